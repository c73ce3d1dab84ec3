"""Operations of the triton backend, by the names that the operators call."""

import torch

from ..dispatch import CHUNKED, DEFAULT, OPEN, PLAIN, Plan, Rule, settled
from . import linear_nll as fused
from .launch import target_of
from .linear_kl import linear_kl, linear_kl_grad
from .linear_nll import merge
from .linear_nll_chunked import linear_nll_chunked
from .linear_nll_grad import linear_nll_grad
from .linear_statistics import linear_statistics, target_logit
from .nll import nll, nll_grad

__all__ = [
    "linear_kl",
    "linear_kl_grad",
    "linear_nll",
    "linear_nll_grad",
    "linear_statistics",
    "merge",
    "nll",
    "nll_grad",
    "target_logit",
]


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    kept: None = None,
) -> torch.Tensor:
    """Return the five sums of every token, float32 [5, N], by the plan's way.

    No plan for this backend keeps products: ``kept`` is None.
    """
    if plan.way == OPEN:
        plan = settled(plan, target_of(hidden), hidden, weight, bias)
    if plan.way == CHUNKED:
        return linear_nll_chunked(hidden, weight, target, class_weight, rule, plan)
    return fused.linear_nll(hidden, weight, bias, target, class_weight, rule, plan)
