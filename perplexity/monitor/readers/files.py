"""What a file is, by its content and its name, and the reader for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from ...errors import InputError, check_encoding
from ..names import OF_RUN, Names, is_bare_perplexity, is_loss
from .cells import Cells, Log, Rows, Table
from .console import read_console
from .delimited import prefix_of, read_table
from .json_text import read_json, read_json_lines
from .stores import read_parquet, read_sqlite
from .tensorboard import read_tensorboard
from .wandb_log import read_wandb
from .wrapped import read_wrapped

OWN = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")  # whose first reader says what is wrong
HEAD = 65_536  # bytes by which a file is known
MLFLOW_LINE = re.compile(rb"\d{10,16} \S+(?: \d+)?\s*\n")  # time in ms, value, step
EVENT = b"brain.Event:"  # in the first record of a TensorBoard file


def read_file(path: Path, names: Names, patterns: tuple[str, ...] = ()) -> dict[str, Log]:
    """Read a file of any kind.

    Args:
        path: The file.
        names: What is read.
        patterns: The user's own for console text.

    Returns:
        Each run's log by its name; {"": log} of a file that names no run.

    Raises:
        InputError: It is empty, or no reader makes anything of it.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"SQLite format 3\0"):
        return read_sqlite(path, names)
    if head.startswith(b"PAR1"):
        log = Log()
        read_parquet(path, names, log)
        return by_run({"": log})
    if head.startswith(b":W&B") or path.suffix == ".wandb":
        return {"": read_wandb(path, names)[1]}
    if ".tfevents." in path.name or EVENT in head[:64]:
        return read_tensorboard(path, names)
    if not head.strip():
        raise InputError(f"{path}: expected a history, got an empty file")
    check_encoding(str(path), head)
    return by_run(_read_text(path, head, names, patterns))


def _read_text(path: Path, head: bytes, names: Names, patterns: tuple[str, ...]) -> dict[str, Log]:
    if patterns:
        log = Log()
        read_console(path, names, log, patterns)
        return {"": log}
    first: InputError | None = None
    nothing: dict[str, Log] | None = None
    for reader in readers_of(path, head):
        try:
            logs = reader(path, names)
        except InputError as error:
            first = first or error
            if reader in (_json, _lines) and _is_certain(path, head):
                raise
            continue
        if any(has_loss(log, names) for log in logs.values()):
            return logs
        if nothing is None and any(log.tables for log in logs.values()):
            nothing = logs
        if reader in (_json, _lines):
            break
    if head.lstrip()[:1] in (b"{", b"["):
        wrapped = read_wrapped(path, names)
        if wrapped is not None and has_loss(wrapped, names):
            return {"": wrapped}
    if nothing is not None and (first is None or any(has_names(log) for log in nothing.values())):
        return nothing
    if first is not None and path.suffix.lower() in OWN:
        raise first
    raise InputError(
        f"{path}: expected a training history, got text without a loss that a known name or pattern "
        "finds; --pattern says how a line holds a step and a loss"
    )


def readers_of(path: Path, head: bytes) -> list[Callable[[Path, Names], dict[str, Log]]]:
    """Return the readers to try, the likeliest first.

    Args:
        path: The file; its ending counts where it says what the file is.
        head: Its first bytes.

    Example:
        >>> [reader.__name__ for reader in readers_of(Path("a.log"), b"step 1 loss 2.0\\n")]
        ['_table', '_console']
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return [_lines]
    if MLFLOW_LINE.match(head) and suffix in ("", path.suffix):
        return [_mlflow_metric, _table, _console]
    if suffix == ".json":
        return [_json, _lines, _console]
    if suffix in (".csv", ".tsv"):
        first = {b"{": [_lines], b"[": [_json]}.get(text[:1], [])
        return [_table, *first, _console]
    if text[:1] == b"{":
        whole = _first_line_is_object(text)
        return [_lines, _console] if whole else [_json, _console]
    if text[:1] == b"[" and re.match(rb"\[\s*[\[{\d\]-]", text):
        return [_json, _table, _console]
    return [_table, _console]


def _first_line_is_object(text: bytes) -> bool:
    line, end, rest = text.partition(b"\n")
    if not end or not rest.strip():
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_certain(path: Path, head: bytes) -> bool:
    """Return whether no other reader may try: the name says what it is, and it is JSON."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def _table(path: Path, names: Names) -> dict[str, Log]:
    log = Log()
    read_table(path, names, log, prefix_of(path))
    return {"": log}


def _console(path: Path, names: Names) -> dict[str, Log]:
    log = Log()
    read_console(path, names, log)
    return {"": log}


def _lines(path: Path, names: Names) -> dict[str, Log]:
    log = Log()
    read_json_lines(path, names, log)
    return {"": log}


def _json(path: Path, names: Names) -> dict[str, Log]:
    return read_json(path, names, Log())


def _mlflow_metric(path: Path, names: Names) -> dict[str, Log]:
    log = Log()
    log.tables.append(mlflow_metric(path, path.name, names))
    return {"": log}


def mlflow_metric(path: Path, name: str, names: Names) -> Table:
    """Return the rows of one of MLflow's metric files: time in ms, value and step.

    Args:
        path: The file.
        name: The metric's: the file's place below ``metrics``.
        names: What is read.
    """
    found = []
    for count, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        parts = line.split()
        if len(parts) in (2, 3) and parts[0].isdigit():
            found.append((int(parts[0]), count, parts))
    rows = Rows(names)
    for _, count, parts in sorted(found, key=lambda each: each[0]):
        rows.add({"step": parts[2] if len(parts) == 3 else None, name: parts[1]}, count)
    return rows.table()


def has_loss(log: Log, names: Names) -> bool:
    """Return whether a log holds a loss.

    Args:
        log: What was read.
        names: What names mean.
    """
    return any(
        column.known.any()
        and (found := names.reading(name)) is not None
        and is_loss(found.measure)
        and not is_bare_perplexity(found, name)
        for table in log.tables
        for name, column in table.columns.items()
    )


def has_names(log: Log) -> bool:
    """Return whether a log has a name in it.

    Args:
        log: What was read.
    """
    return any(table.seen for table in log.tables)


def by_run(logs: dict[str, Log]) -> dict[str, Log]:
    """Return logs with each run that a column names, or that columns are of, apart.

    Args:
        logs: As they were read.
    """
    made: dict[str, Log] = {}
    for title, log in logs.items():
        runs: dict[str, None] = {}
        for table in log.tables:
            runs |= dict.fromkeys(
                name.partition(OF_RUN)[0] for name in table.columns if OF_RUN in name
            )
            if table.runs is not None:
                runs |= dict.fromkeys(table.runs.tolist())
        if not runs:
            made[title] = log
        for run in runs:
            tables = [part for table in log.tables if (part := _part(table, run)) is not None]
            made[run] = Log(tables, list(log.notes), list(log.broken), log.broken_count, log.where)
    return made


def _part(table: Table, run: str) -> Table | None:
    columns = {
        name.rpartition(OF_RUN)[2]: column
        for name, column in table.columns.items()
        if OF_RUN not in name or name.partition(OF_RUN)[0] == run
    }
    seen = {
        name.rpartition(OF_RUN)[2]: numeric
        for name, numeric in table.seen.items()
        if OF_RUN not in name or name.partition(OF_RUN)[0] == run
    }
    if table.runs is None:
        return Table(dict(columns), seen, table.lines)
    rows = table.runs == run
    if not rows.any():
        return None
    return Table(
        {name: Cells(each.values[rows], each.known[rows]) for name, each in columns.items()},
        seen,
        table.lines[rows],
    )
