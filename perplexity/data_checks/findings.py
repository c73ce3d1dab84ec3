"""What a check of the data found, in the monitor's form."""

from __future__ import annotations

from dataclasses import dataclass, field

SIGNALS = (
    *("leakage", "shared-passages", "repeated-validation", "validation-size", "distribution-shift", "unknown-tokens"),
    *("ids-beyond-embedding", "unseen-tokens", "round-trip-loss", "tokenizer-fit", "overlap-unknown"),
)


@dataclass(frozen=True)
class Finding:
    """``severity``: "info", "warning" or "danger"; ``evidence`` in words and numbers, ``advice`` what to do."""

    signal: str
    severity: str
    evidence: str
    advice: str
    numbers: dict = field(default_factory=dict)
