"""Readers of CSV, JSON lines, TensorBoard, transformers' trainer_state.json and, in ``wandb_log.py``, W&B offline runs."""

from __future__ import annotations

import csv
import json
import math
from array import array
from pathlib import Path

import numpy as np

from ..errors import InputError
from .history import EVENTS, LOSSES, UNITS, History, Names
from .wandb_log import read_wandb

SUMMARY = "train_runtime"  # in the last row that transformers logs: means over the whole run
THINNED = ("lr", "grad_norm", "tokens", "seconds")  # slow measures: ten thousand values draw them


def read_history(path: str | Path, *, tags: dict[str, str] | None = None, unit: str = "nats") -> History:
    """The history in a .csv, .jsonl or trainer_state.json file, a TensorBoard folder or event file, or a W&B offline run.

    tags: measure to the name it was logged under. unit: of the losses, "nats", "bits" or "perplexity". Raises InputError
    that names the file and the line where it cannot be read, holds no loss, or no step.
    """
    path, names = Path(path), Names(tags, unit)
    if path.is_dir():
        history = _read_folder(path, names)
    elif not path.is_file():
        raise InputError(f"{path}: expected a history, got no such file")
    elif path.suffix == ".csv":
        history = _read_csv(path, names)
    elif path.suffix in (".jsonl", ".ndjson"):
        history = _read_json_lines(path, names)
    elif path.suffix == ".json":
        history = _read_trainer_state(path, names)
    elif path.suffix == ".wandb":
        history = read_wandb(path, names)
    elif ".tfevents." in path.name:
        history = _read_tensorboard(path, names)
    else:
        raise InputError(
            f"{path}: expected .csv, .jsonl, trainer_state.json, .wandb or a TensorBoard event file, got {path.name!r}"
        )
    names.tell(history)
    if not len(history):
        raise InputError(f"{path}: expected a training loss or a validation loss, got none{_seen(history)}")
    repair_order(history)
    return history


def _seen(history: History) -> str:
    return f" ({'; '.join(history.notes)})" if history.notes else ""


def repair_order(history: History) -> None:
    """Rows in no order at all are sorted by step; a few steps back are restarts and stay."""
    steps = np.array(history.train_step)
    back = int((np.diff(steps) < 0).sum()) if len(steps) > 1 else 0
    if back <= max(3, 0.2 * len(steps)):  # rows in no order go back every second time
        return
    order = np.argsort(steps, kind="stable")
    losses = np.array(history.train_loss)
    history.train_step, history.train_loss = array("d", steps[order]), array("d", losses[order])
    ordered = steps[order]
    history.events = sorted(
        (
            (int(np.searchsorted(ordered, step, side="right")), step, name, value)
            for _, step, name, value in history.events
        ),
        key=lambda event: (event[0], event[1]),
    )
    history.notes.append(
        f"steps went back {back:,} times in {len(steps):,} rows: taken for rows in no order, and sorted by step"
    )


def _whole_lines(path: Path, history: History) -> bytes:
    """The file's bytes up to its last line break: what follows is being written."""
    raw = path.read_bytes()
    if not raw.strip():
        raise InputError(f"{path}: expected a history, got an empty file")
    end = raw.rfind(b"\n") + 1
    if raw[end:].strip():
        if end == 0:
            raise InputError(f"{path}: expected whole lines, got one that does not end")
        history.notes.append("the last line has no end (being written, or cut off) and is left out")
    return raw[:end]


def _read_csv(path: Path, names: Names) -> History:
    history = History(str(path))
    add_csv(history, _whole_lines(path, history), names, str(path))
    return history


def csv_header(raw: bytes) -> list[str]:
    """Names of the first line."""
    line = raw[: raw.find(b"\n")].decode(errors="replace").strip().removeprefix("\ufeff")
    return [name.strip() for name in next(csv.reader([line]))]


def add_csv(history: History, raw: bytes, names: Names, where: str, header: list[str] | None = None) -> None:
    """Rows of CSV text; ``header`` where the text has none of its own."""
    import pyarrow
    from pyarrow.csv import ConvertOptions, ReadOptions, read_csv

    skipped = 0 if header else 1
    header = header or csv_header(raw)
    columns = names.columns(header)
    if "step" not in columns or not columns.keys() & set(LOSSES):
        raise InputError(f"{where}: expected columns step and train_loss or val_loss, got {', '.join(header)[:200]}")
    wanted = [name for found in columns.values() for name in found]
    try:
        table = read_csv(
            pyarrow.py_buffer(raw),
            read_options=ReadOptions(column_names=header, skip_rows=skipped),
            convert_options=ConvertOptions(
                column_types={name: pyarrow.float64() for name in wanted},
                include_columns=wanted,
                null_values=[""],
                strings_can_be_null=False,
            ),
        )
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{where}: expected numbers in {', '.join(wanted)}, got {str(error).splitlines()[0]}")
    _add_table(history, table, columns, names, where)


def _add_table(history: History, table, columns: dict[str, list[str]], names: Names, where: str) -> None:
    """Rows of an Arrow table of numbers; ``columns``: measure to the columns that hold it, the first that has a value read."""
    found = {}
    for measure, of in columns.items():
        values, there = _column(table, of[0])
        for name in of[1:]:
            more, known = _column(table, name)
            if (known & there).any():
                names.doubled.add(measure)
            fresh = known & ~there
            values[fresh] = more[fresh]
            there |= fresh
        if measure in LOSSES and names.convert is not UNITS["nats"]:
            values[there] = [names.convert(value) for value in values[there].tolist()]
        found[measure] = values, there
    steps, known = found.pop("step")
    measured = np.any([there for _, there in found.values()], axis=0) if found else known
    if (measured & ~known).any():
        history.say("rows without a step are left out")
    if not np.isfinite(steps[known]).all():
        raise InputError(f"{where}: expected finite steps, got NaN or infinity")
    _fill(history, steps, known, found)


def _column(table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and whether there is one."""
    column = table[name]
    return column.to_numpy().astype(np.float64), np.asarray(column.is_valid())


def _fill(
    history: History, steps: np.ndarray, known: np.ndarray, found: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Columns into a history, without a loop over the rows that hold a training loss alone."""
    train, has = found.pop("train_loss", (np.empty(len(steps)), np.zeros(len(steps), bool)))
    has = has & known
    history.train_step.frombytes(steps[has].tobytes())
    history.train_loss.frombytes(train[has].tobytes())
    before = np.cumsum(has)
    events = []
    # A learning rate in every row is kept where it changes; so are the other slow measures, thinned.
    for order, name in enumerate(EVENTS):
        if name not in found:
            continue
        values, there = found[name]
        rows = np.flatnonzero(there & known)
        if name in THINNED and len(rows) > 10_000:
            kept = np.zeros(len(rows), bool)
            kept[:: len(rows) // 10_000] = kept[-1] = True
            rows = rows[kept | ~np.isfinite(values[rows])]
        events += [(int(row), order, name) for row in rows]
    events.sort()
    for row, _, name in events:
        history.events.append((int(before[row]), float(steps[row]), name, float(found[name][0][row])))


def _read_json_lines(path: Path, names: Names) -> History:
    history = History(str(path))
    add_json_lines(history, _whole_lines(path, history), names, str(path))
    return history


def add_json_lines(history: History, raw: bytes, names: Names, where: str) -> None:
    """Rows of JSON lines, into a history that is empty."""
    table = _json_table(raw)
    columns = names.columns(table.column_names) if table is not None else {}
    if "step" in columns and _is_plain(table, columns):
        try:
            return _add_table(history, table, columns, names, where)
        except InputError:  # below it is said of which line
            pass
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            _add_json_line(history, line, names, f"{where}, line {number}")


def _json_table(raw: bytes):
    """What Arrow makes of the lines at once, ten times faster than line by line; None where it refuses them."""
    try:
        import pyarrow.json
    except ImportError:
        return None
    try:
        return pyarrow.json.read_json(pyarrow.py_buffer(raw))
    except pyarrow.ArrowInvalid:
        return None


def _is_plain(table, columns: dict[str, list[str]]) -> bool:
    """Numbers in every measure and no row that is treated apart: else a line at a time says what is wrong, and where."""
    import pyarrow

    kinds = [table.schema.field(name).type for found in columns.values() for name in found]
    numbers = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_null)
    return all(any(is_kind(kind) for is_kind in numbers) for kind in kinds) and SUMMARY not in table.column_names


def _add_json_line(history: History, line: bytes, names: Names, where: str) -> None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected a JSON object, got broken JSON ({error})")
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {line[:60].decode(errors='replace')!r}")
    _add_row(history, *names.row(record, where), record, where)


def _add_row(history: History, step: float | None, measures: dict[str, float], record: dict, where: str) -> None:
    """A row into the history; what is left out is said once."""
    if SUMMARY in record:
        return history.say(f"a summary of the whole run is left out ({SUMMARY})")
    if step is None:
        return history.say("rows without a step are left out") if measures else None
    if not math.isfinite(step):
        raise InputError(f"{where}: expected a finite step, got {step}")
    if measures:
        history.add(step, measures)


def _read_trainer_state(path: Path, names: Names) -> History:
    """transformers' Trainer: its log_history."""
    history = History(str(path))
    try:
        record = json.loads(path.read_text())
        rows = record["log_history"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected trainer_state.json with a log_history, got another file ({error!r:.80})")
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: expected objects in log_history, got {row!r:.60} at {number}")
        where = f"{path}, log_history {number}"
        _add_row(history, *names.row(row, where), row, where)
    return history


def _read_folder(path: Path, names: Names) -> History:
    if (path / "trainer_state.json").is_file():
        return _read_trainer_state(path / "trainer_state.json", names)
    runs = sorted(path.glob("*.wandb")) + sorted(path.glob("*/*.wandb"))
    if runs:
        if len(runs) > 1:
            raise InputError(
                f"{path}: expected one W&B run, got {len(runs)}: {', '.join(run.parent.name for run in runs)[:200]}"
            )
        return read_wandb(runs[0], names)
    if any(path.rglob("*.tfevents.*")):
        return _read_tensorboard(path, names)
    for name in ("history.csv", "history.jsonl"):
        if (path / name).is_file():
            return read_history(path / name, unit="nats")
    raise InputError(
        f"{path}: expected TensorBoard event files, a W&B run or trainer_state.json, got a folder with none"
    )


def _read_tensorboard(path: Path, names: Names) -> History:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise InputError(f"{path}: needs tensorboard; install fused-perplexity[monitor]")
    history = History(str(path))
    folders = sorted({file.parent for file in path.rglob("*.tfevents.*")}) if path.is_dir() else [path]
    rows: list[tuple[float, float, str, float]] = []
    seen = []
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        tags = {tag: events.Scalars for tag in events.Tags()["scalars"]}
        for tag, read in tags.items():
            # Writers that keep train and eval in folders of their own: eval/loss is the tag loss under eval.
            inner = "" if path == folder or not path.is_dir() else f"{folder.relative_to(path).as_posix()}/"
            measure = names.measure.get(f"{inner}{tag}") or names.measure.get(tag)
            seen.append(f"{inner}{tag}")
            if measure and measure != "step":
                rows += [
                    (event.wall_time, event.step, measure, names.number(event.value, measure, f"{path}, tag {tag}"))
                    for event in read(tag)
                ]
    # In the order they were written; of one moment the training loss first.
    rows.sort(key=lambda row: (row[0], row[2] != "train_loss"))
    start = rows[0][0] if rows else 0.0
    for wall, step, measure, value in rows:
        history.add(step, {measure: value, "seconds": wall - start})
    if not rows:
        history.notes.append(f"tags seen: {', '.join(seen)[:300] or 'none'}; --tag train_loss=NAME says which is which")
    return history
