"""The kernels as torch operators: registered with shapes for tracing and with their derivatives, on either backend.

``perplexity::linear_nll`` and ``perplexity::nll`` give the five per-token sums [5, N] of ``sums.py``; losses
are arithmetic on those vectors, left to autograd. ``linear_kl`` gives the five rows of the divergence likewise.
``backend`` is "triton" or "torch"; triton is imported only for its own. ``memory_limit`` 0 is the backend's default.

Nothing here waits for a device, ``checked_target`` excepted: its callers decide whether looking is worth that.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from .dispatch import Plan, Rule
from .sums import DIVERGENCE_ROWS, MAX, SUMS, divergence

# The modules have the same functions with the same signatures; triton is imported for its own alone.
BACKENDS = {"torch": "cpu.backend", "triton": "gpu.backend"}


@cache
def implementation(backend: str) -> ModuleType:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'triton' or 'torch', got {backend!r}")
    return import_module(f"{__package__}.{BACKENDS[backend]}")


def _wide(*tensors: Tensor) -> torch.dtype:
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def _class_weight(class_weight: Tensor | None, backend: str) -> Tensor | None:
    if backend == "triton" and class_weight is not None and class_weight.dim() == 2:
        raise TypeError(
            "target: the triton backend expects class indices, got class probabilities; backend='torch' takes both"
        )
    return class_weight


def refuse_second_derivative(*_):
    """A derivative of the derivative is an error that says so, instead of a silent zero."""
    raise NotImplementedError(
        "double backward: the fused losses have first derivatives only; for a gradient penalty take "
        "torch.nn.functional.cross_entropy on torch.nn.functional.linear, which holds the logits"
    )


def _each(function: Callable) -> Callable:
    """Return a rule for vmap that calls ``function`` once an item: its products are large enough to be called one by one."""

    def rule(info, in_dims, *arguments):
        def item(place: int):
            return [
                argument.select(dim, place) if isinstance(argument, Tensor) and dim is not None else argument
                for argument, dim in zip(arguments, in_dims, strict=True)
            ]

        results = [function(*item(place)) for place in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


# Holds what torch.func's transforms call: it is forgotten with this object.
_TRANSFORMED = torch.library.Library("perplexity", "FRAGMENT")


def _register_derivative(operator, setup_context: Callable, backward: Callable) -> None:
    """Register an operator's derivative, for autograd and for torch.func's transforms.

    They take no operator's derivative, only that of an ``autograd.Function`` whose context is set up apart. It stands at
    the first dispatch key of theirs, where a compiled transform finds it, too.
    """
    operator.register_autograd(backward, setup_context=setup_context)
    members = {
        "forward": staticmethod(lambda *arguments: operator(*arguments)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(refuse_forward_mode),
        "vmap": staticmethod(_each(operator)),
    }
    name = operator._name
    function = type(name, (torch.autograd.Function,), members)
    _TRANSFORMED.impl(name, lambda *arguments: function.apply(*arguments), "FuncTorchDynamicLayerFrontMode")


def _no_context(ctx, inputs, output) -> None:
    """Keep nothing: the derivative is an error."""


def refuse_forward_mode(*_):
    """A forward derivative is an error that says so: an operator without one drops the tangent in silence."""
    raise NotImplementedError(
        "forward-mode derivatives (jvp, jacfwd, hessian): the fused losses have reverse-mode first derivatives only; "
        "take torch.nn.functional.cross_entropy on torch.nn.functional.linear, which holds the logits"
    )


@torch.library.custom_op("perplexity::checked_target", mutates_args=())
def checked_target(target: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """``target``, copied, or IndexError with the position of the first value outside [0, vocabulary) ∪ {ignore_index}."""
    invalid = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if invalid.any():
        position = tuple(invalid.nonzero()[0].tolist())
        raise IndexError(
            f"target: expected values in [0, {vocabulary}) or ignore_index ({ignore_index}), "
            f"got {int(target[position])} at position {position[0] if len(position) == 1 else position}"
        )
    return target.clone()


@checked_target.register_fake
def _(target, *_):
    return torch.empty_like(target)


@checked_target.register_vmap
def _(info, in_dims, target, *options):
    return checked_target(target.movedim(in_dims[0], 0), *options), 0


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
    rounded: bool,
    block: list[int],
    memory_limit: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The five sums [5, N]; with a ``block`` also what ``linear_nll_grad_kept`` turns into the weight's gradient [V, D].

    ``rounded`` and ``block``, a ``kept_block``, are for the torch backend (``blockwise.py``); the kernels neither round nor
    keep.
    """
    rule = Rule(ignore_index, softcap, logit_scale, with_logit_sum, with_exp_shift)
    plan = Plan(backend, rounded, tuple(block), memory_limit)
    kept = torch.empty_like(weight, memory_format=torch.contiguous_format) if block and backend == "torch" else None
    class_weight = _class_weight(class_weight, backend)
    sums = implementation(backend).linear_nll(hidden, weight, bias, target, class_weight, rule, plan, kept)
    return sums, weight.new_empty(0) if kept is None else kept


@linear_nll.register_fake
def _(hidden, weight, bias, target, class_weight, *options):
    *_, block, _, backend = options
    sums = hidden.new_empty((SUMS, hidden.shape[0]), dtype=_wide(hidden))
    return sums, weight.new_empty(weight.shape if block and backend == "torch" else 0)


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
    rounded: bool,
    memory_limit: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rule = Rule(ignore_index, softcap, logit_scale, with_logit_sum, with_exp_shift)
    plan = Plan(backend, rounded, memory_limit=memory_limit)
    inputs = upstream, maximum, hidden, weight, bias, target, class_weight
    return _present(implementation(backend).linear_nll_grad(*inputs, rule, plan, needs=tuple(needs)), hidden)


@torch.library.custom_op("perplexity::linear_nll_grad_kept", mutates_args=("kept",))
def linear_nll_grad_kept(
    kept: Tensor,
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
    rounded: bool,
    block: list[int],
    memory_limit: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and bias; ``kept``, of the forward with these arguments, becomes that of the weight."""
    rule = Rule(ignore_index, softcap, logit_scale, with_logit_sum, with_exp_shift)
    plan = Plan("torch", rounded, tuple(block), memory_limit)
    inputs = upstream, maximum, hidden, weight, bias, target, class_weight
    gradients = implementation("torch").linear_nll_grad(*inputs, rule, plan, kept, needs=(needs[0], True, needs[2]))
    return _present((gradients[0], gradients[2]), hidden)


@linear_nll_grad_kept.register_fake
def _(kept, upstream, maximum, hidden, weight, bias, target, class_weight, *options):
    needs = options[-1]
    return _fake_gradients((hidden, bias), (needs[0], needs[2]))


def _present(gradients, like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors only: an empty one stands for a gradient nobody asked for."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_gradients(tensors, needs) -> tuple[Tensor, ...]:
    like = tensors[0]
    # Whatever the leaves' strides, gradients are contiguous.
    return tuple(
        tensor.new_empty(tensor.shape) if needed else like.new_empty(0)
        for tensor, needed in zip(tensors, needs, strict=True)
    )


@linear_nll_grad.register_fake
def _(upstream, maximum, hidden, weight, bias, target, class_weight, *options):
    return _fake_gradients((hidden, weight, bias), options[-1])


_register_derivative(linear_nll_grad, _no_context, refuse_second_derivative)


def _linear_setup(ctx, inputs, output):
    hidden, weight, bias, target, class_weight, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for what was kept would be another [V, D]
    ctx.save_for_backward(hidden, weight, bias, target, class_weight, *output)
    ctx.options = options


def _wanted(gradients, needs) -> list[Tensor | None]:
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


def only_backward(upstream: Tensor) -> bool:
    """Whether this is the only backward there will be: not of a graph that is retained, nor of what is traced or batched."""
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    stays = known is None or known()
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(upstream) or functorch.is_legacy_batchedtensor(upstream)
    return not stays and not batched


def _linear_backward(ctx, upstream, _):
    if upstream is None:
        return (None,) * 14
    hidden, weight, bias, target, class_weight, sums, kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    *options, block, memory_limit, backend = ctx.options
    inputs = (upstream, sums[MAX].detach(), hidden, weight, bias, target, class_weight, *options)
    if kept.shape == weight.shape and needs[1] and type(kept) is Tensor and only_backward(upstream):
        grad_hidden, grad_bias = linear_nll_grad_kept(kept, *inputs, block, memory_limit, needs)
        gradients = grad_hidden, kept, grad_bias
    else:
        gradients = linear_nll_grad(*inputs, memory_limit, backend, needs)
    return *_wanted(gradients, needs), *([None] * 11)


_register_derivative(linear_nll, _linear_setup, _linear_backward)


@torch.library.custom_op("perplexity::target_logit", mutates_args=())
def target_logit(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    softcap: float | None,
    logit_scale: float,
    memory_limit: int,
    backend: str,
) -> Tensor:
    """The logit of every token's target, [N]; 0 where it is no row of ``weight``."""
    rule, plan = Rule(softcap=softcap, logit_scale=logit_scale), Plan(backend, memory_limit=memory_limit)
    return implementation(backend).target_logit(hidden, weight, bias, target, rule, plan)


target_logit.register_vmap(_each(target_logit))


@target_logit.register_fake
def _(hidden, *_):
    return hidden.new_empty(hidden.shape[0], dtype=_wide(hidden))


@torch.library.custom_op("perplexity::linear_statistics", mutates_args=())
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_logit: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    memory_limit: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The five sums [5, N], how many logits are above the target's and the column of the largest, int64 [N]."""
    rule, plan = Rule(ignore_index, softcap, logit_scale), Plan(backend, memory_limit=memory_limit)
    return implementation(backend).linear_statistics(hidden, weight, bias, target, target_logit, rule, plan)


linear_statistics.register_vmap(_each(linear_statistics))


@linear_statistics.register_fake
def _(hidden, *_):
    counts = [hidden.new_empty(hidden.shape[0], dtype=torch.int64) for _ in range(2)]
    return hidden.new_empty((SUMS, hidden.shape[0]), dtype=_wide(hidden)), *counts


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
    memory_limit: int,
    backend: str,
) -> Tensor:
    rule = Rule(ignore_index, softcap, logit_scale, with_logit_sum, with_exp_shift)
    plan = Plan(backend, memory_limit=memory_limit)
    return implementation(backend).nll(logits, target, _class_weight(class_weight, backend), rule, plan)


@nll.register_fake
def _(logits, target, *_):
    return logits.new_empty((SUMS, target.shape[0]), dtype=_wide(logits))


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
    memory_limit: int,
    backend: str,
) -> Tensor:
    rule = Rule(ignore_index, softcap, logit_scale, with_logit_sum, with_exp_shift)
    plan = Plan(backend, memory_limit=memory_limit)
    return implementation(backend).nll_grad(upstream, maximum, logits, target, class_weight, rule, plan)


@nll_grad.register_fake
def _(upstream, maximum, logits, *_):
    return torch.empty_like(logits)


_register_derivative(nll_grad, _no_context, refuse_second_derivative)


def _nll_setup(ctx, inputs, output):
    logits, target, class_weight, *options = inputs
    ctx.save_for_backward(logits, target, class_weight, output)
    ctx.options = options


def _nll_backward(ctx, upstream):
    logits, target, class_weight, sums = ctx.saved_tensors
    return nll_grad(upstream, sums[MAX].detach(), logits, target, class_weight, *ctx.options), *([None] * 9)


_register_derivative(nll, _nll_setup, _nll_backward)


@torch.library.custom_op("perplexity::merge", mutates_args=())
def merge(
    partials: Tensor, target: Tensor, weights: Tensor | None, vocabulary: int, ignore_index: int, backend: str
) -> Tensor:
    """Sums of parts of the vocabulary, [5, parts, N], folded into [5, N] in their order: what spans of a kernel do.

    ``weights`` [parts], Σ w of each, where ``LOGIT_SUM`` is asked for.
    """
    return implementation(backend).merge(partials, target, weights, vocabulary=vocabulary, ignore_index=ignore_index)


@merge.register_fake
def _(partials, *_):
    return partials.new_empty((partials.shape[0], partials.shape[2]))


def _merge_setup(ctx, inputs, output):
    partials, target, _, _, ctx.ignore_index, _ = inputs
    ctx.save_for_backward(partials, target, output)


def _merge_backward(ctx, upstream):
    """The maxima count as constants, as everywhere: S = Σ s · e^(m − M), U = Σ e^(m − M) · (u + s · (m − M))."""
    partials, target, sums = ctx.saved_tensors
    moved = torch.where(partials[1] > 0, partials[MAX] - sums[MAX], -torch.inf)
    decay = moved.exp()
    _, per_sum, per_target, per_logit, per_shift = upstream
    moved = torch.where(decay > 0, moved, 0.0)
    rows = torch.stack(
        [
            torch.zeros_like(decay),
            decay * (per_sum + per_shift * moved),
            per_target.expand_as(decay),
            per_logit.expand_as(decay),
            decay * per_shift,
        ]
    )
    return rows.masked_fill(target == ctx.ignore_index, 0.0), *([None] * 5)


_register_derivative(merge, _merge_setup, _merge_backward)


@torch.library.custom_op("perplexity::linear_kl", mutates_args=())
def linear_kl(
    p_hidden: Tensor,
    p_weight: Tensor,
    p_bias: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    p_softcap: float | None,
    p_logit_scale: float,
    q_softcap: float | None,
    q_logit_scale: float,
    memory_limit: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """KL(P‖Q) [N] and the rows of the divergence [5, N], which its gradient takes."""
    heads = (p_hidden, p_weight, p_bias), (q_hidden, q_weight, q_bias)
    rules = [
        Rule(softcap=cap, logit_scale=scale) for cap, scale in ((p_softcap, p_logit_scale), (q_softcap, q_logit_scale))
    ]
    rows = implementation(backend).linear_kl(*heads, *rules, Plan(backend, memory_limit=memory_limit))
    return divergence(rows), rows


@linear_kl.register_fake
def _(p_hidden, p_weight, p_bias, q_hidden, *_):
    wide, tokens = _wide(p_hidden, q_hidden), p_hidden.shape[0]
    return p_hidden.new_empty(tokens, dtype=wide), p_hidden.new_empty((DIVERGENCE_ROWS, tokens), dtype=wide)


@torch.library.custom_op("perplexity::linear_kl_grad", mutates_args=())
def linear_kl_grad(
    upstream: Tensor,
    rows: Tensor,
    p_hidden: Tensor,
    p_weight: Tensor,
    p_bias: Tensor | None,
    q_hidden: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    p_softcap: float | None,
    p_logit_scale: float,
    q_softcap: float | None,
    q_logit_scale: float,
    memory_limit: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads = (p_hidden, p_weight, p_bias), (q_hidden, q_weight, q_bias)
    rules = [
        Rule(softcap=cap, logit_scale=scale) for cap, scale in ((p_softcap, p_logit_scale), (q_softcap, q_logit_scale))
    ]
    plan, sides = Plan(backend, memory_limit=memory_limit), dict(p_needs=tuple(needs[:3]), q_needs=tuple(needs[3:]))
    gradients = implementation(backend).linear_kl_grad(upstream, rows, *heads, *rules, plan, **sides)
    return _present(gradients, p_hidden)


@linear_kl_grad.register_fake
def _(upstream, rows, *arguments):
    return _fake_gradients(arguments[:6], arguments[-1])


_register_derivative(linear_kl_grad, _no_context, refuse_second_derivative)


def _kl_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(output[1])


def _kl_backward(ctx, upstream, _):
    *tensors, rows = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    gradients = linear_kl_grad(upstream, rows, *tensors, *ctx.options, needs)
    return *_wanted(gradients, needs), *([None] * 6)


_register_derivative(linear_kl, _kl_setup, _kl_backward)
