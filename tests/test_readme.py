"""README's table of features: every cell of ours names a test that exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_cell_of_the_feature_table_names_a_test():
    text = (ROOT / "README.md").read_text()
    rows = (
        text.split("### What the others have")[1]
        .split("\n## ")[0]
        .split("| --- |")[-1]
        .splitlines()[1:]
    )
    rows = [row for row in rows if row.startswith("|")]
    assert len(rows) >= 25
    for row in rows:
        link = re.search(r'\]\(([\w/.-]+)(?: "(\w+)")?\)', row.split("|")[2])
        assert link, row
        source = (ROOT / link[1]).read_text()
        assert link[2] is None or f"def {link[2]}(" in source, row
        assert link[2] or not link[1].endswith(".py"), row
