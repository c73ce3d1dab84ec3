"""``ppl doctor``: installed packages, the backend of each device, and a self-check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """what is installed, which backend runs where, and a self-check"""


def run(options: Options) -> int:
    """Print the report; return 1 where a self-check failed, else 0."""
    from ..doctor import report

    return report()
