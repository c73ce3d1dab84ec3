"""What is computed of a call's logits, and how: one ``Rule`` and one ``Plan`` a call, which both backends take."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """What the logits are, which tokens count, and which of the five sums (``sums.py``) are wanted.

    The logits are softcap · tanh(logit_scale · (hidden @ weightᵀ + bias) / softcap). A sum that is not wanted may be
    anything.
    """

    ignore_index: int = -100
    softcap: float | None = None
    logit_scale: float = 1.0
    with_logit_sum: bool = False
    with_exp_shift: bool = False


class Plan(NamedTuple):
    """How a call is computed. What a backend cannot do (round, keep products), no plan for it asks."""

    backend: str = "torch"
    rounded: bool = False  # products of 16-bit inputs may be rounded to their dtype where that is faster
    block: tuple[int, ...] = ()  # tokens and vocabulary rows at a time, of a step that keeps products
    memory_limit: int = 0  # bytes of temporary memory; 0: each function's own default


# Defaults of the backends' functions.
PLAIN, DEFAULT = Rule(), Plan()
