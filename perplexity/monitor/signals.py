"""The signals of a run: all of them, in one table, and what they leave out when they meet.

``training.py``, ``validation.py`` and ``trend.py`` hold the signals of the curves; here are those
of a vocabulary's size, of the evaluations' cadence, and of steps that go back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

from ..findings import SEVERITIES
from . import training, validation
from .digest import Digest
from .findings import Finding
from .trend import healthy_decline, plateau

UNIFORM_ADVICE = (
    "check for a mismatched tokenizer, mis-shifted labels, scored padding, or divergence"
)


def worse_than_uniform(digest: Digest, vocabulary_size: int | None) -> Iterator[Finding]:
    """Find a training loss above ln V for half of the run: the model does worse than a guess.

    Wrong only where V is not the vocabulary's size.
    """
    if not vocabulary_size:
        return
    limit = math.log(vocabulary_size) + digest.settings.uniform_margin
    late = [piece for piece in digest.pieces() if piece.first >= digest.last_step / 2]
    if digest.points < digest.settings.least_points or not late:
        return
    # While it falls as at the start of a run, it is given as long again.
    falling = 2 * late[-1].mean - late[0].mean <= limit
    if falling or min(piece.mean for piece in late) <= limit:
        return
    yield Finding(
        "worse-than-uniform",
        "warning",
        f"the training loss has been above ln V = {math.log(vocabulary_size):.3f} since step "
        f"{late[0].first:,.0f}; now {late[-1].mean:.3f}",
        UNIFORM_ADVICE,
        {"measure": "train_loss", "loss": late[-1].mean},
        first_step=late[0].first,
        last_step=digest.last_step,
    )


def validation_worse_than_uniform(digest: Digest, vocabulary_size: int | None) -> Iterator[Finding]:
    """Find validation losses above ln V for several evaluations."""
    if not vocabulary_size:
        return
    last = digest.evaluations[-digest.settings.evaluations_in_a_row :]
    limit = math.log(vocabulary_size) + digest.settings.uniform_margin
    enough = len(last) == digest.settings.evaluations_in_a_row
    if enough and min(e.loss for e in last) > limit:
        yield Finding(
            "worse-than-uniform",
            "warning",
            f"the last {len(last)} validation losses are above ln V = "
            f"{math.log(vocabulary_size):.3f}; now {last[-1].loss:.3f}",
            UNIFORM_ADVICE,
            {"measure": "val_loss", "loss": last[-1].loss},
            first_step=last[0].step,
            last_step=last[-1].step,
        )


def cadence(digest: Digest) -> Iterator[Finding]:
    """Find evaluations that are missing, too rare to see a trend, or too dear for what they cost."""
    s = digest.settings
    count, last = len(digest.evaluations), digest.last_step
    if digest.points < s.least_points:
        return
    wanted = "every 500 to 1,000 steps is usual"
    if not count:
        yield Finding(
            "evaluation-cadence",
            "info",
            "no validation loss was logged",
            f"evaluate on text that is not trained on: {wanted}",
            first_step=digest.first_step,
            last_step=last,
        )
        return
    first = digest.evaluations[0].step
    spacing = (digest.evaluations[-1].step - first) / max(1, count - 1)
    since = last - digest.evaluations[-1].step
    few = count < s.evaluations_wanted and last > 2 * s.steps_without
    if few or max(spacing, since) > max(s.steps_without, last / 4):
        times = f"{count} evaluations, {spacing:,.0f} steps apart" if count > 1 else "1 evaluation"
        yield Finding(
            "evaluation-cadence",
            "info",
            f"{times}, the last {since:,.0f} steps ago: a trend shows late",
            f"evaluate more often: {wanted}",
            {"spacing": spacing, "count": count},
            first_step=first,
            last_step=last,
        )
    share = digest.evaluation_seconds / digest.seconds if digest.seconds else 0.0
    if share > s.evaluation_share:
        yield Finding(
            "evaluation-cadence",
            "info",
            f"evaluations take {share:.0%} of the run's time, one every {spacing:,.0f} steps",
            f"evaluate less often, or on less text: {wanted}",
            {"share": share},
            first_step=first,
            last_step=last,
        )


def restarts(digest: Digest) -> Iterator[Finding]:
    """Find steps that went back: a restart from a checkpoint, or another run in the same file.

    What a restart replaced is not judged.
    """
    if not digest.restarts:
        return
    last = digest.restarts[-1]
    anew = "the run began anew" if last.to <= digest.first_step else "it went on from there"
    times = "once" if digest.restarts_seen == 1 else f"{digest.restarts_seen} times, last"
    yield Finding(
        "restart",
        "info",
        f"steps went back {times} from {last.left:,.0f} to {last.to:,.0f}; {anew}, and what was "
        "logged from there on before is not judged",
        "nothing to do; give runs files of their own to see them all",
        {"count": digest.restarts_seen},
        first_step=last.to,
        last_step=last.left,
    )


Signal = Callable[[Digest], Iterator[Finding]]
# Of the run, and of each validation set.
RUN: tuple[Signal, ...] = (
    training.spikes,
    training.memorised,
    training.restart_falls,
    plateau,
    restarts,
    cadence,
)
SET: tuple[Signal, ...] = (
    validation.divergence,
    validation.overfitting,
    validation.validation_spikes,
)
# They compare a validation loss with the training loss: both must be in nats a token.
LEVEL: tuple[Signal, ...] = (validation.leakage, validation.generalisation_gap)


def all_findings(
    digest: Digest,
    *,
    vocabulary_size: int | None = None,
    total_steps: int | None = None,
    told: Iterable[Finding] = (),
) -> list[Finding]:
    """Return every signal's findings, the most severe first; with ``told``, see ``still_there``.

    A run whose losses are no cross-entropy is judged for what is not finite alone; an evaluation
    that is broken is not judged further. Of a run that overfits or diverges no plateau is told.
    """
    findings = [*training.non_finite(digest), *training.not_cross_entropy(digest)]
    if any(finding.signal == "not-cross-entropy" for finding in findings):
        return _by_severity([*findings, *restarts(digest)])
    judged = digest
    for name, evaluations in [(digest.main_set, digest.evaluations), *digest.sets.items()]:
        one = digest.with_evaluations(evaluations)
        broken = list(validation.broken_evaluation(one))
        level = "train_loss" not in digest.unscaled and name not in digest.unscaled
        judges = () if broken else (*SET, *LEVEL) if level else SET
        of_set = [*broken, *(finding for signal in judges for finding in signal(one))]
        if level and not broken:
            of_set += validation_worse_than_uniform(one, vocabulary_size)
        findings += [dataclasses.replace(finding, set=name) for finding in of_set]
        if broken and evaluations is digest.evaluations:
            judged = digest.with_evaluations([])
    signals = {finding.signal for finding in findings}
    if "divergence" not in signals:
        findings += training.divergence(digest)
    findings += still_there(digest, told, findings)
    findings += [finding for signal in RUN for finding in signal(judged)]
    if "train_loss" not in digest.unscaled:
        findings += worse_than_uniform(digest, vocabulary_size)
    findings += healthy_decline(digest, total_steps)
    return _by_severity(_without_echoes(findings))


def still_there(digest: Digest, told: Iterable[Finding], found: list[Finding]) -> list[Finding]:
    """Return the dangers told before that are not found any more and not seen to be over.

    A rise is over where the loss is back to less than half of it above the best, or where steps
    went back before it. By more losses alone, which raise the noise that is seen, it is not.

    Args:
        digest: the run by now.
        told: what was found earlier.
        found: what is found now.
    """
    dangers = {(finding.signal, finding.set) for finding in found if finding.severity == "danger"}
    return [
        finding
        for finding in told
        if finding.severity == "danger"
        and "best_loss" in finding.numbers
        and (finding.signal, finding.set) not in dangers
        and not _over(digest, finding)
    ]


def _over(digest: Digest, rise: Finding) -> bool:
    if any(back.left >= rise.last_step and back.to <= rise.last_step for back in digest.restarts):
        return True
    if rise.numbers["measure"] == "train_loss":
        losses = [piece.mean for piece in digest.pieces()]
    else:
        main = rise.set == digest.main_set
        evaluations = digest.evaluations if main else digest.sets.get(rise.set or "", [])
        losses = [evaluation.loss for evaluation in evaluations]
    return not losses or losses[-1] < rise.numbers["best_loss"] + rise.numbers["rise"] / 2


def _without_echoes(findings: list[Finding]) -> list[Finding]:
    """Drop what another finding says already: a plateau of a run that overfits, say."""
    signals = {finding.signal for finding in findings}
    dropped: set[str] = set()
    if signals & {"overfitting", "divergence"}:
        dropped |= {"plateau", "healthy-decline"}
    if "memorised" in signals:
        dropped.add("plateau")
    if "plateau" in signals:
        dropped.add("healthy-decline")
    return [finding for finding in findings if finding.signal not in dropped]


def _by_severity(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity))
