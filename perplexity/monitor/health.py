"""Verdict and health score of a run's findings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..findings import CEILING, VERDICTS, Judged, worst
from ..nats import exp, logged_perplexity
from ..wording import counted as counted
from .digest import Digest
from .findings import Finding
from .signals import all_findings

# Which part of the score a signal speaks of, and the part's share of 100.
PARTS = {
    "stability": (35, ("non-finite", "divergence", "spike")),
    "validation": (35, ("overfitting", "worse-than-uniform", "broken-evaluation")),
    "generalisation": (20, ("leakage-suspected", "memorised", "generalisation-gap")),
    "progress": (10, ("plateau",)),
}
LEFT = {"info": 1.0, "warning": 0.4, "danger": 0.0}  # of a part, by its worst finding
FEWER = 0.8  # of what is left, for each further warning or danger in the part
GAP_SCALE = 2.0  # nats of validation above training that leave 1/e of the generalisation part


@dataclass(frozen=True)
class Diagnosis(Judged):
    """The verdict of a run's curves; its fields are the keys of ``ppl monitor --json``.

    Args:
        verdict: "healthy", "watch" or "unhealthy", by the worst finding, or "insufficient-data".
        health_score: 0 to 100; None where there is too little to judge.
        components: each part's share of the score, what is left of it, and which findings took the
            rest.
        findings: what the signals found, the most severe first.
        points: training losses that were finite.
        evaluations: validation losses of the main set that were finite.
        first_step: the first step that was logged; None where none was.
        last_step: the last step.
        train_loss: mean of the last training losses, in nats a token.
        train_perplexity: its exponential.
        val_loss: the last validation loss, in nats a token.
        val_perplexity: its exponential.
        best_val_loss: the lowest validation loss.
        best_val_step: the step of it.
        notes: what was left out or repaired.

    >>> from perplexity import Monitor
    >>> Monitor().diagnose().health_score is None
    True
    """

    verdict: str
    health_score: float | None
    components: dict[str, dict]
    findings: list[Finding]
    points: int
    evaluations: int
    first_step: float | None
    last_step: float | None
    train_loss: float | None
    train_perplexity: float | None
    val_loss: float | None
    val_perplexity: float | None
    best_val_loss: float | None
    best_val_step: float | None
    notes: list[str]


def score(findings: list[Finding], gap: float | None) -> tuple[float, dict[str, dict]]:
    """Health score and its components; ``gap``: validation above training, in nats.

    Σ share · left over the parts, at most the worst severity's ceiling. A part's ``left`` is LEFT
    of its worst finding, times FEWER for each further warning or danger; generalisation's also
    times exp(−gap / GAP_SCALE) where validation is above training. Every factor falls with a
    finding more, with a severity raised, and with a wider gap.
    """
    components, whole = {}, 0.0
    for name, (share, signals) in PARTS.items():
        mine = [f for f in findings if f.signal in signals and f.severity != "info"]
        left = 1.0
        if mine:
            left = LEFT[worst(f.severity for f in mine)] * FEWER ** (len(mine) - 1)
        if name == "generalisation" and gap is not None:
            left *= math.exp(-max(0.0, gap) / GAP_SCALE)
        components[name] = {
            "share": share,
            "left": left,
            "findings": sorted({f.signal for f in mine}),
        }
        if name == "generalisation":
            components[name]["gap"] = gap
        whole += share * left
    return min(whole, CEILING[worst(f.severity for f in findings)]), components


def diagnose(
    digest: Digest,
    *,
    vocabulary_size: int | None = None,
    total_steps: int | None = None,
    notes: list[str] | None = None,
    told: Iterable[Finding] = (),
) -> Diagnosis:
    """Return the ``Diagnosis`` of a run.

    Too little to go by is said, never guessed, but what is wrong already is told.

    Args:
        digest: the run.
        vocabulary_size: to know the loss of a uniform guess, ln V.
        total_steps: the run's budget, for projections.
        notes: what was left out or repaired as it was read.
        told: findings of an earlier diagnosis of the same run: a danger stays until it is seen to
            be over.
    """
    findings = all_findings(
        digest, vocabulary_size=vocabulary_size, total_steps=total_steps, told=told
    )
    s = digest.settings
    evaluations, last = digest.evaluations, digest.evaluations[-1] if digest.evaluations else None
    gravest = worst(f.severity for f in findings)
    judged = all(finding.signal != "not-cross-entropy" for finding in findings)
    enough = judged and (len(evaluations) >= s.least_evaluations or digest.points >= s.least_points)
    verdict = VERDICTS[gravest] if enough or gravest != "info" else "insufficient-data"
    notes = list(notes or [])
    health: float | None = None
    components: dict[str, dict] = {}
    if enough or gravest == "danger":
        gap = None if last is None or math.isnan(last.near) else last.loss - last.near
        health, components = score(findings, gap)
    if not judged:
        notes.append("losses at or below 0 are no cross-entropy: nothing but NaN was looked for")
    elif not enough:
        notes.append(
            f"{counted(digest.points, 'training loss')} and "
            f"{counted(len(evaluations), 'validation loss')}; a verdict needs {s.least_points} or "
            f"{s.least_evaluations}"
        )
    blocks = [block for block in digest.all_blocks() if block.count]
    train = blocks[-1].mean if blocks else None
    best = min(evaluations, key=lambda e: e.loss) if evaluations else None
    number = lambda value: None if value is None or math.isnan(value) else value  # noqa: E731
    return Diagnosis(
        verdict,
        health,
        components,
        findings,
        digest.points,
        len(evaluations),
        number(digest.first_step),
        number(digest.last_step),
        train,
        logged_perplexity(train),
        None if last is None else last.loss,
        exp(last.loss) if last else None,
        None if best is None else best.loss,
        None if best is None else best.step,
        notes,
    )
