"""``linear_nll``: the five sums from hidden states and a vocabulary matrix, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import KEPT, Plan
from ..sums import MAX, SUMS
from ._derivatives import no_context, only_backward, refuse_second_derivative, register_derivative
from ._schema import (
    HEAD,
    SCALARS,
    check_class_weight,
    fake_gradients,
    implementation,
    operator,
    present,
    read,
    wanted,
    wide,
)

INPUTS = f"{HEAD}, Tensor target, Tensor? class_weight"
BACKWARD = f"Tensor upstream, Tensor maximum, {INPUTS}, bool[] needs, {SCALARS}"


@operator(f"({INPUTS}, {SCALARS}) -> (Tensor, Tensor)")
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    *scalars,
) -> tuple[Tensor, Tensor]:
    """Return the five sums [5, N] and, for a plan that keeps products, the kept ones [V, D].

    Args:
        hidden: Hidden states [N, D].
        weight: Vocabulary matrix [V, D].
        bias: Bias [V], or None.
        target: Class indices int [N].
        class_weight: Weights of ``LOGIT_SUM`` [V] or, of class probabilities, [N, V]; or None.
        scalars: Fields of a ``Rule`` and a ``Plan``, in their order.

    Returns:
        Sums, float32 (float64 for float64 inputs), and memory for ``linear_nll_grad_kept``, empty
        if nothing is kept.

    Raises:
        TypeError: Class probabilities with the triton backend.

    Example:
        >>> from perplexity.kernels.dispatch import DEFAULT, PLAIN
        >>> hidden, weight, target = torch.zeros(2, 8), torch.zeros(100, 8), torch.tensor([1, 2])
        >>> sums, _ = linear_nll(hidden, weight, None, target, None, *PLAIN, *DEFAULT)
        >>> sums[1]  # Σ exp(z − max)
        tensor([100., 100.])
    """
    rule, plan = read(scalars)
    check_class_weight(class_weight, plan.backend)
    kept = kept_like(weight, plan)
    inputs = hidden, weight, bias, target, class_weight
    sums = implementation(plan.backend).linear_nll(*inputs, rule, plan, kept)
    return sums, weight.new_empty(0) if kept is None else kept


def kept_like(weight: Tensor, plan: Plan) -> Tensor | None:
    """Return memory for the products that a plan keeps, [V, D]; None if it keeps none."""
    if plan.way != KEPT:
        return None
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@linear_nll.register_fake
def _(hidden, weight, bias, target, class_weight, *scalars):
    _, plan = read(scalars)
    sums = hidden.new_empty((SUMS, hidden.shape[0]), dtype=wide(hidden))
    return sums, weight.new_empty(weight.shape if plan.way == KEPT else 0)


@operator(f"({BACKWARD}) -> (Tensor, Tensor, Tensor)")
def linear_nll_grad(
    upstream: Tensor,
    maximum: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    needs: list[bool],
    *scalars,
) -> tuple[Tensor, ...]:
    """Return the gradients of hidden, weight and bias.

    Args:
        upstream: Upstream gradient of the sums [5, N].
        maximum: The forward's maxima [N].
        hidden, weight, bias, target, class_weight, scalars: As in ``linear_nll``.
        needs: Whether each of the three gradients is needed.

    Returns:
        Three tensors, empty where no gradient is needed.

    Example:
        >>> from perplexity.kernels.dispatch import DEFAULT, PLAIN
        >>> hidden, weight, target = torch.zeros(2, 8), torch.zeros(100, 8), torch.tensor([1, 2])
        >>> inputs = hidden, weight, None, target, None
        >>> sums, _ = linear_nll(*inputs, *PLAIN, *DEFAULT)
        >>> needs = [True, True, False]
        >>> gradients = linear_nll_grad(torch.ones(5, 2), sums[0], *inputs, needs, *PLAIN, *DEFAULT)
        >>> [tuple(gradient.shape) for gradient in gradients]
        [(2, 8), (100, 8), (0,)]
    """
    rule, plan = read(scalars)
    inputs = upstream, maximum, hidden, weight, bias, target, class_weight
    return present(
        implementation(plan.backend).linear_nll_grad(*inputs, rule, plan, needs=tuple(needs)),
        hidden,
    )


@linear_nll_grad.register_fake
def _(upstream, maximum, hidden, weight, bias, target, class_weight, needs, *_):
    return fake_gradients((hidden, weight, bias), needs, hidden)


@operator(f"(Tensor(a!) kept, {BACKWARD}) -> (Tensor, Tensor)", mutates=("kept",))
def linear_nll_grad_kept(
    kept: Tensor,
    upstream: Tensor,
    maximum: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    needs: list[bool],
    *scalars,
) -> tuple[Tensor, ...]:
    """Return the gradients of hidden and bias; turn ``kept`` into that of the weight.

    Args:
        kept: Products kept by the forward with these arguments, [V, D]; overwritten.
        upstream: Upstream gradient of the sums [5, N].
        maximum: The forward's maxima [N].
        hidden, weight, bias, target, class_weight, scalars: As in ``linear_nll``.
        needs: Whether the gradients of hidden, weight and bias are needed.

    Returns:
        Two tensors, empty where no gradient is needed.

    Example:
        >>> from perplexity.kernels.dispatch import PLAIN, plan
        >>> hidden, target = torch.zeros(2, 8), torch.tensor([1, 2])
        >>> weight = torch.zeros(100, 8, requires_grad=True)
        >>> scalars = *PLAIN, *plan(PLAIN, hidden, weight, backend="torch")
        >>> inputs = hidden, weight.detach(), None, target, None
        >>> sums, kept = linear_nll(*inputs, *scalars)
        >>> needs = [True, True, False]
        >>> grad_hidden, _ = linear_nll_grad_kept(
        ...     kept, torch.ones(5, 2), sums[0], *inputs, needs, *scalars
        ... )
        >>> grad_hidden.shape, kept.shape
        (torch.Size([2, 8]), torch.Size([100, 8]))
    """
    rule, plan = read(scalars)
    inputs = upstream, maximum, hidden, weight, bias, target, class_weight
    with_weight = needs[0], True, needs[2]
    gradients = implementation(plan.backend).linear_nll_grad(
        *inputs, rule, plan, kept, needs=with_weight
    )
    return present((gradients[0], gradients[2]), hidden)


@linear_nll_grad_kept.register_fake
def _(kept, upstream, maximum, hidden, weight, bias, target, class_weight, needs, *_):
    return fake_gradients((hidden, bias), (needs[0], needs[2]), hidden)


register_derivative(linear_nll_grad, no_context, refuse_second_derivative)


def save_for_gradient(ctx, inputs, scalars, sums: Tensor, kept: Tensor) -> None:
    """Save what ``gradients_of_sums`` needs of a forward with these inputs and results."""
    ctx.scalars = scalars
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # zeros for ``kept`` would be another [V, D]
    ctx.save_for_backward(*inputs, sums, kept)


def gradients_of_sums(ctx, upstream: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of hidden, weight and bias from that of the sums [5, N]."""
    if upstream is None:
        return [None, None, None]
    hidden, weight, bias, target, class_weight, sums, kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    inputs = (
        upstream,
        sums[MAX].detach(),
        hidden,
        weight,
        bias,
        target,
        class_weight,
        needs,
        *ctx.scalars,
    )
    if kept.shape == weight.shape and needs[1] and type(kept) is Tensor and only_backward(upstream):
        grad_hidden, grad_bias = linear_nll_grad_kept(kept, *inputs)
        gradients = grad_hidden, kept, grad_bias
    else:
        gradients = linear_nll_grad(*inputs)
    return wanted(gradients, needs)


def _setup(ctx, inputs, output):
    save_for_gradient(ctx, inputs[:5], inputs[5:], *output)


def _backward(ctx, upstream, _):
    nothing = [None] * (2 + len(ctx.scalars))  # for target, class_weight and the scalars
    return *gradients_of_sums(ctx, upstream), *nothing


register_derivative(linear_nll, _setup, _backward)
