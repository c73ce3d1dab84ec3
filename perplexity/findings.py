"""What a finding is, and what is done with findings: one form for curves, data and generated
text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from .files import write_text
from .json_files import to_json

SEVERITIES = ("info", "warning", "danger")
VERDICTS = {"info": "healthy", "warning": "watch", "danger": "unhealthy"}  # by the worst finding
CEILING = {"info": 100.0, "warning": 70.0, "danger": 30.0}  # of a health score, likewise
COLOURS = {"info": "cyan", "warning": "yellow", "danger": "red"}
VERDICT_COLOURS = {
    "healthy": "green",
    "watch": "yellow",
    "unhealthy": "red",
    "insufficient-data": "cyan",
}


@dataclass(frozen=True)
class Finding:
    """``severity``: "info", "warning" or "danger"; ``evidence`` in words and numbers, ``advice``
    what to do.
    """

    signal: str
    severity: str
    evidence: str
    advice: str
    numbers: dict = field(default_factory=dict)


def worst(severities: Iterable[str]) -> str:
    """The most severe; "info" where there is none."""
    return max(severities, key=SEVERITIES.index, default="info")


class Severe(Protocol):
    """A finding of either kind: the monitor's have steps, too."""

    @property
    def severity(self) -> str: ...


class Judged:
    """What a dataclass with ``findings`` does with them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # every subclass is a dataclass
    findings: Sequence[Severe]

    def worst(self) -> str:
        """The most severe finding's severity; "info" where there is none."""
        return worst(finding.severity for finding in self.findings)

    def fails(self, severity: str | None) -> bool:
        """Whether a finding is as severe: what ``--fail-on`` asks; None asks nothing."""
        from . import checks  # needs torch, which the command line's help is to do without

        checks.optional(checks.choice, "severity", severity, SEVERITIES)
        least = len(SEVERITIES) if severity is None else SEVERITIES.index(severity)
        return any(SEVERITIES.index(finding.severity) >= least for finding in self.findings)

    def to_dict(self) -> dict:
        return asdict(self)

    def to_json(self) -> str:
        return to_json(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write ``to_json``; InputError naming the file where the system refuses."""
        write_text(path, self.to_json() + "\n")
