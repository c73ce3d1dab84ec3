"""Messages count in the singular where there is one thing."""

import ast
import re
from pathlib import Path

import perplexity

ROOT = Path(perplexity.__file__).parent
NOUNS = "documents?|texts|prompts|tokens are|tokens have"


def test_no_message_has_a_bare_count_before_a_plural():
    """ "got 1 documents with none": a count before these nouns goes through ``counted``."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            for value, after in zip(node.values, node.values[1:], strict=False):
                if not isinstance(value, ast.FormattedValue) or not isinstance(after, ast.Constant):
                    continue
                if re.match(rf" (validation )?({NOUNS})\b", after.value):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
