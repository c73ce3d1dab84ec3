"""Tables of a run to its History: which column is which measure, the steps, what to say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from ...errors import InputError
from ..history import EVENTS, History
from ..names import SET, Memory, Names, is_bare_perplexity, is_loss, is_set, looks_like_loss
from .cells import SUMMARY, Log, Table
from .order import arrange, continued_over_epochs, numbered

THINNED = ("lr", "grad_norm", "tokens", "seconds")  # slow measures: ten thousand values draw them
MOST_THINNED = 10_000
SHOWN = 5  # names in a note
OF_PERPLEXITY = re.compile(r"(?i)ppl|perplexity")
OF_A_STEP = ("loss", "learning_rate")  # in transformers' rows, not in its summary
UNIT_APART = 0.02  # nats or bits between a loss and its perplexity's logarithm: both are rounded
LEAST_TOLD = 0.2  # a loss of less is nearly the same in bits and in nats
OF_THE_LOSS = re.compile(r"(?i)ppl|perplexity|bpb|bits.per")  # which was read

Column = tuple[np.ndarray, np.ndarray]  # values and whether there is one


def history_of(log: Log, names: Names, source: str, *, ordered: bool = True) -> History:
    """Return a run's history.

    Args:
        log: Its tables, and what was left out of them.
        names: What the names mean, and the unit.
        source: For messages.
        ordered: False where rows were added to a history before, which alone tells their order.

    Raises:
        InputError: It holds no loss, or a tag is nowhere; the message lists the names seen.
    """
    history = History(source)
    history.notes = list(log.notes)
    if names.memory is None:
        names.scale = {}
    seen = names_seen(log.tables)
    for measure, name in names.tags.items():
        if name not in seen:
            missing = f"tag: expected a name that {source} logs for {measure}, got {name!r}"
            if names.memory is None:
                raise InputError(f"{missing}{_listed(seen)}")
    strange = say_left_out(log, names, history)
    columns = _columns(log.tables, names, history)
    if not any(is_loss(measure) and there.any() for measure, (_, there) in columns.items()):
        raise InputError(nothing_read(source, log, seen, strange, history))
    has_step = any(
        found is not None and (found.measure, found.unit) == ("step", "")
        for found in map(names.reading, seen)
    )
    steps, known = _steps(log, columns, history, has_step)
    columns = {measure: column for measure, column in columns.items() if not _is_step(measure)}
    if not _is_any_loss(columns, known):
        raise InputError(nothing_read(source, log, seen, strange, history))
    _choose_main_set(columns, history, names.memory)
    _scale(columns, steps, known, names, history)
    _fill(history, steps, known, columns)
    if ordered:
        arrange(history)
    if names.memory is not None:
        names.memory.repaired |= history.repaired
    _say_unread(history, names, seen)
    return history


def names_seen(tables: list[Table]) -> dict[str, bool]:
    """Return every name in the tables, and whether it holds a number."""
    seen: dict[str, bool] = {}
    for table in tables:
        for name, numeric in table.seen.items():
            seen[name] = seen.get(name, False) or numeric
    return seen


Strange = dict[str, tuple[int, int, str]]  # by name: how many cells; line and text of the first


def _strange(tables: list[Table]) -> Strange:
    """Return the cells that are no numbers."""
    found: Strange = {}
    for table in tables:
        for name, column in table.columns.items():
            if column.first is not None:
                row, text = column.first
                count, line, said = found.get(name, (0, int(table.lines[row]), text))
                found[name] = count + column.strange, line, said
    return found


def nothing_read(
    source: str, log: Log, seen: dict[str, bool], strange: Strange, history: History
) -> str:
    """Return the message of a source without a loss: the first thing that went wrong, and names.

    Args:
        source: For the message.
        log: What was left out.
        seen: Names, and whether each holds a number.
        strange: Cells that are no numbers.
        history: Its notes say what else was left out.
    """
    problems = [f", {log.where} {line}: {why}" for line, why in log.broken[:1]]
    problems += [
        f", {log.where} {line}: expected a number for {name}, got {text}"
        for name, (_, line, text) in strange.items()
    ]
    problems += [f": {note}" for note in history.notes if "left out" in note]
    what = problems[0] if problems else ": expected a training loss or a validation loss, got none"
    candidates = [name for name in seen if looks_like_loss(name)]
    candidates = candidates or [name for name, numeric in seen.items() if numeric]
    unit = " --unit perplexity" if candidates and OF_PERPLEXITY.search(candidates[0]) else ""
    hint = f"; --tag train_loss={candidates[0]}{unit} reads it" if candidates else ""
    return f"{source}{what}{_listed(seen)}{hint if not problems else ''}"


def _listed(seen: dict[str, bool]) -> str:
    listed = ", ".join(seen)
    return f" (names seen: {listed[:300]}{'...' if len(listed) > 300 else ''})" if seen else ""


def _is_step(measure: str) -> bool:
    return measure.startswith("step")


def _is_any_loss(columns: dict[str, Column], known: np.ndarray) -> bool:
    return any((there & known).any() for measure, (_, there) in columns.items() if is_loss(measure))


def _columns(tables: list[Table], names: Names, history: History) -> dict[str, Column]:
    """Return each measure's values over all rows in nats; steps as ``step``, ``step epoch``, ..."""
    kept = [_kept(table, history) for table in tables]
    there: dict[str, None] = {}
    for table in tables:
        for name, column in table.columns.items():
            if name != SUMMARY and column.known.any():
                there.setdefault(name)
    chosen = names.chosen(
        name for name in there if not is_bare_perplexity(names.reading(name), name)
    )
    bits = _in_bits(tables, chosen, there, names, history)
    found: dict[str, Column] = {}
    steps = chosen.pop("step", [])
    for measure, entries in chosen.items():
        values, known = None, None
        for name, unit in entries:
            if unit == "nats" and measure in bits:
                unit = "bits"
            more, has = _joined(tables, kept, name)
            if unit:
                has = _above_zero(more, has, names.unit_of(unit), name, history)
                more = names.nats(more, unit, measure)
            if unit == "bits per byte" and not names.bytes_per_token:
                history.unscaled.add(measure)
            if values is None or known is None:
                values, known = more, has
                continue
            both = known & has
            if (values[both] != more[both]).any():
                history.say(
                    f"rows hold {measure} under more than one name: the first is read "
                    f"(--tag {measure}=NAME chooses)"
                )
            fresh = has & ~known
            values[fresh], known = more[fresh], known | fresh
        if values is not None and known is not None:
            found[measure] = values, known
    for kind in dict.fromkeys(unit for _, unit in steps):
        of = [_joined(tables, kept, name) for name, unit in steps if unit == kind]
        found[f"step {kind}".strip()] = _one_step(of, kind, found)
    return found


def _in_bits(
    tables: list[Table],
    chosen: dict[str, list[tuple[str, str]]],
    there: Iterable[str],
    names: Names,
    history: History,
) -> set[str]:
    """Return the losses that are bits: the perplexity logged beside each is 2 to its power.

    What one loss shows holds for those that show nothing: a program logs in one unit.
    """
    losses = [m for m, entries in chosen.items() if is_loss(m) and entries[0][1] == "nats"]
    if names.unit != "nats" or not losses:
        return set()
    perplexities: dict[str, list[str]] = {}
    for name in there:
        found = names.reading(name)
        if found is not None and found.unit == "perplexity":
            perplexities.setdefault(found.measure, []).append(name)
    shown: dict[str, str] = {}
    for measure in losses:
        for name, _ in chosen[measure]:
            for other in perplexities.get(measure, ()):
                unit = _unit_beside(tables, name, other)
                if unit is not None:
                    shown[measure] = "nats" if shown.get(measure) == "nats" else unit
    units = set(shown.values())
    bits = {m for m in losses if shown.get(m, "bits" if units == {"bits"} else "") == "bits"}
    if names.memory is not None and not units:
        bits = names.memory.bits or set()
    elif names.memory is not None:
        names.memory.stale |= names.memory.bits is not None and names.memory.bits != bits
        names.memory.bits = bits
    if bits:
        history.say("losses are bits: the perplexity beside them is 2 to their power")
    return bits


def _unit_beside(tables: list[Table], loss: str, perplexity: str) -> str | None:
    """Return the unit of a loss by the perplexity in the same rows, or None where it is neither."""
    apart: list[np.ndarray] = []
    for table in tables:
        if loss in table.columns and perplexity in table.columns:
            values, of = table.columns[loss], table.columns[perplexity]
            rows = values.known & of.known & (of.values > 1) & np.isfinite(of.values)
            # What is rounded to 1.0 or is near 0 tells nothing.
            rows &= values.values > LEAST_TOLD
            logs = np.log(of.values[rows])
            both = [values.values[rows] - logs, values.values[rows] - logs / math.log(2)]
            apart.append(np.abs(np.stack(both)))
    if not apart or not (away := np.concatenate(apart, axis=1)).size:
        return None
    nats, bits = np.median(away, axis=1)
    return "nats" if nats < UNIT_APART else "bits" if bits < UNIT_APART else None


def _above_zero(
    values: np.ndarray, known: np.ndarray, unit: str, name: str, history: History
) -> np.ndarray:
    """Return which values count: a perplexity of 0 or less is none."""
    if unit != "perplexity" or not (wrong := known & (values <= 0)).any():
        return known
    at = int(np.argmax(wrong))
    cell = "1 cell" if wrong.sum() == 1 else f"{int(wrong.sum()):,} cells"
    history.say(f"expected perplexities above 0 for {name}, got {values[at]:g}; {cell} left out")
    return known & ~wrong


def _kept(table: Table, history: History) -> np.ndarray | None:
    """Return which rows count: transformers' summary of the whole run does not. None: all."""
    summary = table.columns.get(SUMMARY)
    if summary is None or not (summary.known.any() or summary.strange):
        return None
    whole = summary.known
    for name in OF_A_STEP:  # a log of tokens a second has the time in each row
        if name in table.columns:
            whole = whole & ~table.columns[name].known
    if not whole.any():
        return None
    history.say(f"a summary of the whole run is left out ({SUMMARY})")
    return ~whole


def _joined(tables: list[Table], kept: list[np.ndarray | None], name: str) -> Column:
    values, known = [], []
    for table, keep in zip(tables, kept, strict=True):
        column = table.columns.pop(name, None)
        count = len(table) if keep is None else int(keep.sum())
        if column is None:
            values.append(np.full(count, math.nan))
            known.append(np.zeros(count, bool))
        elif keep is None:
            values.append(column.values)
            known.append(column.known)
        else:
            values.append(column.values[keep])
            known.append(column.known[keep])
    if len(values) == 1:
        return values[0], known[0]
    return np.concatenate(values), np.concatenate(known)


def _one_step(of: list[Column], kind: str, others: dict[str, Column]) -> Column:
    """Return one step of several names: the first that most rows have, and another's where the two
    never differ.

    A name that a loss's rows never have gives way to one that every loss has.
    """
    rows = len(of[0][0])
    best = max(int(known.sum()) for _, known in of)
    place = next(at for at, (_, known) in enumerate(of) if 2 * known.sum() >= min(best, rows))
    losses = [has for measure, (_, has) in others.items() if is_loss(measure)]
    if any(has.any() and not (has & of[place][1]).any() for has in losses):
        whole = (
            at
            for at, (_, known) in enumerate(of)
            if not any((has & ~known).any() for has in losses)
        )
        place = next(whole, place)
    values, known = of[place][0].copy(), of[place][1].copy()
    for at, (more, has) in enumerate(of):
        both = known & has
        if at != place and not (kind or (more[both] != values[both]).any()):
            fresh = has & ~known
            values[fresh], known = more[fresh], known | fresh
    return values, known


def _steps(log: Log, columns: dict[str, Column], history: History, has_step: bool) -> Column:
    """Return each row's step; what stands in for one is said. ``has_step``: there is a name for it,
    of which a cell that is no number does not make the rows' numbers the steps.
    """
    rows = len(next(iter(columns.values()))[0])
    losses = np.zeros(rows, bool)
    train = np.zeros(rows, bool)
    for measure, (_, there) in columns.items():
        if is_loss(measure):
            losses |= there
        if measure == "train_loss":
            train = there
    steps, known = columns.get("step", (np.empty(0), np.zeros(0, bool)))
    epoch = columns.get("step epoch")
    if known.any() and (known & losses).any():
        without = bool((losses & ~known).any())
        bad = known & ~np.isfinite(steps)
        if bad.any():
            at = int(np.argmax(bad))
            history.say(
                f"{log.where} {_line(log, at)}: expected a finite step, got {steps[at]}; left out"
            )
            log.broken.insert(0, (_line(log, at), f"expected a finite step, got {steps[at]}"))
            known = known & ~bad
        if without and epoch is not None:
            steps, known = _carried(steps, known, losses & ~train & epoch[1], history)
            without = bool((losses & ~known).any())
        if without:
            history.say("rows without a step are left out")
        if epoch is not None:
            steps = continued_over_epochs(steps, known & losses, *epoch, history)
        return steps, known
    return numbered(columns, losses, train, history, has_step)


def _carried(
    steps: np.ndarray, known: np.ndarray, rows: np.ndarray, history: History
) -> tuple[np.ndarray, np.ndarray]:
    """Return steps where evaluations that have an epoch alone take the step of the row before."""
    before = np.maximum.accumulate(np.where(known, np.arange(len(known)), -1))
    lost = rows & ~known & (before >= 0)
    if not lost.any():
        return steps, known
    steps = steps.copy()
    steps[lost] = steps[before[lost]]
    history.repaired = True
    history.say("evaluations that have an epoch and no step take the step of the row before")
    return steps, known | lost


def _line(log: Log, row: int) -> int:
    for table in log.tables:
        if row < len(table):
            return int(table.lines[row])
        row -= len(table)
    return row + 1


def _choose_main_set(columns: dict[str, Column], history: History, memory: Memory | None) -> None:
    """Make the first set with a name the main one where none is without; test text comes last."""
    sets = [measure for measure in columns if is_set(measure)]
    if memory is not None and memory.main_set is not None:
        first = f"{SET}{memory.main_set}"
        memory.stale |= bool(memory.main_set) and "val_loss" in columns
        if not memory.main_set or first not in columns:
            history.main_set = memory.main_set
            return
    elif "val_loss" in columns or not sets:
        if memory is not None and "val_loss" in columns:
            memory.main_set = ""
        return
    else:
        first = min(sets, key=lambda measure: measure == f"{SET}test")
    history.main_set = first.removeprefix(SET)
    if memory is not None:
        memory.main_set = history.main_set
    columns["val_loss"] = columns.pop(first)
    if first in history.unscaled:
        history.unscaled = (history.unscaled - {first}) | {"val_loss"}


def _scale(
    columns: dict[str, Column],
    steps: np.ndarray,
    known: np.ndarray,
    names: Names,
    history: History,
) -> None:
    """Scale losses in bits per byte of unknown bytes to the training loss of their beginning."""
    if "train_loss" in history.unscaled:
        history.say("training losses are in bits per byte: give --bytes-per-token for nats a token")
    train, there = columns.get("train_loss", (np.empty(0), np.zeros(0, bool)))
    there = there & known if len(there) else there
    for measure in sorted(history.unscaled & columns.keys() - {"train_loss"} - names.scale.keys()):
        values, has = columns[measure]
        rows = np.flatnonzero(has & known & np.isfinite(values) & (values > 0))[:3]
        factors = []
        for row in rows if there.any() and "train_loss" not in history.unscaled else ():
            near = np.flatnonzero(there & (np.abs(steps - steps[row]) <= 0.05 * abs(steps[row])))
            near = near if len(near) else np.flatnonzero(there)[:1]
            factors.append(float(np.nanmedian(train[near])) / float(values[row]))
        factor = float(np.median(factors)) if factors else math.nan
        name = "" if measure == "val_loss" else f" of {measure.removeprefix(SET)}"
        if math.isfinite(factor) and factor > 0:
            columns[measure] = values * factor, has
            names.scale[measure] = factor
            history.say(
                f"validation losses{name} are in bits per byte and no --bytes-per-token was given: "
                "they are scaled to the training loss of the first 3 evaluations; "
                "their trend counts, their level does not"
            )
        else:
            history.repaired = True
            history.say(
                f"validation losses{name} are in bits per byte and no --bytes-per-token was given: "
                "they are nats a byte"
            )


def _fill(
    history: History, steps: np.ndarray, known: np.ndarray, columns: dict[str, Column]
) -> None:
    """Columns into a history, without a loop over the rows that hold a training loss alone."""
    train, has = columns.get("train_loss", (np.empty(len(steps)), np.zeros(len(steps), bool)))
    has = has & known
    history.train_step.frombytes(steps[has].tobytes())
    history.train_loss.frombytes(train[has].tobytes())
    before = np.cumsum(has)
    events = []
    others = [measure for measure in EVENTS if measure in columns]
    for order, measure in enumerate([*others, *(m for m in columns if is_set(m))]):
        values, there = columns[measure]
        rows = np.flatnonzero(there & known)
        if measure in THINNED and len(rows) > MOST_THINNED:
            kept = np.zeros(len(rows), bool)
            kept[:: len(rows) // MOST_THINNED] = kept[-1] = True
            rows = rows[kept | ~np.isfinite(values[rows])]
        found = zip(
            rows.tolist(),
            before[rows].tolist(),
            steps[rows].tolist(),
            values[rows].tolist(),
            strict=True,
        )
        events += [(row, order, place, step, measure, value) for row, place, step, value in found]
    events.sort(key=lambda event: event[:2])
    history.events += [event[2:] for event in events]


def say_left_out(log: Log, names: Names, history: History) -> Strange:
    """Say which lines and which cells of measures could not be read; returns the cells.

    Args:
        log: What was read.
        names: What names mean.
        history: Takes the notes.
    """
    strange = _strange(log.tables)
    _say_broken(log, history)
    _say_strange(log, names, strange, history)
    return strange


def _say_broken(log: Log, history: History) -> None:
    for line, why in log.broken[:1]:
        more = f" (and {log.broken_count - 1:,} more)" if log.broken_count > 1 else ""
        history.say(f"{log.where} {line}{more}: {why}; left out")


def _say_strange(log: Log, names: Names, strange: Strange, history: History) -> None:
    """Say which cells of measures are no numbers."""
    for name, (count, line, text) in strange.items():
        if names.reading(name) is None:
            continue
        cell = "1 cell" if count == 1 else f"{count:,} cells"
        history.say(
            f"{log.where} {line}: expected a number for {name}, got {text}; {cell} left out"
        )


def _say_unread(history: History, names: Names, seen: dict[str, bool]) -> None:
    """Name columns that look like losses and were not read, with the tag that would read them."""
    unread = [
        name
        for name, numeric in seen.items()
        if numeric
        and names.reading(name) is None
        and looks_like_loss(name)
        and name not in names.tagged
        and not OF_THE_LOSS.search(name)
    ]
    if not unread:
        return
    shown = [f"{name} (--tag {_tag(name)})" for name in unread[:SHOWN]]
    more = f" and {len(unread) - SHOWN:,} more" if len(unread) > SHOWN else ""
    history.say(f"not read, though they look like losses: {', '.join(shown)}{more}")


def _tag(name: str) -> str:
    is_validation = any(word in name.lower() for word in ("val", "eval", "test", "dev"))
    return f"{'val_loss' if is_validation else 'train_loss'}={name}"
