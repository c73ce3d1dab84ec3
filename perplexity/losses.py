"""Cross-entropy from hidden states or from logits: torch's semantics, without N × V in memory for
the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from . import checks
from .checks import IGNORE_INDEX, wrong
from .inputs import (
    LinearInputs,
    LossOptions,
    choose_backend,
    class_weights,
    prepare_target,
    refuse_forward_mode,
)
from .kernels import operators
from .kernels.cpu.logit_blocks import apply_rule
from .kernels.dispatch import AHEAD, Plan, Rule
from .kernels.sums import EXP_SHIFT, LOGIT_SUM, MAX, SUM_EXP, TARGET
from .parallel import VocabularyShard


def token_log_probability(sums: Tensor) -> Tensor:
    return (sums[TARGET] - sums[MAX]) - sums[SUM_EXP].log()


def negative_log_likelihood(sums: Tensor) -> Tensor:
    """Return −log p(target) of every token [N] in nats; by its own formula, since a log-probability
    of 0 negated is −0.
    """
    return (sums[MAX] - sums[TARGET]) + sums[SUM_EXP].log()


def token_entropy(sums: Tensor) -> Tensor:
    return sums[SUM_EXP].log() - sums[EXP_SHIFT] / sums[SUM_EXP]


def _reduced(
    loss: Tensor, penalty: Tensor | None, totals: tuple[Tensor, Tensor], reduction: str
) -> Tensor:
    """Per-token loss and z-loss, [N], to the loss: the mean of the first by class weights, of the
    second by tokens (``totals``).
    """
    if reduction == "none":
        return loss if penalty is None else loss + penalty
    total = loss.sum()
    if reduction == "mean":
        total = total / totals[0]
    if penalty is not None:
        total = total + (penalty.sum() / totals[1] if reduction == "mean" else penalty.sum())
    return total


def _weights_of_tokens(
    target: Tensor,
    class_weight: Tensor | None,
    vocabulary: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What each of the targets [N] counts in the loss, and whether it counts at all, [N]."""
    counted = target != ignore_index
    scale = counted.to(dtype)
    if class_weight is not None:
        scale = scale * class_weight[target.clamp(0, vocabulary - 1).long()]
    return scale, counted


def _loss(
    sums: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    vocabulary: int,
    options: LossOptions,
    totals: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Per-token sums [5, N] to the loss, in the dtype of the sums; formulas of
    torch.nn.functional.cross_entropy.

    loss = (1 − ε) · w[t] · nll + ε / V · Σ_v w[v] · (logsumexp − z[v]) + z_loss · logsumexp²

    ``totals``: what a mean divides by, where these tokens are part of more.
    """
    log_sum = sums[SUM_EXP].log()
    loss = negative_log_likelihood(sums)
    scale, counted = _weights_of_tokens(
        target, class_weight, vocabulary, options.ignore_index, loss.dtype
    )
    if class_weight is not None:
        loss = loss * scale
    if options.label_smoothing:
        weight_sum = vocabulary if class_weight is None else class_weight.sum()
        spread = weight_sum * log_sum - sums[LOGIT_SUM]
        loss = (
            1.0 - options.label_smoothing
        ) * loss + options.label_smoothing / vocabulary * spread
    penalty = options.z_loss * (sums[MAX] + log_sum).square() if options.z_loss else None
    return _reduced(loss, penalty, totals or (scale.sum(), counted.sum()), options.reduction)


class _Anchor(torch.autograd.Function):
    """An empty tensor that depends on the leaves: what a gradient that was made ahead depends on,
    without holding them.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, *leaves: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.leaves = 1 + len(leaves)
        return hidden.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return (None,) * ctx.leaves


class _FirstDerivative(torch.autograd.Function):
    """A gradient that depends on an anchor, in a way that nobody may ask for."""

    @staticmethod
    def forward(ctx, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx, *upstream):
        return operators.refuse_second_derivative()


class _GradientsAhead(torch.autograd.Function):
    """A loss whose gradients are made with it, while a chunk's logits are there: three matrix
    products a step.

    ``make()`` gives the loss and the gradients of hidden, weight and bias for an upstream gradient
    of 1.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, make: Callable
    ) -> Tensor:
        loss, gradients = make(ctx.needs_input_grad[:3])
        ctx.save_for_backward(anchor, *gradients)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        anchor, *gradients = ctx.saved_tensors
        multiply = Tensor.mul_ if operators.only_backward(upstream) else Tensor.mul
        scaled = [
            None if gradient is None else multiply(gradient, upstream) for gradient in gradients
        ]
        if torch.is_grad_enabled():
            scaled = [
                None if gradient is None else _FirstDerivative.apply(gradient, anchor)
                for gradient in scaled
            ]
        return *scaled, None, None


@contextmanager
def _own_graph() -> Iterator[None]:
    """Autograd for a graph of its own: a caller's hooks on saved tensors (checkpoints, offloading)
    are for the model's graph.
    """
    hooks: AbstractContextManager = nullcontext()
    if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]  # missing from torch's stubs
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor, lambda tensor: tensor
        )
    with torch.enable_grad(), hooks:
        yield


def _loss_with_gradients(inputs: LinearInputs, rule: Rule, plan: Plan) -> Tensor:
    from .kernels.gpu.linear_nll_chunked import linear_nll_with_gradients

    target, options, weight, vocabulary = (
        inputs.target.flat,
        inputs.options,
        inputs.class_weight,
        inputs.vocabulary,
    )
    scale, counted = _weights_of_tokens(
        target, weight, vocabulary, options.ignore_index, torch.float32
    )
    totals = scale.sum(), counted.sum()

    def loss_of(sums: Tensor, tokens: slice) -> Tensor:
        return _loss(sums, target[tokens], weight, vocabulary, options, totals)

    def upstream_of(sums: Tensor, tokens: slice) -> Tensor:
        with _own_graph():
            sums = sums.detach().requires_grad_()
            return torch.autograd.grad(loss_of(sums, tokens), sums)[0]

    def make(needs: tuple[bool, bool, bool]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        sums, gradients = linear_nll_with_gradients(
            inputs.hidden,
            inputs.weight,
            inputs.bias,
            target,
            weight if rule.with_logit_sum else None,
            rule,
            plan,
            upstream_of=upstream_of,
            needs=needs,
        )
        return loss_of(sums, slice(None)), gradients

    leaves = inputs.hidden, inputs.weight, inputs.bias
    return _GradientsAhead.apply(*leaves, _Anchor.apply(*leaves), make)


def _soft_weights(
    probabilities: Tensor, class_weight: Tensor | None, options: LossOptions, dtype: torch.dtype
) -> Tensor:
    """q[n, v] = w[v] · ((1 − ε) · p[n, v] + ε / V): the loss of a token is Σ_v q · (logsumexp −
    z).
    """
    q = probabilities.to(torch.promote_types(dtype, torch.float32))
    if options.label_smoothing:
        q = (1.0 - options.label_smoothing) * q + options.label_smoothing / q.shape[1]
    return q if class_weight is None else q * class_weight


class _LogitSumByWeights(torch.autograd.Function):
    """Zeros [N] with the derivative of Σ_v q · (z − m) by q [N, V], for which a kernel has none.

    ``shifted()`` gives z − m [N, V]. It is called in the backward: the derivative is as large.
    """

    @staticmethod
    def forward(ctx, q: Tensor, sums: Tensor, shifted: Callable[[], Tensor]) -> Tensor:
        ctx.shifted = shifted
        ctx.save_for_backward(sums)
        return q.new_zeros(q.shape[0])

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradient = upstream[:, None] * ctx.shifted()
        if torch.is_grad_enabled():  # it depends on what the sums depend on
            gradient = _FirstDerivative.apply(gradient, *ctx.saved_tensors)
        return gradient, None, None


def _with_derivative_by_weights(sums: Tensor, q: Tensor, logits: Callable[[], Tensor]) -> Tensor:
    """Return the sums with ``LOGIT_SUM`` differentiable by q, too; ``logits()`` gives z [N, V]."""
    if not (q.requires_grad and torch.is_grad_enabled()):
        return sums
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "target: the gradient of class probabilities is not for torch.func's transforms; take backward(), or "
            "torch.nn.functional.cross_entropy on torch.nn.functional.linear, which holds the logits"
        )
    maximum = sums[MAX].detach()

    def shifted() -> Tensor:
        with torch.no_grad():
            return logits().to(q.dtype) - maximum[:, None]

    rows = list(sums)
    rows[LOGIT_SUM] = rows[LOGIT_SUM] + _LogitSumByWeights.apply(q, sums, shifted)
    return torch.stack(rows)


def _soft_loss(sums: Tensor, q: Tensor, options: LossOptions) -> Tensor:
    log_sum = sums[SUM_EXP].log()
    loss = q.sum(1) * log_sum - sums[LOGIT_SUM]
    penalty = options.z_loss * (sums[MAX] + log_sum).square() if options.z_loss else None
    # torch divides by the number of tokens here, class weights or not
    every = torch.ones_like(loss).sum()
    return _reduced(loss, penalty, (every, every), options.reduction)


def named_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Return ``reduction``, or what torch's two older flags mean, with torch's warning."""
    if size_average is None and reduce is None:
        return reduction
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        checks.optional(checks.flag, name, value)
    return legacy_get_string(size_average, reduce)


def _of_several_heads(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    **keywords,
) -> Tensor:
    """Return torch's K-dimensional loss: a head for every place of [d_1, ..., d_K], one after the
    other.

    input [N, D], linear_weight [V, d_1, ..., d_K, D], linear_bias [V, d_1, ..., d_K], target [N,
    d_1, ..., d_K] or class probabilities [N, V, d_1, ..., d_K].
    """
    dimensions = f"with a linear_weight of {linear_weight.dim()} dimensions"
    for name, value, plain in (
        ("z_loss", options.z_loss, 0.0),
        ("shift", keywords.pop("shift"), 0),
        ("shard", keywords.pop("shard"), None),
    ):
        if value:
            raise wrong(name, f"{plain} {dimensions}", checks.shown(value))
    places, vocabulary = tuple(linear_weight.shape[1:-1]), linear_weight.shape[0]
    if math.prod(places) == 0:
        raise wrong("linear_weight", "at least one head", tuple(linear_weight.shape))
    if input.dim() != 2:
        raise wrong("input", f"shape [N, D] {dimensions}", tuple(input.shape))
    checks.dense("target", target)
    soft, tokens = target.is_floating_point(), input.shape[0]
    wanted = (tokens, vocabulary, *places) if soft else (tokens, *places)
    if tuple(target.shape) != wanted:
        raise wrong("target", f"shape {wanted}", tuple(target.shape))
    if linear_bias is not None:
        checks.floating("linear_bias", linear_bias)
        if tuple(linear_bias.shape) != (vocabulary, *places):
            raise wrong("linear_bias", f"shape {(vocabulary, *places)}", tuple(linear_bias.shape))
    # Unbound once: the gradient of a slice would be as large as all of the weight.
    weights = linear_weight.flatten(1, -2).unbind(1)
    biases = [None] * len(weights) if linear_bias is None else linear_bias.flatten(1).unbind(1)
    targets = target.flatten(1 + soft).unbind(-1)
    shared = vars(options) | keywords | {"reduction": "none"}
    losses = [
        linear_cross_entropy(input, *head, linear_bias=bias, weight=weight, **shared)
        for *head, bias in zip(weights, targets, biases, strict=True)
    ]
    loss = torch.stack(losses, dim=-1)
    if options.reduction == "none":
        return loss.reshape(tokens, *places)
    if options.reduction == "sum":
        return loss.sum()
    if soft:
        return loss.mean()
    scale, _ = _weights_of_tokens(target, weight, vocabulary, options.ignore_index, loss.dtype)
    return loss.sum() / scale.sum()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    shift: int = 0,
    round_logits: bool = True,
    backend: str | None = None,
    memory_limit: int | None = None,
    validate: bool | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Cross-entropy of ``input @ linear_weight.T + linear_bias`` against ``target``, in nats,
    without holding the logits.

    input [..., D], linear_weight [V, D], linear_bias [V], weight (of classes) [V]; target int64
    [...], or class probabilities [..., V] (torch backend only; where they are 16-bit, smoothed or
    weighted, a float32 copy is made of them, which ``memory_limit`` does not count). The logits are
    ``softcap * tanh(logit_scale * (input @ linear_weight.T + linear_bias) / softcap)``, in float32
    for 16-bit inputs. Returns float32 (float64 for float64 inputs): a scalar, or the shape of
    target for ``reduction="none"``.

    ``reduction``, ``ignore_index``, ``label_smoothing`` and ``weight`` mean what they mean in
    ``torch.nn.functional.cross_entropy``; ``z_loss`` adds z_loss · logsumexp² per token (PaLM,
    arXiv:2204.02311). ``shift=True`` scores position t with the target at t + 1 of the last
    dimension of target (``shift=k``: at t + k), without copying ``input``; "none" then returns one
    position less. ``shard``: ``linear_weight`` holds the rows of one rank only
    (``VocabularyShard``); a DTensor weight says so itself.

    ``round_logits``: products of 16-bit inputs may be rounded to their dtype before the softmax, as
    ``torch.nn.functional.linear`` rounds them, where that is faster: bfloat16 on a CPU that has
    instructions for it. False: float32 logits everywhere. On a GPU rounding is of use to a bfloat16
    training step alone (see below); everything else there has float32 logits in any case.

    ``memory_limit`` caps temporary memory in bytes (gradients, counted in float32, and vectors of N
    excepted; one token and one vocabulary row are taken at least). Default: 12 MiB forward and 16
    MiB backward on the torch backend, 512 MiB on triton. On the torch backend a block of T tokens
    and R vocabulary rows takes c · T · R bytes, c what a logit takes with its copies (forward 4,
    and 2 where products are rounded, 4 for class probabilities; backward 4, and 2 for 16-bit
    inputs, 4 for a softcap, 4 for class probabilities; a step that keeps products, see below, takes
    the backward's limit and c in both directions); of the limit, float32 copies of 16-bit inputs
    take three quarters at most, 16-bit products on their way to a float32 sum an eighth. On triton
    the forward takes 20 bytes a token and 2,048 vocabulary rows, the backward the 2 or 4 bytes of
    the inputs a logit and 4 · D bytes a vocabulary row; a step whose gradients are made with the
    loss 2 bytes a logit, and it holds the weight's gradient in float32 and in its own dtype at
    once.

    Gradients: three to four matrix products a step. The torch backend keeps the products of the
    first D tokens where the gradient of the weight will be, from the forward on. On an NVIDIA GPU a
    bfloat16 sum or mean makes its gradients with the loss, from as many tokens' logits at a time as
    the limit holds, and the backward multiplies them by its upstream gradient: they are held from
    then on, and the limit has to hold 1,024 tokens' logits, or all. Everywhere else, while
    compiling, and on the torch backend where the graph is retained, logits are computed again,
    block by block. Any upstream gradient, a second backward too, is right; the second derivative is
    an error.

    ``validate``: look for targets outside [0, V) and raise IndexError with the position (None: on a
    CPU only, since on a GPU looking waits for it; such a target gives NaN there). Raises ValueError
    or TypeError naming the argument.
    """
    if options is not None:
        raise wrong(
            "options", "None (torch's chunking options have no use here: see memory_limit)", options
        )
    settings = LossOptions(
        reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss, memory_limit
    )
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        checks.floating("input", input)
        return _of_several_heads(
            input,
            linear_weight,
            target,
            linear_bias,
            weight,
            settings,
            shift=shift,
            round_logits=round_logits,
            backend=backend,
            validate=validate,
            shard=shard,
        )
    inputs = LinearInputs.prepare(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        options=settings,
        backend=backend,
        shift=shift,
        validate=validate,
        shard=shard,
        round_logits=round_logits,
    )
    if inputs.target.probabilities:
        q = _soft_weights(inputs.target.flat, inputs.class_weight, settings, inputs.hidden.dtype)
        sums = inputs.sums(settings.rule(with_logit_sum=True), q)
        loss = _soft_loss(_with_derivative_by_weights(sums, q, inputs.logits), q, settings)
    else:
        rule = settings.rule(with_logit_sum=settings.label_smoothing > 0.0)
        plan = inputs.plan(rule)
        if plan.way == AHEAD:
            loss = _loss_with_gradients(inputs, rule, plan)
        else:
            sums = inputs.sums(rule, inputs.class_weight, plan)
            loss = _loss(sums, inputs.target.flat, inputs.class_weight, inputs.vocabulary, settings)
    return inputs.target.unflatten(loss) if reduction == "none" else loss


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int | None = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    shift: int = 0,
    backend: str | None = None,
    memory_limit: int | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Cross-entropy of logits that exist, in nats; float32 for 16-bit logits, which are read where
    they are.

    input [C], [N, C] or [N, C, d1, ...] as in ``torch.nn.functional.cross_entropy``; target int64
    [], [N] or [N, d1, ...], or class probabilities in the shape of input (torch backend only). The
    other options are those of ``linear_cross_entropy``; the logits are ``softcap * tanh(logit_scale
    * input / softcap)``. ``memory_limit`` (4 MiB by default) caps the copies of the torch backend,
    one row of C at least; triton needs none.
    """
    reduction = named_reduction(size_average, reduce, reduction)
    settings = LossOptions(
        reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss, memory_limit
    )
    checks.floating("input", input)
    refuse_forward_mode(input)
    if input.dim() < 1:
        raise wrong("input", "shape [C], [N, C] or [N, C, d1, ...]", "a scalar")
    class_dimension = min(input.dim() - 1, 1)
    vocabulary = input.shape[class_dimension]
    if vocabulary == 0:
        raise wrong("input", "at least one class", tuple(input.shape))
    shape = tuple(input.shape)
    prepared = prepare_target(
        target,
        classes=shape[:class_dimension] + shape[class_dimension + 1 :],
        probabilities=shape,
        class_dimension=class_dimension,
        vocabulary=vocabulary,
        device=input.device,
        options=settings,
        shift=shift,
        validate=validate,
    )
    weight = class_weights(weight, vocabulary, input)
    soft = prepared.probabilities
    rows = (
        prepared.flat.new_zeros(prepared.flat.shape[0], dtype=torch.int64)
        if soft
        else prepared.flat
    )
    q = _soft_weights(prepared.flat, weight, settings, input.dtype) if soft else None
    ignored = IGNORE_INDEX if soft else settings.ignore_index
    rule = Rule(
        ignored, softcap, logit_scale, with_logit_sum=soft or settings.label_smoothing > 0.0
    )
    chosen = "torch" if backend is None and soft else choose_backend(backend, input)
    sums = operators.nll(
        input[None] if input.dim() == 1 else input.flatten(2) if input.dim() > 3 else input,
        rows,
        q if soft else weight if settings.label_smoothing else None,
        *rule,
        *Plan(chosen, memory_limit=settings.memory),
    )
    if q is not None:
        flat = input.movedim(class_dimension, -1).reshape(-1, vocabulary)
        sums = _with_derivative_by_weights(
            sums, q, lambda: apply_rule(flat.to(q.dtype, copy=True), None, softcap, logit_scale)
        )
        loss = _soft_loss(sums, q, settings)
    else:
        loss = _loss(sums, rows, weight, vocabulary, settings)
    return prepared.unflatten(loss) if reduction == "none" else loss
