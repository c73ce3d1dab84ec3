"""Signals of the training loss alone.

Each is a pure function of a run's ``Digest``; its docstring names its reference, and what would
make it wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..findings import Severity
from ..nats import exp
from .digest import Block, Digest, Spike
from .findings import Finding, nats
from .noise import about_its_curve


def non_finite(digest: Digest) -> Iterator[Finding]:
    """Find losses that are NaN or infinite, and what shows that the weights are.

    transformers logs a loss that is no number as 0.0 or as the mean of those before
    (``logging_nan_inf_filter``). So losses of exactly 0.0 from one step to the next, or beside a
    gradient norm of NaN, and gradient norms of NaN up to the run's end show lost weights. A few
    gradient norms that are no numbers are a loss scale that is being found: info.
    """
    gradients = digest.lost_gradients()
    if not math.isnan(digest.zero_from):
        what = "training losses of exactly 0.0, as some trainers log a loss that is no number"
        yield _lost(digest, "train_loss", what, digest.zero_from, digest.zeros)
    elif gradients is not None:
        first, count = gradients
        what = f"the last {count:,} gradient norms are NaN"
        yield _lost(digest, "grad_norm", what, first, count)
    for name, (count, first) in digest.non_finite.items():
        times = "once" if count == 1 else f"{count:,} times"
        what = f"{name} is NaN or infinite {times}"
        if name != "grad_norm":
            yield _lost(digest, name, what, first, count)
        elif gradients is None:
            yield _lost(digest, name, what, first, count, "info")


def _lost(
    digest: Digest,
    measure: str,
    what: str,
    first: float,
    count: int,
    severity: Severity = "danger",
) -> Finding:
    return Finding(
        "non-finite",
        severity,
        f"{what}, first at step {first:,.0f}",
        "go back to a checkpoint before it; lower the learning rate, clip gradients, look for a "
        "bad batch, check 16-bit overflow",
        {"measure": measure, "count": count},
        first_step=first,
        last_step=digest.last_step,
    )


def not_cross_entropy(digest: Digest) -> Iterator[Finding]:
    """Find losses at or below 0: those of a policy gradient or a preference, not a cross-entropy."""
    least = digest.settings.negative_share * digest.points
    none_above = digest.points >= digest.settings.evaluations_in_a_row and not digest.positive
    if not (digest.negative > least or none_above):
        return
    below = f"{digest.negative:,} are below 0" if digest.negative else "all are 0"
    yield Finding(
        "not-cross-entropy",
        "info",
        f"of {digest.points:,} training losses {below}: a cross-entropy is above 0, so the curves "
        "are not judged",
        "nothing to do for a policy-gradient or preference loss (its name is often loss, too); "
        "where it should be a cross-entropy, check that labels are not all masked",
        {"negative": digest.negative, "zeros": digest.zeros},
        first_step=digest.first_step,
        last_step=digest.last_step,
    )


# ---- spikes


def spikes(digest: Digest) -> Iterator[Finding]:
    """Find training losses in a row far above the median of those before.

    By median and MAD, outliers kept out of the baseline. After OLMo-core's and llm-foundry's
    monitors, which compare with a mean: a median does not move with what it judges.

    Wrong where the data change for good: the loss then never comes back. Single batches stand out
    in every healthy run.
    """
    sustained = _sustained_length(digest)
    single = [spike for spike in digest.spikes if spike.points < sustained]
    if single:
        worst = max(single, key=lambda spike: spike.excess)
        count = digest.spikes_seen - (len(digest.spikes) - len(single))
        batches = (
            "1 outlying batch" if count == 1 else f"{count:,} outlying batches"
        ) + " that recovered at once"
        yield Finding(
            "spike",
            "info",
            f"{batches}; the largest {nats(worst.excess)} ({worst.deviations:.0f} robust "
            "deviations) above the loss before it",
            "nothing to do; look at that batch if you are curious",
            {"points": worst.points, "excess": worst.excess, "class": "isolated"},
            first_step=worst.first,
            last_step=worst.last,
        )
    for spike in digest.spikes:
        if spike.points >= sustained:
            yield _sustained(digest, spike)


def _sustained_length(digest: Digest) -> int:
    """Return how many outliers in a row are no chance.

    Where a share q of n batches stand out singly, n · q^length is under 0.01. In text of mixed
    kinds every seventh batch may be a hard one, and five in a row come of themselves.
    """
    share = digest.single_outliers / max(1, digest.points)
    if digest.single_outliers < 10 or share >= 1:
        return digest.settings.spike_sustained
    return max(
        digest.settings.spike_sustained, math.ceil(math.log(0.01 / digest.points) / math.log(share))
    )


def _sustained(digest: Digest, spike: Spike) -> Finding:
    lasted = f"{spike.points} logged steps, up to {nats(spike.excess)} above the loss before them"
    if not spike.ended and spike.points >= digest.settings.spike_not_recovered:
        return Finding(
            "spike",
            "danger",
            f"the loss jumped at step {spike.first:,.0f} and has not come back for {lasted}",
            "go back to the checkpoint before it; skip those batches, lower the learning rate, "
            "clip gradients",
            {"points": spike.points, "excess": spike.excess, "class": "not recovered"},
            first_step=spike.first,
            last_step=spike.last,
        )
    slow = spike.points >= digest.settings.spike_not_recovered
    state = (
        "recovered slowly after" if slow else "recovered after" if spike.ended else "is up since"
    )
    return Finding(
        "spike",
        "warning",
        f"a spike {state} {lasted}",
        "look at the batches of those steps and at the gradient norm; if it comes again, lower the "
        "learning rate or clip",
        {
            "points": spike.points,
            "excess": spike.excess,
            "class": "slow" if slow else "recovered" if spike.ended else "open",
        },
        first_step=spike.first,
        last_step=spike.last,
    )


# ---- a rise


def divergence(digest: Digest) -> Iterator[Finding]:
    """Find a training loss far above its best, for an eighth of the run.

    A rise counts in nats, or as a multiple of a small loss: from 0.002 to 0.02 is one.

    Wrong where the data get harder on purpose or the objective changes, and no validation loss shows
    that the model still learns; and at the height of a cyclic learning rate that was not logged.
    """
    s = digest.settings
    pieces = digest.pieces()
    width = max(4, len(pieces) // 8)
    if digest.points < s.divergence_points or len(pieces) < 3 * width:
        return
    means = np.array([piece.mean for piece in pieces])
    counts = np.array([piece.count for piece in pieces], dtype=float)
    totals = np.concatenate([[0.0], np.cumsum(means * counts)])
    sizes = np.concatenate([[0.0], np.cumsum(counts)])
    stretches = (totals[width:] - totals[:-width]) / (sizes[width:] - sizes[:-width])
    low = int(np.argmin(stretches[:-width]))
    rise = float(stretches[-1] - stretches[low])
    # Noise grows with the loss, so the end's counts as well; its trend does not.
    ends = (means[low : low + width + 1], means[-width - 1 :])
    spread = max(about_its_curve(part) for part in ends)
    least = min(s.train_rise, s.train_rise_share * float(stretches[low]))
    if rise <= max(least, s.standard_errors * spread):
        return
    risen = means > stretches[low] + least / 2
    if not risen[-width:].all():
        return
    since = pieces[len(means) - int(np.argmin(risen[::-1]))].first if not risen.all() else math.nan
    if _validation_gains_since(digest, since):
        return
    if stretches[-1] - digest.train_at(digest.height_before()) <= least / 2:
        return  # lower than at the last height of a cyclic learning rate
    start = pieces[low].first
    yield Finding(
        "divergence",
        "danger",
        f"the training loss is {nats(rise)} above its best mean ({stretches[low]:.3f} around step "
        f"{start:,.0f}) and has been for the last {int(counts[-width:].sum()):,} logged steps",
        f"stop, and go back to step {start:,.0f}; lower the learning rate, lengthen the warm-up, "
        "clip gradients",
        {
            "best_step": start,
            "best_loss": float(stretches[low]),
            "rise": rise,
            "measure": "train_loss",
        },
        first_step=start,
        last_step=digest.last_step,
    )


def _validation_gains_since(digest: Digest, step: float) -> bool:
    """Return whether validation is lower than ever before a step, well after it.

    Then the training text became harder: a model that diverges loses on both.
    """
    if math.isnan(step) or not digest.evaluations:
        return False
    before = [e.loss for e in digest.evaluations if e.step <= step]
    last = digest.evaluations[-1]
    return bool(before) and last.step >= (step + digest.last_step) / 2 and last.loss < min(before)


# ---- text seen again


def memorised(digest: Digest) -> Iterator[Finding]:
    """Find a training loss near 0, or one that falls at once at the start of each epoch.

    Wrong where the text is really that easy: formulaic completions. Validation that is as low says
    so, down to a perplexity of 1.01, where the text holds no information.
    """
    s = digest.settings
    pieces = digest.pieces()
    last = pieces[-max(1, len(pieces) // 10) :]
    # of the last piece too, which may hold few points of a long run
    loss = max((piece.mean for piece in last), default=math.inf)
    if not math.isnan(digest.zero_from):  # these losses of 0.0 are no losses
        return
    enough = sum(piece.count for piece in last) >= s.memorised_points or len(pieces) >= 40
    if digest.points >= s.memorised_least and enough and loss < _least_loss(digest):
        yield Finding(
            "memorised",
            "warning",
            f"a training perplexity of {exp(last[-1].mean):.3f}: the text is memorised, or "
            "degenerate",
            "look at the training text: repeated lines, or too little of it; stop earlier, or "
            "train for fewer epochs",
            {"loss": last[-1].mean},
            first_step=last[0].first,
            last_step=digest.last_step,
        )
        return
    yield from _falls_by_epoch(digest, pieces)


def _least_loss(digest: Digest) -> float:
    """Return the training loss below which the text is memorised: it depends on validation."""
    s = digest.settings
    if not digest.evaluations:
        return s.memorised
    last = digest.evaluations[-1]
    above = last.loss - last.near
    return s.degenerate if math.isnan(above) or above < s.memorised_gap else 2 * s.memorised


def _falls_by_epoch(digest: Digest, pieces: list[Block]) -> Iterator[Finding]:
    s = digest.settings
    evaluations = digest.evaluations
    if evaluations and evaluations[-1].loss < evaluations[0].loss:
        return  # validation gains: what is learnt is not only remembered
    falls = _sudden_falls(digest, pieces) if digest.points >= s.epoch_points else []
    steps = [pieces[at].first - digest.first_step for at, _ in falls]
    if len(falls) < 2 or not steps[0] > 0:
        return
    # The first may be missing or hidden: the distance between two is an epoch.
    epoch = float(np.median(np.diff(steps)))
    numbers = np.array(steps) / epoch
    if (np.abs(numbers - np.round(numbers)) > s.epoch_jitter).any():
        return
    sizes = ", ".join(f"{size:.2f}" for _, size in falls[-4:])
    first = pieces[falls[0][0]].first
    yield Finding(
        "memorised",
        "warning",
        f"the training loss falls at once every {epoch:,.0f} steps, at the start of an epoch "
        f"({len(falls)} times, last by {sizes} nats): text that is seen again is remembered",
        "what is remembered is not what is learnt: evaluate on text that is not trained on, and "
        "train for fewer epochs",
        {"falls": len(falls), "epoch": epoch},
        first_step=first,
        last_step=digest.last_step,
    )


def _sudden_falls(digest: Digest, pieces: list[Block]) -> list[tuple[int, float]]:
    """Return the pieces where the training loss is lower at once, and by how much.

    The level after is compared with the level before, less what the trend on both sides explains.
    """
    s, width = digest.settings, 3
    means = np.array([piece.mean for piece in pieces])
    if len(means) < 8 * width:
        return []
    falls: list[tuple[int, float]] = []
    noise = float(np.median(np.abs(np.diff(means)))) * 1.05  # of one piece, by its neighbour
    for at in range(width + 1, len(means) - width):
        # The piece that holds the fall is of neither side.
        before, after = means[at - width - 1 : at - 1], means[at + 1 : at + 1 + width]
        fall = float(np.median(before) - np.median(after))
        trend = max(0.0, float(before[0] - before[-1]), float(after[0] - after[-1]))
        least = max(s.epoch_fall, s.epoch_share * float(np.median(before)), 3 * noise)
        if fall - 2 * trend <= least or _rate_changed(digest, pieces[at - 2], pieces[at + 1]):
            continue
        # It is between the two pieces that differ most.
        place = max(range(at - 1, at + 2), key=lambda k: float(means[k - 1] - means[k]))
        if falls and place - falls[-1][0] <= width + 1:
            falls[-1] = max(falls[-1], (place, fall), key=lambda found: found[1])
        else:
            falls.append((place, fall))
    return falls


def _rate_changed(digest: Digest, before: Block, after: Block) -> bool:
    """Return whether the learning rate was cut between two pieces: that makes the loss fall, too."""
    earlier = [rate for step, rate in digest.learning_rate if step < before.first][-1:]
    within = [rate for step, rate in digest.learning_rate if before.first <= step <= after.last]
    rates = earlier + within
    return bool(rates) and min(rates) < 0.7 * max(rates)


def restart_falls(digest: Digest) -> Iterator[Finding]:
    """Find a training loss that is lower after a restart: data that had been seen already."""
    s = digest.settings
    for restart in digest.restarts:
        enough = len(restart.after) >= 32 and not math.isnan(restart.before)
        # The ordinary decline goes on after a restart, too.
        limit = max(s.restart_fall, s.standard_errors * restart.before_error) + 2 * restart.decline
        if enough and restart.fall > limit:
            yield Finding(
                "leakage-suspected",
                "warning",
                f"after the restart at step {restart.to:,.0f} the training loss is "
                f"{nats(restart.fall)} lower within {len(restart.after)} logged steps: data that "
                "had been seen already",
                "check that the data loader continues where the checkpoint left it",
                {"fall": restart.fall},
                first_step=restart.to,
                last_step=digest.last_step,
            )
