"""``ppl doctor``: what is installed, which backend runs where, and a self-check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """what is installed, which backend runs where, and a self-check"""


def run(options: Options) -> int:
    """Print what is found; 1 where a self-check failed."""
    from ..doctor import report

    return report()
