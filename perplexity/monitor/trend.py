"""Where the loss is going: a plateau, or a healthy decline and where it leads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from .digest import Digest
from .findings import Finding, nats
from .noise import validation_noise
from .settings import Settings

MOST_SLOPES = 64


def plateau(digest: Digest) -> Iterator[Finding]:
    """Find a run with little to gain, by Theil and Sen's slope of the loss over log2 of the step.

    In the last doubling of the steps: the gain of another doubling, at the optimistic end of its
    95 % interval, is under a share of the loss; and the doubling before gained little as well, as a
    stable phase of a schedule is flat for about one. A run that never learnt, and weights that do
    not change (a validation loss that stays the same, a learning rate of 0), show sooner.

    Wrong in a long stable phase with little left to learn until the rate is lowered: that is why it
    is a warning.
    """
    found = _frozen(digest) or _flat_losses(digest)
    if found is None:
        return
    measure, since, level, gain, optimistic = found
    stands = f"the {measure} loss stands at {level:.3f}: "
    if math.isnan(gain):
        how = "it has not changed in any digit, as if the weights did not"
    elif gain >= 0:
        how = (
            f"another doubling of the steps would gain {nats(gain)} (at most "
            f"{nats(max(0.0, optimistic))})"
        )
    else:
        how = f"it rises by {nats(-gain)} a doubling of the steps, if anything"
    yield Finding(
        "plateau",
        "warning",
        stands + how,
        _plateau_advice(digest, since),
        {"gain_per_doubling": None if math.isnan(gain) else gain, "loss": level},
        first_step=since,
        last_step=digest.last_step,
    )


# What a plateau shows: measure, since which step, level, gain of another doubling, and that gain at
# its most optimistic.
Flat = tuple[str, float, float, float, float]


def _frozen(digest: Digest) -> Flat | None:
    """Return weights that do not change: validation equal to the last digit, or a rate of 0."""
    s = digest.settings
    last = [e for e in digest.evaluations[-s.frozen_evaluations :] if e.loss != 0]
    if len(last) == s.frozen_evaluations and len({e.loss for e in last}) == 1:
        points = [piece for piece in digest.pieces() if piece.first >= last[0].step]
        trained = len(points) > 1 and len({piece.mean for piece in points}) > 1
        fell = digest.evaluations[0].loss != last[0].loss
        # Where few digits are logged, losses are equal by rounding.
        digits = any(round(e.loss, 3) != e.loss for e in digest.evaluations)
        if trained and fell and digits:
            return "validation", last[0].step, last[0].loss, math.nan, math.nan
    if digest.learning_rate and digest.learning_rate[-1][1] == 0:
        since = digest.learning_rate[-1][0]
        after = [piece for piece in digest.pieces() if piece.first > since]
        if len(digest.learning_rate) > 1 and sum(piece.count for piece in after) >= s.frozen_points:
            level = float(np.median([piece.mean for piece in after]))
            return "training", since, level, 0.0, 0.0
    return None


def _flat_losses(digest: Digest) -> Flat | None:
    s = digest.settings
    # Validation text is the same each time: its curve shows sooner than the batches do whether
    # anything is gained.
    steps, losses = _late_evaluations(digest)
    found = (
        None if _gained_before(digest, validation=True) else _flat("validation", steps, losses, s)
    )
    if found is not None or _gains(steps, losses, s) or _validation_gains(digest):
        return found
    stuck = _stuck(digest)
    if stuck is not None or _gained_before(digest, validation=False):
        return stuck
    return _flat("training", *_binned(digest), s) or _no_gain(digest)


def _validation_gains(digest: Digest) -> bool:
    """Return whether the last evaluations are below those at half of the run, by medians of three."""
    s, evaluations = digest.settings, digest.evaluations
    if len(evaluations) < s.evaluations_in_a_row:
        return False
    losses = np.array([e.loss for e in evaluations])
    distance = [abs(e.step - evaluations[-1].step / 2) for e in evaluations]
    middle = max(1, min(int(np.argmin(distance)), len(losses) - 2))
    before, now = np.median(losses[middle - 1 : middle + 2]), np.median(losses[-3:])
    least = max(s.plateau_gain * abs(now), 2 * validation_noise(losses, s))
    return bool(before - now > least)


def _gained_before(digest: Digest, *, validation: bool) -> bool:
    """Return whether the doubling of the steps before the last one gained: too early to judge."""
    s, last = digest.settings, digest.last_step
    if validation:
        at = [(e.step, e.loss) for e in digest.evaluations]
    else:
        at = [(piece.first, piece.mean) for piece in digest.pieces()]
    early = [loss for step, loss in at if last / 8 <= step < last / 4]
    late = [loss for step, loss in at if last / 4 <= step < last / 2]
    if not early or not late:
        return False
    gain = float(np.median(early) - np.median(late))
    error = math.hypot(*(np.std(part) / math.sqrt(len(part)) for part in (early, late)))
    return gain > max(s.plateau_before * abs(float(np.median(late))), 2 * error)


def _plateau_advice(digest: Digest, since: float) -> str:
    """By what the learning rate did: at zero, constant (no failure: a stable phase is flat),
    decayed, or not logged.
    """
    more = "more data or capacity; check that labels belong to their inputs"
    rates = [rate for _, rate in digest.learning_rate]
    if not rates:
        return f"check that the learning rate is not zero; where it is constant, a cosine or linear decay; {more}"
    if rates[-1] == 0:
        return "the learning rate is 0: nothing is learnt any more; if the schedule has not ended, mend it"
    if digest.learning_rate[-1][0] <= since:
        return (
            "the learning rate has been constant: a stable phase is flat and no failure, a cosine or linear decay often "
            f"gives the next gain; else {more}"
        )
    if rates[-1] < 0.1 * max(rates):
        return f"the learning rate has decayed to {rates[-1] / max(rates):.0%} of its peak, this run gains no more: {more}"
    return more


def theil_sen(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return the median slope of all pairs of points and the ends of its 95% interval.

    Sen 1968, equation 2.6, as ``scipy.stats.theilslopes`` computes it. By numpy alone: a training
    loop that is watched need not have scipy. The ends are NaN where every ``y`` is equal.
    """
    dx, dy = x[:, None] - x, y[:, None] - y
    slopes = np.sort(dy[dx > 0] / dx[dx > 0])
    tied = [np.unique(values, return_counts=True)[1].tolist() for values in (x, y)]
    variance = (_kendall(len(y)) - sum(map(_kendall, tied[0] + tied[1]))) * (1 / 18)
    if variance < 0:
        return float(np.median(slopes)), math.nan, math.nan
    width = NormalDist().inv_cdf(0.975) * math.sqrt(variance)
    low = max(round((len(slopes) - width) / 2) - 1, 0)
    high = min(round((len(slopes) + width) / 2), len(slopes) - 1)
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def _kendall(count: int) -> int:
    return count * (count - 1) * (2 * count + 5)


def _flat(
    measure: str, steps: np.ndarray | None, losses: np.ndarray | None, s: Settings
) -> Flat | None:
    """Return the plateau that a late part of a curve shows."""
    if steps is None or losses is None or len(np.unique(steps)) < 4:
        return None
    if math.log2(steps[-1] / steps[0]) < s.plateau_span:
        return None  # of a run that went on late: little of a doubling was seen
    steps, losses = _thinned(steps, losses)
    slope, low, high = theil_sen(np.log2(steps), losses)
    gain, optimistic = -slope, -low
    level = float(np.median(losses[-3:]))
    error = (high - low) / (2 * 1.96)
    # Under a share of the loss for certain; or no gain that stands out of the noise, where the
    # noise is small.
    certain = optimistic < s.plateau_gain * abs(level)
    lost = gain < s.plateau_errors * error and error < s.plateau_error * abs(level)
    return (measure, float(steps[0]), level, gain, optimistic) if certain or lost else None


def _thinned(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means of equal parts where the slopes of all pairs are too many."""
    if len(steps) <= MOST_SLOPES:
        return steps, losses
    parts = np.array_split(np.arange(len(steps)), MOST_SLOPES)
    means = [np.array([values[part].mean() for part in parts]) for values in (steps, losses)]
    return means[0], means[1]


def _gains(steps: np.ndarray | None, losses: np.ndarray | None, s: Settings) -> bool:
    """Return whether more is gained than on a plateau, at the pessimistic end of the interval."""
    if steps is None or losses is None or len(np.unique(steps)) < 4:
        return False
    steps, losses = _thinned(steps, losses)
    _, _, high = theil_sen(np.log2(steps), losses)
    return -high > s.plateau_gain * abs(float(np.median(losses[-3:])))


def _no_gain(digest: Digest) -> Flat | None:
    """Return the plateau of a noisy curve: the last doubling's mean beside the doubling before."""
    s, last = digest.settings, digest.last_step
    halves = []
    for begin, end in ((last / 4, last / 2), (last / 2, math.inf)):
        blocks = [
            block for block in digest.all_blocks() if block.count and begin <= block.first < end
        ]
        if len(blocks) < 4 or sum(block.count for block in blocks) < s.plateau_points / 2:
            return None
        means = np.array([block.mean for block in blocks])
        halves.append(
            (float(means.mean()), float(means.std(ddof=1)) / math.sqrt(len(means)), blocks[0].first)
        )
    (before, error_before, _), (now, error_now, first) = halves
    gain, error = before - now, math.hypot(error_before, error_now)
    if error > s.plateau_spread * abs(now) or gain > s.plateau_doubling * abs(now):
        return None
    return "training", first, now, gain, gain + 1.96 * error


def _stuck(digest: Digest) -> Flat | None:
    """Return the plateau of a run that never learnt: its last quarter is no lower than its first.

    The first twentieth is left out. The gain, with two standard errors, is under a share of the
    loss.
    """
    s = digest.settings
    whole = digest.pieces()
    pieces = whole[len(whole) // 20 :]
    quarter = len(pieces) // 4
    if digest.points < s.stuck_points or quarter < 4 or pieces[0].first > 0.2 * digest.last_step:
        return None
    means = np.array([piece.mean for piece in pieces])
    first, last = means[:quarter], means[-quarter:]
    # A run that fell at first and settled has learnt what it could.
    start = float(np.median([piece.mean for piece in whole[:3]]))
    if start - last.mean() > s.stuck_fall * abs(float(last.mean())):
        return None
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / quarter)
    gain, now = float(first.mean() - last.mean()), float(last.mean())
    if gain + 2 * error > 2 * s.plateau_gain * abs(now):
        return None
    return "training", pieces[0].first, now, gain, gain + 2 * error


def _late_evaluations(digest: Digest) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return steps and losses of the later evaluations without the last few.

    A rise at the end is no gain, but would blur the slope and hide a plateau.
    """
    s = digest.settings
    before = digest.evaluations[: -s.evaluations_in_a_row]
    late = [e for e in before if e.step >= max(0.55 * before[-1].step, 1)]
    if digest.points < s.plateau_points or len(late) < s.plateau_evaluations:
        return None, None
    return np.array([e.step for e in late]), np.array([e.loss for e in late])


def _binned(digest: Digest) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return medians of blocks over the last doubling, in bins of equal width in log2 step."""
    s = digest.settings
    last = digest.last_step
    blocks = [
        block for block in digest.all_blocks() if block.count and block.first >= max(last / 2, 1)
    ]
    if digest.points < s.plateau_points or len(blocks) < s.plateau_bins // 2:
        return None, None
    at = np.array([(block.first + block.last) / 2 for block in blocks])
    means = np.array([block.mean for block in blocks])
    edges = np.linspace(np.log2(at[0]), np.log2(at[-1]) + 1e-9, s.plateau_bins + 1)
    number = np.clip(np.searchsorted(edges, np.log2(at), side="right") - 1, 0, s.plateau_bins - 1)
    kept = [which for which in range(s.plateau_bins) if (number == which).any()]
    if len(kept) < s.plateau_bins // 2:
        return None, None
    return (
        np.array([at[number == which].mean() for which in kept]),
        np.array([np.median(means[number == which]) for which in kept]),
    )


def healthy_decline(digest: Digest, total_steps: int | None = None) -> Iterator[Finding]:
    """Fit the fall of the loss by a power law, and project it.

    L(s) = E + A·s^−α (Kaplan et al., 2020; Hoffmann et al., 2022).

    Wrong as a projection where the learning rate is about to change; the exponent is a description,
    not a promise.
    """
    blocks = [block for block in digest.all_blocks() if block.count and block.first > 0]
    if digest.points < digest.settings.least_points or len(blocks) < 6:
        return
    steps = np.array([(block.first + block.last) / 2 for block in blocks])
    losses = np.array([block.mean for block in blocks])
    late = steps >= steps[-1] / 16
    if late.sum() < 6:
        return
    steps, losses = steps[late], losses[late]
    fitted = _power_law(steps, losses)
    if fitted is None:
        return
    floor, scale, exponent = fitted
    gained = float(
        losses[: max(1, len(losses) // 8)].mean() - losses[-max(1, len(losses) // 8) :].mean()
    )
    if gained <= digest.settings.plateau_gain * abs(float(losses[-1])):
        return
    end, where = 2 * digest.last_step, "at twice the steps"
    if total_steps is not None and total_steps > digest.last_step:
        end, where = total_steps, "at the end of the budget"
    projected = floor + scale * end**-exponent
    yield Finding(
        "healthy-decline",
        "info",
        f"the training loss fell by {nats(gained)} since step {steps[0]:,.0f}, as step to the power −{exponent:.2f}; the fit "
        f"gives {projected:.3f} {where} (step {end:,.0f})",
        "nothing to do",
        {"exponent": exponent, "floor": floor, "projected": projected, "at_step": end},
        first_step=float(steps[0]),
        last_step=digest.last_step,
    )


def _power_law(steps: np.ndarray, losses: np.ndarray) -> tuple[float, float, float] | None:
    """Return (E, A, α) of least squares with E ≥ 0.

    The search over α solves for E and A at each, which cannot fail to converge.
    """
    best = None
    for exponent in np.geomspace(0.02, 2.0, 40):
        basis = steps**-exponent
        design = np.stack([np.ones_like(basis), basis], 1)
        (floor, scale), *_ = np.linalg.lstsq(design, losses, rcond=None)
        if floor < 0:
            floor, scale = 0.0, float(np.dot(basis, losses) / np.dot(basis, basis))
        residual = float(((floor + scale * basis - losses) ** 2).sum())
        if scale > 0 and (best is None or residual < best[0]):
            best = residual, float(floor), float(scale), float(exponent)
    return best and best[1:]
