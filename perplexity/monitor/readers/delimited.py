"""Delimited tables: CSV of any delimiter, columns of numbers without a header."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...errors import InputError, check_encoding
from ..names import OF_RUN, SAYS_TRAIN, Names, is_loss
from .cells import RUN_NAMES, Log, Rows, Table, arrow_table, number

BLOCK = 1 << 22  # bytes that are read at a time
LOOKED_AT = 100  # lines among which the header is looked for
LONGEST = 50_000  # characters of a header
LEAST_BARE = 3  # lines of numbers that are a table without a header
DELIMITERS = (",", "\t", ";", "|")
BLANKS = ""  # any white space
KEYS = (
    *("key", "metric", "metric_name", "metricname", "tag", "name", "series", "variable", "measure"),
    "attribute_path",  # Neptune
)
VALUES = ("value", "metric_value", "metricvalue", "scalar", "float_value")
CLOCK = 1e9, 1e14  # seconds or milliseconds since 1970, of this century
PAIR = re.compile(r"\w\)?(?:\s*[:=]\s*|\s+)[-+]?\d+(?:\.\d+|\.?\d*[eE][-+]?\d+)(?=[\s,;|]|$)")
RULE = re.compile(r"[\s|:+=-]+")  # between a head and its rows
VALIDATION = {"val", "valid", "validation", "eval", "evaluation"}
SPLITS = VALIDATION | {"train", "training", "dev", "test"}
EMPTY = ["", "None", "none", "N/A", "n/a", "NA", "null", "No log", "-", "NULL"]


def blocks_of_lines(file: BinaryIO, size: int = BLOCK) -> Iterator[bytes]:
    """Yield a file in blocks of whole lines; the last may have no end.

    Args:
        file: Open for reading bytes.
        size: Bytes a block, about.
    """
    rest = b""
    while piece := file.read(size):
        end = piece.rfind(b"\n") + 1
        if end:
            yield rest + piece[:end]
            rest = piece[end:]
        else:
            rest += piece
    if rest:
        yield rest


class TableReader:
    """Rows of delimited text, block by block; a header that comes again begins new columns.

    Args:
        names: What is read.
        log: Takes the tables and what is left out.
        where: The file, for messages.
        prefix: Before the names, where the file's place says which text it is: "val/".
    """

    def __init__(self, names: Names, log: Log, where: str, prefix: str = "") -> None:
        self.names, self.log, self.where, self.prefix = names, log, where, prefix
        self.header: list[str] | None = None
        self.delimiter = ","
        self.decimal_comma = False
        self.line = 0  # lines read so far
        # Columns of names and of values, where a row holds one measure.
        self.long: tuple[int, int] | None = None

    def add(self, raw: bytes) -> None:
        """Read whole lines.

        Args:
            raw: Ends with a line break.

        Raises:
            InputError: The first lines hold no header and no numbers.
        """
        first = self.line + 1
        if self.header is None:
            raw, first = self._begin(raw)
        self.line = first - 1 + raw.count(b"\n")
        if not raw.strip():
            return
        table = self._at_once(raw, first)
        if table is not None:
            self.log.tables.append(table)
        else:
            self._line_by_line(raw, first)

    def _begin(self, raw: bytes) -> tuple[bytes, int]:
        """Find the header; returns the lines behind it and the number of their first.

        It is the first line of names among which a loss is, else the first line of names.
        """
        place, bare = 0, []
        candidate: tuple[list[str], str, int, int] | None = None
        for count in range(1, LOOKED_AT + 1):
            end = raw.find(b"\n", place) + 1
            if not end:
                break
            line = _text(raw[place:end])
            place = end
            if line and (found := self._header(line)) is not None:
                names, self.delimiter = self._renamed(found[0]), found[1]
                this = names, found[1], end, count
                if self.long or any(is_a_loss(self.names, name) for name in names):
                    candidate = this
                    break
                candidate = candidate or this
            elif line and not line.startswith("#"):
                bare.append((line, count, end))
        if candidate is None:
            return self._bare(raw, bare)
        self.header, self.delimiter, end, count = candidate
        wanted = [name for name in self.header if self.names.reading(name) is not None]
        if twice := sorted({name for name in wanted if self.header.count(name) > 1}):
            raise InputError(
                f"{self.where}: expected one column of a name, got {', '.join(twice)} more than once"
            )
        first = raw[end : end + 4096]
        quoted = self.delimiter == "," and _quoted_commas(first)
        self.decimal_comma = quoted or (self.delimiter != "," and _decimal_commas(first))
        return raw[end:], count + 1

    def is_header(self, line: str) -> bool:
        """Return whether a line is a header.

        Args:
            line: The text.
        """
        found = self._header(line.strip())
        return found is not None and any(self.names.reading(name) for name in found[0])

    def _header(self, line: str) -> tuple[list[str], str] | None:
        """Return a line's names and delimiter, if it is a header: two names or more, one known."""
        text = line.lstrip("# ")
        if len(text) > LONGEST:
            return None
        candidates = []
        for rank, delimiter in enumerate((*DELIMITERS, BLANKS)):
            found = _split(text, delimiter)
            if found is None or len(found) < 2 or any(_is_numeric(name) for name in found):
                continue
            found = [self._name(name) for name in found]
            known = sum(self.names.reading(name) is not None for name in found)
            if delimiter == BLANKS and known < 2:
                continue
            if known or all(re.fullmatch(r"[\w ./:()-]*", name) for name in found):
                candidates.append((known, -rank, found, delimiter))
        if not candidates:
            return self._one_name(text)
        _, _, found, delimiter = max(candidates)
        if len(PAIR.findall(text)) >= 2 and not any(map(self._is_column, found)):
            return None  # a line of names with their numbers
        return found, delimiter

    def _is_column(self, name: str) -> bool:
        """Return whether a name is that of a step or a loss."""
        found = self.names.reading(name)
        return found is not None and (found.measure == "step" or is_loss(found.measure))

    def _renamed(self, header: list[str]) -> list[str]:
        """Return names that say what W&B, TensorBoard and tables of (name, value) put elsewhere.

        W&B's export has columns of runs, ``RUN - NAME``, with ``__MIN`` and ``__MAX`` beside each.
        """
        of_runs = [re.fullmatch(r"(.+?) - (.+?)(__M(?:IN|AX))?", name) for name in header]
        runs = {found[1] for found in of_runs if found and self.names.reading(found[2])}
        made = header
        if runs - SPLITS:
            made = []
            for name, found in zip(header, of_runs, strict=True):
                if found is None or found[1] not in runs or found[3]:
                    made.append(name)
                else:
                    made.append(found[2] if len(runs) == 1 else f"{found[1]}{OF_RUN}{found[2]}")
        lower = [name.lower() for name in made]
        value = next((at for at, name in enumerate(lower) if name in VALUES), None)
        if value is None or any(is_a_loss(self.names, name) for name in made):
            return made
        key = next((at for at, name in enumerate(lower) if name in KEYS and at != value), None)
        if key is not None:
            self.long = key, value
        else:
            made = [*made[:value], series_name(Path(self.where), self.names), *made[value + 1 :]]
        return made

    def _one_name(self, text: str) -> tuple[list[str], str] | None:
        found = _split(text, ",")
        name = self._name(found[0]) if found is not None and len(found) == 1 else ""
        return ([name], ",") if name and is_a_loss(self.names, name) else None

    def _name(self, name: str) -> str:
        name = name.strip().strip("'\"")
        return f"{self.prefix}{name}" if name and self._is_prefixed(name) else name or "unnamed 0"

    def _is_prefixed(self, name: str) -> bool:
        if not self.prefix:
            return False
        plain = self.names.reading(name)
        is_train = plain is not None and plain.measure == "train_loss"
        return is_train and not SAYS_TRAIN.search(name)

    def _bare(self, raw: bytes, bare: list[tuple[str, int, int]]) -> tuple[bytes, int]:
        """Numbers without a header: one column of losses, or a step and losses."""
        for delimiter in (",", "\t", ";", BLANKS):
            rows = [_split(line, delimiter) for line, _, _ in bare]
            width = len(rows[0]) if rows and rows[0] else 0
            good = [
                row is not None and len(row) == width and all(_is_numeric(cell) for cell in row)
                for row in rows
            ]
            if len(rows) < LEAST_BARE or not width or sum(good) < 0.9 * len(good):
                continue
            self.delimiter = delimiter
            numbers = [row for row, is_good in zip(rows, good, strict=True) if is_good and row]
            loss = 1
            if width > 2 and all(CLOCK[0] <= float(row[1]) < CLOCK[1] for row in numbers):
                loss = 2
            if width == 1:
                self.header = ["train_loss"]
            else:
                self.header = ["step", *(f"column {n}" for n in range(2, width + 1))]
                self.header[loss] = "train_loss"
                steps = [
                    float(row[0])
                    for row, is_good in zip(rows, good, strict=True)
                    if is_good and row
                ]
                if any(later < earlier for earlier, later in itertools.pairwise(steps)):
                    break
            if width > 2:
                other = loss + 2 if width > loss + 1 else 2
                self.log.say(
                    f"the table has no header: column 1 is read as the step, column {loss + 1} as the "
                    f"training loss (--tag val_loss='column {other}' reads another)"
                )
            if self.prefix:
                self.header[-1] = f"{self.prefix}loss"
            return raw, 1
        shown = bare[0][0] if bare else ""
        raise InputError(
            f"{self.where}: expected columns step and train_loss or val_loss, got {shown[:200]!r}"
        )

    def _at_once(self, raw: bytes, first: int) -> Table | None:
        """Return what Arrow makes of the lines; None where one of them is no plain row."""
        if self.delimiter == BLANKS or self.decimal_comma or self.header is None or self.long:
            return None
        if raw.find(b'"\n') >= 0 and raw.count(b'"') % 2:
            return None
        try:
            import pyarrow
            from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, read_csv
        except ImportError:
            return None
        header = self.header
        wanted = [name for name in header if self.names.reading(name) is not None]
        runs = [name for name in header if name.lower() in RUN_NAMES]
        others = [name for name in header if name not in wanted]
        if not wanted or len(set(header)) < len(header):
            return None
        try:
            table = read_csv(
                pyarrow.py_buffer(raw),
                read_options=ReadOptions(column_names=header, use_threads=False, block_size=BLOCK),
                parse_options=ParseOptions(delimiter=self.delimiter, ignore_empty_lines=False)
                if len(header) > 1
                else ParseOptions(delimiter=self.delimiter),
                convert_options=ConvertOptions(
                    column_types=dict.fromkeys(wanted, pyarrow.float64())
                    | dict.fromkeys(runs, pyarrow.string()),
                    include_columns=[*wanted, *runs],
                    null_values=EMPTY,
                    strings_can_be_null=False,
                ),
                memory_pool=pyarrow.system_memory_pool(),  # gives memory back, block by block
            )
        except pyarrow.ArrowException:
            return None
        made = arrow_table(table, self.names, first)
        made.seen |= dict.fromkeys(others, True)
        return made

    def _line_by_line(self, raw: bytes, first: int) -> None:
        header = self.header or []
        rows = Rows(self.names)
        for count, line in enumerate(raw.split(b"\n"), first):
            text = _text(line)
            if not text or text.startswith("#") or RULE.fullmatch(text):
                continue
            row = _split(text, self.delimiter)
            if row is None:
                self.log.leave_out(count, f"expected a row, got {text[:60]!r}")
                continue
            if (again := self._again(row)) is not None:
                if again != header and len(rows.lines):
                    self.log.tables.append(rows.table())
                    rows = Rows(self.names)
                self.header = header = again
                continue
            if len(row) > len(header):
                if all(not cell.strip() for cell in row[len(header) :]):
                    row = row[: len(header)]
                else:
                    self.log.leave_out(count, f"expected {len(header)} cells, got {len(row)}")
                    continue
            if self.decimal_comma:
                row = [cell.replace(",", ".") for cell in row]
            record = dict(zip(header, row, strict=False))
            if self.long is not None and len(row) > max(self.long):
                key, value = self.long
                record[row[key].strip()] = row[value]
            rows.add(record, count)
        if len(rows.lines):
            self.log.tables.append(rows.table())

    def _again(self, row: list[str]) -> list[str] | None:
        """Return a row as a header, if it is one: no numbers, and a name of the header among it."""
        if any(_is_numeric(cell) for cell in row):
            return None
        found = [self._name(cell) for cell in row]
        known = [name for name in found if self.names.reading(name) is not None]
        return found if known and set(known) & set(self.header or ()) else None


def is_a_loss(names: Names, name: str) -> bool:
    """Return whether a name is read as a loss.

    Args:
        names: What names mean.
        name: As it was logged.
    """
    found = names.reading(name)
    return found is not None and is_loss(found.measure)


def series_name(path: Path, names: Names) -> str:
    """Return the name of the one series in a file, which its name and place say.

    Args:
        path: ``run-RUN-tag-TAG.csv`` as TensorBoard exports it, else ``train_loss.csv``, say.
        names: What names mean.

    Example:
        >>> from pathlib import Path
        >>> series_name(Path("run-logs_val-tag-loss.csv"), Names())
        'val/loss'
    """
    found = re.fullmatch(r"run-(.*?)-tag-(.*)", path.stem)
    run, tag = (found[1], found[2]) if found else ("", path.stem)
    last = re.split(r"[_.\\/-]", run)[-1]
    if last in SPLITS and names.reading(f"{last}/{tag}") is not None:
        return f"{last}/{tag}"
    return tag if names.reading(tag) is not None or found else "loss"


def prefix_of(path: Path) -> str:
    """Return what a file's name or folder says of its losses: "val/" or "".

    Args:
        path: Of the file.

    Example:
        >>> from pathlib import Path
        >>> prefix_of(Path("metrics/eval/loss.tsv")), prefix_of(Path("val_log.csv"))
        ('val/', 'val/')
    """
    words = set(re.split(r"[\W_]+", path.stem.lower()))
    if words & {"train", "training"}:
        return ""
    words.add(path.absolute().parent.name.lower())
    return "val/" if words & VALIDATION else ""


def _text(line: bytes) -> str:
    # A bar that was drawn over: what stands behind the last return is what was seen.
    return line.decode(errors="replace").strip("\ufeff\r\n ").rpartition("\r")[2]


def _split(line: str, delimiter: str) -> list[str] | None:
    if delimiter == BLANKS:
        return line.split()
    if delimiter == "|":
        line = line.strip().strip("|")
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return None


def _is_numeric(cell: str) -> bool:
    try:
        return number(cell.strip()) is not None
    except ValueError:
        return False


def _decimal_commas(raw: bytes) -> bool:
    return bool(
        re.search(rb"(?:^|[;\t|\n])\s*-?\d+,\d+\s*(?:$|[;\t|\r\n])", raw)
    ) and not re.search(rb"\d\.\d", raw)


def _quoted_commas(raw: bytes) -> bool:
    """Return whether cells such as "2,9061" are decimals: "2,906" alone may be thousands."""
    found = re.findall(rb'"-?\d+,(\d+)"', raw)
    return any(len(part) != 3 for part in found) and not re.search(rb"\d\.\d", raw)


def ends(raw: bytes, delimiter: str = ",") -> bool:
    """Return whether a last line without a line break is whole: as many cells as the line before,
    the last as long as the shortest there.

    Args:
        raw: A file, or its end.
        delimiter: Between the cells.
    """
    lines = [line for line in raw[-65_536:].split(b"\n") if line.strip()][-20:]
    if len(lines) < 3:
        return False
    cut = delimiter.encode() or None
    parts = [line.strip().split(cut) for line in lines]
    *before, last = parts
    alike = [len(each[-1]) for each in before if len(each) == len(last) and each[-1]]
    return len(alike) >= 2 and bool(last[-1]) and len(last[-1]) >= min(alike)


def read_table(path: Path, names: Names, log: Log, prefix: str = "") -> TableReader:
    """Read a file of delimited text.

    Args:
        path: The file.
        names: What is read.
        log: Takes what is found.
        prefix: See ``TableReader``.

    Returns:
        The reader, which can go on with what is added to the file.

    Raises:
        InputError: It is empty, no text, or no table.
    """
    reader = TableReader(names, log, str(path), prefix)
    with path.open("rb") as file:
        for place, raw in enumerate(blocks_of_lines(file)):
            if place == 0:
                if not raw.strip():
                    raise InputError(f"{path}: expected a history, got an empty file")
                check_encoding(str(path), raw)
            if not raw.endswith(b"\n"):
                end = raw.rfind(b"\n") + 1
                if end == 0 and place == 0:
                    raise InputError(f"{path}: expected whole lines, got one that does not end")
                if raw[end:].strip() and not ends(raw, reader.delimiter):
                    log.say("the last line has no end (being written, or cut off) and is left out")
                    raw = raw[:end]
                else:
                    raw += b"\n"
                if not raw.strip():
                    continue
            reader.add(raw)
    if reader.header is not None and not log.tables:  # a header alone: for the names in a message
        empty = dict.fromkeys(reader.header, False)
        log.tables.append(Table({}, empty, np.empty(0, dtype=np.int64)))
    return reader
