"""Hidden states and the vocabulary matrix to per-token sums over the vocabulary, without the N × V logits.

Computes, for logits z = softcap · tanh(logit_scale · (hidden @ weightᵀ + bias) / softcap), the five sums of
``kernels/__init__.py``: from them follow log-sum-exp, NLL, entropy and every loss of the public functions.

How: the vocabulary is cut into spans of ``SPAN`` rows. A program owns ``BLOCK_N`` tokens and one span, walks it in tiles
of ``BLOCK_V`` with an online softmax (a running maximum; sums rescaled when it grows: Milakov & Gimelshein 2018,
arXiv:1805.02867) and writes its partial sums. ``merge`` folds the spans, always in the same order: no atomics, two
runs give the same bits. SPAN is a constant, so a token's sums do not depend on which batch it came in.

Cost: 2·N·V·D operations; reads hidden once per vocabulary tile (from L2) and weight once per block of tokens;
temporary memory 5 · ceil(V / SPAN) · N floats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import EXP_SHIFT, LOGIT_SUM, MAX, SUM_EXP, SUMS, TARGET
from .launch import Target, current_target, launch, tanh, widen_products

SPAN = 4096
MEMORY_LIMIT = 512 << 20

MAX_ROW, SUM_EXP_ROW, TARGET_ROW, LOGIT_SUM_ROW, EXP_SHIFT_ROW = (
    tl.constexpr(row) for row in (MAX, SUM_EXP, TARGET, LOGIT_SUM, EXP_SHIFT)
)
ROWS = tl.constexpr(SUMS)


def tile_configuration(target: Target, dtype: torch.dtype, vectorised: bool, plain: bool) -> tuple[dict, dict]:
    """Tile sizes and launch options of the kernels that multiply hidden by weight.

    The largest tile whose accumulator (BLOCK_N · BLOCK_V floats over num_warps) stays in registers; less room is left where
    the loss is not ``plain`` (no softcap, no sums beyond NLL), where three tf32 products a tile need both operands split, and
    where rows that cannot be read 16 bytes at a time take registers for addresses. None spills: `make compile-check`.
    """
    if target.backend == "interpreter":
        return dict(BLOCK_N=64, BLOCK_V=128, BLOCK_D=64), {}
    if target.backend == "hip":
        if dtype == torch.float32:
            return dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=32), dict(num_warps=4, num_stages=2)
        return dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=32), dict(num_warps=8, num_stages=2)
    if dtype == torch.float32 or not vectorised:
        return dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=32 if vectorised else 16), dict(num_warps=8, num_stages=2)
    if not plain:
        return dict(BLOCK_N=64, BLOCK_V=128, BLOCK_D=64), dict(num_warps=8, num_stages=3)
    return dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64), dict(num_warps=8, num_stages=3)


@triton.jit
def products(
    hidden_ptr,
    weight_ptr,
    hidden_offsets,  # [BLOCK_N, BLOCK_D], from hidden_ptr
    weight_offsets,  # [BLOCK_D, BLOCK_V], from weight_ptr
    D,
    hidden_stride_d,
    weight_stride_d,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden @ weightᵀ of the rows the offsets point at, float32 [BLOCK_N, BLOCK_V]."""
    offsets = tl.arange(0, BLOCK_D)
    accumulator = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            hidden = tl.load(hidden_ptr + hidden_offsets)
            weight = tl.load(weight_ptr + weight_offsets)
        else:
            hidden = tl.load(hidden_ptr + hidden_offsets, mask=(offsets < D - start)[None, :], other=0.0)
            weight = tl.load(weight_ptr + weight_offsets, mask=(offsets < D - start)[:, None], other=0.0)
        if WIDEN:
            hidden = hidden.to(tl.float32)
            weight = weight.to(tl.float32)
        accumulator = tl.dot(hidden, weight, accumulator, input_precision=PRECISION)
        hidden_ptr += BLOCK_D * hidden_stride_d
        weight_ptr += BLOCK_D * weight_stride_d
    return accumulator


@triton.jit
def apply_rule(
    logits,  # float32 [BLOCK_N, BLOCK_V]
    bias_ptr,  # [V], read where HAS_BIAS
    columns,
    bias_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """softcap · tanh(logit_scale · (logits + bias) / softcap)."""
    if HAS_BIAS:
        logits += tl.load(bias_ptr + columns * bias_stride).to(tl.float32)[None, :]
    logits *= logit_scale
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    return logits


@triton.jit
def logit_tile(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], read where HAS_BIAS
    first_row,  # int64
    first_column,
    N,
    V,
    D,
    hidden_stride_n,
    hidden_stride_d,
    weight_stride_v,
    weight_stride_d,
    bias_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of a tile, float32 [BLOCK_N, BLOCK_V], not masked: lanes past N or V repeat the last row or column."""
    # One 64-bit address a tile and 32-bit offsets within it: 64-bit offsets would take half the registers.
    rows = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_row).to(tl.int32))
    columns = tl.minimum(tl.arange(0, BLOCK_V), V - 1 - first_column)
    wide_column = first_column + tl.zeros([], dtype=tl.int64)
    offsets = tl.arange(0, BLOCK_D)
    accumulator = products(
        hidden_ptr + first_row * hidden_stride_n,
        weight_ptr + wide_column * weight_stride_v,
        rows[:, None] * hidden_stride_n + offsets[None, :] * hidden_stride_d,
        columns[None, :] * weight_stride_v + offsets[:, None] * weight_stride_d,
        D,
        hidden_stride_d,
        weight_stride_d,
        EVEN_D,
        WIDEN,
        PRECISION,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
    )
    return apply_rule(
        accumulator,
        bias_ptr,
        first_column + columns,
        bias_stride,
        logit_scale,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
    )


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
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A tile whose columns are the targets of its rows, of which the diagonal is kept: BLOCK_V times the work of a dot
    # product a token, and bit for bit the logit that the sweep over the vocabulary meets, so that equal logits tie.
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
        hidden_ptr + first_row * hidden_stride_n,
        weight_ptr,
        rows[:, None] * hidden_stride_n + offsets[None, :] * hidden_stride_d,
        columns[None, :] * weight_stride_v + offsets[:, None] * weight_stride_d,
        D,
        hidden_stride_d,
        weight_stride_d,
        EVEN_D,
        WIDEN,
        PRECISION,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
    )
    logits = apply_rule(accumulator, bias_ptr, columns, bias_stride, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    diagonal = (tl.arange(0, BLOCK_V)[None, :] == lanes[:, None]) & known[None, :]
    own = tl.sum(tl.where(diagonal, logits, 0.0), axis=1)
    tl.store(out_ptr + first_row + lanes, own, mask=first_row + lanes < N)


@triton.jit(do_not_specialize=["N", "spans", "ignore_index"])
def _partials_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    target_ptr,  # int [N]
    class_weight_ptr,  # float32 [V]
    target_logit_ptr,  # float32 [N], read where WITH_RANK
    partials_ptr,  # float32 [5, spans, N]
    choices_ptr,  # int32 [2, spans, N], written where WITH_RANK: logits above the target's, column of the largest
    N,
    V,
    D,
    spans,
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
    HAS_CLASS_WEIGHT: tl.constexpr,
    WITH_LOGIT_SUM: tl.constexpr,
    WITH_EXP_SHIFT: tl.constexpr,
    WITH_RANK: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Neighbouring programs share a span: its weight is read from memory once, then from L2.
    row_blocks = tl.cdiv(N, BLOCK_N)
    span = tl.program_id(0) // row_blocks
    first_row = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_N)
    exists = rows < N
    target = tl.load(target_ptr + rows * target_stride, mask=exists, other=ignore_index).to(tl.int64)
    counted = target != ignore_index
    # 32 bits are enough for a column, and half the registers of 64; −1 is no column.
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)

    maximum = tl.full([BLOCK_N], -float("inf"), dtype=tl.float32)
    sum_exp = tl.zeros([BLOCK_N], dtype=tl.float32)
    target_logit = tl.zeros([BLOCK_N], dtype=tl.float32)
    logit_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    exp_shift = tl.zeros([BLOCK_N], dtype=tl.float32)
    if WITH_RANK:
        own_logit = tl.load(target_logit_ptr + rows, mask=exists, other=0.0)
        above = tl.zeros([BLOCK_N], dtype=tl.int32)
        best = tl.zeros([BLOCK_N], dtype=tl.int32)
    if tl.max(counted.to(tl.int32), axis=0) > 0:  # a block of ignored tokens costs nothing
        for start in range(span * SPAN, min(span * SPAN + SPAN, V), BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            logits = logit_tile(
                hidden_ptr,
                weight_ptr,
                bias_ptr,
                first_row,
                start,
                N,
                V,
                D,
                hidden_stride_n,
                hidden_stride_d,
                weight_stride_v,
                weight_stride_d,
                bias_stride,
                logit_scale,
                softcap,
                HAS_BIAS,
                HAS_SOFTCAP,
                EVEN_D,
                WIDEN,
                PRECISION,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
            )
            inside = (columns < V)[None, :]
            target_logit += tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), axis=1)
            if WITH_LOGIT_SUM:
                weighted = logits
                if HAS_CLASS_WEIGHT:
                    class_weight = tl.load(class_weight_ptr + columns, mask=columns < V, other=0.0)
                    weighted = logits * class_weight[None, :]
                logit_sum += tl.sum(tl.where(inside, weighted, 0.0), axis=1)
            # The mask comes after the softcap: a capped −inf would be a finite −softcap in the sum.
            logits = tl.where(inside, logits, -float("inf"))
            tile_maximum = tl.max(logits, axis=1)
            if WITH_RANK:
                # Lanes past V are −inf and above nothing; of equal logits the first column is the prediction.
                larger = (logits > own_logit[:, None]) & (columns[None, :] != target[:, None])
                above += tl.sum(larger.to(tl.int32), axis=1)
                first = tl.min(tl.where(logits == tile_maximum[:, None], columns[None, :], V), axis=1)
                best = tl.where(tile_maximum > maximum, first, best)
            new_maximum = tl.maximum(maximum, tile_maximum)
            # Logits of −inf alone (a bias may hold them): any finite reference avoids inf − inf.
            reference = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
            decay = tl.exp(maximum - reference)
            shifted = logits - reference[:, None]
            exponentials = tl.exp(shifted)
            if WITH_EXP_SHIFT:
                moved = tl.where(sum_exp > 0.0, sum_exp * (maximum - reference), 0.0)
                products = tl.where(shifted == -float("inf"), 0.0, exponentials * shifted)
                exp_shift = decay * (exp_shift + moved) + tl.sum(products, axis=1)
            sum_exp = sum_exp * decay + tl.sum(exponentials, axis=1)
            maximum = new_maximum

    plane = spans.to(tl.int64) * N
    if WITH_RANK:
        choices_ptr += span.to(tl.int64) * N + rows
        tl.store(choices_ptr, above, mask=exists)
        tl.store(choices_ptr + plane, best, mask=exists)
    partials_ptr += span.to(tl.int64) * N + rows
    tl.store(partials_ptr + MAX_ROW * plane, maximum, mask=exists)
    tl.store(partials_ptr + SUM_EXP_ROW * plane, sum_exp, mask=exists)
    tl.store(partials_ptr + TARGET_ROW * plane, target_logit, mask=exists)
    tl.store(partials_ptr + LOGIT_SUM_ROW * plane, logit_sum, mask=exists)
    tl.store(partials_ptr + EXP_SHIFT_ROW * plane, exp_shift, mask=exists)


@triton.jit(do_not_specialize=["N", "spans", "ignore_index"])
def _merge_kernel(
    partials_ptr,  # float32 [5, spans, N]
    target_ptr,  # int [N]
    sums_ptr,  # float32 [5, N]
    N,
    V,
    spans,
    target_stride,
    ignore_index,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = rows < N
    plane = spans.to(tl.int64) * N
    partials_ptr += rows

    maximum = tl.full([BLOCK_N], -float("inf"), dtype=tl.float32)
    sum_exp = tl.zeros([BLOCK_N], dtype=tl.float32)
    target_logit = tl.zeros([BLOCK_N], dtype=tl.float32)
    logit_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    exp_shift = tl.zeros([BLOCK_N], dtype=tl.float32)
    for _ in range(spans):
        span_maximum = tl.load(partials_ptr + MAX_ROW * plane, mask=exists, other=0.0)
        span_sum = tl.load(partials_ptr + SUM_EXP_ROW * plane, mask=exists, other=0.0)
        span_shift = tl.load(partials_ptr + EXP_SHIFT_ROW * plane, mask=exists, other=0.0)
        new_maximum = tl.maximum(maximum, span_maximum)
        reference = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        decay = tl.exp(maximum - reference)
        span_decay = tl.exp(span_maximum - reference)
        moved = tl.where(sum_exp > 0.0, sum_exp * (maximum - reference), 0.0)
        span_moved = tl.where(span_sum > 0.0, span_sum * (span_maximum - reference), 0.0)
        exp_shift = decay * (exp_shift + moved) + span_decay * (span_shift + span_moved)
        sum_exp = decay * sum_exp + span_decay * span_sum
        maximum = new_maximum
        target_logit += tl.load(partials_ptr + TARGET_ROW * plane, mask=exists, other=0.0)
        logit_sum += tl.load(partials_ptr + LOGIT_SUM_ROW * plane, mask=exists, other=0.0)
        partials_ptr += N

    target = tl.load(target_ptr + rows * target_stride, mask=exists, other=ignore_index).to(tl.int64)
    counted = target != ignore_index
    target_logit = tl.where((target >= 0) & (target < V), target_logit, float("nan"))
    sums_ptr += rows
    wide = N.to(tl.int64)
    tl.store(sums_ptr + MAX_ROW * wide, tl.where(counted, maximum, 0.0), mask=exists)
    tl.store(sums_ptr + SUM_EXP_ROW * wide, tl.where(counted, sum_exp, 1.0), mask=exists)
    tl.store(sums_ptr + TARGET_ROW * wide, tl.where(counted, target_logit, 0.0), mask=exists)
    tl.store(sums_ptr + LOGIT_SUM_ROW * wide, tl.where(counted, logit_sum, 0.0), mask=exists)
    tl.store(sums_ptr + EXP_SHIFT_ROW * wide, tl.where(counted, exp_shift, 0.0), mask=exists)


def vectorised(matrix: torch.Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time: contiguous, and every row starts on a multiple of 16 bytes."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and matrix.shape[1] * matrix.element_size() % 16 == 0
    )


def within_32_bits(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, copied if a tile of 256 × 256 of it would span more than 2³¹ elements."""
    return matrix if 256 * sum(map(abs, matrix.stride())) < 2**31 else matrix.contiguous()


def logit_arguments(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    with_logit_sum: bool,
    with_exp_shift: bool,
) -> tuple[dict, dict, dict]:
    """Arguments, constants and launch options common to the kernels that compute tiles of logits."""
    target = current_target()
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16) or weight.dtype != hidden.dtype:
        raise TypeError(
            "input and linear_weight: the triton backend expects one dtype of float32, float16, bfloat16 for both, "
            f"got {hidden.dtype} and {weight.dtype}; backend='torch' takes any floating dtype"
        )
    hidden, weight = within_32_bits(hidden), within_32_bits(weight)
    plain = softcap is None and not with_logit_sum and not with_exp_shift
    tiles, options = tile_configuration(target, hidden.dtype, vectorised(hidden) and vectorised(weight), plain)
    arguments = dict(
        hidden_ptr=hidden,
        weight_ptr=weight,
        bias_ptr=weight if bias is None else bias,
        V=weight.shape[0],
        D=weight.shape[1],
        hidden_stride_n=hidden.stride(0),
        hidden_stride_d=hidden.stride(1),
        weight_stride_v=weight.stride(0),
        weight_stride_d=weight.stride(1),
        bias_stride=0 if bias is None else bias.stride(0),
        logit_scale=float(logit_scale),
        softcap=0.0 if softcap is None else float(softcap),
    )
    constants = dict(
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        WITH_LOGIT_SUM=with_logit_sum,
        WITH_EXP_SHIFT=with_exp_shift,
        EVEN_D=weight.shape[1] % tiles["BLOCK_D"] == 0,
        WIDEN=widen_products(target, hidden.dtype),
        PRECISION=target.float32_products,
        **tiles,
    )
    return arguments, constants, options


def partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    target_logit: torch.Tensor | None = None,
    *,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    with_logit_sum: bool,
    with_exp_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Per-span sums, float32 [5, spans, N]; a target that is not a row of ``weight`` adds nothing to ``TARGET``.

    With ``target_logit`` [N] also int32 [2, spans, N]: how many logits are larger, and the column of the largest.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    spans = triton.cdiv(vocabulary, SPAN)
    out = hidden.new_empty((SUMS, spans, tokens), dtype=torch.float32)
    choices = None if target_logit is None else hidden.new_empty((2, spans, tokens), dtype=torch.int32)
    if tokens == 0 or vocabulary == 0:
        return out, choices
    arguments, constants, options = logit_arguments(
        hidden, weight, bias, softcap, logit_scale, with_logit_sum or target_logit is not None, with_exp_shift
    )
    launch(
        _partials_kernel,
        (triton.cdiv(tokens, constants["BLOCK_N"]) * spans,),
        arguments
        | dict(
            target_ptr=target,
            class_weight_ptr=out if class_weight is None else class_weight,
            target_logit_ptr=out if target_logit is None else target_logit,
            partials_ptr=out,
            choices_ptr=out if choices is None else choices,
            N=tokens,
            spans=spans,
            target_stride=target.stride(0),
            ignore_index=ignore_index,
        ),
        constants
        | dict(
            HAS_CLASS_WEIGHT=class_weight is not None,
            WITH_LOGIT_SUM=with_logit_sum,
            WITH_EXP_SHIFT=with_exp_shift,
            WITH_RANK=target_logit is not None,
            SPAN=SPAN,
        ),
        options,
    )
    return out, choices


def merge(partials: torch.Tensor, target: torch.Tensor, *, vocabulary: int, ignore_index: int) -> torch.Tensor:
    """Fold partial sums [5, spans, N] into [5, N], in the order of the spans.

    Marks what only the whole vocabulary can tell: ignored tokens (sums 0, 1, 0, 0, 0) and targets outside
    [0, ``vocabulary``) (NaN). Spans may also be the shards of ranks, empty ones (sums −inf, 0, 0, 0, 0) included.
    """
    _, spans, tokens = partials.shape
    out = partials.new_empty((SUMS, tokens))
    if tokens == 0:
        return out
    launch(
        _merge_kernel,
        (triton.cdiv(tokens, 128),),
        dict(
            partials_ptr=partials,
            target_ptr=target,
            sums_ptr=out,
            N=tokens,
            V=vocabulary,
            spans=spans,
            target_stride=target.stride(0),
            ignore_index=ignore_index,
        ),
        dict(BLOCK_N=128),
        dict(num_warps=4),
    )
    return out


def _token_chunks(tokens: int, vocabulary: int, bytes_per_partial: int, memory_limit: int) -> list[slice]:
    """Chunks of tokens whose partial sums fit in ``memory_limit`` bytes; one empty chunk where there are no tokens."""
    size = max(1, memory_limit // (bytes_per_partial * max(1, triton.cdiv(vocabulary, SPAN))))
    return [slice(start, min(tokens, start + size)) for start in range(0, max(1, tokens), size)]


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_logit_sum: bool = False,
    with_exp_shift: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> torch.Tensor:
    """The five sums of every token, float32 [5, N], from hidden [N, D], weight [V, D], bias [V], target int [N].

    ``memory_limit`` bounds the partial sums, in bytes: more tokens than fit are done in several launches.
    """
    chunks = []
    for tokens in _token_chunks(hidden.shape[0], weight.shape[0], 4 * SUMS, memory_limit):
        of_spans, _ = partials(
            hidden[tokens],
            weight,
            bias,
            target[tokens],
            class_weight,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            with_logit_sum=with_logit_sum,
            with_exp_shift=with_exp_shift,
        )
        chunks.append(merge(of_spans, target[tokens], vocabulary=weight.shape[0], ignore_index=ignore_index))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)


def target_logit(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """The logit of every token's target, float32 [N], 0 where it is no row of ``weight``; what ``linear_statistics`` takes."""
    out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    if hidden.shape[0] == 0:
        return out
    # The tiles of ``linear_statistics``: equal tiles, equal bits.
    arguments, constants, options = logit_arguments(hidden, weight, bias, softcap, logit_scale, True, True)
    del constants["WITH_LOGIT_SUM"], constants["WITH_EXP_SHIFT"]
    launch(
        _target_logit_kernel,
        (triton.cdiv(hidden.shape[0], constants["BLOCK_N"]),),
        arguments | dict(target_ptr=target, out_ptr=out, N=hidden.shape[0], target_stride=target.stride(0)),
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
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_limit: int = MEMORY_LIMIT,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The five sums [5, N] (``LOGIT_SUM`` left 0), how many logits are above ``target_logit`` [N], and the largest's column.

    Both int64 [N]; 0 for ignored tokens. Of equal largest logits the first column is taken.
    """
    vocabulary = weight.shape[0]
    sums, above, best = [], [], []
    for tokens in _token_chunks(hidden.shape[0], vocabulary, 4 * (SUMS + 2), memory_limit):
        of_spans, choices = partials(
            hidden[tokens],
            weight,
            bias,
            target[tokens],
            None,
            target_logit[tokens],
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            with_logit_sum=False,
            with_exp_shift=True,
        )
        sums.append(merge(of_spans, target[tokens], vocabulary=vocabulary, ignore_index=ignore_index))
        above.append(choices[0].sum(0))
        largest = of_spans[MAX] == of_spans[MAX].amax(0)
        best.append(torch.where(largest, choices[1], vocabulary).amin(0).long())
    ignored = target == ignore_index
    return (
        torch.cat(sums, dim=1),
        torch.cat(above).masked_fill_(ignored, 0),
        torch.cat(best).masked_fill_(ignored, 0),
    )
