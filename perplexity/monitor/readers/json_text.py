"""JSON: lines of objects, lists of objects, log_history, columns as lists, and what is nested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import InputError, check_encoding
from ..names import SAYS_TRAIN, Names
from .cells import Log, Rows, Table, arrow_table
from .delimited import KEYS, SPLITS, VALUES, blocks_of_lines, is_a_loss, prefix_of, series_name

DEEPEST = 200  # brackets in a line that Arrow is given
MOST_DEPTH = 6  # of a file that is searched for rows


class LineReader:
    """Rows of JSON lines, block by block.

    Args:
        names: What is read.
        log: Takes the tables and what is left out.
        prefix: "val/" where the file's name says that its losses are of validation.
    """

    def __init__(self, names: Names, log: Log, prefix: str = "") -> None:
        self.names, self.log, self.prefix = names, log, prefix
        self.line = 0  # lines read so far
        self.objects = 0

    def add(self, raw: bytes) -> None:
        """Read whole lines.

        Args:
            raw: Ends with a line break.
        """
        first = self.line + 1
        self.line += raw.count(b"\n")
        table = json_table(raw)
        if table is not None and self._is_plain(table):
            self.objects += table.num_rows
            self.log.tables.append(arrow_table(table, self.names, first))
            return
        rows = Rows(self.names)
        for count, line in enumerate(raw.split(b"\n"), first):
            if line.strip():
                self._add_line(rows, line, count)
        if len(rows.lines):
            self.log.tables.append(rows.table())

    def _is_plain(self, table) -> bool:
        """Return whether the columns can be taken as Arrow has them."""
        import pyarrow

        names = table.column_names
        return (
            not self.prefix
            and len(set(names)) == len(names)
            and not any(name.lower() in (*KEYS, *VALUES) for name in names)
            and not any(
                pyarrow.types.is_list(each.type) and self.names.reading(each.name)
                for each in table.schema
            )
        )

    def _add_line(self, rows: Rows, line: bytes, count: int) -> None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return self.log.leave_out(count, f"expected a JSON object, got broken JSON ({error})")
        if not isinstance(record, dict):
            shown = line[:60].decode(errors="replace")
            return self.log.leave_out(count, f"expected a JSON object, got {shown!r}")
        self.objects += 1
        rows.add(one_record(record, self.names, self.prefix), count)


def one_record(record: dict[str, Any], names: Names, prefix: str = "") -> dict[str, Any]:
    """Return a record under names that say what they are.

    Args:
        record: As it was logged; of a name and a value, as MLflow writes, it is {name: value}.
        names: What names mean.
        prefix: "val/" before a plain loss, unless a validation loss stands beside.

    Example:
        >>> one_record({"key": "val_loss", "value": 3.0, "step": 5}, Names())
        {'key': 'val_loss', 'value': 3.0, 'step': 5, 'val_loss': 3.0}
    """
    lower = {name.lower(): name for name in record}
    value = next((lower[name] for name in VALUES if name in lower), None)
    if value is not None:
        key = next((lower[name] for name in KEYS if name in lower), None)
        if key is not None and isinstance(record[key], str):
            return record | {record[key]: record[value]}
    if not prefix:
        return record
    losses = {name: names.reading(name) for name in record}
    measures = {found.measure for found in losses.values() if found is not None}
    if "val_loss" in measures:
        return record
    plain = [
        n
        for n, found in losses.items()
        if found and found.measure == "train_loss" and not SAYS_TRAIN.search(n)
    ]
    return {(f"{prefix}{n}" if n in plain else n): v for n, v in record.items()}


def json_table(raw: bytes):
    """Return what Arrow makes of JSON lines at once, ten times faster than line by line; None where
    Arrow refuses them.

    Args:
        raw: Whole lines.
    """
    try:
        import pyarrow.json
    except ImportError:
        return None
    if not is_for_arrow(raw):
        return None
    try:
        return pyarrow.json.read_json(
            pyarrow.py_buffer(raw),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=max(len(raw), 1)),
            memory_pool=pyarrow.system_memory_pool(),
        )
    except pyarrow.ArrowException:
        return None


def is_for_arrow(raw: bytes) -> bool:
    """Return whether Arrow can be given the lines: objects that are not nested deeper than
    ``DEEPEST``, one a line.

    Args:
        raw: Whole lines.

    A null before the first object, and a hundred thousand brackets in a line, end the process in
    Arrow 26, without an error.
    """
    lines = raw.strip()
    if lines.count(b"\n{") + lines.startswith(b"{") != lines.count(b"\n") + 1:
        return False
    if lines.count(b"[") + lines.count(b"{") <= lines.count(b"\n") + DEEPEST:
        return True
    return all(line.count(b"[") + line.count(b"{") <= DEEPEST for line in lines.split(b"\n"))


def read_json_lines(path: Path, names: Names, log: Log) -> LineReader:
    """Read a file of JSON lines.

    Args:
        path: The file.
        names: What is read.
        log: Takes what is found.

    Returns:
        The reader, which can go on with what is added to the file.

    Raises:
        InputError: It is empty, no text, or half of it is no JSON object.
    """
    reader = LineReader(names, log, prefix_of(path))
    with path.open("rb") as file:
        for place, raw in enumerate(blocks_of_lines(file)):
            if place == 0:
                if not raw.strip():
                    raise InputError(f"{path}: expected a history, got an empty file")
                check_encoding(str(path), raw)
            end = raw.rfind(b"\n") + 1
            if rest := raw[end:].strip():
                if _is_object(rest):
                    raw += b"\n"
                else:
                    if end == 0 and place == 0:
                        raise InputError(f"{path}: expected whole lines, got one that does not end")
                    log.say("the last line has no end (being written, or cut off) and is left out")
                    raw = raw[:end]
            reader.add(raw)
    if log.broken and log.broken_count >= reader.objects:
        line, why = log.broken[0]
        raise InputError(f"{path}, line {line}: {why}")
    return reader


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False


def read_json(path: Path, names: Names, log: Log) -> dict[str, Log]:
    """Read a JSON file: its rows wherever they are.

    Args:
        path: The file.
        names: What is read.
        log: Takes what is found where that is one run.

    Returns:
        Each run's log by its name.

    Raises:
        InputError: It is no JSON, holds no rows, or is a result of another command.
    """
    from ...json_files import described_result

    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON with a training history, got ({error!r:.80})")
    found = described_result(record) if isinstance(record, dict) else None
    if found is not None:
        raise InputError(f"{path}: expected JSON with a training history, got {found}")
    log.where = "row"
    tables = _tables(record, names, path, "", 0)
    if not tables:
        got = (
            f"an object of {', '.join(map(str, record))[:80]}"
            if isinstance(record, dict) and record
            else f"{record!r:.60}"
        )
        raise InputError(
            f"{path}: expected rows, a log_history or lists of losses (as trainer_state.json has), got {got}"
        )
    named = {name for name, _ in tables}
    if len(named) > 1 and not named & SPLITS:
        logs: dict[str, Log] = {}
        for name, table in tables:
            logs.setdefault(name, Log(where="row")).tables.append(table)
        return logs
    log.tables = [table for _, table in tables]
    return {"": log}


def _tables(value: Any, names: Names, path: Path, name: str, depth: int) -> list[tuple[str, Table]]:
    """Return the tables below a value with the key that holds each."""
    if depth > MOST_DEPTH:
        return []
    if isinstance(value, list):
        return _listed(value, names, path, name)
    if not isinstance(value, dict):
        return []
    if (columns := _columns(value, names, name)) is not None:
        return [(name, columns)]
    if (series := _series(value, names, name)) is not None:
        return [("", series)]
    if isinstance(rows := value.get("log_history"), list):  # transformers: the rest is settings
        return _listed(rows, names, path, name)
    return [
        found
        for key, each in value.items()
        if isinstance(each, (dict, list))
        for found in _tables(
            each, names, path, key if depth == 0 or key in SPLITS else name, depth + 1
        )
    ]


def _listed(value: list, names: Names, path: Path, name: str) -> list[tuple[str, Table]]:
    prefix = f"{name}/" if name in SPLITS else prefix_of(path)
    rows = Rows(names)
    for count, each in enumerate(value, 1):
        if isinstance(each, dict) and (points := _points(each)):
            for point in points:
                rows.add({"step": point[0], str(each.get("name", name)): point[1]}, count)
        elif isinstance(each, dict):
            rows.add(one_record(each, names, "" if prefix == "train/" else prefix), count)
        elif (
            isinstance(each, list) and len(each) == 3
        ):  # TensorBoard's export: wall time, step, value
            rows.add({"step": each[1], series_name(path, names): each[2]}, count)
        elif isinstance(each, list):
            return [] if count == 1 else [(name, rows.table())]
    if rows.lines:
        return [(name, rows.table())]
    if len(value) > 1 and all(isinstance(each, (int, float)) for each in value):
        wanted = f"{name}/loss" if name in SPLITS else name or series_name(path, names)
        for place, each in enumerate(value):
            rows.add({wanted: each}, place + 1)
        return [(name, rows.table())]
    return []


def _points(value: dict) -> list[tuple]:
    """Return the (step, value) of a series that is drawn: lists ``x`` and ``y`` of numbers."""
    x, y = value.get("x"), value.get("y")
    if not (isinstance(x, list) and isinstance(y, list) and len(x) == len(y)):
        return []
    is_drawn = all(isinstance(each, (int, float)) for each in x)
    return list(zip(x, y, strict=True)) if is_drawn else []


def _series(value: dict, names: Names, name: str) -> Table | None:
    """Return the table of the series below a value, as ClearML exports them: key to x and y."""
    found = {key: _points(each) for key, each in value.items() if isinstance(each, dict)}
    if not any(found.values()):
        return None
    rows = Rows(names)
    for key, points in found.items():
        wanted = (f"{name}/{key}", key, str(value[key].get("name", key)))
        series = next((each for each in wanted if names.reading(each) is not None), wanted[0])
        for step, each in points:
            rows.add({"step": step, series: each}, 1)
    return rows.table()


def _columns(value: dict, names: Names, name: str) -> Table | None:
    """Return a table of columns: lists (Keras' history), or objects by row (pandas), of numbers."""
    lists = {}
    for key, each in value.items():
        if isinstance(each, dict) and each and all(str(k).isdigit() for k in each):
            each = list(each.values())
        if (
            isinstance(each, list)
            and len(each) > 1
            and not any(isinstance(e, (dict, list)) for e in each)
        ):
            lists[f"{name}/{key}" if name in SPLITS else str(key)] = each
    if not any(is_a_loss(names, key) for key in lists):
        return None
    rows = Rows(names)
    for row in range(max(map(len, lists.values()))):
        rows.add({key: each[row] for key, each in lists.items() if row < len(each)}, row + 1)
    return rows.table()
