"""``target_logit`` and ``linear_statistics``: sums, ranks and predictions, without derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sums import SUMS
from ._derivatives import each
from ._schema import HEAD, SCALARS, implementation, operator, read, wide


@operator(f"({HEAD}, Tensor target, {SCALARS}) -> Tensor")
def target_logit(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *scalars
) -> Tensor:
    """Return the logit of every token's target, [N]; 0 where it is no row of ``weight``."""
    rule, plan = read(scalars)
    return implementation(plan.backend).target_logit(hidden, weight, bias, target, rule, plan)


target_logit.register_vmap(each(target_logit))


@target_logit.register_fake
def _(hidden, *_):
    return hidden.new_empty(hidden.shape[0], dtype=wide(hidden))


@operator(f"({HEAD}, Tensor target, Tensor target_logit, {SCALARS}) -> (Tensor, Tensor, Tensor)")
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_logit: Tensor,
    *scalars,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the five sums [5, N], how many logits are above the target's and the column of the
    largest, int64 [N].
    """
    rule, plan = read(scalars)
    return implementation(plan.backend).linear_statistics(
        hidden, weight, bias, target, target_logit, rule, plan
    )


linear_statistics.register_vmap(each(linear_statistics))


@linear_statistics.register_fake
def _(hidden, *_):
    counts = [hidden.new_empty(hidden.shape[0], dtype=torch.int64) for _ in range(2)]
    return hidden.new_empty((SUMS, hidden.shape[0]), dtype=wide(hidden)), *counts
