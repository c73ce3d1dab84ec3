"""SQLite files of MLflow and trackio, and Parquet."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np

from ...errors import InputError, first_line, theirs
from ..names import Names
from .cells import RUN_NAMES, SUMMARY, Log, Rows, Table, arrow_table

MOST_ROWS = 65_536  # of a Parquet file that are read at a time


def read_sqlite(path: Path, names: Names) -> dict[str, Log]:
    """Read the runs of an MLflow or trackio file.

    Args:
        path: The file; it is opened for reading only.
        names: What is read.

    Returns:
        Each run's log by its name.

    Raises:
        InputError: It is no SQLite file, or has no table of metrics.
    """
    logs: dict[str, Log] = {}
    try:
        address = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as base:
            tables = {
                name: [row[1] for row in base.execute(f'PRAGMA table_info("{_quoted(name)}")')]
                for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
            columns = set(tables.get("metrics", ()))
            if {"key", "value", "step"} <= columns:
                _read_mlflow(base, tables, names, logs)
            elif {"metrics", "step"} <= columns:
                _read_trackio(base, columns, names, logs)
            else:
                _read_any(base, tables, names, logs)
    except (sqlite3.Error, ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected an SQLite file that can be read ({first_line(error)})")
    if not logs:
        listed = ", ".join(tables)[:200] or "none"
        raise InputError(
            f"{path}: expected a table of metrics, as MLflow and trackio write, got tables: {listed}"
        )
    return logs


def _quoted(name: str) -> str:
    return name.replace('"', '""')


def _read_mlflow(
    base: sqlite3.Connection, tables: dict[str, list[str]], names: Names, logs: dict[str, Log]
) -> None:
    run = "run_uuid" if "run_uuid" in tables["metrics"] else "run_id"
    titles: dict[str, str] = {}
    if {"run_uuid", "name"} <= set(tables.get("runs", ())):
        found = base.execute("SELECT run_uuid, name FROM runs")
        titles = {of: name for of, name in found if name}
    nan = "is_nan" if "is_nan" in tables["metrics"] else "0"
    order = "timestamp" if "timestamp" in tables["metrics"] else "step"
    rows: dict[str, Rows] = {}
    for of, key, value, step, is_nan in base.execute(
        f'SELECT "{run}", key, value, step, {nan} FROM metrics ORDER BY "{order}", rowid'
    ):
        title = titles.get(of, str(of))
        if list(titles.values()).count(title) > 1:
            title = f"{title} ({str(of)[:8]})"
        at = rows.setdefault(title, Rows(names))
        record = {"step": step, str(key): float("nan") if is_nan else value}
        at.add(record, len(at.lines) + 1)
    for title, at in rows.items():
        logs[title] = Log(tables=[at.table()], where="row")


def _read_trackio(
    base: sqlite3.Connection, columns: set[str], names: Names, logs: dict[str, Log]
) -> None:
    run = next((name for name in RUN_NAMES if name in columns), None)
    order = "id" if "id" in columns else "rowid"
    rows: dict[str, Rows] = {}
    of_run = f'"{run}"' if run else "''"
    for of, step, metrics in base.execute(
        f"SELECT {of_run}, step, metrics FROM metrics ORDER BY {order}"
    ):
        at = rows.setdefault(str(of), Rows(names))
        record = json.loads(metrics)
        if isinstance(record, dict):
            at.add({"_step": step, **record}, len(at.lines) + 1)
    for title, at in rows.items():
        logs[title] = Log(tables=[at.table()], where="row")


def _read_any(
    base: sqlite3.Connection, tables: dict[str, list[str]], names: Names, logs: dict[str, Log]
) -> None:
    """Read every table of another program that has a column of losses."""
    for name, columns in tables.items():
        readings = [names.reading(column) for column in columns]
        if not any(found is not None and "loss" in found.measure for found in readings):
            continue
        rows = Rows(names)
        for count, row in enumerate(base.execute(f'SELECT * FROM "{_quoted(name)}"'), 1):
            rows.add(dict(zip(columns, row, strict=True)), count)
        logs[name] = Log(tables=[rows.table()], where="row")


def read_parquet(path: Path, names: Names, log: Log) -> None:
    """Read a Parquet file's columns that may be measures.

    Args:
        path: The file.
        names: What is read.
        log: Takes what is found.

    Raises:
        InputError: pyarrow is absent, or the file cannot be read.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: needs pyarrow; install fused-perplexity[monitor]")
    log.where = "row"
    broken = f"{path}: expected a Parquet file, got one that cannot be read"
    with theirs(broken):
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow.names
    wanted = [n for n in columns if names.reading(n) or n == SUMMARY or n.lower() in RUN_NAMES]
    structs = [n for n in columns if str(file.schema_arrow.field(n).type).startswith("struct")]
    first = 1
    for group in range(file.num_row_groups):
        with theirs(broken):
            table = file.read_row_group(group, columns=[*wanted, *structs], use_threads=False)
        made = arrow_table(table, names, first)
        made.seen |= dict.fromkeys((n for n in columns if n not in made.seen), True)
        first += table.num_rows
        log.tables.append(made)
    if not log.tables:
        log.tables.append(Table({}, dict.fromkeys(columns, False), np.empty(0, np.int64)))
