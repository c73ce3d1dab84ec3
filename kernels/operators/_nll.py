"""``nll``: the five sums of existing logits, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sums import MAX, SUMS
from ._derivatives import no_context, refuse_second_derivative, register_derivative
from ._schema import SCALARS, check_class_weight, implementation, operator, read, wide

INPUTS = "Tensor logits, Tensor target, Tensor? class_weight"


@operator(f"({INPUTS}, {SCALARS}) -> Tensor")
def nll(logits: Tensor, target: Tensor, class_weight: Tensor | None, *scalars) -> Tensor:
    """Return the five sums [5, N · T] of logits.

    Args:
        logits: Logits [N, V] or [N, V, T].
        target: Class indices int [N · T].
        class_weight: Weights of ``LOGIT_SUM`` [V] or, of class probabilities, [N · T, V]; or None.
        scalars: Fields of a ``Rule`` and a ``Plan``, in their order.

    Returns:
        Sums, float32 (float64 for float64 logits).

    Raises:
        TypeError: Class probabilities with the triton backend.

    Example:
        >>> from perplexity.kernels.dispatch import DEFAULT, PLAIN
        >>> nll(torch.zeros(2, 100), torch.tensor([1, 2]), None, *PLAIN, *DEFAULT)[1]
        tensor([100., 100.])
    """
    rule, plan = read(scalars)
    check_class_weight(class_weight, plan.backend)
    return implementation(plan.backend).nll(logits, target, class_weight, rule, plan)


@nll.register_fake
def _(logits, target, *_):
    return logits.new_empty((SUMS, target.shape[0]), dtype=wide(logits))


@operator(f"(Tensor upstream, Tensor maximum, {INPUTS}, {SCALARS}) -> Tensor")
def nll_grad(
    upstream: Tensor,
    maximum: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    *scalars,
) -> Tensor:
    """Return the gradient of the logits.

    Args:
        upstream: Upstream gradient of the sums [5, N · T].
        maximum: The forward's maxima [N · T].
        logits, target, class_weight, scalars: As in ``nll``.

    Returns:
        Gradient in the shape and dtype of the logits.

    Example:
        >>> from perplexity.kernels.dispatch import DEFAULT, PLAIN
        >>> upstream, logits = torch.zeros(5, 2), torch.zeros(2, 3)
        >>> upstream[2] = 1.0  # of the target's logit
        >>> target = torch.tensor([1, 2])
        >>> nll_grad(upstream, torch.zeros(2), logits, target, None, *PLAIN, *DEFAULT)
        tensor([[0., 1., 0.],
                [0., 0., 1.]])
    """
    rule, plan = read(scalars)
    return implementation(plan.backend).nll_grad(
        upstream, maximum, logits, target, class_weight, rule, plan
    )


@nll_grad.register_fake
def _(upstream, maximum, logits, *_):
    return torch.empty_like(logits)


register_derivative(nll_grad, no_context, refuse_second_derivative)


def _setup(ctx, inputs, output):
    tensors, ctx.scalars = inputs[:3], inputs[3:]
    ctx.save_for_backward(*tensors, output)


def _backward(ctx, upstream):
    logits, target, class_weight, sums = ctx.saved_tensors
    gradient = nll_grad(upstream, sums[MAX].detach(), logits, target, class_weight, *ctx.scalars)
    return gradient, None, None, *([None] * len(ctx.scalars))


register_derivative(nll, _setup, _backward)
