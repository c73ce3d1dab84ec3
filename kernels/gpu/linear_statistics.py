"""Per-token statistics from hidden states: the sums of ``linear_nll``, ranks and predictions.

A rank counts the logits above the target's, which must be known before the sweep over the
vocabulary. A small kernel computes it first, from the same tiles in the same order. So it has the
sweep's bits, and equal logits tie.

Cost: that of ``linear_nll`` and BLOCK_V / V of it more; temporary memory 28 · ceil(V / SPAN) · N
bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dispatch import DEFAULT, PLAIN, TRITON_LIMIT, Plan, Rule
from ..sums import MAX, SUMS
from .launch import launch
from .linear_nll import linear_nll, merge, partials, span_weights, token_chunks
from .logit_tile import apply_rule, logit_arguments, products, work_of


@triton.jit(do_not_specialize=["N"])
def _target_logit_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # int [N]
    out_ptr,  # float32 [N]
    N,
    V,
    D,
    hidden_stride_n,
    hidden_stride_d,
    weight_stride_v,
    weight_stride_d,
    bias_stride,
    target_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FLUSH: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The diagonal of a tile whose columns are the targets of its rows. This is BLOCK_V times the
    # work of a dot product per token, but gives the bits of the sweep over the vocabulary, so that
    # equal logits tie.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    lanes = tl.arange(0, BLOCK_N)
    rows = tl.minimum(lanes, (N - 1 - first_row).to(tl.int32))
    of_column = tl.arange(0, BLOCK_V) % BLOCK_N
    token = tl.minimum(first_row + of_column, N - 1)
    target = tl.load(target_ptr + token * target_stride).to(tl.int64)
    known = (target >= 0) & (target < V)
    columns = tl.where(known, target, 0)
    offsets = tl.arange(0, BLOCK_D)
    accumulator = products(
        hidden_ptr=hidden_ptr + first_row * hidden_stride_n,
        weight_ptr=weight_ptr,
        hidden_offsets=rows[:, None] * hidden_stride_n + offsets[None, :] * hidden_stride_d,
        weight_offsets=columns[None, :] * weight_stride_v + offsets[:, None] * weight_stride_d,
        D=D,
        hidden_stride_d=hidden_stride_d,
        weight_stride_d=weight_stride_d,
        EVEN_D=EVEN_D,
        WIDEN=WIDEN,
        PRECISION=PRECISION,
        BLOCK_N=BLOCK_N,
        BLOCK_V=BLOCK_V,
        BLOCK_D=BLOCK_D,
    )
    logits = apply_rule(
        logits=accumulator,
        bias_ptr=bias_ptr,
        columns=columns,
        bias_stride=bias_stride,
        logit_scale=logit_scale,
        softcap=softcap,
        HAS_BIAS=HAS_BIAS,
        HAS_SOFTCAP=HAS_SOFTCAP,
        FLUSH=FLUSH,
    )
    diagonal = (tl.arange(0, BLOCK_V)[None, :] == lanes[:, None]) & known[None, :]
    own = tl.sum(tl.where(diagonal, logits, 0.0), axis=1)
    tl.store(out_ptr + first_row + lanes, own, mask=first_row + lanes < N)


def target_logit(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
) -> torch.Tensor:
    """Return the logit of every token's target, float32 [N], 0 where it is no row of ``weight``.

    No temporary memory is taken, whatever the plan.
    """
    out = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    if hidden.shape[0] == 0 or weight.shape[0] == 0:
        return out
    # The tile sizes of ``linear_statistics``: equal tiles give equal bits.
    arguments, constants, options = logit_arguments(
        hidden, weight, bias, rule, work_of(rule, bias, ranks=True)
    )
    launch(
        _target_logit_kernel,
        (triton.cdiv(hidden.shape[0], constants["BLOCK_N"]),),
        arguments
        | dict(target_ptr=target, out_ptr=out, N=hidden.shape[0], target_stride=target.stride(0)),
        constants,
        options,
    )
    return out


def linear_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    target_logit: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    kept: None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the five sums [5, N], the number of logits above ``target_logit``, and the prediction.

    The number and the prediction, the column of the largest logit, are int64 [N] and 0 for ignored
    tokens. Of equal largest logits the first column is taken. No plan for this backend keeps
    products: ``kept`` is None.
    """
    vocabulary, memory_limit = weight.shape[0], plan.memory_limit or TRITON_LIMIT
    if vocabulary == 0:  # the shard of a rank that holds no row
        nothing = torch.zeros_like(target, dtype=torch.int64)
        return linear_nll(hidden, weight, bias, target, None, rule), nothing, nothing.clone()
    rule = rule._replace(with_exp_shift=True)
    weights = span_weights(vocabulary, class_weight, hidden) if rule.with_logit_sum else None
    whole = dict(vocabulary=vocabulary, ignore_index=rule.ignore_index)
    sums, above, best = [], [], []
    for tokens in token_chunks(hidden.shape[0], vocabulary, 4 * (SUMS + 2), memory_limit):
        of_spans, choices = partials(
            hidden[tokens], weight, bias, target[tokens], class_weight, rule, target_logit[tokens]
        )
        sums.append(merge(of_spans, target[tokens], weights, **whole))
        # With target_logit there are choices.
        above.append(choices[0].sum(0))  # type: ignore[index]
        largest = of_spans[MAX] == sums[-1][MAX]
        best.append(
            torch.where(largest, choices[1], vocabulary).amin(0).long()  # type: ignore[index]
        )
    ignored = target == rule.ignore_index
    return (
        torch.cat(sums, dim=1),
        torch.cat(above).masked_fill_(ignored, 0),
        torch.cat(best).masked_fill_(ignored, 0),
    )
