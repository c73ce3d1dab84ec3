"""TensorBoard and Weights & Biases: loss and perplexity side by side under the tags their users expect, findings as text."""

from __future__ import annotations

import math

from ..errors import InputError
from ..metric import logged_perplexity
from ..monitor import Finding

# The measures of ``Monitor.log``, and what they are called.
TAGS = {
    "train_loss": ("train/loss", "train/perplexity"),
    "val_loss": ("eval/loss", "eval/perplexity"),
    "train_eval_loss": ("train_eval/loss", "train_eval/perplexity"),
    "lr": ("train/learning_rate", None),
    "grad_norm": ("train/grad_norm", None),
    "tokens": ("train/tokens", None),
}
ALERTS = {"warning": "WARN", "danger": "ERROR"}  # W&B's levels, by severity


def scalars(measures: dict[str, float | None]) -> dict[str, float]:
    """Return tags and values of measures, each loss with its perplexity; None is left out.

    A loss of exactly 0 has no perplexity (``logged_perplexity``). Raises InputError for an unknown
    measure.
    """
    found = {}
    for name, value in measures.items():
        if name not in TAGS:
            raise InputError(f"log: expected measures of {', '.join(TAGS)}, got {name!r}")
        if value is not None:
            tag, beside = TAGS[name]
            found[tag] = float(value)
            perplexity = logged_perplexity(float(value))
            if beside is not None and perplexity is not None:
                found[beside] = perplexity
    return found


class TensorBoardTracker:
    """``writer``: a ``SummaryWriter``. ``Monitor(on_finding=tracker.finding)`` writes findings as text."""

    def __init__(self, writer) -> None:
        self.writer = writer

    def log(self, step: float, **measures: float | None) -> None:
        for tag, value in scalars(measures).items():
            self.writer.add_scalar(tag, value, int(step))

    def finding(self, finding: Finding) -> None:
        text = f"**{finding.severity}**: {finding.evidence}  \n{finding.advice}"
        step = int(finding.last_step) if math.isfinite(finding.last_step) else None
        self.writer.add_text(f"findings/{finding.signal}", text, step)


class WandbTracker:
    """``run``: what ``wandb.init`` returned. ``Monitor(on_finding=tracker.finding)`` raises an alert for each finding but info."""

    def __init__(self, run) -> None:
        self.run = run

    def log(self, step: float, **measures: float | None) -> None:
        self.run.log(scalars(measures), step=int(step))

    def finding(self, finding: Finding) -> None:
        if finding.severity in ALERTS:
            self.run.alert(
                title=finding.signal, text=f"{finding.evidence}. {finding.advice}", level=ALERTS[finding.severity]
            )
