"""``linear_nll``: the five sums from hidden states and a vocabulary matrix, and its two
gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import KEPT
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
    """Return the five sums [5, N] and, of a plan that keeps products, those:
    ``linear_nll_grad_kept`` takes them, [V, D].
    """
    rule, plan = read(scalars)
    check_class_weight(class_weight, plan.backend)
    kept = (
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        if plan.way == KEPT
        else None
    )
    inputs = hidden, weight, bias, target, class_weight
    sums = implementation(plan.backend).linear_nll(*inputs, rule, plan, kept)
    return sums, weight.new_empty(0) if kept is None else kept


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
    """Return the gradients of hidden, weight and bias, from ``upstream`` [5, N] and the forward's
    ``maximum`` [N].
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
    """Return the gradients of hidden and bias; ``kept``, of the forward with these arguments,
    becomes that of the weight.
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


def _setup(ctx, inputs, output):
    tensors, ctx.scalars = inputs[:5], inputs[5:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for what was kept would be another [V, D]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, upstream, _):
    nothing = [None] * (2 + len(ctx.scalars))  # for the targets, the class weights and the scalars
    if upstream is None:
        return None, None, None, *nothing
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
    return *wanted(gradients, needs), *nothing


register_derivative(linear_nll, _setup, _backward)
