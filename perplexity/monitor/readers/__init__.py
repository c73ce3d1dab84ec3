"""Readers of training histories: ``read_history`` finds out what a file or a folder is.

A file a family of formats: ``delimited.py``, ``json_text.py``, ``console.py``, ``wrapped.py`` (text
inside JSON), ``stores.py`` (SQLite, Parquet), ``tensorboard.py``, ``wandb_log.py``; ``files.py`` and
``folders.py`` choose among them. All of them make tables under logged names (``cells.py``), of which
``assemble.py`` makes a History; ``order.py`` orders it, and ``..names`` says which name is which
measure.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..history import History
from ..names import Names
from .assemble import history_of
from .cells import Log
from .console import compiled
from .files import has_loss, read_file
from .folders import files_of, read_folder
from .json_text import LineReader

__all__ = [
    "add_json_lines",
    "extend",
    "files_of",
    "history_files",
    "history_of",
    "read_histories",
    "read_history",
]

LISTED = 300  # characters of a list of runs in a message


def read_history(
    path: str | Path,
    *,
    tags: dict[str, str] | None = None,
    unit: str = "nats",
    run: str | None = None,
    patterns: tuple[str, ...] | list[str] = (),
    bytes_per_token: float | None = None,
) -> History:
    """Return the history of a run.

    Args:
        path: A file or a folder that a training program wrote; docs/monitor.md lists the kinds.
        tags: Measure to the name that it was logged under; ``val_loss/SET`` names a further set.
        unit: Of the losses: "nats", "bits" or "perplexity".
        run: Which of several runs; None where there is one.
        patterns: Regular expressions for console text, with groups named by measures.
        bytes_per_token: Of the validation text, for losses in bits per byte.

    Raises:
        InputError: It cannot be read, holds no loss, or holds several runs of which ``run`` names
            none. The message says which line, which names or which runs there are.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.log"
        ...     _ = file.write_text("step 1: loss 3.5\\nstep 2: loss 3.25\\n")
        ...     read_history(file).train_loss.tolist()
        [3.5, 3.25]
    """
    found = read_histories(
        path, tags=tags, unit=unit, patterns=patterns, bytes_per_token=bytes_per_token, run=run
    )
    if len(found) > 1:
        raise InputError(
            f"{path}: expected one run, got {len(found)}: {listed(found)}; "
            "--run NAME chooses one, --all judges each"
        )
    return next(iter(found.values()))


def read_histories(
    path: str | Path,
    *,
    tags: dict[str, str] | None = None,
    unit: str = "nats",
    run: str | None = None,
    patterns: tuple[str, ...] | list[str] = (),
    bytes_per_token: float | None = None,
    names: Names | None = None,
) -> dict[str, History]:
    """Return every run's history by its name.

    Args:
        path, tags, unit, patterns, bytes_per_token: As for ``read_history``.
        run: Only this one.
        names: Instead of tags, unit and bytes_per_token.

    Returns:
        Run to history, in the order in which they are found; {"": history} of a source that names
        no run.

    Raises:
        InputError: As for ``read_history``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.csv"
        ...     _ = file.write_text("run,step,loss\\na,1,3\\nb,1,4\\n")
        ...     list(read_histories(file))
        ['a', 'b']
    """
    path = Path(path)
    names = names or Names(tags, unit, bytes_per_token)
    for pattern in patterns:
        compiled(pattern)
    if path.is_dir():
        logs = read_folder(path, names)
    elif not path.is_file():
        what = (
            "what is no regular file (a pipe is read once, a history twice)"
            if path.exists()
            else "standard input, which is read once, and a history twice: write it to a file"
            if str(path) == "-"
            else "no such file"
        )
        raise InputError(f"{path}: expected a history, got {what}")
    else:
        logs = read_file(path, names, tuple(patterns))
    if len(logs) > 1:
        logs = {title: log for title, log in logs.items() if has_loss(log, names)} or {
            "": _whole(logs)
        }
    if run is not None:
        if run not in logs and [*logs] != [""]:
            raise InputError(f"run: expected one of {listed(logs)}, got {run!r}")
        if run not in logs:
            raise InputError(f"run: expected none, {path} names no runs, got {run!r}")
        logs = {run: logs[run]}
    return {
        title: history_of(log, names, f"{path}, run {title}" if len(logs) > 1 else str(path))
        for title, log in logs.items()
    }


def _whole(logs: dict[str, Log]) -> Log:
    """Return one log of runs of which none holds a loss, for the message."""
    whole = Log()
    for log in logs.values():
        whole.tables += log.tables
        whole.broken += log.broken
    return whole


def listed(runs: dict) -> str:
    """Return the names of runs for a message.

    Args:
        runs: By name.

    Example:
        >>> listed({"a": 1, "b": 2})
        'a, b'
    """
    text = ", ".join(name or "(no name)" for name in runs)
    return text if len(text) <= LISTED else f"{text[:LISTED]}..."


def add_json_lines(history: History, raw: bytes, names: Names, where: str) -> None:
    """Add rows of JSON lines to a history.

    Args:
        history: Is added to.
        raw: Whole lines.
        names: What names mean.
        where: For messages.

    Example:
        >>> history = History()
        >>> add_json_lines(history, b'{"step": 1, "loss": 3.0}\\n', Names(), "a")
        >>> history.train_loss.tolist()
        [3.0]
    """
    log = Log()
    LineReader(names, log).add(raw)
    if has_loss(log, names):
        extend(history, history_of(log, names, where, ordered=False))


def extend(history: History, more: History) -> None:
    """Append what was logged later.

    Args:
        history: Is added to.
        more: The later part.
    """
    places = len(history.train_step)
    history.train_step.extend(more.train_step)
    history.train_loss.extend(more.train_loss)
    history.events += [
        (place + places, step, measure, value) for place, step, measure, value in more.events
    ]
    history.main_set = history.main_set or more.main_set
    history.unscaled |= more.unscaled
    for note in more.notes:
        history.say(note)


def history_files(history: str | Path | None) -> list[Path]:
    """Return the files that ``read_history`` reads, for checks that no output is one of them.

    Args:
        history: A file or a folder, of which these are the files that a training run writes: a
            report may lie beside them.
    """
    if history is None:
        return []
    path = Path(history)
    return list(files_of(path)) if path.is_dir() else [path]
