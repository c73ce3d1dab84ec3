"""A training history as it was logged: readers of CSV, JSON lines, TensorBoard, trainer_state.json and W&B offline runs.

Losses become nats a token; an empty cell is no measurement, NaN is one. What is repaired on the way is said in ``notes``.
"""

from __future__ import annotations

import csv
import json
import math
import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..errors import InputError
from .digest import Digest
from .settings import Settings

# What a measure is called by the programs that log it; `--tag measure=name` adds one.
NAMES = {
    "step": ("step", "global_step", "_step", "trainer/global_step", "iteration", "iter"),
    "train_loss": (
        *("train_loss", "train/loss", "loss", "train/CrossEntropyLoss", "train/ce_loss", "training_loss", "Loss/train"),
        *("train_loss_step", "train/lm_loss", "lm loss", "train_cross_entropy"),
    ),
    "val_loss": (
        *("val_loss", "eval_loss", "valid_loss", "validation_loss", "eval/loss", "val/loss", "valid/loss", "Loss/val"),
        *("validation/loss", "eval/lm/CE loss", "eval/validation/CrossEntropyLoss", "test_loss", "lm loss validation"),
    ),
    "lr": (
        "lr",
        "learning_rate",
        "train/lr",
        "train/learning_rate",
        "optim/learning_rate_group0",
        "optim/LR (group 0)",
        "lr-AdamW",
    ),
    "grad_norm": ("grad_norm", "train/grad_norm", "optim/total_grad_norm", "optim/grad_norm", "total grad norm"),
    "tokens": ("tokens", "num_input_tokens_seen", "train/tokens", "throughput/total_tokens", "tokens_seen"),
    "seconds": ("seconds", "elapsed", "_runtime"),
    "train_eval_loss": ("train_eval_loss",),
    "eval_seconds": ("eval_seconds", "eval_runtime", "eval/runtime"),
}
UNITS: dict[str, Callable[[float], float]] = {
    "nats": lambda value: value,
    "bits": lambda value: value * math.log(2),
    "perplexity": lambda value: math.log(value) if value > 0 else math.nan,
}
LOSSES = ("train_loss", "val_loss", "train_eval_loss")


class History:
    """Measures in the order they were logged; a step may hold any of them.

    train_step, train_loss: the training losses. Everything else is ``events``: (place, step, measure, value), where ``place``
    is how many training losses came before.
    """

    def __init__(self, source: str = "") -> None:
        self.source = source
        self.train_step, self.train_loss = array("d"), array("d")
        self.events: list[tuple[int, float, str, float]] = []
        self.notes: list[str] = []

    def add(self, step: float, measures: dict[str, float]) -> None:
        """One logged row, losses in nats."""
        step = float(step)
        if "train_loss" in measures:
            self.train_step.append(step)
            self.train_loss.append(measures["train_loss"])
        place = len(self.train_step)
        for name in ("lr", "grad_norm", "tokens", "seconds", "eval_seconds", "train_eval_loss", "val_loss"):
            if name in measures:
                self.events.append((place, step, name, measures[name]))

    def say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and losses of training."""
        return np.array(self.train_step), np.array(self.train_loss)

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of another measure."""
        found = [(step, value) for _, step, measure, value in self.events if measure == name]
        return tuple(np.array(found, dtype=float).reshape(-1, 2).T)

    def digest(self, settings: Settings | None = None) -> Digest:
        """The history's state for the signals."""
        digest = Digest(settings)
        feed(digest, self)
        return digest

    def __len__(self) -> int:
        return len(self.train_step) + len(self.events)


def feed(digest: Digest, history: History, train_from: int = 0, events_from: int = 0) -> tuple[int, int]:
    """Give ``digest`` what the history holds beyond these counts; returns the new ones."""
    steps, losses = history.arrays()
    place, waiting = train_from, {}
    for at, step, name, value in history.events[events_from:]:
        if at > place:
            digest.train_many(steps[place:at], losses[place:at])
            place = at
        if name in ("train_eval_loss", "eval_seconds"):
            waiting[name] = value  # of the validation loss in the same row
        elif name == "val_loss":
            digest.validation(step, value, waiting.pop("train_eval_loss", None), waiting.pop("eval_seconds", None))
        else:
            digest.other(step, name, value)
    digest.train_many(steps[place:], losses[place:])
    return len(steps), len(history.events)


class Names:
    """Which logged names are which measure."""

    def __init__(self, tags: dict[str, str] | None = None, unit: str = "nats") -> None:
        if unit not in UNITS:
            raise InputError(f"unit: expected one of {', '.join(UNITS)}, got {unit!r}")
        self.convert = UNITS[unit]
        self.measure = {name: measure for measure, names in NAMES.items() for name in names}
        for measure, name in (tags or {}).items():
            if measure not in NAMES:
                raise InputError(f"tag: expected one of {', '.join(NAMES)} before =, got {measure!r}")
            self.measure = {known: what for known, what in self.measure.items() if what != measure} | {name: measure}

    def row(self, record: dict, where: str) -> tuple[float | None, dict[str, float]]:
        """Step and measures of a logged record; names that are unknown are passed over."""
        found: dict[str, float] = {}
        for name, value in record.items():
            measure = self.measure.get(name)
            if measure is None or value is None or value == "" or (measure in found and measure != "step"):
                continue
            found[measure] = self.number(value, measure, where)
        return found.pop("step", None), found

    def number(self, value, measure: str, where: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{where}: expected a number for {measure}, got {value!r:.60}")
        return self.convert(number) if measure in LOSSES else number


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
        history = _read_wandb(path, names)
    elif ".tfevents." in path.name:
        history = _read_tensorboard(path, names)
    else:
        raise InputError(
            f"{path}: expected .csv, .jsonl, trainer_state.json, .wandb or a TensorBoard event file, got {path.name!r}"
        )
    if not len(history):
        raise InputError(f"{path}: expected a training loss or a validation loss, got none{_seen(history)}")
    _repair_order(history)
    return history


def _seen(history: History) -> str:
    return f" ({'; '.join(history.notes)})" if history.notes else ""


def _repair_order(history: History) -> None:
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
    columns = {}
    for name in header:
        measure = names.measure.get(name)
        if measure is not None and measure not in columns:
            columns[measure] = name
    if "step" not in columns or not columns.keys() & set(LOSSES):
        raise InputError(f"{where}: expected columns step and train_loss or val_loss, got {', '.join(header)[:200]}")
    try:
        table = read_csv(
            pyarrow.py_buffer(raw),
            read_options=ReadOptions(column_names=header, skip_rows=skipped),
            convert_options=ConvertOptions(
                column_types={name: pyarrow.float64() for name in columns.values()},
                include_columns=list(columns.values()),
                null_values=[""],
                strings_can_be_null=False,
            ),
        )
    except pyarrow.ArrowInvalid as error:
        raise InputError(
            f"{where}: expected numbers in {', '.join(columns.values())}, got {str(error).splitlines()[0]}"
        )
    found = {}
    for measure, name in columns.items():
        column = table[name].combine_chunks()
        values = column.to_numpy(zero_copy_only=False)
        if measure in LOSSES and names.convert is not UNITS["nats"]:
            values = np.array([names.convert(value) for value in values.tolist()])
        found[measure] = values, ~np.asarray(column.is_null())
    steps, known = found.pop("step")
    if not known.all():
        history.notes.append(f"{int((~known).sum()):,} rows without a step are left out")
    if not np.isfinite(steps[known]).all():
        raise InputError(f"{where}: expected finite steps, got NaN or infinity")
    _fill(history, steps, known, found)


TAIL = 64  # bytes before the offset, by which a file that was written anew is known


class Follower:
    """New rows of a .csv or .jsonl file each time it is asked; of other histories the whole, read anew."""

    def __init__(self, path: str | Path, *, tags: dict[str, str] | None = None, unit: str = "nats") -> None:
        self.path, self.tags, self.unit = Path(path), tags, unit
        self.names = Names(tags, unit)
        self.lines = self.path.suffix in (".csv", ".jsonl", ".ndjson") and not self.path.is_dir()
        self.offset, self.header, self.identity, self.tail = 0, None, None, b""

    def new(self) -> tuple[History, bool]:
        """What was added, and whether it is the whole: at first, and after the file was replaced or cut."""
        if not self.lines:
            return read_history(self.path, tags=self.tags, unit=self.unit), True
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            raise InputError(f"{self.path}: expected a history, got no such file")
        history = History(str(self.path))
        with self.path.open("rb") as file:
            begin = max(0, self.offset - len(self.tail))
            file.seek(begin)
            raw = file.read()
            if self.offset == 0 or stat.st_ino != self.identity or not raw.startswith(self.tail):  # another file by now
                file.seek(0)
                return self._whole(history, file.read(), stat.st_ino), True
        raw = raw[len(self.tail) :]
        raw = raw[: raw.rfind(b"\n") + 1]
        where = f"{self.path}, after byte {self.offset:,}"
        if raw.strip() and self.header is not None:
            add_csv(history, raw, self.names, where, self.header)
        elif raw.strip():
            add_json_lines(history, raw, self.names, where)
        self._read(raw)
        return history, False

    def _read(self, raw: bytes) -> None:
        self.offset += len(raw)
        self.tail = (self.tail + raw)[-TAIL:]

    def _whole(self, history: History, raw: bytes, identity: int) -> History:
        raw = raw[: raw.rfind(b"\n") + 1]
        self.offset, self.tail, self.identity = 0, b"", identity
        if not raw.strip():
            raise InputError(f"{self.path}: expected a history, got no whole line yet")
        if self.path.suffix == ".csv":
            self.header = csv_header(raw)
            add_csv(history, raw, self.names, str(self.path))
        else:
            add_json_lines(history, raw, self.names, str(self.path))
        _repair_order(history)
        self._read(raw)
        return history


def _fill(
    history: History, steps: np.ndarray, known: np.ndarray, found: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Columns into a history, without a loop over the rows that hold a training loss alone."""
    train, has = found.pop("train_loss", (np.empty(len(steps)), np.zeros(len(steps), bool)))
    has = has & known
    history.train_step, history.train_loss = array("d", steps[has]), array("d", train[has])
    before = np.cumsum(has)
    events = []
    # A learning rate in every row is kept where it changes; so are the other slow measures, thinned.
    for order, name in enumerate(
        ("lr", "grad_norm", "tokens", "seconds", "eval_seconds", "train_eval_loss", "val_loss")
    ):
        if name not in found:
            continue
        values, there = found[name]
        rows = np.flatnonzero(there & known)
        if name in ("lr", "grad_norm", "tokens", "seconds") and len(rows) > 10_000:
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
    """Rows of JSON lines."""
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            _add_json_line(history, line, names, f"{where}, line {number}")


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
    if "train_runtime" in record:  # transformers' last row: the mean over the whole run
        return history.say("a summary of the whole run is left out (train_runtime)")
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
        return _read_wandb(runs[0], names)
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


def _read_wandb(path: Path, names: Names) -> History:
    """A W&B offline run: protocol buffers in LevelDB's log format, behind a header of seven bytes."""
    try:
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError:
        raise InputError(f"{path}: needs wandb; install it beside fused-perplexity[monitor]")
    history = History(str(path))
    for data in _wandb_records(path, history):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        values = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        known = {name: _json_number(value) for name, value in values.items() if name in names.measure}
        step, measures = names.row(known, str(path))
        step = float(record.history.step.num) if step is None else step
        if measures.keys() & set(LOSSES):
            history.add(step, measures)
    return history


def _json_number(value: str):
    """W&B writes what JSON has not as strings."""
    number = json.loads(value)
    return (
        {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(number, number)
        if isinstance(number, str)
        else number
    )


LOG_BLOCK, LOG_HEADER = 32_768, 7  # bytes; a record's header: checksum (4), length (2), kind (1)
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def _wandb_records(path: Path, history: History) -> Iterator[bytes]:
    """Records of the log (leveldb/doc/log_format.md); a cut-off end is noted and left out."""
    raw = path.read_bytes()
    if raw[:4] != b":W&B":
        raise InputError(f"{path}: expected a W&B run, got another file")
    place, parts = LOG_HEADER, []
    while place + LOG_HEADER <= len(raw):
        left = LOG_BLOCK - place % LOG_BLOCK
        if left < LOG_HEADER:  # too little for a header: zeros up to the next block
            place += left
            continue
        checksum, length, kind = struct.unpack("<IHB", raw[place : place + LOG_HEADER])
        data = raw[place + LOG_HEADER : place + LOG_HEADER + length]
        if (
            len(data) < length
            or kind not in (WHOLE, FIRST, MIDDLE, LAST)
            or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum
        ):
            break
        place += LOG_HEADER + length
        parts = [data] if kind in (WHOLE, FIRST) else [*parts, data]
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
    if place < len(raw):
        history.notes.append("the last record has no end (being written, or cut off) and is left out")
