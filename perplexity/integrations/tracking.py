"""Trackers that write losses, perplexities and findings to TensorBoard and Weights & Biases."""

from __future__ import annotations

import math

from .. import checks
from ..errors import InputTypeError
from ..monitor import Finding
from ..nats import logged_perplexity

# The measures of ``Monitor.log``, with the tags of their values and of their perplexities.
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
    """Return the values of measures by tag, and the perplexity of each loss.

    Args:
        measures: Values by the measures of ``Monitor.log``, losses in nats a token; None is left
            out. A loss of exactly 0 has no perplexity.

    Raises:
        InputError: A measure is unknown, or its value is no number.

    Example:
        >>> scalars({"val_loss": 2.0, "lr": None})
        {'eval/loss': 2.0, 'eval/perplexity': 7.38905609893065}
    """
    values = {}
    for name, value in measures.items():
        checks.choice("log", name, TAGS, f"measures of {', '.join(TAGS)}")
        if value is not None:
            tag, of_perplexity = TAGS[name]
            value = checks.measured(name, value)
            values[tag] = value
            perplexity = logged_perplexity(value)
            if of_perplexity is not None and perplexity is not None:
                values[of_perplexity] = perplexity
    return values


def _step(step: float) -> int:
    """Return a step as a whole number, which the trackers take."""
    step = checks.measured("step", step)
    checks.number("step", step)
    return int(step)


def _check_methods(name: str, value: object, methods: tuple[str, ...], expected: str) -> None:
    """Raise InputTypeError unless an object has the methods."""
    if not all(callable(getattr(value, method, None)) for method in methods):
        raise checks.wrong(name, expected, checks.shown(value), InputTypeError)


class TensorBoardTracker:
    """Tracker that writes measures and findings for TensorBoard.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.

    Raises:
        InputTypeError: ``writer`` is something else.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from perplexity import Monitor
        >>> tracker = TensorBoardTracker(SummaryWriter(tempfile.mkdtemp()))
        >>> monitor = Monitor(on_finding=tracker.finding)
        >>> tracker.log(1, train_loss=2.5, lr=1e-3)
        >>> tracker.writer.close()
    """

    def __init__(self, writer) -> None:
        _check_methods("writer", writer, ("add_scalar", "add_text"), "a SummaryWriter")
        self.writer = writer

    def log(self, step: float, **measures: float | None) -> None:
        """Write the measures of a step, as ``Monitor.log`` takes them, and their perplexities.

        Raises:
            InputError: The step or a value is no number, or a measure is unknown.
        """
        step = _step(step)
        for tag, value in scalars(measures).items():
            self.writer.add_scalar(tag, value, step)

    def finding(self, finding: Finding) -> None:
        """Write a finding as text: the callback ``on_finding`` of a ``Monitor``."""
        checks.instance("finding", finding, Finding, "a Finding")
        text = f"**{finding.severity}**: {finding.evidence}  \n{finding.advice}"
        step = int(finding.last_step) if math.isfinite(finding.last_step) else None
        self.writer.add_text(f"findings/{finding.signal}", text, step)


class WandbTracker:
    """Tracker that logs measures to a run of Weights & Biases, and findings as its alerts.

    Args:
        run: The run that ``wandb.init`` returns.

    Raises:
        InputTypeError: ``run`` is something else.

    Example:
        >>> from unittest.mock import Mock
        >>> run = Mock(spec=["log", "alert"])  # wandb.init(project="my-model") in a training script
        >>> WandbTracker(run).log(500, val_loss=2.0)
        >>> run.log.call_args
        call({'eval/loss': 2.0, 'eval/perplexity': 7.38905609893065}, step=500)
    """

    def __init__(self, run) -> None:
        _check_methods("run", run, ("log", "alert"), "a run of wandb.init")
        self.run = run

    def log(self, step: float, **measures: float | None) -> None:
        """Log the measures of a step, as ``Monitor.log`` takes them, and their perplexities.

        Raises:
            InputError: The step or a value is no number, or a measure is unknown.
        """
        self.run.log(scalars(measures), step=_step(step))

    def finding(self, finding: Finding) -> None:
        """Raise an alert for a warning or danger: the callback ``on_finding`` of a ``Monitor``."""
        checks.instance("finding", finding, Finding, "a Finding")
        if finding.severity in ALERTS:
            self.run.alert(
                title=finding.signal,
                text=f"{finding.evidence}. {finding.advice}",
                level=ALERTS[finding.severity],
            )
