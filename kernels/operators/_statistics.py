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
    """Return the logit of every token's target; 0 where it is no row of ``weight``.

    Args:
        hidden: Hidden states [N, D].
        weight: Vocabulary matrix [V, D].
        bias: Bias [V], or None.
        target: Class indices int [N].
        scalars: Fields of a ``Rule`` and a ``Plan``, in their order.

    Returns:
        Logits [N], float32 (float64 for float64 inputs).

    Example:
        >>> from perplexity.kernels.dispatch import DEFAULT, PLAIN
        >>> one = torch.eye(2)
        >>> target_logit(one, one, None, torch.tensor([0, 0]), *PLAIN, *DEFAULT)
        tensor([1., 0.])
    """
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
    """Return the five sums, the number of logits above the target's, and the predictions.

    Args:
        hidden: Hidden states [N, D].
        weight: Vocabulary matrix [V, D].
        bias: Bias [V], or None.
        target: Class indices int [N].
        target_logit: Result of ``target_logit`` with these arguments, [N].
        scalars: Fields of a ``Rule`` and a ``Plan``, in their order.

    Returns:
        Sums [5, N]; number of logits above the target's, int64 [N]; column of the largest logit,
        int64 [N].

    Example:
        >>> from perplexity.kernels.dispatch import DEFAULT, PLAIN
        >>> one, scalars = torch.eye(2), (*PLAIN, *DEFAULT)
        >>> inputs = one, one, None, torch.tensor([0, 0])
        >>> _, above, best = linear_statistics(*inputs, target_logit(*inputs, *scalars), *scalars)
        >>> above, best
        (tensor([0, 1]), tensor([0, 1]))
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
