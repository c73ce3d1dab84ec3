"""What a signal says, and the words all signals share."""

from __future__ import annotations

from dataclasses import dataclass, field

SIGNALS = (
    *(
        "healthy-decline",
        "plateau",
        "overfitting",
        "divergence",
        "spike",
        "non-finite",
        "leakage-suspected",
    ),
    *("generalisation-gap", "worse-than-uniform", "evaluation-cadence", "restart"),
)


@dataclass(frozen=True)
class Finding:
    """What a signal found: from ``first_step`` to ``last_step``; ``evidence`` in words and numbers,
    ``advice`` what to do.
    """

    signal: str
    severity: str
    first_step: float
    last_step: float
    evidence: str
    advice: str
    numbers: dict = field(default_factory=dict)


def nats(value: float) -> str:
    return f"{value:.3f} nats"
