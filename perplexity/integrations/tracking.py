"""TensorBoard and Weights & Biases: loss and perplexity side by side under the tags their users
expect, findings as text.
"""

from __future__ import annotations

import math

from .. import checks
from ..errors import InputTypeError
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
        checks.choice("log", name, TAGS, f"measures of {', '.join(TAGS)}")
        if value is not None:
            tag, beside = TAGS[name]
            value = checks.measured(name, value)
            found[tag] = value
            perplexity = logged_perplexity(value)
            if beside is not None and perplexity is not None:
                found[beside] = perplexity
    return found


def _step(step: float) -> int:
    """Return a step as the trackers take it."""
    step = checks.measured("step", step)
    checks.number("step", step)
    return int(step)


def _check_methods(name: str, value: object, methods: tuple[str, ...], expected: str) -> None:
    if not all(callable(getattr(value, method, None)) for method in methods):
        raise checks.wrong(name, expected, checks.shown(value), InputTypeError)


class TensorBoardTracker:
    """``writer``: a ``SummaryWriter``. ``Monitor(on_finding=tracker.finding)`` writes findings as
    text.
    """

    def __init__(self, writer) -> None:
        _check_methods("writer", writer, ("add_scalar", "add_text"), "a SummaryWriter")
        self.writer = writer

    def log(self, step: float, **measures: float | None) -> None:
        step = _step(step)
        for tag, value in scalars(measures).items():
            self.writer.add_scalar(tag, value, step)

    def finding(self, finding: Finding) -> None:
        checks.instance("finding", finding, Finding, "a Finding")
        text = f"**{finding.severity}**: {finding.evidence}  \n{finding.advice}"
        step = int(finding.last_step) if math.isfinite(finding.last_step) else None
        self.writer.add_text(f"findings/{finding.signal}", text, step)


class WandbTracker:
    """``run``: what ``wandb.init`` returned. ``Monitor(on_finding=tracker.finding)`` raises an
    alert for each finding but info.
    """

    def __init__(self, run) -> None:
        _check_methods("run", run, ("log", "alert"), "a run of wandb.init")
        self.run = run

    def log(self, step: float, **measures: float | None) -> None:
        self.run.log(scalars(measures), step=_step(step))

    def finding(self, finding: Finding) -> None:
        checks.instance("finding", finding, Finding, "a Finding")
        if finding.severity in ALERTS:
            self.run.alert(
                title=finding.signal,
                text=f"{finding.evidence}. {finding.advice}",
                level=ALERTS[finding.severity],
            )
