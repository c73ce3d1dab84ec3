"""Two runs at equal tokens or steps: how far apart their losses are, and whether that is noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import InputError
from .history import History
from .names import SET
from .noise import validation_noise
from .settings import Settings

Axis = Literal["tokens", "step"]
Curve = tuple[np.ndarray, np.ndarray]  # places, which rise, and losses
# The part of the common range, at its end, whose training losses are compared; where that holds
# fewer than LEAST, the last ones.
END = 0.2
LEAST = 20
# Means of so many parts of it are taken for independent, however the losses hang together
# (batch means; Law, Simulation Modeling and Analysis, 9.5.3). Of losses whose noise outlasts a
# twentieth of the range still nine intervals in ten hold the difference.
PARTS = 6
STUDENT = 2.776  # 0.975 quantile of Student's t with 4 degrees of freedom: 6 means about a line
NORMAL = 1.96
LAST = 3  # validation losses whose mean is compared
PAIRED = 0.9  # share of the points that both runs logged at the same place, to be compared in pairs


@dataclass(frozen=True)
class Difference:
    """How much larger the second run's loss is, at the end of what both runs have.

    Args:
        curve: "training", "validation", or "validation/SET".
        first: loss of the first run, in nats a token.
        second: loss of the second.
        difference: ``second - first``.
        low: lower end of its 95 % interval, by the noise within the runs.
        high: upper end.
        points: losses of each run, at most, that were compared.
        paired: whether both logged training losses at the same places, so that noise which they
            share cancels.
        larger_than_noise: whether the interval leaves out 0.
    """

    curve: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    points: int
    paired: bool
    larger_than_noise: bool


@dataclass(frozen=True)
class RunComparison:
    """Two runs on one axis; see ``compare_runs``.

    Args:
        by: "tokens" or "step".
        start: where both runs have begun.
        end: where the shorter one ends.
        differences: of training, and of each validation set that both have.
        reached: where the better run had the other's last loss, by curve.
        notes: what was left out.
    """

    by: Axis
    start: float
    end: float
    differences: list[Difference]
    reached: dict[str, float]
    notes: list[str]

    def in_words(self, first: str, second: str) -> list[str]:
        """Return a line for each loss that one run reached earlier than the other.

        Args:
            first: name of the first run.
            second: name of the second.
        """
        lines = []
        for found in self.differences:
            place = self.reached.get(found.curve)
            if place is not None:
                earlier, later = (second, first) if found.difference < 0 else (first, second)
                at = (
                    f"after {place:,.0f} tokens" if self.by == "tokens" else f"at step {place:,.0f}"
                )
                share = f", {place / self.end:.0%} of the way" if self.end > 0 else ""
                lines.append(
                    f"{earlier} reached the last {found.curve} loss of {later} {at}{share}"
                )
        return lines


def compare_runs(first: History, second: History, by: str | None = None) -> RunComparison:
    """Compare two runs where both have equal tokens, or equal steps.

    Training: the means of the last fifth of the common range, each with the standard error of six
    batch means about a straight line; where both runs logged at the same places, the mean of the
    differences there. Validation: the mean of the last three losses, each with the noise that its
    run shows about its curve. The intervals are of the noise within these two runs: runs that
    differ in nothing but their seed may lie further apart.

    Args:
        first: the run that is compared with.
        second: the other one.
        by: "tokens" or "step"; None (default) takes tokens where both runs logged them.

    Returns:
        The differences at the end of the range that both have.

    Raises:
        InputError: a run has no tokens where ``by`` asks for them, or the two have no loss in common.

    Example:
        >>> runs = History("a"), History("b")
        >>> for step in range(1, 201):
        ...     for run, floor in zip(runs, (2.0, 1.9)):
        ...         run.add(step, {"train_loss": floor + 3 / step})
        >>> comparison = compare_runs(*runs)
        >>> round(comparison.differences[0].difference, 3)
        -0.1
    """
    axis, notes = common_axis([first, second], by)
    one, other = curves_of(first, axis), curves_of(second, axis)
    for run in (first, second):
        if run.unscaled:
            notes.append(f"{run.source}: losses in bits per byte need --bytes-per-token to compare")
    shared = [name for name in one if name in other]
    ends = [
        (max(one[name][0][0], other[name][0][0]), min(one[name][0][-1], other[name][0][-1]))
        for name in shared
    ]
    ends = [(start, end) for start, end in ends if start <= end]
    over = "steps" if axis == "step" else "tokens"
    if not ends:
        raise InputError(
            f"{second.source}: expected a loss over the same {over} as one of {first.source}, got none"
        )
    differences, reached = [], {}
    for name in shared:
        judge = _training if name == "training" else _validation
        found = judge(name, one[name], other[name])
        if found is None:
            notes.append(f"{name}: too few losses of both runs over the same {over} to compare")
            continue
        differences.append(found)
        if found.larger_than_noise:
            better, target = (other, found.first) if found.difference < 0 else (one, found.second)
            place = _reaches(better[name], target, smooth=name == "training")
            if place is not None:
                reached[name] = place
    start, end = float(min(start for start, _ in ends)), float(max(end for _, end in ends))
    return RunComparison(axis, start, end, differences, reached, notes)


def compare_with_first(
    runs: dict[str, History], by: str | None = None
) -> tuple[list[tuple[str, str, RunComparison]], list[str]]:
    """Compare the first of several runs with each of the others, all on one axis.

    Args:
        runs: their histories by name.
        by: "tokens" or "step"; None (default) takes tokens where all logged them.

    Returns:
        The first run's name, another's, and their comparison, for each other run; and notes.

    Raises:
        InputError: as of ``compare_runs``.
    """
    axis, notes = common_axis(list(runs.values()), by)
    (first, one), *others = runs.items()
    return [(first, name, compare_runs(one, other, axis)) for name, other in others], notes


def common_axis(runs: list[History], by: str | None = None) -> tuple[Axis, list[str]]:
    """Return the axis that runs can be compared on: tokens where all logged them.

    Args:
        runs: their histories.
        by: "tokens" or "step" asks for that one.

    Returns:
        The axis, and a note where it is steps for want of tokens.

    Raises:
        InputError: ``by`` is no axis, or "tokens" where a run has none; or one run has logged steps
            and another only numbers of its rows.
    """
    if by not in (None, "tokens", "step"):
        raise InputError(f"by: expected tokens or step, got {by!r}")
    without = [run.source for run in runs if _tokens(run) is None]
    if by == "tokens" and without:
        raise InputError(f"by: expected step, since {without[0]} has no tokens, got tokens")
    if by == "step" or without:
        logged = [run.source for run in runs if not run.numbered]
        numbered = [run.source for run in runs if run.numbered]
        if logged and numbered:
            raise InputError(
                f"{numbered[0]}: expected logged steps, as {logged[0]} has, got none: its rows or "
                "epochs are numbered, and do not compare with steps"
            )
    if by == "step" or not without:
        return "step" if by == "step" else "tokens", []
    return "step", [f"compared by step: {without[0]} has no tokens"]


def _tokens(run: History) -> Curve | None:
    """Return steps and the tokens seen until each; None where fewer than two were logged."""
    steps, tokens = run.of("tokens")
    keep = np.isfinite(tokens)
    steps, tokens = _as_it_stands(steps[keep], tokens[keep])
    return (steps, tokens) if len(steps) > 1 and tokens[-1] > tokens[0] else None


def _in_tokens(known: Curve, steps: np.ndarray) -> np.ndarray:
    """Return the tokens at steps; before the first that is known, at the mean rate."""
    at, tokens = known
    rate = (tokens[-1] - tokens[0]) / (at[-1] - at[0])
    outside = np.minimum(steps - at[0], 0) + np.maximum(steps - at[-1], 0)
    return np.interp(steps, at, tokens) + rate * outside


def _as_it_stands(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Leave out what was logged again after the steps went back."""
    later = np.minimum.accumulate(np.append(steps[1:], np.inf)[::-1])[::-1]
    keep = steps < later
    return steps[keep], values[keep]


def curves_of(run: History, axis: Axis) -> dict[str, Curve]:
    """Return a run's losses that are known in nats, by curve, over tokens or steps.

    Args:
        run: its history.
        axis: "tokens", which the run must have logged, or "step".

    Returns:
        "training", "validation" and "validation/SET" to (places, losses); what was replaced after
        steps went back is left out.
    """
    known = _tokens(run) if axis == "tokens" else None
    named = {"training": run.arrays()}
    if "train_loss" in run.unscaled:
        named.clear()
    for name in run.sets():
        if ("val_loss" if name == run.main_set else SET + name) in run.unscaled:
            continue  # their level is not known
        named[f"validation/{name}" if name else "validation"] = run.validation[name]
    made = {}
    for name, (steps, losses) in named.items():
        keep = np.isfinite(losses)
        steps, losses = _as_it_stands(steps[keep], losses[keep])
        if len(steps):
            made[name] = (steps if known is None else _in_tokens(known, steps), losses)
    return made


def _difference(
    name: str, ends: tuple[float, float], made: tuple[float, float], points: int, paired: bool
) -> Difference:
    """Make a difference of the two losses ``ends`` from (difference, half width of its interval)."""
    middle, half = made
    larger = math.isfinite(half) and abs(middle) > half
    return Difference(name, *ends, middle, middle - half, middle + half, points, paired, larger)


def _training(name: str, one: Curve, other: Curve) -> Difference | None:
    start, end = max(one[0][0], other[0][0]), min(one[0][-1], other[0][-1])
    begin = max(start, end - END * (end - min(start, 0.0)))
    for places, _ in (one, other):  # a run of few points: further back
        begin = min([begin, *places[(places >= start) & (places <= end)][-LEAST:][:1]])
    parts = []
    for places, losses in (one, other):
        inside = (places >= begin) & (places <= end)
        parts.append((places[inside], losses[inside]))
    centre = (begin + end) / 2
    ends = [_level(*part, centre) for part in parts]
    if any(found is None for found in ends):
        return None
    (a, error_a), (b, error_b) = ends  # type: ignore[misc]
    points = max(len(part[0]) for part in parts)
    common, at_a, at_b = np.intersect1d(parts[0][0], parts[1][0], return_indices=True)
    if len(common) >= PAIRED * points:
        found = _level(common, parts[1][1][at_b] - parts[0][1][at_a], centre)
        if found is not None:
            middle, error = found
            return _difference(name, (a, a + middle), (middle, STUDENT * error), len(common), True)
    half = STUDENT * math.hypot(error_a, error_b)
    return _difference(name, (a, b), (b - a, half), points, False)


def _level(places: np.ndarray, values: np.ndarray, centre: float) -> tuple[float, float] | None:
    """Return a straight line's value at ``centre``, and its standard error; None of too few."""
    if len(values) < 2 * PARTS or places[-1] <= places[0]:
        return None
    slope, _ = np.polyfit(places - centre, values, 1)
    about = values - slope * (places - centre)
    means = [part.mean() for part in np.array_split(about, PARTS)]
    return float(about.mean()), float(np.std(means, ddof=2)) / math.sqrt(PARTS)


def _validation(name: str, one: Curve, other: Curve) -> Difference | None:
    """Compare at the first run's last places that the second's cover, by straight lines between."""
    inside = (one[0] >= other[0][0]) & (one[0] <= other[0][-1])
    places, losses = one[0][inside][-LAST:], one[1][inside][-LAST:]
    if not len(places):
        return None
    others = np.interp(places, *other)
    settings = Settings()
    noise = math.hypot(*(validation_noise(losses, settings) for _, losses in (one, other)))
    half = NORMAL * noise / math.sqrt(len(places))
    a, b = float(losses.mean()), float(others.mean())
    return _difference(name, (a, b), (b - a, half), len(places), False)


def _reaches(curve: Curve, target: float, *, smooth: bool) -> float | None:
    """Return the first place from which on a curve's mean stays at or below a loss."""
    places, losses = curve
    if smooth:
        size = max(1, len(losses) // 50)
        count = len(losses) // size * size
        losses = losses[:count].reshape(-1, size).mean(1)
        places = places[:count].reshape(-1, size).mean(1)
    above = np.flatnonzero(losses > target)
    if len(above) == 0 or above[-1] + 1 >= len(losses):
        return None
    last = int(above[-1])
    share = (losses[last] - target) / (losses[last] - losses[last + 1])
    return float(places[last] + share * (places[last + 1] - places[last]))
