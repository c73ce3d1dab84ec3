"""Signals: each a pure function of a run's ``Digest``, with what it looks for, its reference, and
what would make it wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from ..findings import SEVERITIES
from ..metric import exp
from .digest import MAD_TO_SIGMA, Digest, Evaluated, Spike
from .findings import Finding, nats
from .trend import healthy_decline, plateau


def _with_train(evaluations: list[Evaluated]) -> list[Evaluated]:
    return [e for e in evaluations if not math.isnan(e.near)]


def validation_noise(digest: Digest) -> float:
    """Standard deviation of a validation loss about its curve, in nats: how far it is from the
    line, in the logarithm of the step, through one before and one after.

    The larger of two robust ones (MAD): for neighbours, in the later two thirds, the last few left
    out as they are judged; and for evaluations three apart, up to the best (a loss that wanders
    hides from the first). Drawn towards ``noise_prior`` while there are few. Too large where the
    curve bends between evaluations that are far apart.
    """
    s = digest.settings
    before = digest.evaluations[: -s.evaluations_in_a_row]
    at = np.log(np.maximum([e.step for e in before], 1.0))
    losses = np.array([e.loss for e in before])
    seen, count = 0.0, 0
    if len(losses):
        best = int(np.argmin(losses)) + 1
        for apart, part in ((1, slice(len(losses) // 3, None)), (3, slice(best // 3, best))):
            off = _off_the_line(at[part], losses[part], apart)
            if len(off) >= 2:
                seen, count = (
                    max(seen, MAD_TO_SIGMA * float(np.median(np.abs(off)))),
                    max(count, len(off)),
                )
    weight = s.noise_prior_evaluations
    return math.sqrt((count * seen**2 + weight * s.noise_prior**2) / (count + weight))


def _off_the_line(at: np.ndarray, losses: np.ndarray, apart: int) -> np.ndarray:
    """What each loss is apart from the line through those ``apart`` before and after, scaled to the
    noise of one.
    """
    if len(losses) < 2 * apart + 1:
        return np.empty(0)
    left, middle, right = at[: -2 * apart], at[apart:-apart], at[2 * apart :]
    share = np.where(right > left, (middle - left) / np.maximum(right - left, 1e-12), 0.5)
    off = losses[apart:-apart] - (1 - share) * losses[: -2 * apart] - share * losses[2 * apart :]
    return off / np.sqrt(1 + share**2 + (1 - share) ** 2)


def non_finite(digest: Digest) -> Iterator[Finding]:
    """NaN or infinite losses. Never wrong; a gradient norm may be infinite for a step under loss
    scaling: info.
    """
    for name, (count, first) in digest.non_finite.items():
        yield Finding(
            "non-finite",
            "info" if name == "grad_norm" else "danger",
            first,
            digest.last_step,
            f"{name} is NaN or infinite {count} times, first at step {first:,.0f}",
            "go back to a checkpoint before it; lower the learning rate, clip gradients, look for a bad batch, "
            "check 16-bit overflow",
            {"measure": name, "count": count},
        )


def spikes(digest: Digest) -> Iterator[Finding]:
    """Training losses in a row far above the median of those before (median and MAD, outliers kept
    out of the baseline).

    After OLMo-core's and llm-foundry's monitors, which compare with a mean: a median does not move
    with what it judges. Wrong where the data change for good: the loss then never comes back.
    Single batches stand out in every healthy run.
    """
    sustained = _sustained_length(digest)
    single = [spike for spike in digest.spikes if spike.points < sustained]
    if single:
        worst = max(single, key=lambda spike: spike.excess)
        yield Finding(
            "spike",
            "info",
            worst.first,
            worst.last,
            f"{digest.spikes_seen - (len(digest.spikes) - len(single)):,} outlying batches that recovered at once; the largest "
            f"{nats(worst.excess)} ({worst.deviations:.0f} robust deviations) above the loss before it",
            "nothing to do; look at that batch if you are curious",
            {"points": worst.points, "excess": worst.excess, "class": "isolated"},
        )
    for spike in digest.spikes:
        if spike.points >= sustained:
            yield _sustained(digest, spike)


def _sustained_length(digest: Digest) -> int:
    """Outliers in a row that are no chance: where a share q of n batches stand out singly, n ·
    q^length is under 0.01.

    In text of mixed kinds every seventh batch may be a hard one, and five in a row come of
    themselves.
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
            spike.first,
            spike.last,
            f"the loss jumped at step {spike.first:,.0f} and has not come back for {lasted}",
            "go back to the checkpoint before it; skip those batches, lower the learning rate, clip gradients",
            {"points": spike.points, "excess": spike.excess, "class": "not recovered"},
        )
    slow = spike.points >= digest.settings.spike_not_recovered
    state = (
        "recovered slowly after" if slow else "recovered after" if spike.ended else "is up since"
    )
    return Finding(
        "spike",
        "warning",
        spike.first,
        spike.last,
        f"a spike {state} {lasted}",
        "look at the batches of those steps and at the gradient norm; if it comes again, lower the learning rate or clip",
        {
            "points": spike.points,
            "excess": spike.excess,
            "class": "slow" if slow else "recovered" if spike.ended else "open",
        },
    )


def validation_rise(digest: Digest) -> tuple[Evaluated, float] | None:
    """The best evaluation and by how much every one of the last few lies above it; None where they
    do not.
    """
    s = digest.settings
    evaluations = digest.evaluations
    if len(evaluations) < s.evaluations_in_a_row + 2:
        return None
    last = evaluations[-s.evaluations_in_a_row :]
    before = evaluations[: -s.evaluations_in_a_row]
    best = min(before, key=lambda e: e.loss)
    # The lowest of many noisy losses lies below the curve: medians of three do less so.
    losses = np.array([e.loss for e in before])
    level = (
        np.median(np.stack([losses[:-2], losses[1:-1], losses[2:]]), axis=0).min()
        if len(losses) > 2
        else losses.min()
    )
    rise = float(min(e.loss for e in last) - level)
    if rise <= max(s.rise, s.standard_errors * validation_noise(digest)):
        return None
    return best, rise


def overfitting(digest: Digest) -> Iterator[Finding]:
    """Validation above its best for several evaluations while training falls (Prechelt, Early
    Stopping, 1998).

    Wrong where validation is of another kind than training and moves away from it as the mix of
    training data changes, and while a cyclic learning rate is at its height again.
    """
    found = validation_rise(digest)
    if found is None:
        return
    best, rise = found
    last = digest.evaluations[-1]
    if _train_rose(digest, best, last):
        return
    before, now = _training(digest, best, last)
    fell = f"; training went from {before:.3f} to {now:.3f}"
    if math.isnan(before) or math.isnan(now):
        fell = "; without training losses beside it this may be a divergence as well"
    yield Finding(
        "overfitting",
        "danger",
        best.step,
        last.step,
        f"validation has been {nats(rise)} or more above its best ({best.loss:.3f} at step {best.step:,.0f}, perplexity "
        f"{exp(best.loss):,.1f}) for {digest.settings.evaluations_in_a_row} evaluations{fell}",
        f"stop, and go back to step {best.step:,.0f}; more data, a smaller model, dropout or weight decay",
        {"best_step": best.step, "best_loss": best.loss, "rise": rise},
    )


def _training(digest: Digest, best: Evaluated, last: Evaluated) -> tuple[float, float]:
    """Training losses at two evaluations: the means just before them, or of the few that were
    logged; NaN where none was.
    """
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
    """Both losses rise, or the training loss alone by far more than its noise and for long.

    Wrong where the data get harder on purpose, the objective changes (a longer context, another
    mix), or a cyclic learning rate is at its height again.
    """
    s = digest.settings
    found = validation_rise(digest)
    if found is not None and _train_rose(digest, found[0], digest.evaluations[-1]):
        best, last = found[0], digest.evaluations[-1]
        yield Finding(
            "divergence",
            "danger",
            best.step,
            last.step,
            f"since step {best.step:,.0f} validation rose from {best.loss:.3f} to {last.loss:.3f} and training from "
            + "{:.3f} to {:.3f}".format(*_training(digest, best, last)),
            f"stop, and go back to step {best.step:,.0f}; lower the learning rate, lengthen the warm-up, clip gradients",
            {"best_step": best.step, "rise": found[1]},
        )
        return
    blocks = [block for block in digest.all_blocks() if block.count]
    # An eighth of the run, or four blocks, at the end against the best such stretch before it.
    width = max(4, len(blocks) // 8)
    if len(blocks) < 3 * width:
        return
    means = np.array([block.mean for block in blocks])
    counts = np.array([block.count for block in blocks], dtype=float)
    totals = np.concatenate([[0.0], np.cumsum(means * counts)])
    sizes = np.concatenate([[0.0], np.cumsum(counts)])
    stretches = (totals[width:] - totals[:-width]) / (sizes[width:] - sizes[:-width])
    low = int(np.argmin(stretches[: -width or None]))
    rise = float(stretches[-1] - stretches[low])
    spread = float(np.std(np.diff(means[low : low + width + 1]))) if width > 1 else 0.0
    if (
        rise > max(s.train_rise, s.standard_errors * spread)
        and (means[-width:] > stretches[low] + s.train_rise / 2).all()
    ):
        yield Finding(
            "divergence",
            "danger",
            blocks[low].first,
            digest.last_step,
            f"the training loss is {nats(rise)} above its best mean ({stretches[low]:.3f} around step "
            f"{blocks[low].first:,.0f}) and has been for the last {int(counts[-width:].sum()):,} logged steps",
            f"stop, and go back to step {blocks[low].first:,.0f}; lower the learning rate, lengthen the warm-up, clip gradients",
            {"best_step": blocks[low].first, "rise": rise},
        )


def _lag(e: Evaluated) -> float:
    """What the training loss may lag behind: the fall over 128 logged points, less its noise; over
    1,024 in a running average.
    """
    return (16 if e.near_smooth else 2) * max(0.0, e.near_fall - e.near_error)


def leakage(digest: Digest) -> Iterator[Finding]:
    """Validation below training for long, by more than noise, the lag of the running loss, and a
    floor.

    Wrong where validation is an easier text, where dropout or a running average makes the logged
    training loss high, or where training text is scored in another way. Then re-score a sample of
    training text in evaluation mode (train_eval_loss).
    """
    s = digest.settings
    with_train = _with_train(digest.evaluations)
    late = [e for e in with_train if e.step >= 0.9 * with_train[-1].step] if with_train else []
    last = max(with_train[-s.leak_evaluations :], late, key=len)
    if len(last) >= s.leak_evaluations and last[-1].step - last[0].step >= 0.05 * last[-1].step:
        noise = validation_noise(digest)
        margins = [
            e.near
            - e.loss
            - max(s.leak_floor + _lag(e), s.standard_errors * math.hypot(e.near_error, noise))
            for e in last
        ]
        if min(margins) > 0:
            below = min(e.near - e.loss for e in last)
            kind = (
                "training text scored in evaluation mode"
                if last[-1].rescored
                else "the training loss before it"
            )
            yield Finding(
                "leakage-suspected",
                "warning",
                last[0].step,
                last[-1].step,
                f"validation has been {nats(below)} or more below {kind} for {len(last)} evaluations",
                "check whether validation text is in the training data (ppl check-data); benign causes: dropout, a running "
                "average as training loss, an easier text",
                {"below": below},
            )
    blocks = [block for block in digest.all_blocks() if block.count][-4:]
    if len(blocks) == 4 and max(block.mean for block in blocks) < s.memorised:
        yield Finding(
            "leakage-suspected",
            "warning",
            blocks[0].first,
            digest.last_step,
            f"a training perplexity of {exp(blocks[-1].mean):.2f}: the text is memorised, or degenerate",
            "look at the training text: repeated lines, too little of it; and whether validation text is in it",
            {"loss": blocks[-1].mean},
        )
    for restart in digest.restarts:
        enough = len(restart.after) >= 32 and not math.isnan(restart.before)
        # The ordinary decline goes on after a restart, too.
        limit = max(s.restart_fall, s.standard_errors * restart.before_error) + 2 * restart.decline
        if enough and restart.fall > limit:
            yield Finding(
                "leakage-suspected",
                "warning",
                restart.to,
                digest.last_step,
                f"after the restart at step {restart.to:,.0f} the training loss is {nats(restart.fall)} lower within "
                f"{len(restart.after)} logged steps: data that had been seen already",
                "check that the data loader continues where the checkpoint left it",
                {"fall": restart.fall},
            )


def worse_than_uniform(digest: Digest, vocabulary_size: int | None) -> Iterator[Finding]:
    """A loss above ln V for long: the model does worse than a guess. Wrong only where V is not the
    vocabulary's size.
    """
    if not vocabulary_size:
        return
    s = digest.settings
    limit = math.log(vocabulary_size) + s.uniform_margin
    advice = "look for another tokenizer than the model's, labels shifted wrongly, padding that is scored, a diverged model"
    last = digest.evaluations[-s.evaluations_in_a_row :]
    if len(last) == s.evaluations_in_a_row and min(e.loss for e in last) > limit:
        yield Finding(
            "worse-than-uniform",
            "warning",
            last[0].step,
            last[-1].step,
            f"the last {len(last)} validation losses are above ln V = {math.log(vocabulary_size):.3f}; now {last[-1].loss:.3f}",
            advice,
            {"measure": "val_loss", "loss": last[-1].loss},
        )
    blocks = [block for block in digest.all_blocks() if block.count]
    late = [block for block in blocks if block.first >= digest.last_step / 2]
    # While it falls as at the start of a run, it is given as long again.
    if (
        digest.points >= s.least_points
        and late
        and min(block.mean for block in late) > limit
        and 2 * late[-1].mean - late[0].mean > limit
    ):
        yield Finding(
            "worse-than-uniform",
            "warning",
            late[0].first,
            digest.last_step,
            f"the training loss has been above ln V = {math.log(vocabulary_size):.3f} since step {late[0].first:,.0f}; now "
            f"{late[-1].mean:.3f}",
            advice,
            {"measure": "train_loss", "loss": late[-1].mean},
        )


def generalisation_gap(digest: Digest) -> Iterator[Finding]:
    """Validation above training: its size and trend; a warning where it is wide. Wrong where the
    two texts differ in kind.
    """
    s = digest.settings
    with_train = _with_train(digest.evaluations)
    last = with_train[-s.evaluations_in_a_row :]
    if len(last) < s.evaluations_in_a_row:
        return
    gaps = [e.loss - e.near for e in last]
    if min(gaps) <= s.gap:
        return
    earlier = with_train[len(with_train) // 2]
    trend = "growing" if gaps[-1] > earlier.loss - earlier.near + s.rise else "not growing"
    yield Finding(
        "generalisation-gap",
        "warning",
        last[0].step,
        last[-1].step,
        f"validation is {nats(gaps[-1])} above training (perplexity {exp(gaps[-1]):,.2f} times), {trend}",
        "more or more varied data, regularisation; check that both texts are of one kind and cut by one tokenizer",
        {"gap": gaps[-1]},
    )


def cadence(digest: Digest) -> Iterator[Finding]:
    """Evaluations too rare to see a trend, missing, or too dear for what they cost."""
    s = digest.settings
    count, last = len(digest.evaluations), digest.last_step
    if digest.points < s.least_points:
        return
    wanted = "every 500 to 1,000 steps is usual"
    if not count:
        advice = f"evaluate on text that is not trained on: {wanted}"
        yield Finding(
            "evaluation-cadence",
            "info",
            digest.first_step,
            last,
            "no validation loss was logged",
            advice,
        )
        return
    spacing = (digest.evaluations[-1].step - digest.evaluations[0].step) / max(1, count - 1)
    since = last - digest.evaluations[-1].step
    if (count < s.evaluations_wanted and last > 2 * s.steps_without) or max(spacing, since) > max(
        s.steps_without, last / 4
    ):
        yield Finding(
            "evaluation-cadence",
            "info",
            digest.evaluations[0].step,
            last,
            f"{count} evaluations, {spacing:,.0f} steps apart, the last {since:,.0f} steps ago: a trend shows late",
            f"evaluate more often: {wanted}",
            {"spacing": spacing, "count": count},
        )
    share = digest.evaluation_seconds / digest.seconds if digest.seconds else 0.0
    if share > s.evaluation_share:
        yield Finding(
            "evaluation-cadence",
            "info",
            digest.evaluations[0].step,
            last,
            f"evaluations take {share:.0%} of the run's time, one every {spacing:,.0f} steps",
            f"evaluate less often, or on less text: {wanted}",
            {"share": share},
        )


def restarts(digest: Digest) -> Iterator[Finding]:
    """Steps that went back: a restart from a checkpoint, or another run in the same file. What it
    replaced is not judged.
    """
    if not digest.restarts:
        return
    last = digest.restarts[-1]
    anew = "the run began anew" if last.to <= digest.first_step else "it went on from there"
    yield Finding(
        "restart",
        "info",
        last.to,
        last.left,
        f"steps went back {digest.restarts_seen} times, last from {last.left:,.0f} to {last.to:,.0f}; {anew}, and what was "
        "logged from there on before is not judged",
        "nothing to do; give runs files of their own to see them all",
        {"count": digest.restarts_seen},
    )


PLAIN: tuple[Callable[[Digest], Iterator[Finding]], ...] = (
    non_finite,
    divergence,
    overfitting,
    spikes,
    leakage,
    generalisation_gap,
    plateau,
    restarts,
    cadence,
)


def all_findings(
    digest: Digest, *, vocabulary_size: int | None = None, total_steps: int | None = None
) -> list[Finding]:
    """Every signal's findings, the most severe first; a plateau is not also told of a run that
    overfits or diverges.
    """
    found = [finding for signal in PLAIN for finding in signal(digest)]
    found += worse_than_uniform(digest, vocabulary_size)
    found += healthy_decline(digest, total_steps)
    told = {finding.signal for finding in found}
    if told & {"overfitting", "divergence"}:
        found = [f for f in found if f.signal not in ("plateau", "healthy-decline")]
    elif "plateau" in told:
        found = [f for f in found if f.signal != "healthy-decline"]
    return sorted(found, key=lambda finding: -SEVERITIES.index(finding.severity))
