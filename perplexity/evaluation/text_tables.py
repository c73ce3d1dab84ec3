"""Tables and notes as lines of plain text, for ``print``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 80  # columns of plain text
GAP = "  "  # between its columns
LEAST = 24  # columns that the last column of plain text has at least


def plain_table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], width: int = WIDTH
) -> str:
    """Return a table as lines of text, for ``print`` and logs.

    Args:
        title: the first line; None for none.
        columns: names of the columns. All but the first and the last are aligned to the right.
        rows: a cell for each column. The last cell is wrapped, with ``LEAST`` columns at least.
        width: columns of the text; default 80.

    Example:
        >>> print(plain_table("2 tokens", ("measure", "value", "unit"), [("loss", "1.5", "nats")]))
        2 tokens
        measure  value  unit
        loss       1.5  nats
    """
    cells = [list(columns), *(list(row) for row in rows)]
    sizes = [max(len(row[place]) for row in cells) for place in range(len(columns) - 1)]
    left = sum(sizes) + len(GAP) * len(sizes)
    lines = [] if title is None else [title]
    for row in cells:
        padded = [
            cell.ljust(size) if place == 0 else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(row, sizes, strict=False))
        ]
        last = _wrapped(row[-1], max(width - left, LEAST)) or [""]
        lines.append(GAP.join([*padded, last[0]]).rstrip())
        lines += [" " * left + line for line in last[1:]]
    return "\n".join(lines)


def with_notes(table: str, notes: Iterable[str], width: int = WIDTH) -> str:
    """Return a table of plain text with each note below it.

    Args:
        table: the lines of the table.
        notes: the notes; a warning says so itself.
        width: columns that notes are wrapped to; default 80.

    Example:
        >>> print(with_notes("a  1", ["few", "warning: none"]))
        a  1
        note: few
        warning: none
    """
    return "\n".join([table, *(line for note in notes for line in _wrapped(noted(note), width))])


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


def noted(note: str) -> str:
    """Return a note as it is printed: a warning says so itself.

    Example:
        >>> noted("one document"), noted("warning: no document")
        ('note: one document', 'warning: no document')
    """
    return note if note.startswith("warning: ") else f"note: {note}"
