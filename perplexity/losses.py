"""Cross-entropy from hidden states or from logits, with torch's semantics.

From hidden states, the logits [N, V] are never held in memory as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from . import checks, tensor_checks
from .checks import IGNORE_INDEX, wrong
from .errors import InputTypeError
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
from .kernels.sums import LOGIT_SUM, MAX, SUM_EXP, TARGET
from .parallel import VocabularyShard
from .per_token import TokenStatistics, negative_log_likelihood

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's from Python 3.11 on


def _reduced(
    loss: Tensor, penalty: Tensor | None, totals: tuple[Tensor, Tensor], reduction: str
) -> Tensor:
    """Reduce the per-token ``loss`` [N] and the z-loss ``penalty`` [N], in that order.

    A mean divides the loss by ``totals[0]``, the class weights, and the penalty by ``totals[1]``,
    the number of tokens.
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
    """Return each token's weight in the loss [N], and whether the token is scored, bool [N]."""
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
    """Return the loss from per-token sums [5, N], in their dtype.

    loss = (1 − ε) · w[t] · nll + ε / V · Σ_v w[v] · (logsumexp − z[v]) + z_loss · logsumexp², as in
    torch.nn.functional.cross_entropy.

    ``totals`` are the divisors of a mean, for tokens that are a part of more.
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
    """An empty tensor that depends on the leaves without holding them.

    Gradients computed ahead depend on this tensor.
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
    """A gradient that depends on an anchor and has no derivative of its own."""

    @staticmethod
    def forward(ctx, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx, *upstream):
        return operators.refuse_second_derivative()


class _GradientsAhead(torch.autograd.Function):
    """A loss whose gradients are computed in the forward, from each chunk's logits.

    A step then takes three matrix products. ``make(needs)`` returns the loss, and the gradients of
    hidden, weight and bias for an upstream gradient of 1.
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
        multiply = _multiply_in_place if operators.only_backward(upstream) else Tensor.mul
        scaled = [
            None if gradient is None else multiply(gradient, upstream) for gradient in gradients
        ]
        if torch.is_grad_enabled():
            scaled = [
                None if gradient is None else _FirstDerivative.apply(gradient, anchor)
                for gradient in scaled
            ]
        return *scaled, None, None


def _multiply_in_place(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply a gradient by the upstream gradient, without a pass over it where that is 1."""
    from .kernels.gpu.linear_nll_chunked import scale_

    if {gradient.dtype, upstream.dtype} <= set(tensor_checks.TRITON_DTYPES):
        return scale_(gradient, upstream)
    return gradient.mul_(upstream)


class _LossDerivative:
    """The derivative of ``_loss`` by the sums of a part of the tokens, in closed form.

    With s = SUM_EXP, m = MAX, c the weight of a token's NLL over the mean's divisor, ε' the weight
    of a class's smoothing over the same, W = Σ w, and z the factor of the z-loss over its divisor:

        ∂/∂s = (c + ε' · W + 2 · z · (m + log s)) / s      ∂/∂TARGET = −c      ∂/∂LOGIT_SUM = −ε'

    The maximum is a constant (``sums.py``), and no loss has ``EXP_SHIFT``. Tokens that are not
    scored have c = 0; the kernels leave their gradient at 0 whatever this derivative is.
    """

    def __init__(
        self,
        scale: Tensor,
        class_weight: Tensor | None,
        vocabulary: int,
        options: LossOptions,
        totals: tuple[Tensor, Tensor],
    ):
        """Prepare what all parts share.

        Args:
            scale: Weights of all tokens in the loss [N].
            class_weight: Class weights [V] or None.
            vocabulary: Number of classes.
            options: Options of the loss; its reduction is "sum" or "mean".
            totals: Divisors of a mean: of the loss and of the z-loss.
        """
        mean, smoothing = options.reduction == "mean", options.label_smoothing
        self.of_nll = scale * (1.0 - smoothing) if smoothing else scale
        if mean:
            self.of_nll = self.of_nll / totals[0]
        self.of_target = -self.of_nll
        self.of_exponentials, self.of_logit = self.of_nll, None
        if smoothing:
            weight_sum = vocabulary if class_weight is None else class_weight.sum()
            smooth = scale.new_full((), smoothing / vocabulary)
            smooth = smooth / totals[0] if mean else smooth
            self.of_logit = -smooth
            self.of_exponentials = self.of_nll + smooth * weight_sum
        self.of_log_sum: Tensor | None = None
        if options.z_loss:
            of_log_sum = scale.new_full((), 2.0 * options.z_loss)
            self.of_log_sum = of_log_sum / totals[1] if mean else of_log_sum

    def __call__(self, sums: Tensor, tokens: slice) -> Tensor:
        """Return the derivative of the loss by the sums [5, T] of these tokens."""
        derivative = torch.zeros_like(sums)
        of_exponentials = self.of_exponentials[tokens]
        if self.of_log_sum is not None:
            log_sum = sums[MAX] + sums[SUM_EXP].log()
            of_exponentials = of_exponentials + self.of_log_sum * log_sum
        torch.div(of_exponentials, sums[SUM_EXP], out=derivative[SUM_EXP])
        derivative[TARGET] = self.of_target[tokens]
        if self.of_logit is not None:
            derivative[LOGIT_SUM] = self.of_logit
        return derivative


def _loss_with_gradients(inputs: LinearInputs, rule: Rule, plan: Plan) -> Tensor:
    """Return the loss of a plan ``ahead``, whose backward only scales gradients."""
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

    def make(needs: tuple[bool, bool, bool]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        sums, gradients = linear_nll_with_gradients(
            inputs.hidden,
            inputs.weight,
            inputs.bias,
            target,
            weight if rule.with_logit_sum else None,
            rule,
            plan,
            upstream_of=_LossDerivative(scale, weight, vocabulary, options, totals),
            needs=needs,
        )
        return _loss(sums, target, weight, vocabulary, options, totals), gradients

    leaves = inputs.hidden, inputs.weight, inputs.bias
    return _GradientsAhead.apply(*leaves, _Anchor.apply(*leaves), make)


def _loss_with_statistics(inputs: LinearInputs) -> tuple[Tensor, TokenStatistics, Tensor]:
    """Return the loss from class indices, the statistics of its own logits, and p(predicted)."""
    options, weight = inputs.options, inputs.class_weight
    if inputs.target.probabilities:
        expected = "class indices with return_statistics"
        raise wrong("target", expected, "class probabilities", InputTypeError)
    rule = options.rule(with_logit_sum=options.label_smoothing > 0.0, with_exp_shift=True)
    plan = inputs.plan(rule, weight, per_token=True)
    sums, rank, predicted = inputs.sums_and_choices(rule, weight, plan=plan)
    loss = _loss(sums, inputs.target.flat, weight, inputs.vocabulary, options)
    return loss, *inputs.statistics(sums, rank, predicted)


def _soft_weights(
    probabilities: Tensor, class_weight: Tensor | None, options: LossOptions, dtype: torch.dtype
) -> Tensor:
    """Return q[n, v] = w[v] · ((1 − ε) · p[n, v] + ε / V) [N, V].

    The loss of a token is Σ_v q · (logsumexp − z).
    """
    q = probabilities.to(torch.promote_types(dtype, torch.float32))
    if options.label_smoothing:
        q = (1.0 - options.label_smoothing) * q + options.label_smoothing / q.shape[1]
    return q if class_weight is None else q * class_weight


class _LogitSumByWeights(torch.autograd.Function):
    """Zeros [N] with the derivative of Σ_v q · (z − m) by q [N, V], which no kernel computes.

    ``shifted()`` returns z − m [N, V]. The backward calls it: the derivative has that size, too.
    """

    @staticmethod
    def forward(ctx, q: Tensor, sums: Tensor, shifted: Callable[[], Tensor]) -> Tensor:
        ctx.shifted = shifted
        ctx.save_for_backward(sums)
        return q.new_zeros(q.shape[0])

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradient = upstream[:, None] * ctx.shifted()
        if torch.is_grad_enabled():  # the gradient depends on what the sums depend on
            gradient = _FirstDerivative.apply(gradient, *ctx.saved_tensors)
        return gradient, None, None


def _with_derivative_by_weights(sums: Tensor, q: Tensor, logits: Callable[[], Tensor]) -> Tensor:
    """Return the sums with ``LOGIT_SUM`` differentiable by q as well.

    ``logits()`` returns z [N, V].
    """
    if not (q.requires_grad and torch.is_grad_enabled()):
        return sums
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "target: the gradient of class probabilities is not for torch.func's transforms; "
            "take backward(), or torch.nn.functional.cross_entropy on "
            "torch.nn.functional.linear, which holds the logits"
        )
    maximum = sums[MAX].detach()

    def shifted() -> Tensor:
        with torch.no_grad():
            return logits().to(q.dtype) - maximum[:, None]

    rows = list(sums)
    rows[LOGIT_SUM] = rows[LOGIT_SUM] + _LogitSumByWeights.apply(q, sums, shifted)
    return torch.stack(rows)


def _soft_loss(sums: Tensor, q: Tensor, options: LossOptions) -> Tensor:
    """Return the loss against class probabilities, from sums [5, N] and weights q [N, V]."""
    log_sum = sums[SUM_EXP].log()
    loss = q.sum(1) * log_sum - sums[LOGIT_SUM]
    penalty = options.z_loss * (sums[MAX] + log_sum).square() if options.z_loss else None
    # torch divides by the number of tokens here, with or without class weights.
    tokens = torch.ones_like(loss).sum()
    return _reduced(loss, penalty, (tokens, tokens), options.reduction)


def named_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Return ``reduction``, or the meaning of torch's two older flags, with torch's warning."""
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
    """Return torch's K-dimensional loss, one head after the other.

    A head stands at every place of [d_1, ..., d_K].

    Args:
        input: Tensor [N, D].
        linear_weight: Tensor [V, d_1, ..., d_K, D].
        target: Class indices [N, d_1, ..., d_K] or class probabilities [N, V, d_1, ..., d_K].
        linear_bias: Tensor [V, d_1, ..., d_K] or None.
        weight: Class weights [V] or None.
        options: Options of the loss.
        keywords: Further arguments of ``linear_cross_entropy``.
    """
    dimensions = f"with a linear_weight of {linear_weight.dim()} dimensions"
    for name, value, plain in (
        ("z_loss", options.z_loss, 0.0),
        ("shift", keywords.pop("shift"), 0),
        ("shard", keywords.pop("shard"), None),
        ("return_statistics", keywords.pop("return_statistics"), False),
    ):
        if value:
            raise wrong(name, f"{plain} {dimensions}", checks.shown(value))
    places, vocabulary = tuple(linear_weight.shape[1:-1]), linear_weight.shape[0]
    if math.prod(places) == 0:
        raise wrong("linear_weight", "at least one head", tuple(linear_weight.shape))
    if input.dim() != 2:
        raise wrong("input", f"shape [N, D] {dimensions}", tuple(input.shape))
    tensor_checks.dense("target", target)
    soft, tokens = target.is_floating_point(), input.shape[0]
    wanted = (tokens, vocabulary, *places) if soft else (tokens, *places)
    if tuple(target.shape) != wanted:
        raise wrong("target", f"shape {wanted}", tuple(target.shape))
    if linear_bias is not None:
        tensor_checks.floating("linear_bias", linear_bias)
        if tuple(linear_bias.shape) != (vocabulary, *places):
            raise wrong("linear_bias", f"shape {(vocabulary, *places)}", tuple(linear_bias.shape))
    # One unbind: the gradient of a slice would be as large as the whole weight.
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


class _LinearOptions(TypedDict, total=False):
    """Keywords that the overloads below share."""

    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: str
    ignore_index: int | None
    label_smoothing: float
    options: None
    softcap: float | None
    logit_scale: float
    z_loss: float
    shift: int
    round_logits: bool
    backend: str | None
    memory_limit: int | None
    validate: bool | None
    shard: VocabularyShard | None
    temperature: float


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_statistics: Literal[False] = ...,
    with_confidence: Literal[False] = ...,
    **options: Unpack[_LinearOptions],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_statistics: Literal[True],
    with_confidence: Literal[False] = ...,
    **options: Unpack[_LinearOptions],
) -> tuple[Tensor, TokenStatistics]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_statistics: Literal[True],
    with_confidence: Literal[True],
    **options: Unpack[_LinearOptions],
) -> tuple[Tensor, TokenStatistics, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_statistics: bool,
    with_confidence: bool = ...,
    **options: Unpack[_LinearOptions],
) -> Tensor | tuple[Tensor, TokenStatistics] | tuple[Tensor, TokenStatistics, Tensor]: ...
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
    temperature: float = 1.0,
    return_statistics: bool = False,
    with_confidence: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics] | tuple[Tensor, TokenStatistics, Tensor]:
    """Return the cross-entropy of ``input @ linear_weight.T + linear_bias`` in nats.

    The logits ``softcap * tanh(logit_scale * (input @ linear_weight.T + linear_bias) / softcap)``,
    divided by ``temperature``, are never held as a whole, and are float32 for 16-bit inputs. Any upstream gradient and a second
    backward are exact; second derivatives raise NotImplementedError. The memory and the matrix
    products of a call: docs/performance.md#the-memory-and-the-products-of-a-call.

    Args:
        input: Hidden states [..., D], floating (float32, float64, bfloat16 or float16).
        linear_weight: Vocabulary matrix [V, D], or [V, d_1, ..., d_K, D] as in torch's
            K-dimensional loss.
        target: Class indices int64 [...], or class probabilities [..., V] (torch backend only).
        linear_bias: Bias [V]. Default: None.
        weight: Class weights [V], as in ``torch.nn.functional.cross_entropy``. Default: None.
        reduction: "mean" (default), "sum" or "none".
        ignore_index: Class index that is not scored. Default: −100.
        label_smoothing: Smoothing in [0, 1]. Default: 0.
        options: None; torch's chunking options have no use here.
        softcap: Bound of the logits' absolute values. Default: None, no bound.
        logit_scale: Factor of the logits, such as 1 / temperature. Default: 1.
        z_loss: Factor of logsumexp² in the loss of a token (PaLM, arXiv:2204.02311). Default: 0.
        shift: Distance of the targets: position t is scored with the target at t + shift, without a
            copy of ``input``. True is 1. "none" then returns ``shift`` positions less. Default: 0.
        round_logits: Whether products of 16-bit inputs may be rounded to 16 bits before the
            softmax, as ``torch.nn.functional.linear`` rounds them, where that is faster. False
            gives float32 logits everywhere. Default: True.
        backend: "torch" or "triton". Default: None, triton for a GPU's tensors where triton is
            installed.
        memory_limit: Temporary memory in bytes, without gradients and vectors of N. Default: None,
            12 MiB forward and 16 MiB backward on torch, 512 MiB on triton.
        validate: Whether to check that targets are in [0, V). Default: None, on a CPU only: on a
            GPU the check waits for the device. An unchecked target outside gives NaN.
        shard: Rows of the vocabulary that this rank's ``linear_weight`` holds; a DTensor weight
            needs no ``shard``. Default: None.
        temperature: Divisor of the logits, after the softcap. Default: 1.
        return_statistics: Whether to return the tokens' ``TokenStatistics`` as well, without
            gradient, from the loss's own logits and in the same pass. Default: False.
        with_confidence: Whether to return p(predicted) of every token as well, which needs
            ``return_statistics``. Default: False.

    Returns:
        Loss, float32 (float64 for float64 inputs): a scalar, or in the shape of ``target`` for
        reduction "none". With ``return_statistics`` a tuple of it, the ``TokenStatistics`` and,
        with ``with_confidence``, p(predicted), float32 in their shape, 0 where ``predicted`` is −1.

    Raises:
        InputError: An argument has another value or shape than expected (a ValueError).
        InputTypeError: An argument has another type or dtype than expected, or statistics are asked
            for class probabilities (a TypeError).
        IndexError: A target is outside [0, V), where targets are checked.

    Example:
        >>> import torch
        >>> from perplexity import linear_cross_entropy
        >>> hidden = torch.zeros(2, 3, 8, requires_grad=True)
        >>> target = torch.tensor([[1, 2, -100], [3, 4, 5]])
        >>> loss = linear_cross_entropy(hidden, torch.zeros(100, 8), target)
        >>> round(loss.item(), 4)  # log(100)
        4.6052
        >>> loss.backward()
        >>> loss, statistics = linear_cross_entropy(
        ...     hidden, torch.eye(100, 8), target, return_statistics=True
        ... )
        >>> accuracy = (statistics.rank == 0).sum() / (target != -100).sum()
        >>> round(accuracy.item(), 2)
        1.0
    """
    checks.flag("return_statistics", return_statistics)
    checks.flag("with_confidence", with_confidence)
    if with_confidence and not return_statistics:
        raise wrong("with_confidence", "False without return_statistics", with_confidence)
    if options is not None:
        raise wrong(
            "options", "None (torch's chunking options have no use here: see memory_limit)", options
        )
    settings = LossOptions(
        reduction,
        ignore_index,
        label_smoothing,
        softcap,
        logit_scale,
        z_loss,
        memory_limit,
        temperature,
    )
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        tensor_checks.floating("input", input)
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
            return_statistics=return_statistics,
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
    if return_statistics:
        loss, statistics, confidence = _loss_with_statistics(inputs)
        loss = inputs.target.unflatten(loss) if reduction == "none" else loss
        return (loss, statistics, confidence) if with_confidence else (loss, statistics)
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
    temperature: float = 1.0,
) -> Tensor:
    """Return the cross-entropy of existing logits in nats.

    The arguments are those of ``torch.nn.functional.cross_entropy``, and further ones by keyword.
    16-bit logits are read where they are and summed in float32. The logits of the loss are
    ``softcap * tanh(logit_scale * input / softcap) / temperature``.

    Args:
        input: Logits [C], [N, C] or [N, C, d1, ...], floating.
        target: Class indices int64 [], [N] or [N, d1, ...], or class probabilities in the shape of
            ``input`` (torch backend only).
        weight: Class weights [C]. Default: None.
        size_average, reduce: torch's deprecated flags, which replace ``reduction``. Default: None.
        ignore_index: Class index that is not scored. Default: −100.
        reduction: "mean" (default), "sum" or "none".
        label_smoothing: Smoothing in [0, 1]. Default: 0.
        softcap, logit_scale, z_loss: As in ``linear_cross_entropy``.
        shift: Distance of the targets along their last dimension, as in ``linear_cross_entropy``.
        backend: "torch" or "triton", as in ``linear_cross_entropy``. Default: None.
        memory_limit: Bytes of the torch backend's copies, one row of C at least; triton makes none.
            Default: None, 4 MiB.
        validate: Whether to check targets, as in ``linear_cross_entropy``. Default: None.
        temperature: Divisor of the logits, after the softcap. Default: 1.

    Returns:
        Loss, float32 (float64 for float64 logits): a scalar, or in the shape of ``target`` for
        reduction "none".

    Raises:
        InputError: An argument has another value or shape than expected (a ValueError).
        InputTypeError: An argument has another type or dtype than expected (a TypeError).
        IndexError: A target is outside [0, C), where targets are checked.

    Example:
        >>> import torch
        >>> from perplexity import cross_entropy
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
        tensor([0.1269, 0.6931])
    """
    reduction = named_reduction(size_average, reduce, reduction)
    settings = LossOptions(
        reduction,
        ignore_index,
        label_smoothing,
        softcap,
        logit_scale,
        z_loss,
        memory_limit,
        temperature,
    )
    tensor_checks.floating("input", input)
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
    rule = settings.rule(with_logit_sum=soft or settings.label_smoothing > 0.0)
    rule = rule._replace(ignore_index=ignored)
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
            sums,
            q,
            lambda: apply_rule(flat.to(q.dtype, copy=True), None, rule.softcap, rule.logit_scale),
        )
        loss = _soft_loss(sums, q, settings)
    else:
        loss = _loss(sums, rows, weight, vocabulary, settings)
    return prepared.unflatten(loss) if reduction == "none" else loss
