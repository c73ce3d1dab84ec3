"""The documents that a comparison needs to detect a difference of a given size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..wording import counted
from .uncertainty import CONFIDENCE, scipy_stats

LEVEL = 1 - CONFIDENCE  # of the two-sided test
POWER = 0.8  # probability that the test finds a difference of the planned size
PLANNED = 0.01  # the difference planned for where none is asked for


@dataclass(frozen=True)
class Plan:
    """The documents that a paired comparison needs, from the paired differences seen.

    Documents of the same lengths and kinds as those seen are taken for granted.

    Args:
        difference: to be detected, in the measure's unit.
        documents: number of documents, or blocks, that detect it with ``power``.
        unit: "document", or "block" of the only document.
        seen: documents, or blocks, of the comparison.
        spread: standard deviation of a document's paired difference, in the measure's unit.
        detectable: the smallest difference that ``seen`` documents detect with ``power``; None
            where they are too few for any.
        power: probability of detecting a difference of this size.
        level: of the two-sided test.

    Example:
        >>> plan_for(0.01, stderr=0.01, seen=25).documents
        199
    """

    difference: float
    documents: int
    unit: str
    seen: int
    spread: float
    detectable: float | None
    power: float = POWER
    level: float = LEVEL

    def note(self, unit: str, pairs: int = 1) -> str:
        """Return the plan in words.

        Args:
            unit: of the measure, such as "nats a token".
            pairs: of models that the plan is for; default 1.
        """
        detects = (
            "are too few to detect any"
            if self.detectable is None
            else f"detect {self.detectable:.2g}"
        )
        level = f"{100 * self.level:.2g}% level"
        if pairs > 1:
            level += f" (5% over {pairs} pairs)"
        return (
            f"plan: {counted(self.documents, self.unit)} like these detect a difference of "
            f"{self.difference:g} {unit} with {100 * self.power:.0f}% power at the two-sided "
            f"{level}; the {counted(self.seen, self.unit)} here {detects}"
        )


def plan_for(
    difference: float,
    stderr: float,
    seen: int,
    unit: str = "document",
    *,
    level: float = LEVEL,
    power: float = POWER,
) -> Plan:
    """Return how many documents a paired comparison needs to detect a difference.

    For the paired t-test n = (z_{1−α/2} + z_{power})² s² / δ² + z_{1−α/2}² / 2 (Guenther, Sample
    size formulas for normal theory t tests, The American Statistician 35, 1981), with s the
    standard deviation of a document's paired difference, here stderr · sqrt(seen).

    Args:
        difference: δ, in the unit of ``stderr``, above 0.
        stderr: standard error of the paired difference over ``seen`` documents.
        seen: number of documents, at least 2.
        unit: "document" (default), or "block" of the only document.
        level: α of the two-sided test; default 0.05.
        power: default 0.8.

    Example:
        >>> plan_for(0.1, stderr=0.01, seen=25).documents
        4
    """
    normal = scipy_stats().norm
    critical = float(normal.ppf(1 - level / 2))
    both = critical + float(normal.ppf(power))
    spread = stderr * math.sqrt(seen)
    needed = (both * spread / difference) ** 2 + critical**2 / 2
    left = seen - critical**2 / 2
    return Plan(
        difference,
        max(2, math.ceil(needed)),
        unit,
        seen,
        spread,
        both * spread / math.sqrt(left) if left > 0 else None,
        power,
        level,
    )
