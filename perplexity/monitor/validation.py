"""Signals of one set's validation losses, and of the training loss beside them.

Each is a pure function of a run's ``Digest``; its docstring names its reference, and what would
make it wrong.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..nats import exp
from .digest import Digest, Evaluated
from .findings import Finding, nats
from .noise import validation_noise
from .settings import Settings


@dataclass(frozen=True)
class Rise:
    """A rise of the validation loss: the best evaluation, and by how much the last are above it."""

    best: Evaluated
    rise: float  # nats
    how: str  # in words: over how many evaluations


def losses_of(digest: Digest) -> np.ndarray:
    """Return the validation losses [n] in nats, in the order of their steps."""
    return np.array([e.loss for e in digest.evaluations])


def _with_train(digest: Digest) -> list[Evaluated]:
    return [e for e in digest.evaluations if not math.isnan(e.near)]


# ---- overfitting and divergence: a rise above the best


def validation_rise(digest: Digest) -> Rise | None:
    """Return the rise of the last evaluations above the best, where it is larger than chance.

    Three tests, each against the noise of one evaluation. The last few all lie above the best. Or,
    where single evaluations are noisy, the mean of the last stretch lies above the mean of the best
    stretch; the lowest of many stretches is low by chance, by σ·√(2 ln m / k) for m of k
    evaluations each (the expected least of m normal means), which is taken off. Or no evaluation
    came near the first one again.
    """
    s = digest.settings
    losses = losses_of(digest)
    if len(losses) < s.least_evaluations:
        return None
    noise = validation_noise(losses, s)
    if _is_height_of_cycle(digest, losses, noise):
        return None
    for test in (_few_above, _stretch_above, _never_near):
        rise = test(digest, losses, noise)
        if rise is not None:
            return rise
    return None


def _is_height_of_cycle(digest: Digest, losses: np.ndarray, noise: float) -> bool:
    """Return whether a cyclic learning rate is as high as once before, and the loss no higher."""
    before = digest.height_before()
    if math.isnan(before):
        return False
    distance = [abs(e.step - before) for e in digest.evaluations]
    then, s = losses[int(np.argmin(distance))], digest.settings
    return bool(losses[-1] - then <= max(_floor(then, s), s.standard_errors * noise))


def _floor(level: float, s: Settings) -> float:
    return min(s.rise, s.rise_share * abs(level))


def _few_above(digest: Digest, losses: np.ndarray, noise: float) -> Rise | None:
    s, last = digest.settings, digest.settings.evaluations_in_a_row
    before = losses[:-last]
    # The lowest of many noisy losses lies below the curve: medians of three do less so.
    level = before.min()
    if len(before) > 2:
        level = np.median(np.stack([before[:-2], before[1:-1], before[2:]]), axis=0).min()
    rises = losses[-last:] - level
    rise, least = float(rises.min()), _floor(level, s)
    if len(losses) < 2 * last:
        # So few do not show their noise: each must lie above the one before, and the first of them,
        # where the curve turns, need not lie as far above the best as the others.
        if not (np.diff(rises) > 0).all() or rise <= max(least, noise):
            return None
        if rises[1] <= s.standard_errors * noise:
            return None
    elif rise <= max(least, s.standard_errors * noise):
        return None
    best = digest.evaluations[int(np.argmin(before))]
    return Rise(best, rise, f"{nats(rise)} or more above its best for {last} evaluations")


def _stretch_above(digest: Digest, losses: np.ndarray, noise: float) -> Rise | None:
    s, count = digest.settings, len(losses)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    for length in sorted({count // 10, count // 5, count // 3}):
        if length < s.stretch:
            continue
        means = (sums[length:] - sums[:-length]) / length
        before = means[: count - 2 * length + 1]
        low = int(np.argmin(before))
        rise = float(means[-1] - before[low])
        chance = noise * math.sqrt(2 * math.log(count / length) / length)
        error = noise * math.sqrt(2 / length)
        if rise - chance > max(_floor(before[low], s), s.standard_errors * error):
            best = digest.evaluations[low + int(np.argmin(losses[low : low + length]))]
            how = f"{nats(rise)} above its best, by means of {length} evaluations"
            return Rise(best, rise, how)
    return None


def _never_near(digest: Digest, losses: np.ndarray, noise: float) -> Rise | None:
    s = digest.settings
    if len(losses) < s.never_better:
        return None
    rise = float(np.median(losses[len(losses) // 2 :]) - losses[0])
    close = losses[1:].min() - losses[0]
    enough = max(_floor(losses[0], s), s.never_better_share * abs(losses[0]))
    # A model that learns falls: to stay this far above the first is no chance at 2 noises.
    if close <= enough or close <= 1.5 * noise or rise <= 2 * noise:
        return None
    how = f"{nats(close)} or more above the first evaluation in all {len(losses) - 1} after it"
    return Rise(digest.evaluations[0], rise, how)


def overfitting(digest: Digest) -> Iterator[Finding]:
    """Find validation above its best while training falls (Prechelt, Early Stopping, 1998).

    Wrong where validation is of another kind than training and moves away from it as the mix of
    training data changes, and while a cyclic learning rate that is not logged is at its height.
    """
    found = validation_rise(digest)
    if found is None:
        return
    best, last = found.best, digest.evaluations[-1]
    if _train_rose(digest, best, last):
        return
    before, now = _training(digest, best, last)
    fell = f"; training went from {before:.3f} to {now:.3f}"
    if math.isnan(before) or math.isnan(now):
        fell = "; without training losses beside it this may be a divergence as well"
    yield Finding(
        "overfitting",
        "danger",
        f"validation has been {found.how} ({best.loss:.3f} at step {best.step:,.0f}, perplexity "
        f"{exp(best.loss):,.1f}){fell}",
        f"stop, and go back to step {best.step:,.0f}; more data, a smaller model, dropout or "
        "weight decay",
        {"best_step": best.step, "best_loss": best.loss, "rise": found.rise, "measure": "val_loss"},
        first_step=best.step,
        last_step=last.step,
    )


def _training(digest: Digest, best: Evaluated, last: Evaluated) -> tuple[float, float]:
    """Return the training losses at two evaluations, NaN where none was logged near one."""
    if math.isnan(best.near) or math.isnan(last.near):
        return digest.train_at(best.step), digest.train_at(last.step)
    return best.near, last.near


def _train_rose(digest: Digest, best: Evaluated, last: Evaluated) -> bool:
    before, now = _training(digest, best, last)
    # few training losses: a rise as large as validation's counts
    if math.isnan(best.near) or math.isnan(last.near):
        return now - before > max(digest.settings.rise, last.loss - best.loss) / 2
    error = math.hypot(best.near_error, last.near_error)
    return now - before > max(digest.settings.rise, digest.settings.standard_errors * error)


def divergence(digest: Digest) -> Iterator[Finding]:
    """Find a rise of both losses. ``training.divergence`` finds one of the training loss alone.

    Wrong where the data get harder on purpose, the objective changes (a longer context, another
    mix), or a cyclic learning rate that is not logged is at its height again.
    """
    found = validation_rise(digest)
    if found is None or not _train_rose(digest, found.best, digest.evaluations[-1]):
        return
    best, last = found.best, digest.evaluations[-1]
    yield Finding(
        "divergence",
        "danger",
        f"since step {best.step:,.0f} validation rose from {best.loss:.3f} to {last.loss:.3f} and "
        "training from {:.3f} to {:.3f}".format(*_training(digest, best, last)),
        f"stop, and go back to step {best.step:,.0f}; lower the learning rate, lengthen the "
        "warm-up, clip gradients",
        {"best_step": best.step, "best_loss": best.loss, "rise": found.rise, "measure": "val_loss"},
        first_step=best.step,
        last_step=last.step,
    )


# ---- validation beside training


def _lag(e: Evaluated) -> float:
    """Return what the training loss may lag behind: its fall over 128 points, less its noise.

    Of a running average it is the fall over 1,024.
    """
    return (16 if e.near_smooth else 2) * max(0.0, e.near_fall - e.near_error)


def leakage(digest: Digest) -> Iterator[Finding]:
    """Find validation that falls below training, by more than noise, lag and a floor.

    Dropout, averaging and an easier text put validation below training by the same from the first
    evaluation on; a leak grows. So what the first evaluations show is taken off.

    Wrong where the kind of training text changes. Then re-score a sample of training text in
    evaluation mode (``train_eval_loss``).
    """
    s = digest.settings
    with_train = _with_train(digest)
    late = [e for e in with_train if e.step >= 0.9 * with_train[-1].step] if with_train else []
    last = max(with_train[-s.leak_evaluations :], late, key=len)
    if len(last) < s.leak_evaluations or last[-1].step - last[0].step < 0.05 * last[-1].step:
        return
    noise = validation_noise(losses_of(digest), s)
    before = with_train[: len(with_train) - len(last)]
    early = before[: max(2, len(with_train) // 4)]
    if len(early) < 2:
        return
    start = max(0.0, min(e.near - e.loss + e.near_error for e in early))
    margins = [
        e.near
        - e.loss
        - start
        - max(s.leak_floor + _lag(e), s.standard_errors * math.hypot(e.near_error, noise))
        for e in last
    ]
    if min(margins) <= 0:
        return
    below = min(e.near - e.loss for e in last)
    if last[-1].rescored:
        kind = "training text scored in evaluation mode"
    else:
        kind = "the training loss before it"
    grew = f", {nats(below - start)} more than at first" if start > s.leak_floor else ""
    yield Finding(
        "leakage-suspected",
        "warning",
        f"validation has been {nats(below)} or more below {kind} for {len(last)} evaluations{grew}",
        "check whether validation text is in the training data (ppl check-data); benign causes: "
        "dropout, a running average as training loss, an easier text",
        {"below": below},
        first_step=last[0].step,
        last_step=last[-1].step,
    )


def generalisation_gap(digest: Digest) -> Iterator[Finding]:
    """Find validation far above training: the size of the gap, and whether it grows.

    The mean gap of the last evaluations less two standard errors counts, so that one low
    evaluation hides nothing. A very wide gap needs one evaluation.

    Wrong where the two texts differ in kind.
    """
    s = digest.settings
    with_train = _with_train(digest)
    if not with_train:
        return
    last = with_train[-max(s.evaluations_in_a_row, min(32, len(with_train) // 5)) :]
    gaps = np.array([e.loss - e.near for e in last])
    gap = float(gaps.mean())
    least = max(s.gap, s.gap_share * last[-1].loss)
    if len(gaps) < s.evaluations_in_a_row:
        last, gap = last[-1:], float(gaps[-1])
        if gap - 4 * last[-1].near_error <= max(s.gap_single, 2 * least):
            return
    else:
        # The evaluations may share training losses, whose mean then has an error of its own.
        error = max(float(gaps.std(ddof=1)) / math.sqrt(len(gaps)), last[-1].near_error)
        if gap - 2 * error <= least:
            return
    earlier = with_train[len(with_train) // 2]
    grows = len(with_train) > 3 and gap > earlier.loss - earlier.near + s.rise
    trend = "growing" if grows else "not growing"
    count = len(last)
    over = "at the last evaluation" if count == 1 else f"over the last {count} evaluations"
    yield Finding(
        "generalisation-gap",
        "warning",
        f"validation is {nats(gap)} above training {over} (perplexity {exp(gap):,.2f} times), "
        f"{trend}",
        "more or more varied data, regularisation; check that both texts are of one kind and cut "
        "by one tokenizer",
        {"gap": gap},
        first_step=last[0].step,
        last_step=last[-1].step,
    )


# ---- single evaluations


def validation_spikes(digest: Digest) -> Iterator[Finding]:
    """Find single validation losses far above those before them.

    The validation text is the same each time: where the loss jumps it is the model that was worse,
    between two logged training losses perhaps.

    Wrong where each evaluation draws another text of few tokens; then its noise says so.
    """
    s = digest.settings
    losses = losses_of(digest)
    least = s.validation_spike_evaluations
    if len(losses) <= least:
        return
    limit = max(s.validation_spike, 1.5 * s.standard_errors * validation_noise(losses, s))
    high: list[int] = []
    excess = np.zeros(len(losses))
    values = losses.tolist()
    usual = deque(values[:least], maxlen=least)  # the last evaluations that were none
    for place in range(least, len(values)):
        excess[place] = values[place] - sorted(usual)[least // 2]
        # It begins with a jump: a loss that climbs is overfitting or divergence.
        going_on = bool(high) and high[-1] == place - 1
        if excess[place] > limit and (going_on or values[place] - values[place - 1] > limit):
            high.append(place)
        else:
            usual.append(values[place])
    if not high or high[-s.validation_spike_evaluations :] == _last(len(losses), s):
        return
    first = [at for at, before in zip(high, [-2, *high], strict=False) if at != before + 1]
    largest = int(np.argmax(excess))
    many = f"{len(first)} times" if len(first) > 1 else "once"
    yield Finding(
        "spike",
        "warning",
        f"the validation loss jumped {many}, by up to {nats(float(excess[largest]))} (at step "
        f"{digest.evaluations[largest].step:,.0f}); its text is the same each time, so the model was worse",
        "look at the gradient norm and the batches before; lower the learning rate or clip "
        "gradients; take no checkpoint from there",
        {"count": len(first), "excess": float(excess[largest]), "measure": "val_loss"},
        first_step=digest.evaluations[int(high[0])].step,
        last_step=digest.evaluations[int(high[-1])].step,
    )


def _last(count: int, s: Settings) -> list[int]:
    """Return the places of the last evaluations: if all are high the loss has not come back."""
    return list(range(count - s.validation_spike_evaluations, count))


def broken_evaluation(digest: Digest) -> Iterator[Finding]:
    """Find an evaluation that measures nothing: losses of exactly 0, or all equal.

    Wrong where a memorised validation text is logged with few digits: training is near 0 then, too.
    """
    s = digest.settings
    losses = losses_of(digest)
    if not len(losses):
        return
    near = [e.near for e in digest.evaluations if not math.isnan(e.near)]
    zero = (losses == 0).all() and (not near or min(near) > s.memorised)
    trained = len(near) > 1 and max(near) - min(near) > 0.01 * max(near)
    constant = len(losses) >= s.least_evaluations and np.ptp(losses) == 0 and trained
    if not zero and not constant:
        return
    what = "exactly 0" if zero else f"{losses[0]:g}, the same to the last digit,"
    times = "at the one evaluation" if len(losses) == 1 else f"at all {len(losses)} evaluations"
    yield Finding(
        "broken-evaluation",
        "warning",
        f"the validation loss is {what} {times}",
        "the evaluation is broken: check that its loader is not empty, that labels are not all "
        "masked, and that it scores the current weights",
        {"loss": float(losses[0])},
        first_step=digest.evaluations[0].step,
        last_step=digest.evaluations[-1].step,
    )
