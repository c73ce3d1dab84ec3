"""What joins this library to the tools people train with; each module needs its own package and is
imported by name.
"""

from __future__ import annotations

from .. import checks
from ..metric import Perplexity
from ..monitor import Monitor


def given_monitor(monitor: Monitor | None) -> Monitor:
    """Return the monitor that a callback was given, a new one for None."""
    checks.optional(checks.instance, "monitor", monitor, Monitor, "a Monitor or None")
    return Monitor() if monitor is None else monitor


def over_ranks(sums) -> dict[str, float | None]:
    """Return ``Perplexity.compute`` of float64 [2] sums, Σ nll and tokens, over all ranks.

    Every rank has to call it; None is a rank without tokens.
    """
    metric = Perplexity()
    if sums is not None:
        metric.nll, metric.tokens = sums[0].item(), int(sums[1])
    return metric.sync().compute()
