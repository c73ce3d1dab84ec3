"""Readers of CSV, JSON lines, TensorBoard, transformers' trainer_state.json and, in
``wandb_log.py``, W&B offline runs.
"""

from __future__ import annotations

import csv
import json
import math
from array import array
from pathlib import Path

import numpy as np

from ..errors import InputError, check_encoding, each_of_theirs, first_line, theirs
from .history import EVENTS, LOSSES, History, Names
from .wandb_log import read_wandb

SUMMARY = "train_runtime"  # in the last row that transformers logs: means over the whole run
HISTORIES = ("history.csv", "history.jsonl")  # of a folder that holds nothing else to read
DEEPEST = 200  # brackets in a line that Arrow is given
THINNED = ("lr", "grad_norm", "tokens", "seconds")  # slow measures: ten thousand values draw them


def read_history(
    path: str | Path, *, tags: dict[str, str] | None = None, unit: str = "nats"
) -> History:
    """The history in a .csv, .jsonl or trainer_state.json file, a TensorBoard folder or event file,
    or a W&B offline run.

    tags: measure to the name it was logged under. unit: of the losses, "nats", "bits" or
    "perplexity". Raises InputError that names the file and the line where it cannot be read, holds
    no loss, or no step.
    """
    path, names = Path(path), Names(tags, unit)
    if path.is_dir():
        history = _read_folder(path, names)
    elif not path.is_file():
        what = (
            "what is no regular file (a pipe is read once, a history twice)"
            if path.exists()
            else "no such file"
        )
        raise InputError(f"{path}: expected a history, got {what}")
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
        raise InputError(
            f"{path}: expected a training loss or a validation loss, got none{_seen(history)}"
        )
    repair_order(history)
    return history


def _seen(history: History) -> str:
    return f" ({'; '.join(history.notes)})" if history.notes else ""


def repair_order(history: History) -> None:
    """Rows that are out of order are sorted by step; steps that go back and are logged again are a
    restart and stay.
    """
    if not history.train_step:
        return _repair_evaluations(history)
    steps = np.array(history.train_step)
    back = _out_of_order(steps)
    if not back:
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
    _say_sorted(history, back, len(steps))


def _repair_evaluations(history: History) -> None:
    """The same for a history of evaluations alone."""
    back = _out_of_order(
        np.array([step for _, step, name, _ in history.events if name == "val_loss"])
    )
    if back:
        history.events.sort(key=lambda event: event[1])
        _say_sorted(history, back, len(history.events))


def _out_of_order(steps: np.ndarray) -> int:
    """How often the steps go back, 0 where that is by restarts: they log again what they went back
    over.

    Rows out of order repeat no step. One to three ways back that are followed by more than two rows
    below the highest step so far are restarts all the same, whose steps fall between the old ones.
    """
    if len(steps) < 2:
        return 0
    ways_back = np.flatnonzero(np.diff(steps) < 0) + 1
    if not len(ways_back) or len(steps) - len(np.unique(steps)) >= len(ways_back):
        return 0
    highest = np.maximum.accumulate(steps)
    longest = max(
        int(np.argmax(np.append(steps[at:] >= highest[at - 1], True))) for at in ways_back[:4]
    )
    return 0 if len(ways_back) <= 3 and longest > 2 else len(ways_back)


def _say_sorted(history: History, back: int, rows: int) -> None:
    history.say(
        f"steps went back {back:,} times in {rows:,} rows and none came twice: out of order, sorted by step"
    )


def _whole_lines(path: Path, history: History) -> bytes:
    """The file's bytes up to its last line break: what follows is being written."""
    raw = path.read_bytes()
    if not raw.strip():
        raise InputError(f"{path}: expected a history, got an empty file")
    check_encoding(str(path), raw)
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


def csv_header(raw: bytes, where: str) -> list[str]:
    """Names of the first line."""
    line = raw[: raw.find(b"\n")].decode(errors="replace").strip().removeprefix("\ufeff")
    try:
        return [name.strip() for name in next(csv.reader([line]), [])]
    except csv.Error as error:
        raise InputError(f"{where}: expected names in the first line, got {line[:60]!r} ({error})")


def add_csv(
    history: History, raw: bytes, names: Names, where: str, header: list[str] | None = None
) -> None:
    """Rows of CSV text; ``header`` where the text has none of its own."""
    import pyarrow
    from pyarrow.csv import ConvertOptions, ReadOptions, read_csv

    skipped = 0 if header else 1
    header = header or csv_header(raw, where)
    columns = names.columns(header)
    if "step" not in columns or not columns.keys() & set(LOSSES):
        raise InputError(
            f"{where}: expected columns step and train_loss or val_loss, got {', '.join(header)[:200]}"
        )
    wanted = [name for found in columns.values() for name in found]
    if twice := sorted({name for name in wanted if header.count(name) > 1}):
        raise InputError(
            f"{where}: expected one column of a name, got {', '.join(twice)} more than once"
        )
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
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{where}: expected numbers in {', '.join(wanted)}, got {first_line(error)}"
        )
    _add_table(history, table, columns, names, where)


def _add_table(
    history: History, table, columns: dict[str, list[str]], names: Names, where: str
) -> None:
    """Rows of an Arrow table of numbers; ``columns``: measure to the columns that hold it, the
    first that has a value read.
    """
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
        if measure in LOSSES and names.unit != "nats":
            values[there] = [names.nats(value, measure, where) for value in values[there].tolist()]
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
    history: History,
    steps: np.ndarray,
    known: np.ndarray,
    found: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Columns into a history, without a loop over the rows that hold a training loss alone."""
    train, has = found.pop("train_loss", (np.empty(len(steps)), np.zeros(len(steps), bool)))
    has = has & known
    history.train_step.frombytes(steps[has].tobytes())
    history.train_loss.frombytes(train[has].tobytes())
    before = np.cumsum(has)
    events = []
    # A learning rate in every row is kept where it changes; so are the other slow measures,
    # thinned.
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
        history.events.append(
            (int(before[row]), float(steps[row]), name, float(found[name][0][row]))
        )


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
    """What Arrow makes of the lines at once, ten times faster than line by line; None where it
    refuses them.
    """
    try:
        import pyarrow.json
    except ImportError:
        return None
    if not _is_for_arrow(raw):
        return None
    try:
        return pyarrow.json.read_json(pyarrow.py_buffer(raw))
    except pyarrow.ArrowException:
        return None


def _is_for_arrow(raw: bytes) -> bool:
    """Return whether Arrow can be given the lines: objects that are not nested deeper than
    ``DEEPEST``.

    A null before the first object, and a hundred thousand brackets in a line, end the process in
    Arrow 26, without an error.
    """
    lines = raw.strip()
    if lines.count(b"\n{") + lines.startswith(b"{") != lines.count(b"\n") + 1:
        return False
    if lines.count(b"[") + lines.count(b"{") <= lines.count(b"\n") + DEEPEST:
        return True
    return all(line.count(b"[") + line.count(b"{") <= DEEPEST for line in lines.split(b"\n"))


def _is_plain(table, columns: dict[str, list[str]]) -> bool:
    """Numbers in every measure and no row that is treated apart: else a line at a time says what is
    wrong, and where.
    """
    import pyarrow

    kinds = [table.schema.field(name).type for found in columns.values() for name in found]
    numbers = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_null)
    return (
        all(any(is_kind(kind) for is_kind in numbers) for kind in kinds)
        and SUMMARY not in table.column_names
    )


def _add_json_line(history: History, line: bytes, names: Names, where: str) -> None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected a JSON object, got broken JSON ({error})")
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: expected a JSON object, got {line[:60].decode(errors='replace')!r}"
        )
    _add_row(history, *names.row(record, where), record, where)


def _add_row(
    history: History, step: float | None, measures: dict[str, float], record: dict, where: str
) -> None:
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
    history, record = History(str(path)), None
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
        rows = record["log_history"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        from ..json_files import described_result

        found = described_result(record) if isinstance(record, dict) else None
        got = found or f"another file ({error!r:.80})"
        raise InputError(f"{path}: expected trainer_state.json with a log_history, got {got}")
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: expected objects in log_history, got {row!r:.60} at {number}"
            )
        where = f"{path}, log_history {number}"
        _add_row(history, *names.row(row, where), row, where)
    return history


def history_files(history: str | Path | None) -> list[Path]:
    """Return the files that ``read_history`` reads, for checks that no output is one of them.

    Of a folder these are the files that a training run writes: a report may lie beside them.
    """
    if history is None:
        return []
    path = Path(history)
    if not path.is_dir():
        return [path]
    patterns = ("trainer_state.json", "*.wandb", "*/*.wandb", "**/*.tfevents.*", *HISTORIES)
    return [file for pattern in patterns for file in path.glob(pattern)]


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
    for name in HISTORIES:
        if (path / name).is_file():
            return read_history(path / name, unit="nats")
    raise InputError(
        f"{path}: expected TensorBoard event files, a W&B run or trainer_state.json, got a folder with none"
    )


def _read_tensorboard(path: Path, names: Names) -> History:
    history = History(str(path))
    files = sorted(path.rglob("*.tfevents.*")) if path.is_dir() else [path]
    rows: list[tuple[float, float, str, float]] = []
    seen: dict[str, str] = {}  # tag to measure
    where: dict[str, set[str]] = {}  # measure to folders
    for file in files:
        folder = file.parent.relative_to(path).as_posix() if path.is_dir() else "."
        for wall, step, tag, value in _scalars(file, history):
            name = _tensorboard_name(folder, tag, names)
            seen.setdefault(name, tag)
            measure = names.measure.get(name)
            names.present.add(name)
            if measure and measure != "step":
                where.setdefault(measure, set()).add(folder)
                rows.append(
                    (wall, step, measure, names.number(value, measure, f"{file}, tag {tag}"))
                )
    for measure in LOSSES:
        if len(folders := sorted(where.get(measure, ()))) > 1:
            listed = ", ".join(folders)[:200]
            raise InputError(
                f"{path}: expected one run, got {measure} in {len(folders)} folders; name one of {listed}"
            )
    # In the order they were written; of one moment the training loss first.
    rows.sort(key=lambda row: (row[0], row[2] != "train_loss"))
    start = rows[0][0] if rows else 0.0
    for wall, step, measure, value in rows:
        history.add(step, {measure: value, "seconds": wall - start})
    if not rows:
        history.notes.append(
            f"tags seen: {', '.join(seen)[:300] or 'none'}; --tag train_loss=NAME says which is which"
        )
    return history


def _tensorboard_name(folder: str, tag: str, names: Names) -> str:
    """What a tag is called: writers keep train and eval in folders of their own, whose name says
    which.

    ``loss`` under ``eval`` is ``eval/loss``; ``add_scalars("loss", {"val": ...})`` puts it under
    ``loss_val``.
    """
    last = folder.rsplit("/", 1)[-1]
    part = last.removeprefix(f"{tag.replace('/', '_')}_")
    for name in (f"{folder}/{tag}", f"{last}/{tag}", f"{part}/{tag}"):
        if name in names.measure:
            return name
    return tag


def _scalars(file: Path, history: History):
    """(wall time, step, tag, value) of an event file's scalars, what was replaced after a restart
    included.
    """
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise InputError(f"{file}: needs tensorboard; install fused-perplexity[monitor]")
    read = 0
    broken = f"{file}: expected a TensorBoard event file, got one that cannot be read"
    with theirs(broken):
        loader = EventFileLoader(str(file))
    for event in each_of_theirs(broken, loader.Load()):
        read += 1
        for value in event.summary.value:
            if value.HasField("tensor"):
                with theirs(
                    f"{file}, tag {value.tag}: expected a tensor, got one that cannot be read"
                ):
                    number = make_ndarray(value.tensor)
                if number.size == 1 and number.dtype.kind in "fiu":
                    yield event.wall_time, float(event.step), value.tag, float(number.reshape(()))
    written, whole = _framed(file)
    if read < written or not whole:
        lost = (
            f"{written - read:,} records behind a broken one"
            if read < written
            else "a last record without an end"
        )
        history.say(f"{file.name}: {lost} left out")


def _framed(file: Path) -> tuple[int, bool]:
    """How many records a file frames (TFRecord: length, its checksum, data, its checksum), and
    whether the last is whole.
    """
    size, place, count = file.stat().st_size, 0, 0
    with file.open("rb") as raw:
        while place + 12 <= size:
            raw.seek(place)
            place += 16 + int.from_bytes(raw.read(8), "little")
            count += place <= size
    return count, place == size
