"""TensorBoard event files, one or a folder of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import InputError, each_of_theirs, theirs
from ..names import Names
from .cells import Log, Rows, Table
from .delimited import SPLITS, is_a_loss

EVENTS_PATTERN = "*tfevents.*"
Part = tuple[float, float, str, float]  # wall time that never goes back, step, name, value


def read_tensorboard(path: Path, names: Names) -> dict[str, Log]:
    """Read the runs of a TensorBoard folder, or of an event file.

    Args:
        path: The folder or the file.
        names: What is read.

    Returns:
        Each run's log by its folder's name. Writers that keep training and evaluation in folders of
        their own are one run.

    Raises:
        InputError: tensorboard is absent, or a file cannot be read.
    """
    files = sorted(path.rglob(EVENTS_PATTERN)) if path.is_dir() else [path]
    notes = Log()
    streams: dict[str, list[Part]] = {}
    start = np.inf
    for file in files:
        folder = file.parent.relative_to(path).as_posix() if path.is_dir() else "."
        # A clock that jumps must not reorder the steps of a file.
        latest = -np.inf
        for wall, step, tag, value in _scalars(file, notes):
            latest = max(latest, wall)
            start = min(start, wall)
            run, name = named(folder, tag, names)
            streams.setdefault(run, []).append((latest, step, name, value))
    logs = {}
    for run, parts in streams.items():
        table = _merged(parts, start, names)
        logs[run] = Log(tables=[table], notes=list(notes.notes), where="row")
    return _one_run(logs, names) if logs else {"": notes}


def _merged(parts: list[Part], start: float, names: Names) -> Table:
    """Return the rows of several files in the order in which they were written."""
    table = Rows(names)
    for count, (wall, step, name, value) in enumerate(sorted(parts, key=lambda row: row[0]), 1):
        record = {"step": step, name: value}
        if is_a_loss(names, name):
            record["seconds"] = wall - start
        table.add(record, count)
    return table.table()


def _one_run(logs: dict[str, Log], names: Names) -> dict[str, Log]:
    """Return runs that hold a loss; two of which no measure is in both are one run's."""
    losses = {
        run: {
            found.measure
            for table in log.tables
            for name in table.columns
            if is_a_loss(names, name) and (found := names.reading(name)) is not None
        }
        for run, log in logs.items()
    }
    with_loss = {run: log for run, log in logs.items() if losses[run]}
    if not with_loss:
        whole = Log(where="row")
        for log in logs.values():
            whole.tables += log.tables
            whole.notes += [note for note in log.notes if note not in whole.notes]
        return {"": whole}
    if len(with_loss) > 1:
        every = [measure for run in with_loss for measure in losses[run]]
        if len(set(every)) == len(every):
            whole = Log(where="row")
            for log in with_loss.values():
                whole.tables += log.tables
                whole.notes += [note for note in log.notes if note not in whole.notes]
            return {"": whole}
    return with_loss


def named(folder: str, tag: str, names: Names) -> tuple[str, str]:
    """Return the run that a folder is of, and the name of a tag in it.

    Args:
        folder: Of the event file, below the folder that is read.
        tag: The scalar's.
        names: What names mean.

    Writers keep train and eval in folders of their own, whose name says which: ``loss`` under
    ``eval`` is ``eval/loss``; ``add_scalars("loss", {"val": ...})`` puts it under ``loss_val``.

    Example:
        >>> named("a/eval", "loss", Names()), named("loss_val", "loss", Names())
        (('a', 'eval/loss'), ('.', 'val/loss'))
    """
    parent, _, last = folder.rpartition("/")
    part = last.removeprefix(f"{tag.replace('/', '_')}_")
    split = next((each for each in (last, part) if each.lower() in SPLITS), None)
    if split is None:
        name = f"{last}/{tag}"
        if folder in ("", ".") or not names.tags or name not in names.tagged:
            return folder, tag
        return parent or ".", name
    whole = f"{folder}/{tag}"
    for name in (*([whole] if whole in names.tagged else []), f"{split}/{tag}"):
        if names.reading(name) is not None and names.reading(tag) != names.reading(name):
            # A plain name that is already of a split stays.
            plain = names.reading(tag)
            if plain is None or plain.measure == "train_loss" or name in names.tagged:
                return parent or ".", name
    return parent or ".", tag


def _scalars(file: Path, notes: Log) -> Iterator[tuple[float, float, str, float]]:
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
        notes.say(f"{file.name}: {lost} left out")


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
