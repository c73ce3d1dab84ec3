"""Integrations with training tools: transformers, Lightning, torchmetrics, TensorBoard and W&B.

Each module needs the package of its tool, and is imported by its own name.
"""

from __future__ import annotations

from .. import checks
from ..metric import Perplexity
from ..monitor import Monitor


def given_monitor(monitor: Monitor | None) -> Monitor:
    """Return a callback's argument ``monitor``, or a new ``Monitor`` for None.

    Raises:
        InputTypeError: It is something else.
    """
    checks.optional(checks.instance, "monitor", monitor, Monitor, "a Monitor or None")
    return Monitor() if monitor is None else monitor


def over_ranks(sums) -> dict[str, float | None]:
    """Return ``Perplexity.compute`` of sums over all ranks, each of which has to call it.

    Args:
        sums: float64 [2]: Σ NLL (nats) and the number of tokens; None for a rank without tokens.
    """
    metric = Perplexity()
    if sums is not None:
        metric.nll, metric.tokens = sums[0].item(), int(sums[1])
    return metric.sync().compute()
