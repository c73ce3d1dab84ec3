"""What a model thinks of each token, straight from hidden states: NLL, log-sum-exp, entropy, rank,
prediction, divergence.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks
from .checks import wrong
from .errors import InputTypeError
from .inputs import LinearInputs, LossOptions, cast, choose_backend, refuse_forward_mode, widened
from .kernels import operators
from .kernels.dispatch import Plan, Rule
from .kernels.sums import MAX, SUM_EXP
from .losses import (
    linear_cross_entropy,
    negative_log_likelihood,
    token_entropy,
    token_log_probability,
)
from .parallel import IGNORED, VocabularyShard


class TokenStatistics(NamedTuple):
    """Of every token, in the shape of target; at ignored positions 0, and −1 for ``rank`` and
    ``predicted``.

    ``rank`` and ``predicted`` are −1, too, where the NLL is no number (NaN logits, a target outside
    [0, V)).
    """

    nll: Tensor  # float32, nats
    logsumexp: Tensor  # float32
    entropy: Tensor  # float32, nats
    # int64: how many logits are larger than the target's; 0 is the model's first choice
    rank: Tensor
    predicted: Tensor  # int64: the column of the largest logit, the first of equal ones


def _head_of_tokens(
    options: LossOptions, input: Tensor, linear_weight: Tensor, target: Tensor, **rest
) -> LinearInputs:
    """Inputs of a statistic, whose targets are tokens."""
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
) -> Tensor:
    """−log p(target) of every token in nats, the shape of target, float32, 0 at ignored positions,
    no gradient.

    Arguments as in ``linear_cross_entropy``; the logits are float32 whatever the inputs' dtype,
    unless ``round_logits``.
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
    ).float()


@overload
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
    with_confidence: Literal[False] = ...,
    backend: str | None = None,
    memory_limit: int | None = None,
    validate: bool | None = None,
    shard: VocabularyShard | None = None,
) -> TokenStatistics: ...
@overload
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
    with_confidence: Literal[True],
    backend: str | None = None,
    memory_limit: int | None = None,
    validate: bool | None = None,
    shard: VocabularyShard | None = None,
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
) -> TokenStatistics | tuple[TokenStatistics, Tensor]:
    """``TokenStatistics`` of every token in one pass over the vocabulary, no gradient; arguments as
    in ``token_nll``.

    With ``with_confidence`` also p(predicted), the probability of the model's first choice,
    float32, from the same pass: what calibration is measured on. It is 0 where ``predicted`` is −1.
    A logit is above the target's if it is larger as computed, in float32. Rows of the vocabulary
    that are the same tie on triton; on the torch backend they do wherever the library's matrix
    product gives them the same bits.
    """
    checks.flag("with_confidence", with_confidence)
    inputs = _head_of_tokens(
        LossOptions(
            "none",
            ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            memory_limit=memory_limit,
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
    options, flat = inputs.options, inputs.target.flat
    local, ignored = flat, options.ignore_index
    if shard := inputs.shard:
        local, own = shard.local_target(flat, inputs.weight.shape[0], ignored)
        ignored = IGNORED
    head = (inputs.hidden, inputs.weight, inputs.bias, local)
    rule = Rule(ignored, options.softcap, options.logit_scale)
    plan = Plan(inputs.backend, memory_limit=options.memory)
    at_target = operators.target_logit(*head, *rule, *plan)
    if shard:
        at_target = shard.gather(at_target).sum(0)  # 0 on every rank but the target's
    sums, rank, predicted = operators.linear_statistics(*head, at_target, *rule, *plan)
    if shard:
        rank, predicted = shard.merge_choices(sums[MAX], rank, predicted)
        sums = shard.merge(sums, flat, own, options.ignore_index, inputs.backend)
    nll = negative_log_likelihood(sums)
    unknown = (flat == options.ignore_index) | nll.isnan()
    unflatten = inputs.target.unflatten
    statistics = TokenStatistics(
        unflatten(nll.float()),
        unflatten((sums[MAX] + sums[SUM_EXP].log()).float()),
        unflatten(token_entropy(sums).float()),
        unflatten(rank.masked_fill(unknown, -1)),
        unflatten(predicted.masked_fill(unknown, -1)),
    )
    if not with_confidence:
        return statistics
    # The largest logit's term of Σ exp(z − max) is 1.
    return statistics, unflatten((1 / sums[SUM_EXP]).float().masked_fill(unknown, 0))


@overload
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
    with_entropy: Literal[False] = ...,
    round_logits: bool = False,
    backend: str | None = None,
    memory_limit: int | None = None,
    validate: bool | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor: ...
@overload
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
    with_entropy: Literal[True],
    round_logits: bool = False,
    backend: str | None = None,
    memory_limit: int | None = None,
    validate: bool | None = None,
    shard: VocabularyShard | None = None,
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
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(target) of every token in nats, never positive, the shape of target, float32,
    differentiable; 0 where ignored.

    With ``with_entropy`` also the entropy of its distribution in nats, from the same pass and with
    gradient: what policy gradients ask for. Arguments as in ``linear_cross_entropy``.
    """
    checks.flag("with_entropy", with_entropy)
    inputs = _head_of_tokens(
        LossOptions(
            "none",
            ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            memory_limit=memory_limit,
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
    sums = inputs.sums(inputs.options.rule(with_exp_shift=with_entropy))
    log_probability = inputs.target.unflatten(token_log_probability(sums)).float()
    if not with_entropy:
        return log_probability
    return log_probability, inputs.target.unflatten(token_entropy(sums)).float()


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
) -> Tensor:
    """KL(P‖Q) = Σ_v p_v · (log p_v − log q_v) of every token, in nats, float32, without the logits
    of either head.

    input_p [..., D_p], weight_p [V, D_p], bias_p [V] for P, and the same with D_q for Q: the hidden
    sizes may differ, the vocabulary not. Differentiable in both. Never negative, 0 for equal heads,
    inf where q is 0 and p is not. Logits, ``backend`` and ``memory_limit`` as in
    ``linear_cross_entropy``; 1 / temperature goes into both logit scales.
    """
    checks.logit_rule(softcap_p, logit_scale_p, "_p")
    checks.logit_rule(softcap_q, logit_scale_q, "_q")
    rules = [
        LossOptions(softcap=softcap, logit_scale=scale, memory_limit=memory_limit)
        for softcap, scale in ((softcap_p, logit_scale_p), (softcap_q, logit_scale_q))
    ]
    heads = []
    for side, (input, weight, bias) in (
        ("p", (input_p, weight_p, bias_p)),
        ("q", (input_q, weight_q, bias_q)),
    ):
        names = f"input_{side}", f"weight_{side}", f"bias_{side}"
        for name, tensor in zip(names, (input, weight, bias), strict=True):
            if name[0] != "b" or tensor is not None:
                checks.floating(name, tensor)
        refuse_forward_mode(input, weight, bias)
        input, weight = cast(input, weight)
        input = widened(input, weight)
        checks.head(names, input, weight, bias)
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
        rules[0].softcap,
        rules[0].logit_scale,
        rules[1].softcap,
        rules[1].logit_scale,
        *Plan(chosen, memory_limit=rules[0].memory),
    )
    return divergence.reshape(leading).float()
