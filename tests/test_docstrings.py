"""Docstrings: examples that run, and the parts that every public function's docstring has."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import perplexity

ROOT = Path(perplexity.__file__).parents[1]
# Summaries that begin with one of these say what a function is about, not what it does.
NO_VERBS = {
    *("a", "an", "as", "by", "each", "every", "for", "from", "how", "in", "of", "on", "one"),
    *("that", "the", "this", "to", "what", "when", "where", "whether", "which", "whose", "with"),
}
# Verbs in the imperative that end as a third person, a noun or an adverb does.
VERBS = {"compress", "cross", "discuss", "pass", "process"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("perplexity", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(path for room in ("perplexity", "kernels") for path in (ROOT / room).rglob("*.py"))
EXAMPLES = [module_name(file) for file in FILES if ">>> " in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("perplexity", "kernels", ""):
            raise
        pytest.skip(f"{name} needs {error.name}")
    # By the source: doctest's own search does not see functions that are registered as operators.
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node) or ""
        label = f"{name}.{getattr(node, 'name', '')}"
        runner.run(parser.get_doctest(text, dict(vars(module)), label, module.__file__, 0))
    assert runner.tries > 0 and runner.failures == 0


def exports() -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Return the definition of every export, and of every public function of the operators."""
    found = {}
    for name, module in perplexity._MODULES.items():
        value = getattr(importlib.import_module(f"perplexity.{module}"), name)
        found[name] = definition(Path(inspect.getsourcefile(inspect.unwrap(value))), name)
    operators = importlib.import_module("perplexity.kernels.operators")
    files = sorted((ROOT / "kernels" / "operators").glob("_[a-z]*.py"))
    for name in operators.__all__:
        (found[f"operators.{name}"],) = [
            node for file in files if (node := definition(file, name)) is not None
        ]
    return found


def definition(file: Path, name: str) -> ast.FunctionDef | ast.ClassDef | None:
    """Return the last definition of ``name`` at the top of a file: overloads come before it."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    named = [node for node in body if getattr(node, "name", None) == name]
    return named[-1] if named else None


def documented() -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Return ``exports`` with the public methods of classes, by ``Class.method``."""
    every = exports()
    for name, node in list(every.items()):
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                every[f"{name}.{method.name}"] = method
    return every


DOCUMENTED = documented()


def section(text: str, title: str) -> str | None:
    match = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    return match[1] if match else None


def parameters(function: ast.FunctionDef) -> list[str]:
    every = function.args
    names = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]
    return [one.arg for one in names if one is not None and one.arg not in ("self", "cls", "_")]


def returns(function: ast.FunctionDef) -> bool:
    """Return whether a function gives a value: a property's is described by its summary."""
    if any(isinstance(one, ast.Name) and one.id == "property" for one in function.decorator_list):
        return False
    return any(
        isinstance(node, ast.Return) and node.value is not None for node in ast.walk(function)
    )


def raises(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Return whether a body has a ``raise`` of its own or calls a check of an argument."""
    return any(
        isinstance(part, ast.Raise)
        or (
            isinstance(part, ast.Call)
            and re.match(r"(checks\.|check_|shard\.check)", ast.unparse(part.func))
        )
        for part in ast.walk(node)
    )


def test_every_export_is_looked_at():
    names = {name.split(".")[0] for name in DOCUMENTED} - {"operators"}
    assert names == set(perplexity.__all__)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_docstrings_have_their_parts(name):
    node = DOCUMENTED[name]
    text = ast.get_docstring(node)
    assert text, f"{name} has no docstring"
    summary = text.split("\n\n")[0]
    assert "\n" not in summary, f"{name}: the summary has more than one line"
    assert summary.endswith("."), f"{name}: the summary is no sentence"
    owner = ast.get_docstring(DOCUMENTED[name.rsplit(".", 1)[0]]) if is_method(name) else ""
    if isinstance(node, ast.ClassDef):
        wanted = constructor_parameters(node)
    else:
        wanted = parameters(node)
        verb = re.match(r"\w*", summary)[0].lower()
        assert verb not in NO_VERBS and (not verb.endswith("s") or verb in VERBS) and verb, summary
    described = section(text, "Args") or ""
    missing = [one for one in wanted if not re.search(rf"^    .*\b{one}\b.*?:", described, re.M)]
    assert not missing, f"{name}: Args lack {missing}"
    if isinstance(node, ast.FunctionDef):
        assert not returns(node) or section(text, "Returns"), f"{name}: no Returns"
        assert not raises(node) or section(text, "Raises"), f"{name}: no Raises"
    shown = ">>> " in text or re.search(rf">>>.*\b{node.name}\b", owner)
    assert shown, f"{name}: no example, nor one of its class"


def is_method(name: str) -> bool:
    return name.count(".") > name.startswith("operators.")


def constructor_parameters(node: ast.ClassDef) -> list[str]:
    """Return what a class is called with: of ``__init__``, or the fields of a dataclass."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return parameters(part)
    fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
    return [field.id for field in fields if isinstance(field, ast.Name)]
