"""What a signal says, and the words all signals share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

SEVERITIES = ("info", "warning", "danger")
SIGNALS = (
    *("healthy-decline", "plateau", "overfitting", "divergence", "spike", "non-finite", "leakage-suspected"),
    *("generalisation-gap", "worse-than-uniform", "evaluation-cadence", "restart"),
)


@dataclass(frozen=True)
class Finding:
    """What a signal found: from ``first_step`` to ``last_step``; ``evidence`` in words and numbers, ``advice`` what to do."""

    signal: str
    severity: str
    first_step: float
    last_step: float
    evidence: str
    advice: str
    numbers: dict = field(default_factory=dict)


class Judged:
    """What a dataclass with ``findings`` does with them."""

    def worst(self) -> str:
        """The most severe finding's severity; "info" where there is none."""
        return max((finding.severity for finding in self.findings), key=SEVERITIES.index, default="info")

    def fails(self, severity: str | None) -> bool:
        """Whether a finding is as severe: what ``--fail-on`` asks; None asks nothing."""
        least = len(SEVERITIES) if severity is None else SEVERITIES.index(severity)
        return any(SEVERITIES.index(finding.severity) >= least for finding in self.findings)

    def to_dict(self) -> dict:
        return asdict(self)

    def to_json(self) -> str:
        from ..evaluation.results import to_json

        return to_json(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write ``to_json``; InputError naming the file where the system refuses."""
        from ..evaluation.results import write_text

        write_text(path, self.to_json() + "\n")


def nats(value: float) -> str:
    return f"{value:.3f} nats"
