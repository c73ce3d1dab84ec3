"""The five sums of every token from hidden states and the vocabulary matrix, without N × V logits.

The logits are z = softcap · tanh(logit_scale · (hidden @ weightᵀ + bias) / softcap). From the sums
(``sums.py``) follow logsumexp, NLL, entropy and every loss of the public functions.

The vocabulary is cut into spans of ``SPAN`` rows. A program owns ``BLOCK_N`` tokens and one span,
and walks the span in tiles of ``BLOCK_V`` with an online softmax: a running maximum, and sums that
are rescaled when the maximum grows (Milakov & Gimelshein 2018, arXiv:1805.02867). ``merge`` folds
the partial sums of the spans, always in the same order, without atomics: two runs give the same
bits. SPAN is a constant, so the sums of a token do not depend on its batch.

From Hopper on, aligned tiles are read through tensor descriptors (TMA). One loop runs through all
tiles of a span, so that the next tile is read while the logits of this one are summed. A tile may
be summed in ``PARTS``, and then needs registers for the accumulator and one part only.

A logit costs five instructions: maximum, exponent (``launch.exponent_of``), power, sum, and a zero
for the next product. What few tiles need is in a branch that the whole program takes or not: the
mask behind the last column, and the target's logit. The latter is looked for in the tiles that hold
a target of the program's rows (``tiles_with_targets``): with 128 rows and a vocabulary of 128,256,
in one tile of five at most. A kernel of its own for the targets would cost a launch, and its
products the bits of the sweep, by which a target that is a row's maximum is exactly that.

Cost: 2·N·V·D operations; reads hidden once per vocabulary tile (from L2) and weight once per
``GROUP`` blocks of tokens; temporary memory 3 or 5 · ceil(V / SPAN) · N floats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..chunks import equal_chunk
from ..devices import Target
from ..dispatch import DEFAULT, PLAIN, TRITON_LIMIT, Plan, Rule
from ..sums import EXP_SHIFT, LOGIT_SUM, MAX, SUM_EXP, SUMS, TARGET
from .launch import (
    NO_POWER,
    exp_below,
    exponent_of,
    fused,
    launch,
    load_class_weight,
    load_row,
    load_target,
    power_of_two,
    target_of,
)
from .logit_tile import apply_rule, column_parts, logit_arguments, product_tile, work_of

# Vocabulary rows a program walks. With 128 tokens, at least 95% of 132 multiprocessors are busy at
# every shape in docs/performance.md, and the start of a program takes at most 2% of its time.
SPAN = 2048
# Blocks of tokens that walk a span at the same time. 16 blocks and 8 spans, one program on each of
# 132 multiprocessors, read the fewest bytes: shared rows stay in L2.
GROUP = 16
# Maximum, Σexp and the target's logit; the other sums are written where they are needed.
NLL_PLANES = 3

MAX_ROW, SUM_EXP_ROW, TARGET_ROW, LOGIT_SUM_ROW, EXP_SHIFT_ROW = (
    tl.constexpr(row) for row in (MAX, SUM_EXP, TARGET, LOGIT_SUM, EXP_SHIFT)
)


@triton.jit
def span_and_row(N, spans, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a program's span and its first token, int64.

    The blocks of a group go over one span, then over the next.
    """
    group = tl.program_id(0) // (GROUP * spans)
    in_group = tl.minimum(tl.cdiv(N, BLOCK_N) - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * spans)
    return place // in_group, (group * GROUP + place % in_group).to(tl.int64) * BLOCK_N


@triton.jit
def either(one, other):
    """Return the bits that one of two numbers has."""
    return one | other


@triton.jit
def tiles_with_targets(
    target,  # int32 [BLOCK_N], from the first column of a span
    SPAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return a number whose bit t says that tile t of a span holds a target, int32."""
    tl.static_assert(SPAN // BLOCK_V <= 32, "a span has at most 32 tiles, a bit each")
    bits = tl.where((target >= 0) & (target < SPAN), 1 << (target // BLOCK_V), 0)
    return tl.reduce(bits, 0, either)


@triton.jit
def at_target(
    logits,  # float32 [BLOCK_N, columns]
    target,  # int32 [BLOCK_N], from the first column
    own_logit,  # float32 [BLOCK_N]
    WITH_RANK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return the target's logit, 0 where it is in no column, and 1 where that is above its own.

    The logits are looked through in ``PARTS``, which leaves registers.
    """
    width: tl.constexpr = logits.shape[1] // PARTS
    found = tl.zeros([logits.shape[0]], dtype=tl.float32)
    above = tl.zeros([logits.shape[0]], dtype=tl.int32)
    parts = column_parts(logits, PARTS)
    for part in tl.static_range(PARTS):
        hit = tl.arange(0, width)[None, :] == (target - part * width)[:, None]
        found += tl.sum(tl.where(hit, parts[part], 0.0), axis=1)
        if WITH_RANK:
            above += tl.sum((hit & (parts[part] > own_logit[:, None])).to(tl.int32), axis=1)
    return found, above


@triton.jit
def _fold(
    # Of the columns before: maximum, sum_exp, target_logit, logit_sum, exp_shift, above, best,
    # weight_seen.
    sums,
    accumulator,  # float32 [BLOCK_N, columns], hidden @ weightᵀ
    start,  # the first column
    bias_ptr,
    V,
    bias_stride,
    logit_scale,
    softcap,
    target,  # int32 [BLOCK_N], −1 for none
    holds_target,  # some row's target may be among these columns
    own_logit,  # float32 [BLOCK_N], the target's, read where WITH_RANK
    class_weight_ptr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    WITH_LOGIT_SUM: tl.constexpr,
    WITH_EXP_SHIFT: tl.constexpr,
    WITH_RANK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    FLUSH: tl.constexpr,
    ENDS: tl.constexpr,  # the vocabulary may end among these columns
    LOOKS: tl.constexpr,  # number of parts in which a target is looked for
):
    """Return the sums with these columns added."""
    maximum, sum_exp, target_logit, logit_sum, exp_shift, above, best, weight_seen = sums
    lanes = tl.arange(0, accumulator.shape[1])
    columns = tl.minimum(start + lanes, V - 1)
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
        HAS_SCALE=HAS_SCALE,
    )
    if ENDS:  # noqa: SIM102  # a constant
        # After the softcap, which would turn −inf into a finite −softcap.
        if start + lanes.shape[0] > V:
            logits = tl.where((lanes < V - start)[None, :], logits, -float("inf"))
    if holds_target:
        found, own_above = at_target(
            logits=logits,
            target=target - start,
            own_logit=own_logit,
            WITH_RANK=WITH_RANK,
            PARTS=LOOKS,
        )
        target_logit += found
        above -= own_above
    part_maximum = tl.max(logits, axis=1)
    if WITH_RANK:
        # Lanes past V are −inf and never above. Of equal logits the first column is predicted.
        # Up to 256 are counted in float32, by fewer instructions than in int32.
        above += tl.sum(tl.where(logits > own_logit[:, None], 1.0, 0.0), axis=1).to(tl.int32)
        first = tl.min(tl.where(logits == part_maximum[:, None], columns[None, :], V), axis=1)
        best = tl.where(part_maximum > maximum, first, best)
    new_maximum = tl.maximum(maximum, part_maximum)
    # All logits may be −inf (a bias may hold −inf): any finite reference avoids inf − inf. It is
    # written out everywhere: a helper costs two to six registers in the kernels over logits.
    reference = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
    decay = exp_below(maximum - reference, FLUSH)
    factor, offset, rest = exponent_of(reference)
    correction = power_of_two(-rest, FLUSH)
    exponents = fused(
        tl.broadcast_to(factor[:, None], logits.shape),
        logits,
        tl.broadcast_to(offset[:, None], logits.shape),
    )
    exponentials = power_of_two(exponents, FLUSH)
    if WITH_LOGIT_SUM:
        moved = tl.where(sum_exp > 0.0, maximum - reference, 0.0)
        class_weight = load_class_weight(
            class_weight_ptr + start + lanes, lanes < V - start, HAS_CLASS_WEIGHT
        )
        weighted = (logits - reference[:, None]) * class_weight[None, :]
        if ENDS:
            weighted = tl.where((lanes < V - start)[None, :], weighted, 0.0)
            class_weight = tl.where(lanes < V - start, class_weight, 0.0)
        logit_sum += weight_seen * moved + tl.sum(weighted, axis=1)
        weight_seen += tl.sum(class_weight, axis=0)
    tile_sum = tl.sum(exponentials, axis=1)
    if WITH_EXP_SHIFT:
        # Not from the exponents, whose rounding would leave the entropy of a sure token above 0.
        shifted = tl.maximum(logits - reference[:, None], NO_POWER)
        products = correction * tl.sum(exponentials * shifted, axis=1)
        below = tl.maximum(maximum - reference, NO_POWER)
        exp_shift = decay * (exp_shift + sum_exp * below) + products
    sum_exp = sum_exp * decay + correction * tile_sum
    return new_maximum, sum_exp, target_logit, logit_sum, exp_shift, above, best, weight_seen


@triton.jit(do_not_specialize=["N", "spans", "ignore_index"])
def _partials_kernel(
    hidden_ptr,  # [N, D], a descriptor where DESCRIBED
    weight_ptr,  # [V, D], likewise
    bias_ptr,  # [V]
    target_ptr,  # int [N]
    class_weight_ptr,  # float32 [V]
    target_logit_ptr,  # float32 [N], read where WITH_RANK
    partials_ptr,  # float32 [3 or 5, spans, N]
    # int32 [2, spans, N], written where WITH_RANK: number of logits above the target's, column of
    # the largest
    choices_ptr,
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
    HAS_SCALE: tl.constexpr,
    EVEN_V: tl.constexpr,  # V is whole tiles
    FLUSH: tl.constexpr,  # as in ``power_of_two``
    DESCRIBED: tl.constexpr,
    FLATTEN: tl.constexpr,  # one loop over the tiles of a span and the parts of D
    PARTS: tl.constexpr,  # number of parts in which a tile is summed
    LOOKS: tl.constexpr,  # number of parts of such a part in which a target is looked for
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    span, first_row = span_and_row(N, spans, GROUP, BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_N)
    exists = rows < N
    target, counted = load_target(target_ptr, rows, target_stride, exists, ignore_index, V)

    nothing = tl.zeros([BLOCK_N], dtype=tl.float32)
    none = tl.zeros([BLOCK_N], dtype=tl.int32)
    own_logit = nothing
    if WITH_RANK:
        own_logit = tl.load(target_logit_ptr + rows, mask=exists, other=0.0)
    sums = nothing - float("inf"), nothing, nothing, nothing, nothing, none, none, 0.0
    held = tiles_with_targets(target - span * SPAN, SPAN, BLOCK_V)
    if tl.max(counted.to(tl.int32), axis=0) > 0:  # a block of ignored tokens costs nothing
        for start in tl.range(
            span * SPAN, tl.minimum(span * SPAN + SPAN, V), BLOCK_V, flatten=FLATTEN
        ):
            accumulator = product_tile(
                hidden_ptr=hidden_ptr,
                weight_ptr=weight_ptr,
                first_row=first_row,
                first_column=start,
                N=N,
                V=V,
                D=D,
                hidden_stride_n=hidden_stride_n,
                hidden_stride_d=hidden_stride_d,
                weight_stride_v=weight_stride_v,
                weight_stride_d=weight_stride_d,
                EVEN_D=EVEN_D,
                WIDEN=WIDEN,
                PRECISION=PRECISION,
                BLOCK_N=BLOCK_N,
                BLOCK_V=BLOCK_V,
                BLOCK_D=BLOCK_D,
                DESCRIBED=DESCRIBED,
            )
            holds_target = (held >> (start - span * SPAN) // BLOCK_V) & 1 != 0
            parts = column_parts(accumulator, PARTS)
            for part in tl.static_range(PARTS):
                sums = _fold(
                    sums=sums,
                    accumulator=parts[part],
                    start=start + part * (BLOCK_V // PARTS),
                    bias_ptr=bias_ptr,
                    V=V,
                    bias_stride=bias_stride,
                    logit_scale=logit_scale,
                    softcap=softcap,
                    target=target,
                    holds_target=holds_target,
                    own_logit=own_logit,
                    class_weight_ptr=class_weight_ptr,
                    HAS_BIAS=HAS_BIAS,
                    HAS_SOFTCAP=HAS_SOFTCAP,
                    HAS_CLASS_WEIGHT=HAS_CLASS_WEIGHT,
                    WITH_LOGIT_SUM=WITH_LOGIT_SUM,
                    WITH_EXP_SHIFT=WITH_EXP_SHIFT,
                    WITH_RANK=WITH_RANK,
                    HAS_SCALE=HAS_SCALE,
                    FLUSH=FLUSH,
                    ENDS=not EVEN_V,
                    LOOKS=LOOKS,
                )
    maximum, sum_exp, target_logit, logit_sum, exp_shift, above, best, _ = sums
    # The maximum's own share is 1 but for rounding: below, an NLL could be below 0.
    sum_exp = tl.where((maximum > -float("inf")) & (sum_exp < 1.0), 1.0, sum_exp)

    plane = spans.to(tl.int64) * N
    if WITH_RANK:
        choices_ptr += span.to(tl.int64) * N + rows
        tl.store(choices_ptr, above, mask=exists)
        tl.store(choices_ptr + plane, best, mask=exists)
    partials_ptr += span.to(tl.int64) * N + rows
    tl.store(partials_ptr + MAX_ROW * plane, maximum, mask=exists)
    tl.store(partials_ptr + SUM_EXP_ROW * plane, sum_exp, mask=exists)
    tl.store(partials_ptr + TARGET_ROW * plane, target_logit, mask=exists)
    if WITH_LOGIT_SUM or WITH_EXP_SHIFT:
        tl.store(partials_ptr + LOGIT_SUM_ROW * plane, logit_sum, mask=exists)
        tl.store(partials_ptr + EXP_SHIFT_ROW * plane, exp_shift, mask=exists)


@triton.jit(do_not_specialize=["N", "spans", "ignore_index"])
def _merge_kernel(
    partials_ptr,  # float32 [3 or 5, spans, N]
    weights_ptr,  # float32 [spans], Σ w of a span, read where WITH_LOGIT_SUM
    target_ptr,  # int [N]
    sums_ptr,  # float32 [5, N]
    N,
    V,
    spans,
    target_stride,
    ignore_index,
    WITH_LOGIT_SUM: tl.constexpr,
    ALL_PLANES: tl.constexpr,
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
    weight_seen = 0.0
    for span in range(spans):
        span_maximum = load_row(partials_ptr, MAX_ROW, plane, exists)
        span_sum = load_row(partials_ptr, SUM_EXP_ROW, plane, exists)
        new_maximum = tl.maximum(maximum, span_maximum)
        reference = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        decay = tl.exp(maximum - reference)
        span_decay = tl.exp(span_maximum - reference)
        moved = tl.where(sum_exp > 0.0, maximum - reference, 0.0)
        span_moved = tl.where(span_sum > 0.0, span_maximum - reference, 0.0)
        if ALL_PLANES:
            span_shift = load_row(partials_ptr, EXP_SHIFT_ROW, plane, exists)
            exp_shift = decay * (exp_shift + sum_exp * tl.maximum(moved, NO_POWER))
            exp_shift += span_decay * (span_shift + span_sum * tl.maximum(span_moved, NO_POWER))
            logit_sum += load_row(partials_ptr, LOGIT_SUM_ROW, plane, exists)
        sum_exp = decay * sum_exp + span_decay * span_sum
        if WITH_LOGIT_SUM:
            span_weight = tl.load(weights_ptr + span)
            logit_sum += weight_seen * moved + span_weight * span_moved
            weight_seen += span_weight
        maximum = new_maximum
        target_logit += load_row(partials_ptr, TARGET_ROW, plane, exists)
        partials_ptr += N

    target = tl.load(target_ptr + rows * target_stride, mask=exists, other=ignore_index).to(
        tl.int64
    )
    counted = target != ignore_index
    target_logit = tl.where((target >= 0) & (target < V), target_logit, float("nan"))
    sums_ptr += rows
    wide = N.to(tl.int64)
    tl.store(sums_ptr + MAX_ROW * wide, tl.where(counted, maximum, 0.0), mask=exists)
    tl.store(sums_ptr + SUM_EXP_ROW * wide, tl.where(counted, sum_exp, 1.0), mask=exists)
    tl.store(sums_ptr + TARGET_ROW * wide, tl.where(counted, target_logit, 0.0), mask=exists)
    tl.store(sums_ptr + LOGIT_SUM_ROW * wide, tl.where(counted, logit_sum, 0.0), mask=exists)
    tl.store(sums_ptr + EXP_SHIFT_ROW * wide, tl.where(counted, exp_shift, 0.0), mask=exists)


def loop_shape(target: Target, constants: dict, work: str) -> dict:
    """Return ``FLATTEN``, ``PARTS`` and ``LOOKS`` of a kernel's ``work`` on its tiles.

    With the copy engine there is one loop, but not where the accumulator is in a memory of its own
    and its parts must be read from there. Fewer parts are fewer instructions; more parts leave
    registers, or less shared memory where operands are in registers (compute capability 12).
    """
    if not constants["DESCRIBED"]:
        # Addresses take the registers that parts would save; parts may move through shared memory.
        return dict(FLATTEN=False, PARTS=1, LOOKS=1)
    parts = {"nll": 1, "capped nll": 1, "ruled statistics": 4}.get(work, 2)
    if target.own_accumulator or not target.wide_accumulator:
        parts = 4
    return dict(
        FLATTEN=target.backend == "cuda" and not target.own_accumulator,
        PARTS=parts,
        LOOKS=4 // parts,
    )


def planes_of(rule: Rule) -> int:
    """Return how many rows of sums a program writes."""
    return SUMS if rule.with_logit_sum or rule.with_exp_shift else NLL_PLANES


def partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    rule: Rule,
    target_logit: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the sums of each span, float32 [3 or 5, spans, N].

    A target that is no row of ``weight`` adds nothing to ``TARGET``. With ``target_logit`` [N] the
    second result is int32 [2, spans, N]: the number of logits above, and the column of the largest.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    spans = triton.cdiv(vocabulary, SPAN)
    planes = planes_of(rule)
    out = hidden.new_empty((planes, spans, tokens), dtype=torch.float32)
    choices = (
        None if target_logit is None else hidden.new_empty((2, spans, tokens), dtype=torch.int32)
    )
    if tokens == 0 or vocabulary == 0:
        return out, choices
    device = target_of(hidden)
    work = work_of(rule, bias, ranks=target_logit is not None)
    arguments, constants, options = logit_arguments(
        hidden, weight, bias, rule, work, may_describe=True
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
            ignore_index=rule.ignore_index,
        ),
        constants
        | dict(
            HAS_CLASS_WEIGHT=class_weight is not None,
            WITH_LOGIT_SUM=rule.with_logit_sum,
            WITH_EXP_SHIFT=rule.with_exp_shift,
            WITH_RANK=target_logit is not None,
            # With descriptors this saves operations per logit. With pointers the compiler uses the
            # freed registers for more reads in flight, and spills.
            HAS_SCALE=rule.logit_scale != 1.0 or not constants["DESCRIBED"],
            EVEN_V=vocabulary % constants["BLOCK_V"] == 0 and constants["DESCRIBED"],
            SPAN=SPAN,
            GROUP=GROUP,
            **loop_shape(device, constants, work),
        ),
        options,
    )
    return out, choices


def span_weights(
    vocabulary: int, class_weight: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    """Return Σ w of every span, float32 [spans].

    The ``LOGIT_SUM`` of a span moves by that when its maximum moves by 1.
    """
    weights = (
        like.new_ones(vocabulary, dtype=torch.float32) if class_weight is None else class_weight
    )
    return torch.nn.functional.pad(weights, (0, -vocabulary % SPAN)).view(-1, SPAN).sum(1)


def merge(
    partials: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    vocabulary: int,
    ignore_index: int,
) -> torch.Tensor:
    """Fold the partial sums [3 or 5, spans, N] into [5, N], in the order of the spans.

    ``LOGIT_SUM`` needs the spans' ``weights`` [spans]. Only the whole vocabulary shows which tokens
    are ignored (sums 0, 1, 0, 0, 0) and which targets are outside [0, ``vocabulary``) (NaN). Spans
    may also be shards of ranks, empty ones (sums −inf, 0, 0, 0, 0) included.
    """
    planes, spans, tokens = partials.shape
    out = partials.new_empty((SUMS, tokens))
    if tokens == 0:
        return out
    launch(
        _merge_kernel,
        (triton.cdiv(tokens, 128),),
        dict(
            partials_ptr=partials,
            weights_ptr=out if weights is None else weights,
            target_ptr=target,
            sums_ptr=out,
            N=tokens,
            V=vocabulary,
            spans=spans,
            target_stride=target.stride(0),
            ignore_index=ignore_index,
        ),
        dict(WITH_LOGIT_SUM=weights is not None, ALL_PLANES=planes == SUMS, BLOCK_N=128),
        dict(num_warps=4),
    )
    return out


def token_chunks(
    tokens: int, vocabulary: int, bytes_per_partial: int, memory_limit: int
) -> list[slice]:
    """Return chunks of tokens whose partial sums fit in ``memory_limit`` bytes.

    Without tokens there is one empty chunk.
    """
    most = max(1, memory_limit // (bytes_per_partial * max(1, triton.cdiv(vocabulary, SPAN))))
    size = equal_chunk(tokens, most)
    return [slice(start, min(tokens, start + size)) for start in range(0, max(1, tokens), size)]


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
) -> torch.Tensor:
    """Return the five sums of every token, float32 [5, N].

    They are of hidden [N, D], weight [V, D], bias [V] and target int [N]. The plan's
    ``memory_limit`` bounds the partial sums, in bytes: more tokens than fit take several launches.
    """
    weights = (
        span_weights(weight.shape[0], class_weight, hidden)
        if rule.with_logit_sum and weight.shape[0]
        else None
    )
    chunks = []
    bytes_per_partial, memory_limit = 4 * planes_of(rule), plan.memory_limit or TRITON_LIMIT
    whole = dict(vocabulary=weight.shape[0], ignore_index=rule.ignore_index)
    for tokens in token_chunks(hidden.shape[0], weight.shape[0], bytes_per_partial, memory_limit):
        of_spans, _ = partials(hidden[tokens], weight, bias, target[tokens], class_weight, rule)
        chunks.append(merge(of_spans, target[tokens], weights, **whole))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)
