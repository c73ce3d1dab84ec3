"""Gradients of the sums of ``linear_nll`` with respect to hidden states, weight and bias.

With g the upstream gradient of the five sums and z the logits (formula: ``sums.py``),

    G = ∂/∂(hidden @ weightᵀ + bias) = logit_scale · (1 − (z / softcap)²) · ∂/∂z

    grad_hidden = G @ weight        grad_weight = Gᵀ @ hidden        grad_bias = Σ_n G

The kernel recomputes a tile of logits from hidden and weight exactly as the forward did. It writes
the tile of G, in the inputs' dtype, to a block whose size ``memory_limit`` bounds. The two products
with that block, accumulated in float32, are left to the vendor's library.

Cost: at most 8·N·V·D operations (recompute 2, and 2 per gradient); one block of G, which is written
once and read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..chunks import WHOLE, accumulate_gradients, gradient_block, written_whole
from ..dispatch import DEFAULT, PLAIN, TRITON_LIMIT, Plan, Rule
from ..sums import EXP_SHIFT, LOGIT_SUM, SUM_EXP, TARGET
from .launch import NO_POWER, launch, load_class_weight, load_row, load_target
from .logit_tile import logit_arguments, logit_tile, work_of

SUM_EXP_ROW, TARGET_ROW, LOGIT_SUM_ROW, EXP_SHIFT_ROW = (
    tl.constexpr(row) for row in (SUM_EXP, TARGET, LOGIT_SUM, EXP_SHIFT)
)


@triton.jit
def sums_derivative(
    logits,  # float32 [BLOCK_N, BLOCK_V]
    hit,  # bool [BLOCK_N, BLOCK_V], the target's column
    class_weight,  # float32 [BLOCK_V]
    maximum_ptr,  # float32 [N]
    upstream_ptr,  # float32 [5, N]
    rows,
    exists,
    N,
    WITH_LOGIT_SUM: tl.constexpr,
    WITH_EXP_SHIFT: tl.constexpr,
):
    """Return ∂/∂z of the five sums, weighted by their upstream gradients.

    The result for ignored tokens is arbitrary.
    """
    plane = N.to(tl.int64)
    upstream_ptr += rows
    maximum = tl.load(maximum_ptr + rows, mask=exists, other=0.0)
    reference = tl.where(maximum == -float("inf"), 0.0, maximum)
    shifted = logits - reference[:, None]
    per_exponential = load_row(upstream_ptr, SUM_EXP_ROW, plane, exists)[:, None]
    if WITH_EXP_SHIFT:
        per_shift = load_row(upstream_ptr, EXP_SHIFT_ROW, plane, exists)[:, None]
        per_exponential += per_shift * (1.0 + tl.maximum(shifted, NO_POWER))
    at_target = tl.where(hit, load_row(upstream_ptr, TARGET_ROW, plane, exists)[:, None], 0.0)
    gradient = tl.fma(tl.exp(shifted), per_exponential, at_target)
    if WITH_LOGIT_SUM:
        per_logit = load_row(upstream_ptr, LOGIT_SUM_ROW, plane, exists)
        gradient += per_logit[:, None] * class_weight[None, :]
    return gradient


@triton.jit(do_not_specialize=["N", "N_all", "first_column", "ignore_index"])
def _logit_gradient_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # int [N]
    class_weight_ptr,  # float32 [V]
    maximum_ptr,  # float32 [N]
    upstream_ptr,  # float32 [5, N_all], already offset to the first token
    gradient_ptr,  # [N, columns_here], written as a whole, whatever V
    N,
    N_all,
    V,
    D,
    first_column,
    columns_here,
    hidden_stride_n,
    hidden_stride_d,
    weight_stride_v,
    weight_stride_d,
    bias_stride,
    target_stride,
    ignore_index,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FLUSH: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    WITH_LOGIT_SUM: tl.constexpr,
    WITH_EXP_SHIFT: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    first_row = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_N
    first_local_column = (tl.program_id(0) // row_blocks) * BLOCK_V
    rows = first_row + tl.arange(0, BLOCK_N)
    local_columns = first_local_column + tl.arange(0, BLOCK_V)
    columns = first_column + local_columns
    exists = rows < N
    target, counted = load_target(target_ptr, rows, target_stride, exists, ignore_index, V)
    gradient = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    if tl.max(counted.to(tl.int32), axis=0) > 0:
        logits = logit_tile(
            hidden_ptr=hidden_ptr,
            weight_ptr=weight_ptr,
            bias_ptr=bias_ptr,
            first_row=first_row,
            first_column=first_column + first_local_column,
            N=N,
            V=V,
            D=D,
            hidden_stride_n=hidden_stride_n,
            hidden_stride_d=hidden_stride_d,
            weight_stride_v=weight_stride_v,
            weight_stride_d=weight_stride_d,
            bias_stride=bias_stride,
            logit_scale=logit_scale,
            softcap=softcap,
            HAS_BIAS=HAS_BIAS,
            HAS_SOFTCAP=HAS_SOFTCAP,
            FLUSH=FLUSH,
            EVEN_D=EVEN_D,
            WIDEN=WIDEN,
            PRECISION=PRECISION,
            BLOCK_N=BLOCK_N,
            BLOCK_V=BLOCK_V,
            BLOCK_D=BLOCK_D,
        )
        class_weight = load_class_weight(class_weight_ptr + columns, columns < V, HAS_CLASS_WEIGHT)
        gradient = sums_derivative(
            logits=logits,
            hit=columns[None, :] == target[:, None],
            class_weight=class_weight,
            maximum_ptr=maximum_ptr,
            upstream_ptr=upstream_ptr,
            rows=rows,
            exists=exists,
            N=N_all,
            WITH_LOGIT_SUM=WITH_LOGIT_SUM,
            WITH_EXP_SHIFT=WITH_EXP_SHIFT,
        )
        if HAS_SOFTCAP:
            capped = logits * (1.0 / softcap)
            gradient *= tl.fma(-capped, capped, 1.0)
        # Last, since the logits of an ignored token may be NaN, and so its slope.
        gradient = tl.where(counted[:, None], gradient * logit_scale, 0.0)
    tl.store(
        gradient_ptr + rows[:, None] * columns_here + local_columns[None, :],
        gradient.to(gradient_ptr.dtype.element_ty),
        mask=exists[:, None] & (local_columns < columns_here)[None, :],
    )


def linear_nll_grad(
    upstream: torch.Tensor,
    maximum: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    kept: None = None,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of hidden, weight and bias.

    They follow from ``upstream`` float32 [5, N] and the forward's ``maximum`` [N]. The plan's
    ``memory_limit`` bounds the blocks of logit gradients and of the weight's gradient, in bytes. No
    plan for this backend keeps products: ``kept`` is None.
    """
    upstream = upstream.contiguous()
    arguments, constants, options = logit_arguments(hidden, weight, bias, rule, work_of(rule))
    memory_limit = plan.memory_limit or TRITON_LIMIT
    block = gradient_block(hidden, weight, needs, memory_limit, per_logit=hidden.element_size())
    block, stride = written_whole(block, hidden.element_size(), memory_limit)
    buffer = hidden.new_empty(block[0] * stride)

    def logit_gradient(tokens: slice, columns: slice) -> torch.Tensor:
        count, real = tokens.stop - tokens.start, columns.stop - columns.start
        width = min(stride, -(-real // WHOLE) * WHOLE)
        out = buffer[: count * width].view(count, width)
        tiles = triton.cdiv(count, constants["BLOCK_N"]) * triton.cdiv(width, constants["BLOCK_V"])
        launch(
            _logit_gradient_kernel,
            (tiles,),
            arguments
            | dict(
                hidden_ptr=arguments["hidden_ptr"][tokens],
                target_ptr=target[tokens],
                class_weight_ptr=upstream if class_weight is None else class_weight,
                maximum_ptr=maximum[tokens],
                upstream_ptr=upstream[:, tokens],
                gradient_ptr=out,
                N=count,
                N_all=upstream.shape[1],
                first_column=columns.start,
                columns_here=width,
                target_stride=target.stride(0),
                ignore_index=rule.ignore_index,
            ),
            constants
            | dict(
                HAS_CLASS_WEIGHT=class_weight is not None,
                WITH_LOGIT_SUM=rule.with_logit_sum,
                WITH_EXP_SHIFT=rule.with_exp_shift,
            ),
            options,
        )
        return out[:, :real]

    return accumulate_gradients(
        logit_gradient,
        hidden,
        weight,
        bias,
        needs=needs,
        block=block,
        ignored=target == rule.ignore_index,
    )
