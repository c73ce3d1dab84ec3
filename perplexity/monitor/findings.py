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


def nats(value: float) -> str:
    """Return a difference of losses in words.

    >>> nats(0.25)
    '0.250 nats'
    """
    return f"{value:.3f} nats"
