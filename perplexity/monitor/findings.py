"""What a signal of the monitor reports, and the names of all signals."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .. import findings

SIGNALS = (
    "healthy-decline",
    "plateau",
    "overfitting",
    "divergence",
    "spike",
    "non-finite",
    "leakage-suspected",
    "memorised",
    "generalisation-gap",
    "worse-than-uniform",
    "broken-evaluation",
    "not-cross-entropy",
    "evaluation-cadence",
    "restart",
)


@dataclass(frozen=True)
class Finding(findings.Finding):
    """A finding about the curves from ``first_step`` to ``last_step``.

    ``set`` names the validation set that it is about; None is the main one, or training.

    >>> Finding("spike", "info", "one batch", "nothing to do", first_step=10, last_step=11).signal
    'spike'
    """

    first_step: float = math.nan
    last_step: float = math.nan
    set: str | None = None

    def __str__(self) -> str:
        """Return the finding as one line: severity, signal, steps, evidence and advice.

        >>> print(Finding("spike", "info", "one batch", "nothing to do", first_step=10, last_step=11))
        info: spike, steps 10 to 11: one batch. Advice: nothing to do
        """
        steps = f"steps {self.first_step:,.0f} to {self.last_step:,.0f}"
        of = f" of {self.set}" if self.set else ""
        return (
            f"{self.severity}: {self.signal}{of}, {steps}: {self.evidence}. Advice: {self.advice}"
        )


def nats(value: float) -> str:
    """Return a difference of losses in words.

    >>> nats(0.25)
    '0.250 nats'
    """
    return f"{value:.3f} nats"
