"""The kernels as torch operators: registered with shapes for tracing and with their derivatives, on either backend.

``perplexity::linear_nll`` and ``perplexity::nll`` give the five per-token sums [5, N] of ``kernels/__init__.py``; losses
are arithmetic on those vectors, left to autograd. ``backend`` is "triton" or "torch"; triton is imported only for its own.
On a CPU a target outside [0, V) is an IndexError with its position; on a GPU, where looking costs a synchronisation,
its sums are NaN.
"""

import torch
from torch import Tensor

from . import MAX, SUMS, blockwise


def _implementation(backend: str, name: str):
    if backend == "torch":
        return getattr(blockwise, name)
    if backend != "triton":
        raise ValueError(f"backend: expected 'triton' or 'torch', got {backend!r}")
    if name.startswith("linear"):
        from . import linear_nll, linear_nll_grad

        return linear_nll_grad.linear_nll_grad if name.endswith("grad") else linear_nll.linear_nll
    from . import nll

    return getattr(nll, name)


def _memory(limit: int) -> dict:
    """0 stands for the implementation's own default."""
    return {"memory_limit": limit} if limit else {}


def _check(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    if target.device.type == "cpu":
        blockwise.check_target(target, vocabulary, ignore_index)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("perplexity::linear_nll", mutates_args=())
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    with_logit_sum: bool,
    with_exp_shift: bool,
    memory_limit: int,
    backend: str,
) -> Tensor:
    _check(target, weight.shape[0], ignore_index)
    return _implementation(backend, "linear_nll")(
        hidden,
        weight,
        bias,
        target,
        class_weight,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        with_logit_sum=with_logit_sum,
        with_exp_shift=with_exp_shift,
        **_memory(memory_limit),
    )


@linear_nll.register_fake
def _(hidden, weight, bias, target, *_):
    return hidden.new_empty((SUMS, hidden.shape[0]), dtype=_wide(hidden.dtype))


@torch.library.custom_op("perplexity::linear_nll_grad", mutates_args=())
def linear_nll_grad(
    upstream: Tensor,
    maximum: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    with_logit_sum: bool,
    with_exp_shift: bool,
    memory_limit: int,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _implementation(backend, "linear_nll_grad")(
        upstream,
        maximum,
        hidden,
        weight,
        bias,
        target,
        class_weight,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        with_logit_sum=with_logit_sum,
        with_exp_shift=with_exp_shift,
        needs=(needs_hidden, needs_weight, needs_bias),
        **_memory(memory_limit),
    )
    # An operator returns tensors only: an empty one stands for a gradient nobody asked for.
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)


@linear_nll_grad.register_fake
def _(
    upstream,
    maximum,
    hidden,
    weight,
    bias,
    target,
    class_weight,
    ignore_index,
    softcap,
    logit_scale,
    with_logit_sum,
    with_exp_shift,
    memory_limit,
    backend,
    needs_hidden,
    needs_weight,
    needs_bias,
):
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        bias.new_empty(weight.shape[0]) if needs_bias else hidden.new_empty(0),
    )


def _linear_setup(ctx, inputs, output):
    hidden, weight, bias, target, class_weight, *options = inputs
    ctx.save_for_backward(hidden, weight, bias, target, class_weight, output)
    ctx.options = options


def _linear_backward(ctx, upstream):
    hidden, weight, bias, target, class_weight, sums = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = linear_nll_grad(
        upstream, sums[MAX].detach(), hidden, weight, bias, target, class_weight, *ctx.options, *needs
    )
    wanted = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return *wanted, *([None] * 9)


linear_nll.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("perplexity::nll", mutates_args=())
def nll(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    with_logit_sum: bool,
    with_exp_shift: bool,
    backend: str,
) -> Tensor:
    _check(target, logits.shape[1], ignore_index)
    return _implementation(backend, "nll")(
        logits,
        target,
        class_weight,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        with_logit_sum=with_logit_sum,
        with_exp_shift=with_exp_shift,
    )


@nll.register_fake
def _(logits, *_):
    return logits.new_empty((SUMS, logits.shape[0]), dtype=_wide(logits.dtype))


@torch.library.custom_op("perplexity::nll_grad", mutates_args=())
def nll_grad(
    upstream: Tensor,
    maximum: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    with_logit_sum: bool,
    with_exp_shift: bool,
    backend: str,
) -> Tensor:
    return _implementation(backend, "nll_grad")(
        upstream,
        maximum,
        logits,
        target,
        class_weight,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        with_logit_sum=with_logit_sum,
        with_exp_shift=with_exp_shift,
    )


@nll_grad.register_fake
def _(upstream, maximum, logits, *_):
    return torch.empty_like(logits)


def _nll_setup(ctx, inputs, output):
    logits, target, class_weight, *options = inputs
    ctx.save_for_backward(logits, target, class_weight, output)
    ctx.options = options


def _nll_backward(ctx, upstream):
    logits, target, class_weight, sums = ctx.saved_tensors
    return nll_grad(upstream, sums[MAX].detach(), logits, target, class_weight, *ctx.options), *([None] * 8)


nll.register_autograd(_nll_backward, setup_context=_nll_setup)
