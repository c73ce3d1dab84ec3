"""Statistics of tokens from hidden states: NLL, logsumexp, entropy, rank, prediction, KL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from . import checks, tensor_checks
from .checks import wrong
from .errors import InputTypeError
from .inputs import (
    LinearInputs,
    LossOptions,
    cast,
    choose_backend,
    prepare_target,
    refuse_forward_mode,
    widened,
)
from .kernels import operators
from .kernels.dispatch import Plan
from .losses import linear_cross_entropy
from .parallel import VocabularyShard
from .per_token import TokenStatistics, token_entropy, token_log_probability

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's from Python 3.11 on


class _HeadOptions(TypedDict, total=False):
    """Keywords that the overloads below share."""

    linear_bias: Tensor | None
    ignore_index: int | None
    softcap: float | None
    logit_scale: float
    shift: int
    backend: str | None
    memory_limit: int | None
    validate: bool | None
    shard: VocabularyShard | None
    temperature: float


class _LogitsOptions(TypedDict, total=False):
    """Keywords that the overloads of a function of logits share."""

    ignore_index: int | None
    softcap: float | None
    logit_scale: float
    shift: int
    backend: str | None
    memory_limit: int | None
    validate: bool | None
    temperature: float


class _RoundedHeadOptions(_HeadOptions, total=False):
    """``_HeadOptions`` of a function that may round products."""

    round_logits: bool


def _head_of_tokens(
    options: LossOptions, input: Tensor, linear_weight: Tensor, target: Tensor, **rest
) -> LinearInputs:
    """Prepare the inputs of a statistic, whose targets are class indices."""
    inputs = LinearInputs.prepare(
        input, linear_weight, target, weight=None, options=options, **rest
    )
    if inputs.target.probabilities:
        raise wrong("target", "class indices", "class probabilities", InputTypeError)
    return inputs


@torch.no_grad()
def token_nll(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: int = 0,
    round_logits: bool = False,
    backend: str | None = None,
    memory_limit: int | None = None,
    validate: bool | None = None,
    shard: VocabularyShard | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return −log p(target) of every token in nats, without gradient.

    Args:
        input: Hidden states [..., D], floating.
        linear_weight: Vocabulary matrix [V, D].
        target: Class indices int64 [...].
        linear_bias, ignore_index, softcap, logit_scale, shift: As in ``linear_cross_entropy``.
        round_logits: Whether products of 16-bit inputs may be rounded to 16 bits. Default: False,
            float32 logits whatever the inputs' dtype.
        backend, memory_limit, validate, shard, temperature: As in ``linear_cross_entropy``.

    Returns:
        NLL float32 in the shape of ``target`` (shorter by ``shift``), 0 at ignored positions.

    Raises:
        InputError, InputTypeError, IndexError: As ``linear_cross_entropy`` does.

    Example:
        >>> import torch
        >>> from perplexity import token_nll
        >>> token_nll(torch.zeros(3, 8), torch.zeros(100, 8), torch.tensor([1, 2, -100]))
        tensor([4.6052, 4.6052, 0.0000])
    """
    return linear_cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        reduction="none",
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        shift=shift,
        round_logits=round_logits,
        backend=backend,
        memory_limit=memory_limit,
        validate=validate,
        shard=shard,
        temperature=temperature,
    ).float()


@overload
def token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    with_confidence: Literal[False] = ...,
    **options: Unpack[_HeadOptions],
) -> TokenStatistics: ...
@overload
def token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    with_confidence: Literal[True],
    **options: Unpack[_HeadOptions],
) -> tuple[TokenStatistics, Tensor]: ...
@torch.no_grad()
def token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: int = 0,
    with_confidence: bool = False,
    backend: str | None = None,
    memory_limit: int | None = None,
    validate: bool | None = None,
    shard: VocabularyShard | None = None,
    temperature: float = 1.0,
) -> TokenStatistics | tuple[TokenStatistics, Tensor]:
    """Return ``TokenStatistics`` from one pass over the vocabulary, without gradient.

    A logit is above the target's if it is larger as computed, in float32. Equal rows of the
    vocabulary tie on triton. On the torch backend they tie where the library's matrix product gives
    them equal bits.

    Args:
        input: Hidden states [..., D], floating.
        linear_weight: Vocabulary matrix [V, D].
        target: Class indices int64 [...].
        linear_bias, ignore_index, softcap, logit_scale, shift: As in ``linear_cross_entropy``.
        with_confidence: Whether to return p(predicted) as well, which calibration is measured by.
            Default: False.
        backend, memory_limit, validate, shard, temperature: As in ``linear_cross_entropy``.

    Returns:
        ``TokenStatistics``. With ``with_confidence``, a pair of them and p(predicted), float32 in
        their shape, 0 where ``predicted`` is −1.

    Raises:
        InputError, InputTypeError, IndexError: As ``linear_cross_entropy`` does. InputTypeError for
            class probabilities as well.

    Example:
        >>> import torch
        >>> from perplexity import token_statistics
        >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> statistics, confidence = token_statistics(
        ...     hidden, weight, torch.tensor([1]), with_confidence=True
        ... )
        >>> statistics.rank, statistics.predicted, confidence
        (tensor([1]), tensor([0]), tensor([0.8808]))
    """
    checks.flag("with_confidence", with_confidence)
    inputs = _head_of_tokens(
        LossOptions(
            "none",
            ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            memory_limit=memory_limit,
            temperature=temperature,
        ),
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        shift=shift,
        backend=backend,
        validate=validate,
        shard=shard,
    )
    rule = inputs.options.rule(with_exp_shift=True)
    plan = Plan(inputs.backend, memory_limit=inputs.options.memory)
    sums, rank, predicted = inputs.sums_and_choices(rule, plan=plan)
    found, confidence = inputs.statistics(sums, rank, predicted)
    return (found, confidence) if with_confidence else found


@overload
def token_log_probabilities(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    with_entropy: Literal[False] = ...,
    **options: Unpack[_RoundedHeadOptions],
) -> Tensor: ...
@overload
def token_log_probabilities(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    with_entropy: Literal[True],
    **options: Unpack[_RoundedHeadOptions],
) -> tuple[Tensor, Tensor]: ...
def token_log_probabilities(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: int = 0,
    with_entropy: bool = False,
    round_logits: bool = False,
    backend: str | None = None,
    memory_limit: int | None = None,
    validate: bool | None = None,
    shard: VocabularyShard | None = None,
    temperature: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log p(target) of every token in nats, differentiable and never positive.

    Args:
        input: Hidden states [..., D], floating.
        linear_weight: Vocabulary matrix [V, D].
        target: Class indices int64 [...].
        linear_bias, ignore_index, softcap, logit_scale, shift: As in ``linear_cross_entropy``.
        with_entropy: Whether to return the entropy of each token's distribution as well, as policy
            gradients need it. Default: False.
        round_logits: Whether products of 16-bit inputs may be rounded to 16 bits. Default: False.
        backend, memory_limit, validate, shard, temperature: As in ``linear_cross_entropy``.

    Returns:
        Log-probabilities, float32 in the shape of ``target``, 0 at ignored positions. With
        ``with_entropy``, a pair of them and the entropies in nats, from the same pass and
        differentiable.

    Raises:
        InputError, InputTypeError, IndexError: As ``linear_cross_entropy`` does. InputTypeError for
            class probabilities as well.

    Example:
        >>> import torch
        >>> from perplexity import token_log_probabilities
        >>> hidden = torch.zeros(2, 8, requires_grad=True)
        >>> log_p = token_log_probabilities(hidden, torch.zeros(100, 8), torch.tensor([1, 2]))
        >>> log_p.tolist() == [-log_p.new_tensor(100).log().item()] * 2
        True
        >>> log_p.sum().backward()
    """
    checks.flag("with_entropy", with_entropy)
    inputs = _head_of_tokens(
        LossOptions(
            "none",
            ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            memory_limit=memory_limit,
            temperature=temperature,
        ),
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        shift=shift,
        round_logits=round_logits,
        backend=backend,
        validate=validate,
        shard=shard,
    )
    rule = inputs.options.rule(with_exp_shift=with_entropy)
    sums = inputs.sums(rule, plan=inputs.plan(rule, per_token=True))
    log_probability = inputs.target.unflatten(token_log_probability(sums)).float()
    if not with_entropy:
        return log_probability
    return log_probability, inputs.target.unflatten(token_entropy(sums)).float()


@overload
def token_log_probabilities_of_logits(
    input: Tensor,
    target: Tensor,
    *,
    with_entropy: Literal[False] = ...,
    **options: Unpack[_LogitsOptions],
) -> Tensor: ...
@overload
def token_log_probabilities_of_logits(
    input: Tensor,
    target: Tensor,
    *,
    with_entropy: Literal[True],
    **options: Unpack[_LogitsOptions],
) -> tuple[Tensor, Tensor]: ...
def token_log_probabilities_of_logits(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: int = 0,
    with_entropy: bool = False,
    backend: str | None = None,
    memory_limit: int | None = None,
    validate: bool | None = None,
    temperature: float = 1.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log p(target) of every token in nats from logits that exist, differentiable.

    The forward reads the logits once, and the backward reads them again. 16-bit logits are read
    where they are, and summed in float32.

    Args:
        input: Logits [..., V], floating.
        target: Class indices int64 [...].
        ignore_index, softcap, logit_scale: As in ``linear_cross_entropy``.
        shift: Distance of the targets, as in ``linear_cross_entropy``.
        with_entropy: Whether to return the entropy of each token's distribution as well. Default:
            False.
        backend, memory_limit, validate, temperature: As in ``cross_entropy``.

    Returns:
        Log-probabilities, float32 in the shape of ``target``, 0 at ignored positions. With
        ``with_entropy``, a pair of them and the entropies in nats, from the same pass and
        differentiable.

    Raises:
        InputError: An argument has another value or shape than expected (a ValueError).
        InputTypeError: An argument has another type or dtype than expected, or the targets are
            class probabilities (a TypeError).
        IndexError: A target is outside [0, V), where targets are checked.

    Example:
        >>> import torch
        >>> from perplexity import token_log_probabilities_of_logits
        >>> logits, target = torch.zeros(2, 3, 100), torch.tensor([[1, 2, 3], [4, 5, -100]])
        >>> log_p, entropy = token_log_probabilities_of_logits(logits, target, with_entropy=True)
        >>> round(-log_p[0, 0].item(), 4), round(entropy[0, 0].item(), 4)  # log(100)
        (4.6052, 4.6052)
    """
    checks.flag("with_entropy", with_entropy)
    options = LossOptions(
        "none",
        ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        memory_limit=memory_limit,
        temperature=temperature,
    )
    tensor_checks.floating("input", input)
    refuse_forward_mode(input)
    if input.dim() < 1 or input.shape[-1] == 0:
        raise wrong("input", "shape [..., V] with at least one class", tuple(input.shape))
    leading, vocabulary = tuple(input.shape[:-1]), input.shape[-1]
    prepared = prepare_target(
        target,
        classes=leading,
        probabilities=(*leading, vocabulary),
        class_dimension=-1,
        vocabulary=vocabulary,
        device=input.device,
        options=options,
        shift=shift,
        validate=validate,
    )
    if prepared.probabilities:
        raise wrong("target", "class indices", "class probabilities", InputTypeError)
    sums = operators.nll(
        input.reshape(-1, vocabulary),
        prepared.flat,
        None,
        *options.rule(with_exp_shift=with_entropy),
        *Plan(choose_backend(backend, input), memory_limit=options.memory),
    )
    log_probability = prepared.unflatten(token_log_probability(sums)).float()
    if not with_entropy:
        return log_probability
    return log_probability, prepared.unflatten(token_entropy(sums)).float()


def linear_kl_divergence(
    input_p: Tensor,
    weight_p: Tensor,
    input_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    softcap_p: float | None = None,
    softcap_q: float | None = None,
    logit_scale_p: float = 1.0,
    logit_scale_q: float = 1.0,
    backend: str | None = None,
    memory_limit: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return KL(P‖Q) = Σ_v p_v · (log p_v − log q_v) of every token, in nats.

    The logits of neither head are held as a whole. The divergence is differentiable in both heads.
    It is never negative, 0 for equal heads, and inf where q is 0 and p is not.

    Args:
        input_p: Hidden states [..., D_p] of P, floating.
        weight_p: Vocabulary matrix [V, D_p] of P.
        input_q: Hidden states [..., D_q] of Q, of the same leading shape.
        weight_q: Vocabulary matrix [V, D_q] of Q.
        bias_p, bias_q: Biases [V]. Default: None.
        softcap_p, softcap_q: Bounds of the logits. Default: None.
        logit_scale_p, logit_scale_q: Factors of the logits. Default: 1.
        backend: "torch" or "triton". Default: None, as in ``linear_cross_entropy``.
        memory_limit: Temporary memory in bytes, as in ``linear_cross_entropy``. Default: None.
        temperature: Divisor of both heads' logits, after the softcaps. Default: 1.

    Returns:
        Divergence, float32 [...].

    Raises:
        InputError: An argument has another value or shape than expected (a ValueError).
        InputTypeError: An argument has another type or dtype than expected (a TypeError).

    Example:
        >>> import torch
        >>> from perplexity import linear_kl_divergence
        >>> one, zero = torch.eye(2), torch.zeros(2, 2)
        >>> linear_kl_divergence(one, one, one, zero)
        tensor([0.1109, 0.1109])
    """
    checks.logit_rule(softcap_p, logit_scale_p, "_p")
    checks.logit_rule(softcap_q, logit_scale_q, "_q")
    options = [
        LossOptions(
            softcap=softcap, logit_scale=scale, memory_limit=memory_limit, temperature=temperature
        )
        for softcap, scale in ((softcap_p, logit_scale_p), (softcap_q, logit_scale_q))
    ]
    p_rule, q_rule = (each.rule() for each in options)
    heads = []
    for side, (input, weight, bias) in (
        ("p", (input_p, weight_p, bias_p)),
        ("q", (input_q, weight_q, bias_q)),
    ):
        names = f"input_{side}", f"weight_{side}", f"bias_{side}"
        for name, tensor in zip(names, (input, weight, bias), strict=True):
            if name[0] != "b" or tensor is not None:
                tensor_checks.floating(name, tensor)
        refuse_forward_mode(input, weight, bias)
        input, weight = cast(input, weight)
        input = widened(input, weight)
        tensor_checks.head(names, input, weight, bias)
        heads.append((input.reshape(-1, input.shape[-1]), weight, bias))
    leading = tuple(input_p.shape[:-1])
    if tuple(input_q.shape[:-1]) != leading:
        raise wrong("input_q", f"shape {(*leading, 'D')}, as input_p", tuple(input_q.shape))
    if weight_q.shape[0] != weight_p.shape[0]:
        raise wrong("weight_q", f"{weight_p.shape[0]} rows, as weight_p", weight_q.shape[0])
    if weight_p.shape[0] == 0:
        raise wrong("weight_p", "at least one row", tuple(weight_p.shape))
    if input_q.device != input_p.device:
        raise wrong("input_q", f"a tensor on {input_p.device}, as input_p", input_q.device)
    chosen = choose_backend(backend, input_q if input_q.dtype == torch.float64 else input_p)
    divergence, _ = operators.linear_kl(
        *heads[0],
        *heads[1],
        p_rule.softcap,
        p_rule.logit_scale,
        q_rule.softcap,
        q_rule.logit_scale,
        *Plan(chosen, memory_limit=options[0].memory),
    )
    return divergence.reshape(leading).float()
