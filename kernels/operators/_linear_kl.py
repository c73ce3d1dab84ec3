"""``linear_kl``: the divergence of two heads per token, and its gradients."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Plan, Rule
from ..sums import DIVERGENCE_ROWS, divergence
from ._derivatives import no_context, refuse_second_derivative, register_derivative
from ._schema import PLAN, fake_gradients, implementation, operator, present, wanted, wide

HEADS = ", ".join(
    f"Tensor {side}_hidden, Tensor {side}_weight, Tensor? {side}_bias" for side in "pq"
)
RULES = ", ".join(f"float? {side}_softcap, float {side}_logit_scale" for side in "pq")


def _read(scalars: tuple) -> tuple[Rule, Rule, Plan]:
    """Return the rules of P and Q and the plan from an operator's scalars."""
    p_softcap, p_logit_scale, q_softcap, q_logit_scale, *plan = scalars
    p_rule = Rule(softcap=p_softcap, logit_scale=p_logit_scale)
    return p_rule, Rule(softcap=q_softcap, logit_scale=q_logit_scale), Plan(*plan)


@operator(f"({HEADS}, {RULES}, {PLAN}) -> (Tensor, Tensor)")
def linear_kl(
    p_hidden: Tensor,
    p_weight: Tensor,
    p_bias: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    *scalars,
) -> tuple[Tensor, Tensor]:
    """Return KL(P‖Q) [N] in nats, and the divergence's rows [5, N], which its gradient needs.

    Args:
        p_hidden, q_hidden: Hidden states [N, D_p] and [N, D_q].
        p_weight, q_weight: Vocabulary matrices [V, D_p] and [V, D_q].
        p_bias, q_bias: Biases [V], or None.
        scalars: Softcap and logit scale of P, then of Q, and the fields of a ``Plan``.

    Returns:
        Divergence [N] and rows [5, N], float32 (float64 where an input is).

    Example:
        >>> import torch
        >>> from perplexity.kernels.dispatch import DEFAULT
        >>> p, q = torch.eye(2), torch.zeros(2, 2)
        >>> linear_kl(p, p, None, p, q, None, None, 1.0, None, 1.0, *DEFAULT)[0]
        tensor([0.1109, 0.1109])
    """
    *rules, plan = _read(scalars)
    heads = (p_hidden, p_weight, p_bias), (q_hidden, q_weight, q_bias)
    rows = implementation(plan.backend).linear_kl(*heads, *rules, plan)
    return divergence(rows), rows


@linear_kl.register_fake
def _(p_hidden, p_weight, p_bias, q_hidden, *_):
    dtype, tokens = wide(p_hidden, q_hidden), p_hidden.shape[0]
    return p_hidden.new_empty(tokens, dtype=dtype), p_hidden.new_empty(
        (DIVERGENCE_ROWS, tokens), dtype=dtype
    )


@operator(
    f"(Tensor upstream, Tensor rows, {HEADS}, bool[] needs, {RULES}, {PLAN}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def linear_kl_grad(
    upstream: Tensor,
    rows: Tensor,
    p_hidden: Tensor,
    p_weight: Tensor,
    p_bias: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    needs: list[bool],
    *scalars,
) -> tuple[Tensor, ...]:
    """Return the gradients of hidden, weight and bias of P, then of Q.

    Args:
        upstream: Upstream gradient of the divergence [N].
        rows: The forward's rows [5, N].
        p_hidden, q_hidden, p_weight, q_weight, p_bias, q_bias: As in ``linear_kl``.
        needs: Whether each of the six gradients is needed.
        scalars: As in ``linear_kl``.

    Returns:
        Six tensors, empty where no gradient is needed.

    Example:
        >>> import torch
        >>> from perplexity.kernels.dispatch import DEFAULT
        >>> heads = [torch.eye(2), torch.eye(2), None] * 2
        >>> scalars = [None, 1.0, None, 1.0, *DEFAULT]
        >>> _, rows = linear_kl(*heads, *scalars)
        >>> needs = [True, False, False, False, False, False]
        >>> linear_kl_grad(torch.ones(2), rows, *heads, needs, *scalars)[0].abs().max()
        tensor(0.)
    """
    *rules, plan = _read(scalars)
    heads = (p_hidden, p_weight, p_bias), (q_hidden, q_weight, q_bias)
    sides = dict(p_needs=tuple(needs[:3]), q_needs=tuple(needs[3:]))
    gradients = implementation(plan.backend).linear_kl_grad(
        upstream, rows, *heads, *rules, plan, **sides
    )
    return present(gradients, p_hidden)


@linear_kl_grad.register_fake
def _(upstream, rows, *arguments):
    return fake_gradients(arguments[:6], arguments[6], arguments[0])


register_derivative(linear_kl_grad, no_context, refuse_second_derivative)


def _setup(ctx, inputs, output):
    tensors, ctx.scalars = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream, _):
    *tensors, rows = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    gradients = linear_kl_grad(upstream, rows, *tensors, needs, *ctx.scalars)
    return *wanted(gradients, needs), *([None] * len(ctx.scalars))


register_derivative(linear_kl, _setup, _backward)
