"""Findings, in one form for curves, data and generated text, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args

from .files import write_text
from .json_files import to_json

Severity = Literal["info", "warning", "danger"]
Verdict = Literal["healthy", "watch", "unhealthy", "insufficient-data"]
SEVERITIES: tuple[str, ...] = get_args(Severity)
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
    """A problem that a check has seen.

    Args:
        signal: name of the kind of problem.
        severity: "info", "warning" or "danger".
        evidence: what was seen, in words and numbers.
        advice: what to do.
        numbers: the numbers of the evidence by name; default none.

    Example:
        >>> Finding("leakage", "danger", "3 of 4 documents leak", "drop them").severity
        'danger'
    """

    signal: str
    severity: str
    evidence: str
    advice: str
    numbers: dict = field(default_factory=dict)


def worst(severities: Iterable[str]) -> str:
    """Return the most severe of several severities, "info" of none.

    Args:
        severities: any number of ``SEVERITIES``.

    Example:
        >>> worst(["info", "danger", "warning"])
        'danger'
    """
    return max(severities, key=SEVERITIES.index, default="info")


class Severe(Protocol):
    """A finding of either kind: the monitor's have steps as well."""

    @property
    def severity(self) -> str: ...


class Judged:
    """A result with ``findings``: the base of the dataclasses that checks return."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # every subclass is a dataclass
    findings: Sequence[Severe]

    def worst(self) -> str:
        """Return the severity of the most severe finding, "info" where there is none."""
        return worst(finding.severity for finding in self.findings)

    def fails(self, severity: str | None) -> bool:
        """Return whether a finding is at least as severe as ``severity``, as ``--fail-on`` asks.

        Args:
            severity: one of ``SEVERITIES``; None: no finding is severe enough.

        Raises:
            InputError: ``severity`` is another text.
        """
        from . import checks  # needs torch, which the command line's help is to do without

        checks.optional(checks.choice, "severity", severity, SEVERITIES)
        least = len(SEVERITIES) if severity is None else SEVERITIES.index(severity)
        return any(SEVERITIES.index(finding.severity) >= least for finding in self.findings)

    def to_dict(self) -> dict:
        """Return the fields as dicts, lists and scalars."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the fields as a JSON document, without an infinity or NaN (RFC 8259)."""
        return to_json(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write ``to_json`` into a file.

        Args:
            path: the file, which is written whole or left as it was.

        Raises:
            InputError: the system refuses; the file is named.
        """
        write_text(path, self.to_json() + "\n")
