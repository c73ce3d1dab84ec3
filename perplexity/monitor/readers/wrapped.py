"""Console text inside JSON: logs of containers and of hosted notebooks, outputs of a notebook."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..names import Names, looks_like_loss
from .cells import Log
from .console import ConsoleReader
from .delimited import TableReader

TABLE = re.compile(r"(?is)<table.*?</table>")
ROW_END, CELL_END, TAG = (re.compile(p) for p in (r"(?i)</tr>", r"(?i)</t[hd]>", r"<[^>]*>"))


def read_wrapped(path: Path, names: Names) -> Log | None:
    """Return the log of the text in a JSON file, or None where it holds no text of that kind.

    Args:
        path: Objects with a line of text each (``{"stream": "stdout", "data": "step 1 ..."}``), as
            a list or one a line, or a notebook.
        names: What is read.

    Of a notebook, tables of losses count before printed text.
    """
    try:
        record = _json(path.read_text(encoding="utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        return None
    cells = record.get("cells") if isinstance(record, dict) else None
    if not isinstance(cells, list):
        return _console("".join(_lines(record)), names)
    texts, tables = _outputs(cells)
    log = Log()
    for table in tables:
        try:
            TableReader(names, log, str(path)).add(table.encode())
        except InputError:
            continue
    is_read = any(names.reading(name) for table in log.tables for name in table.columns)
    return log if is_read else _console("\n".join(texts), names)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _console(text: str, names: Names) -> Log | None:
    if not text.strip():
        return None
    log = Log()
    ConsoleReader(names, log).add(text.encode())
    return log


def _lines(record: Any) -> Iterator[str]:
    """Yield the texts of the key that speaks of losses most often."""
    rows = record if isinstance(record, list) else []
    texts = [(key, each) for row in rows if isinstance(row, dict) for key, each in row.items()]
    count = Counter(key for key, each in texts if isinstance(each, str) and looks_like_loss(each))
    if not count:
        return
    wanted = count.most_common(1)[0][0]
    for key, each in texts:
        if key == wanted and isinstance(each, str):
            yield each if each.endswith("\n") else f"{each}\n"


def _outputs(cells: list) -> tuple[list[str], list[str]]:
    """Return the printed texts of a notebook, and its HTML tables with tabs between the cells."""
    texts: list[str] = []
    tables: list[str] = []
    for output in (each for cell in cells for each in _list(cell, "outputs")):
        if not isinstance(output, dict):
            continue
        shown = output.get("data")
        data: dict = shown if isinstance(shown, dict) else {}
        texts.append(_joined(output.get("text", data.get("text/plain", ""))))
        for table in TABLE.findall(_joined(data.get("text/html", ""))):
            rows = ROW_END.split(CELL_END.sub("\t", re.sub(r"\s*\n\s*", "", table)))
            plain = [html.unescape(TAG.sub("", row)).rstrip("\t") for row in rows]
            tables.append("".join(f"{row}\n" for row in plain if row.strip()))
    return texts, tables


def _list(cell: Any, name: str) -> list:
    found = cell.get(name) if isinstance(cell, dict) else None
    return found if isinstance(found, list) else []


def _joined(text: Any) -> str:
    parts = text if isinstance(text, list) else [text]
    return "".join(part for part in parts if isinstance(part, str))
