"""The order of a history: rows by step, restarts as they were, writers of one run as one."""

from __future__ import annotations

from array import array

import numpy as np

from ..history import History
from ..names import is_loss

NO_LOSS = -1.0  # what the ranks of a pipeline print that do not hold its last stage
MOST_WRITERS = 64  # ranks that print the same steps


def continued_over_epochs(
    steps: np.ndarray,
    rows: np.ndarray,
    epochs: np.ndarray,
    known: np.ndarray,
    history: History,
) -> np.ndarray:
    """Return steps that count on where a program counts from 0 in each epoch.

    Args:
        steps, epochs: (N,) as logged.
        rows: (N,) which rows hold a loss at a step.
        known: (N,) which rows hold an epoch.
        history: Takes the note.

    Steps are taken for those of an epoch where they go back exactly where a new epoch begins.
    """
    at = np.flatnonzero(rows & known & np.isfinite(epochs))
    if len(at) < 4:
        return steps
    here, whole = steps[at], np.floor(epochs[at])
    back = np.flatnonzero(np.diff(here) < 0) + 1
    if not len(back) or not np.array_equal(back, np.flatnonzero(np.diff(whole) > 0) + 1):
        return steps
    rise = np.diff(here)
    stride = float(np.median(rise[rise > 0])) if (rise > 0).any() else 0.0
    if here[back].max() > here[0] + stride:  # not the beginning of an epoch
        return steps
    first = 1 if here.min() < 1 else 0
    made, offset, begin = steps.copy(), 0.0, 0
    for end in [*back.tolist(), len(at)]:
        until = at[end] if end < len(at) else len(steps)
        part = slice(0 if begin == 0 else at[begin], until)
        made[part] = steps[part] + offset
        offset += here[begin:end].max() + first
        begin = end
    history.repaired = True
    history.say("steps begin anew in each epoch: they are counted on")
    return made


def numbered(
    columns: dict[str, tuple[np.ndarray, np.ndarray]],
    losses: np.ndarray,
    train: np.ndarray,
    history: History,
    has_step: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps for rows that have none: a progress bar's count, whole epochs, an index, or the
    number of the row.

    Args:
        columns: ``step progress``, ``step batch``, ``step epoch`` and ``step index`` where logged.
        losses: (N,) which rows hold a loss.
        train: (N,) which rows hold a training loss.
        history: Takes the note.
        has_step: Rows have a step by name: theirs is broken, and their numbers are none.
    """
    of = train if train.any() else losses
    history.repaired = True
    for kind, note in (
        ("progress", "no step was logged: it is read from the progress bar"),
        ("batch", "no step was logged: batches are the steps"),
        ("epoch", "no step was logged: epochs are the steps"),
        ("index", "no step was logged: the first column, which has no name, is the step"),
    ):
        values, known = columns.get(f"step {kind}", (np.empty(0), np.zeros(0, bool)))
        if not len(values) or (losses & ~known).sum() > 0.1 * losses.sum():
            continue
        here = values[of & known]
        if not np.isfinite(here).all():
            continue
        if kind == "epoch" and (here != np.floor(here)).any():
            return _numbered_by_epoch(values, known & losses, of, history)
        if kind == "batch" and "step epoch" in columns:
            values = continued_over_epochs(values, losses & known, *columns["step epoch"], history)
            here = values[of & known]
        if (np.diff(here) > 0).all():
            history.numbered = kind == "epoch"
            history.say(note)
            return values, known
        if kind == "epoch":
            return _numbered_by_epoch(values, known & losses, of, history)
    if has_step:
        history.say("rows without a step are left out")
        return np.zeros(len(losses)), np.zeros(len(losses), bool)
    history.numbered = True
    history.say("no step was logged: rows with a loss are numbered")
    return np.maximum(np.cumsum(of), 1).astype(float), losses


def _numbered_by_epoch(
    epochs: np.ndarray, known: np.ndarray, of: np.ndarray, history: History
) -> tuple[np.ndarray, np.ndarray]:
    """Number training rows from 1; where the epoch goes back, go on from the row it goes back to."""
    history.numbered = True
    history.say("no step was logged: training losses are numbered (their epochs are rounded)")
    made = np.zeros(len(epochs))
    highest: list[float] = []  # by number, the highest epoch up to it
    count, last = 0, -np.inf
    for row in range(len(epochs)):
        epoch = epochs[row] if known[row] else last
        if of[row]:
            if epoch < last:
                count = int(np.searchsorted(highest, epoch, side="left"))
                del highest[count:]
            count += 1
            highest.append(max(epoch, highest[-1] if highest else epoch))
            last = epoch
        made[row] = max(count, 1)
    return made, known


def arrange(history: History) -> None:
    """Put a history into the order of its steps, and say what was done.

    Args:
        history: In the order of the file; is changed.

    - Steps that several writers (ranks) logged become one, with the mean of their losses.
    - Rows that are out of order are sorted. Steps that go back and are logged again are a restart
      and stay as they are.
    - What is logged apart from the training losses, as by a program that writes all of one measure
      and then all of another, is put beside the training loss of its step.
    """
    _merge_writers(history)
    _sort(history)
    _put_beside(history)


def _merge_writers(history: History) -> None:
    """Average what several writers of one run logged at the same step."""
    steps = np.array(history.train_step)
    sets = [np.array(at) for at, _ in history.validation.values()] if not len(steps) else []
    count = max((_writers(each) for each in (steps, *sets)), default=1)
    if count < 2:
        return
    of: dict[str, dict[float, list[float]]] = {}
    for step, loss in zip(history.train_step, history.train_loss, strict=True):
        of.setdefault("train_loss", {}).setdefault(step, []).append(loss)
    for _, step, measure, value in history.events:
        of.setdefault(measure, {}).setdefault(step, []).append(value)
    rows: dict[float, dict[str, float]] = {}
    for measure, found in of.items():
        for step, values in found.items():
            told = [value for value in values if value != NO_LOSS] or values
            mean = sum(told) / len(told) if is_loss(measure) else values[0]
            rows.setdefault(step, {})[measure] = mean
    history.train_step, history.train_loss, history.events = array("d"), array("d"), []
    for step in sorted(rows):
        history.add(step, rows[step])
    history.repaired = True
    history.say(f"{count} writers of one run (ranks): the losses of a step are averaged")


def _writers(steps: np.ndarray) -> int:
    """Return how many writers logged the same steps beside each other; 1 where it is one."""
    if len(steps) < 4:
        return 1
    each, counts = np.unique(steps, return_counts=True)
    count = int(np.median(counts))
    if not 2 <= count <= MOST_WRITERS or (counts == count).mean() < 0.8 or len(each) < 3:
        return 1
    ordered = np.argsort(steps, kind="stable")
    same = np.diff(steps[ordered]) == 0
    distance = np.median(np.diff(ordered)[same])
    back = int((np.diff(steps) < 0).sum())
    # Runs behind each other go back once a run.
    return count if distance <= count or back >= 3 * count else 1


def _sort(history: History) -> None:
    """Sort rows that are out of order by step."""
    if not history.train_step:
        return _sort_evaluations(history)
    steps = np.array(history.train_step)
    back = out_of_order(steps)
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


def _sort_evaluations(history: History) -> None:
    """Sort a history of evaluations alone."""
    by_measure: dict[str, list[float]] = {}
    for _, step, name, _ in history.events:
        if is_loss(name):
            by_measure.setdefault(name, []).append(step)
    back = max((out_of_order(np.array(steps)) for steps in by_measure.values()), default=0)
    steps = [step for _, step, _, _ in history.events]
    if back:
        history.events.sort(key=lambda event: event[1])
        _say_sorted(history, back, len(history.events))
    elif all(steps_rise(each) for each in by_measure.values()) and not steps_rise(steps):
        # One set after another.
        history.events.sort(key=lambda event: event[1])
        history.repaired = True


def steps_rise(steps: list[float]) -> bool:
    """Return whether no step goes back.

    Args:
        steps: In the order of the file.

    Example:
        >>> steps_rise([1, 2, 2]), steps_rise([2, 1])
        (True, False)
    """
    return bool((np.diff(np.array(steps, dtype=float)) >= 0).all())


def out_of_order(steps: np.ndarray) -> int:
    """Return how often the steps go back, 0 where that is by restarts: these log again what they
    went back over.

    Args:
        steps: (N,) in the order of the file.

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
    history.repaired = True
    history.say(
        f"steps went back {back:,} times in {rows:,} rows and none came twice: out of order, sorted by step"
    )


def _put_beside(history: History) -> None:
    """Put events that lie behind or before the training loss of their step where it is.

    An event stays where a restart explains it: the training loss goes back there, too.
    """
    if not history.events or not history.train_step:
        return
    train = np.array(history.train_step)
    places = np.array([event[0] for event in history.events])
    steps = np.array([event[1] for event in history.events])
    count = len(train)
    behind = np.append(train, np.inf)[np.minimum(places, count)]  # the next training loss
    before = np.append(-np.inf, train)[places]
    restart = behind < before
    late = (before > steps) & ~restart
    early = (behind < steps) & ~restart & (places < count)
    moved = np.flatnonzero(late | early)
    if not len(moved):
        return
    history.repaired = True
    starts = np.concatenate([[0], np.flatnonzero(np.diff(train) < 0) + 1, [count]])
    for number in moved.tolist():
        place, step = int(places[number]), steps[number]
        if late[number]:
            segment = int(np.searchsorted(starts, place, side="left")) - 1
            while segment > 0 and step < train[starts[segment]]:
                segment -= 1
            begin = starts[segment]
            end = min(int(starts[segment + 1]), place)
        else:
            segment = int(np.searchsorted(starts, place, side="right")) - 1
            begin, end = place, int(starts[segment + 1])
        places[number] = begin + np.searchsorted(train[begin:end], step, side="right")
    order = np.argsort(places, kind="stable")
    history.events = [
        (int(places[number]), *history.events[number][1:]) for number in order.tolist()
    ]
