"""The perplexity of a loss in nats, without torch."""

from __future__ import annotations

import math
from typing import overload


@overload
def exp(value: float) -> float: ...
@overload
def exp(value: None) -> None: ...
@overload
def exp(value: float | None) -> float | None: ...
def exp(value: float | None) -> float | None:
    """Return e to the power of ``value``: inf where float64 overflows, None for None."""
    if value is None:
        return None
    return math.inf if value > 709.0 else math.exp(value)


def logged_perplexity(loss: float | None) -> float | None:
    """Return exp of a loss that somebody else logged, None for exactly 0.

    Trainers log 0 where a loss was NaN (transformers' ``logging_nan_inf_filter``), and a dead model
    is not a perfect one.
    """
    return None if loss == 0 else exp(loss)
