"""Cells of a log as numbers, and the tables that they stand in.

A cell is a number, no measurement (empty, None, N/A, "No log"), or something else, which costs the
cell alone: it is counted, and the first is kept with its line for a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..names import NO_MEASUREMENT, Names

SUMMARY = "train_runtime"  # in the last row that transformers logs: means over the whole run
# Columns that say which run a row is of; the first here that is there counts.
RUN_NAMES = ("run_name", "run", "run name", "run_id", "run_uuid", "run id", "experiment_name")
SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_SUFFIXED = re.compile(r"([-+]?\d+(?:\.\d+)?)\s*([kKmMbBgGtT])")
_OF_ALL = re.compile(r"(\d+)\s*/\s*\d+")
_CLOCK = re.compile(r"(?:(\d+) days?, *)?(\d+):(\d\d)(?::(\d\d(?:\.\d+)?))?")
_SPOKEN = re.compile(
    r"(?:(\d+)\s*d)?\s*(?:(\d+)\s*h)?\s*(?:(\d+)\s*m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)\s*s)?"
)
_TENSOR = re.compile(
    r"(?:tensor|array|Array|np\.float\d+)\(\[?\s*([-+.\w]+)\s*\]?[,)].*|\[\s*([-+.\w]+)\s*\]"
)


def number(value: object) -> float | None:
    """Return a cell as a number, or None where it is no measurement.

    Args:
        value: A number, or text: ``3.2``, ``nan``, ``5,000``, ``1.2B``, ``10/6000`` (10),
            ``0:01:02`` and ``1m 2s`` (62), ``tensor(3.2, device='cuda:0')``.

    Returns:
        The number; None for an empty cell, ``None``, ``N/A``, ``No log`` and the like.

    Raises:
        ValueError: It is something else.

    Example:
        >>> number("1.2B"), number("0:01:02"), number("No log")
        (1200000000.0, 62.0, None)
    """
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(value)
    if not isinstance(value, str) or len(value) > 200:
        raise ValueError(value)
    text = value.strip()
    if text.lower() in NO_MEASUREMENT:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    if _GROUPED.fullmatch(text):
        return float(text.replace(",", ""))
    if found := _SUFFIXED.fullmatch(text):
        return float(found[1]) * SUFFIXES[found[2].lower()]
    if found := _OF_ALL.fullmatch(text):
        return float(found[1])
    if found := _CLOCK.fullmatch(text):
        days, first, second, third = (float(part or 0) for part in found.groups())
        if found[4] is None:
            return 60 * first + second
        return 86_400 * days + 3600 * first + 60 * second + third
    if (found := _TENSOR.fullmatch(text)) is not None:
        return float(found[1] or found[2])
    if (found := _SPOKEN.fullmatch(text)) is not None:
        days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
        return 86_400 * days + 3600 * hours + 60 * minutes + seconds
    raise ValueError(value)


@dataclass
class Cells:
    """A column's numbers.

    values: (rows,) float64, NaN where there is none. known: (rows,) whether there is one, which may
    be NaN. strange: how many cells are something else; first: the row and the text of the first.
    """

    values: np.ndarray
    known: np.ndarray
    strange: int = 0
    first: tuple[int, str] | None = None


def cells(values: Sequence[Any]) -> Cells:
    """Return raw values as a column.

    Args:
        values: Numbers, texts and None.

    Example:
        >>> column = cells([3, "N/A", "x"])
        >>> column.known.tolist(), column.first
        ([True, False, False], (2, "'x'"))
    """
    found = np.full(len(values), math.nan)
    known = np.zeros(len(values), bool)
    column = Cells(found, known)
    for row, value in enumerate(values):
        if value is None or value == "":
            continue
        try:
            read = value if type(value) is float else number(value)
        except ValueError:
            column.strange += 1
            column.first = column.first or (row, f"{value!r:.60}")
            continue
        if read is not None:
            found[row], known[row] = read, True
    return column


@dataclass
class Table:
    """Rows of a log under the names that they were logged by.

    columns: of the names that may be a measure. seen: every name, and whether it holds a number.
    lines: the line (or row) of the file that a row came from. runs: (rows,) the run that a row
    names as its own, where there is such a column.
    """

    columns: dict[str, Cells]
    seen: dict[str, bool]
    lines: np.ndarray
    runs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lines)


@dataclass
class Log:
    """Everything of one run that a reader found: its tables, and what had to be left out.

    where: what a row's number counts, "line" or "row". strict: text that is no row is broken, not
    a line of something else.
    """

    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)
    broken_count: int = 0
    where: str = "line"

    def say(self, note: str) -> None:
        """Add a note once."""
        if note not in self.notes:
            self.notes.append(note)

    def leave_out(self, line: int, why: str) -> None:
        """Count a line that could not be read.

        Args:
            line: Its number, from 1.
            why: "expected ..., got ...".
        """
        self.broken_count += 1
        if len(self.broken) < 3:
            self.broken.append((line, why))


class Rows:
    """Records that become a table.

    Example:
        >>> rows = Rows(Names())
        >>> rows.add({"step": 1, "loss": 3.0, "note": "a word"}, 1)
        >>> sorted(rows.table().columns)
        ['loss', 'step']
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self.columns: dict[str, list] = {}
        self.seen: dict[str, bool] = {}
        self.lines: list[int] = []
        self.runs: dict[str, dict[int, str]] = {}

    def add(self, record: dict[str, Any], line: int) -> None:
        """Add a record; records in it are flattened, with / between the names.

        Args:
            record: Name to value.
            line: Its line or row in the file, from 1.
        """
        row = len(self.lines)
        self.lines.append(line)
        self._put(record, row, "", 0)

    def _put(self, record: dict[str, Any], row: int, before: str, depth: int) -> None:
        for name, value in record.items():
            name = f"{before}{name}"
            if isinstance(value, dict):
                if depth < 4:
                    self._put(value, row, f"{name}/", depth + 1)
                continue
            column = self.columns.get(name)
            if column is None:
                if self.names.reading(name) is None and name != SUMMARY:
                    if name.lower() in RUN_NAMES and isinstance(value, (str, int)):
                        self.runs.setdefault(name.lower(), {})[row] = str(value)
                    if not self.seen.get(name):
                        self.seen[name] = isinstance(value, (int, float)) or _is_number(value)
                    continue
                column = self.columns[name] = []
            if len(column) < row:
                column.extend([None] * (row - len(column)))
            if len(column) == row:
                column.append(value)

    def table(self) -> Table:
        """Return the records as a table."""
        count = len(self.lines)
        made = {}
        for name, values in self.columns.items():
            values.extend([None] * (count - len(values)))
            made[name] = cells(values)
        seen = self.seen | {name: bool(column.known.any()) for name, column in made.items()}
        runs = None
        for name in RUN_NAMES:
            if len(set(self.runs.get(name, {}).values())) > 1:
                of = self.runs[name]
                runs = np.array([of.get(row, "") for row in range(count)], dtype=object)
                break
        return Table(made, seen, np.array(self.lines, dtype=np.int64), runs)


def _is_number(value: object) -> bool:
    try:
        return number(value) is not None
    except ValueError:
        return False


def _arrow_numbers(column) -> Cells:
    """Return an Arrow column of float64; its buffers are read here, because ``to_numpy`` imports
    pandas where it is installed.
    """
    count = len(column)
    values, known = np.full(count, math.nan), np.ones(count, bool)
    place = 0
    for chunk in column.chunks:
        rows = slice(place, place + len(chunk))
        valid, data = chunk.buffers()
        begin, end = chunk.offset, chunk.offset + len(chunk)
        if data is not None and len(chunk):
            values[rows] = np.frombuffer(data, np.float64)[begin:end]
        if valid is not None and chunk.null_count:
            bits = np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")
            known[rows] = bits[begin:end].astype(bool)
        place += len(chunk)
    values[~known] = math.nan
    return Cells(values, known)


def arrow_table(table, names: Names, first_line: int, lines: np.ndarray | None = None) -> Table:
    """Return an Arrow table's columns that may be measures.

    Args:
        table: Arrow's; structs are flattened, with / between the names.
        names: Which columns those are.
        first_line: The line or row of the file that its first row came from.
        lines: (rows,) of each row instead, where they do not follow each other.
    """
    import pyarrow

    for _ in range(4):
        structs = {f.name for f in table.schema if pyarrow.types.is_struct(f.type)}
        if not structs:
            break
        before = table.column_names
        table = table.flatten()
        after = [
            f"{name.split('.', 1)[0]}/{name.split('.', 1)[1]}"
            if name not in before and name.split(".", 1)[0] in structs
            else name
            for name in table.column_names
        ]
        table = table.rename_columns(after)
    columns: dict[str, Cells] = {}
    seen: dict[str, bool] = {}
    runs, rank = None, len(RUN_NAMES)
    for place, each in enumerate(table.schema):
        name, kind, column = each.name, each.type, table.column(place)
        if name.lower() in RUN_NAMES[:rank] and pyarrow.types.is_string(kind):
            coded = column.combine_chunks().dictionary_encode()
            if len(coded.dictionary) > 1 and not coded.indices.null_count:
                of = np.array(coded.dictionary.to_pylist(), dtype=object)
                runs, rank = (
                    of[np.array(coded.indices.to_pylist(), dtype=np.int64)],
                    RUN_NAMES.index(name.lower()),
                )
            continue
        numeric = (
            pyarrow.types.is_integer(kind)
            or pyarrow.types.is_floating(kind)
            or pyarrow.types.is_decimal(kind)
        )
        seen[name] = seen.get(name, False) or numeric
        if name in columns or (names.reading(name) is None and name != SUMMARY):
            continue
        if numeric:
            columns[name] = _arrow_numbers(column.cast(pyarrow.float64(), safe=False))
        elif not pyarrow.types.is_null(kind):
            columns[name] = cells(column.to_pylist())
        if name in columns:
            seen[name] = bool(columns[name].known.any())
    rows = table.num_rows
    lines = np.arange(first_line, first_line + rows) if lines is None else lines
    return Table(columns, seen, lines, runs)
