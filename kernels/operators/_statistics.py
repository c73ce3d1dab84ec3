"""``target_logit`` and ``linear_statistics``: sums, ranks and predictions in one sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import KEPT
from ..sums import SUMS
from ._derivatives import each, register_derivative
from ._linear_nll import gradients_of_sums, kept_like, save_for_gradient
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


@operator(
    f"({HEAD}, Tensor target, Tensor target_logit, Tensor? class_weight, {SCALARS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_logit: Tensor,
    class_weight: Tensor | None,
    *scalars,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the five sums, the number of logits above the target's, the predictions, the kept.

    The sums have the derivative of ``linear_nll``'s, but for ``EXP_SHIFT``, which has none.

    Args:
        hidden: Hidden states [N, D].
        weight: Vocabulary matrix [V, D].
        bias: Bias [V], or None.
        target: Class indices int [N].
        target_logit: Result of ``target_logit`` with these arguments, [N].
        class_weight: Weights of ``LOGIT_SUM`` [V], or None.
        scalars: Fields of a ``Rule`` and a ``Plan``, in their order.

    Returns:
        Sums [5, N]; number of logits above the target's, int64 [N]; column of the largest logit,
        int64 [N]; products as ``linear_nll`` keeps them.

    Example:
        >>> from perplexity.kernels.dispatch import DEFAULT, PLAIN
        >>> one, scalars = torch.eye(2), (*PLAIN, *DEFAULT)
        >>> inputs = one, one, None, torch.tensor([0, 0])
        >>> at_target = target_logit(*inputs, *scalars)
        >>> _, above, best, _ = linear_statistics(*inputs, at_target, None, *scalars)
        >>> above, best
        (tensor([0, 1]), tensor([0, 1]))
    """
    rule, plan = read(scalars)
    kept = kept_like(weight, plan)
    inputs = hidden, weight, bias, target, target_logit, class_weight
    results = implementation(plan.backend).linear_statistics(*inputs, rule, plan, kept)
    return *results, weight.new_empty(0) if kept is None else kept


@linear_statistics.register_fake
def _(hidden, weight, bias, target, target_logit, class_weight, *scalars):
    _, plan = read(scalars)
    counts = [hidden.new_empty(hidden.shape[0], dtype=torch.int64) for _ in range(2)]
    kept = weight.new_empty(weight.shape if plan.way == KEPT else 0)
    return hidden.new_empty((SUMS, hidden.shape[0]), dtype=wide(hidden)), *counts, kept


def _setup(ctx, inputs, output):
    rule, plan = read(inputs[6:])
    scalars = (*rule._replace(with_exp_shift=False), *plan)
    hidden, weight, bias, target, _, class_weight = inputs[:6]
    sums, above, best, kept = output
    ctx.mark_non_differentiable(above, best)
    save_for_gradient(ctx, (hidden, weight, bias, target, class_weight), scalars, sums, kept)


def _backward(ctx, upstream, *_):
    gradients = gradients_of_sums(ctx, upstream)
    nothing = [None] * (3 + len(ctx.scalars))  # for targets, class weights and the scalars
    return *gradients, *nothing


register_derivative(linear_statistics, _setup, _backward)
