"""Folders of runs: what each program leaves behind, and which of it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import InputError
from ..names import Names
from .cells import Log
from .delimited import SPLITS, read_table
from .files import has_loss, mlflow_metric, read_file
from .tensorboard import EVENTS_PATTERN, read_tensorboard
from .wandb_log import read_wandb

Logs = dict[str, Log]
STATE = "trainer_state.json"
# Files of a folder whose name says that they are a run's history; the first kind that is there is
# read.
HISTORIES = (
    ("history.csv", "history.jsonl"),
    ("trainer_log.jsonl", "*/trainer_log.jsonl"),  # LLaMA-Factory
    ("logging.jsonl", "v*-*/logging.jsonl"),  # ms-swift
    ("metrics.csv", "version_*/metrics.csv", "*/version_*/metrics.csv"),  # Lightning
    ("metrics.jsonl", "*/metrics.jsonl"),  # lingua, Levanter
    ("*.db", "*.sqlite", "*.sqlite3"),  # trackio, MLflow
)
OTHERS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json", ".log", ".txt", ".out")
MOST_FILES = 200


def read_folder(path: Path, names: Names) -> Logs:
    """Read the runs of a folder.

    Args:
        path: The folder of a run, or of several.
        names: What is read.

    Returns:
        Each run's log by its name.

    Raises:
        InputError: It holds nothing that a training run writes.
    """
    if (state := state_of(path)) is not None:
        return read_file(state, names)
    kinds: tuple[Callable[[Path, Names], Logs], ...] = (
        _wandb,
        _tensorboard,
        _dvclive,
        _mlruns,
        _histories,
        _others,
    )
    nothing: Logs = {}
    for kind in kinds:
        logs = kind(path, names)
        if any(has_loss(log, names) for log in logs.values()):
            return logs
        nothing = nothing or logs
    if nothing:
        return nothing
    raise InputError(
        f"{path}: expected TensorBoard event files, a W&B run, trainer_state.json or another log, "
        "got a folder with none"
    )


def state_of(path: Path) -> Path | None:
    """Return transformers' ``trainer_state.json`` in a folder, or that of its last checkpoint.

    Args:
        path: The folder.
    """
    if (path / STATE).is_file():
        return path / STATE
    found = [
        (int(at[1]), file)
        for file in path.glob(f"checkpoint-*/{STATE}")
        if (at := re.fullmatch(r"checkpoint-(\d+)", file.parent.name))
    ]
    return max(found)[1] if found else None


def files_of(path: Path) -> Iterator[Path]:
    """Yield the files of a folder that a training run writes and ``read_folder`` may read.

    Args:
        path: The folder.
    """
    patterns = [STATE, f"checkpoint-*/{STATE}", "*.wandb", "*/*.wandb", "*/*/*.wandb"]
    patterns += [f"**/{EVENTS_PATTERN}", "**/plots/metrics/**/*.tsv", "**/metrics/*"]
    for pattern in [*patterns, *(pattern for kind in HISTORIES for pattern in kind)]:
        yield from (file for file in path.glob(pattern) if file.is_file())


def _wandb(path: Path, names: Names) -> Logs:
    """W&B's offline runs; the parts of one run that was resumed are one, in the order of their
    folders' names, which begin with the time.
    """
    files: dict[Path, Path] = {}
    for pattern in ("*.wandb", "*/*.wandb", "wandb/*/*.wandb"):
        for file in path.glob(pattern):
            files.setdefault(file.resolve(), file.resolve())
    logs: Logs = {}
    for file in sorted(files, key=lambda each: (each.parent.name, each.name)):
        run, log = read_wandb(file, names)
        if run not in logs:
            logs[run] = log
        else:
            logs[run].tables += log.tables
            logs[run].notes += [note for note in log.notes if note not in logs[run].notes]
    return logs


def _tensorboard(path: Path, names: Names) -> Logs:
    return read_tensorboard(path, names) if any(path.rglob(EVENTS_PATTERN)) else {}


def _dvclive(path: Path, names: Names) -> Logs:
    """DVCLive: one table a measure, named by its place below ``plots/metrics``."""
    logs: Logs = {}
    for pattern in ("plots/metrics", "*/plots/metrics", "metrics", "."):
        roots = [path] if pattern == "." else sorted(path.glob(pattern))
        for root in roots:
            files = sorted(root.rglob("*.tsv")) if root.is_dir() else []
            for file in files:
                log = logs.setdefault(
                    _title(path, root.parent.parent if pattern != "." else path), Log()
                )
                place = file.relative_to(root).with_suffix("").as_posix()
                _add_series(file, place, names, log)
        if logs:
            break
    return logs


def _title(path: Path, run: Path) -> str:
    return "" if run in (path, path.parent) else run.name


def _add_series(file: Path, place: str, names: Names, log: Log) -> None:
    """Add a table of a step and one value, under the name that its place says."""
    part = Log()
    try:
        read_table(file, names, part)
    except InputError:
        return
    last = place.rsplit("/", 1)[-1]
    for table in part.tables:
        if last in table.columns and last != place:
            table.columns[place] = table.columns.pop(last)
            table.seen[place] = table.seen.pop(last)
        measures = {found.measure for n in table.columns if (found := names.reading(n))}
        if measures - {"step"}:
            log.tables.append(table)
    log.notes += [note for note in part.notes if note not in log.notes]


def _mlruns(path: Path, names: Names) -> Logs:
    """MLflow's folders: EXPERIMENT/RUN/metrics/NAME."""
    folders = [path] if path.name == "metrics" else []
    for pattern in ("metrics", "*/metrics", "*/*/metrics", "mlruns/*/*/metrics"):
        folders += [each for each in sorted(path.glob(pattern)) if each.is_dir()]
    logs: Logs = {}
    for folder in folders:
        log = Log(where="row")
        for file in sorted(each for each in folder.rglob("*") if each.is_file()):
            name = file.relative_to(folder).as_posix()
            if names.reading(name) is not None:
                log.tables.append(mlflow_metric(file, name, names))
        if log.tables and any(len(table) for table in log.tables):
            title = folder.parent / "tags" / "mlflow.runName"
            name = (
                title.read_text(encoding="utf-8", errors="replace").strip()
                if title.is_file()
                else folder.parent.name
            )
            logs[name if name not in logs else f"{name} ({folder.parent.name[:8]})"] = log
    return logs


def _histories(path: Path, names: Names) -> Logs:
    for kind in HISTORIES:
        files = [file for pattern in kind for file in sorted(path.glob(pattern)) if file.is_file()]
        if files and (logs := _each(path, files, names)):
            return logs
    return {}


def _others(path: Path, names: Names) -> Logs:
    """Any logs in a folder, or in the folders in it."""
    for pattern in ("*", "*/*"):
        files = sorted(
            file for file in path.glob(pattern) if file.suffix.lower() in OTHERS and file.is_file()
        )
        if files and (logs := _each(path, files[:MOST_FILES], names)):
            return logs
    return {}


def _each(path: Path, files: list[Path], names: Names) -> Logs:
    """Return the runs of several files; files that each hold one split are one run."""
    found: dict[Path, Logs] = {}
    first: InputError | None = None
    for file in files:
        try:
            logs = read_file(file, names)
        except InputError as error:
            first = first or error
            continue
        logs = {title: log for title, log in logs.items() if has_loss(log, names)}
        if logs:
            found[file] = logs
    if not found and first is not None and len(files) == 1:
        raise first
    if len(found) == 1:
        return next(iter(found.values()))
    splits = [bool(set(re.split(r"[\W_]+", file.stem.lower())) & SPLITS) for file in found]
    if found and all(splits) and len({file.parent for file in found}) == 1:
        whole = Log()
        for logs in found.values():
            for log in logs.values():
                whole.tables += log.tables
                whole.notes += [note for note in log.notes if note not in whole.notes]
        return {"": whole}
    made: Logs = {}
    for file, logs in found.items():
        title = file.relative_to(path).as_posix()
        if len({each.name for each in found}) == 1 and file.parent != path:
            title = file.parent.relative_to(path).as_posix()
        for run, log in logs.items():
            made[f"{title}/{run}" if run else title] = log
    return made
