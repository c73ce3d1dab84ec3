"""The five sums of existing logits, and their gradient, which may overwrite the logits.

Formulas: ``sums.py``, with z = softcap · tanh(logit_scale · logits / softcap). Logits are [N, V],
or torch's [N, V, T], whose token n · T + t is logits[n, :, t]. One program a token walks its row
with an online softmax. Cost: one read of the logits forward; one read and one write backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dispatch import DEFAULT, PLAIN, Plan, Rule
from ..sums import EXP_SHIFT, LOGIT_SUM, MAX, SUM_EXP, SUMS, TARGET, with_positions
from .launch import NO_POWER, exp_below, launch, load_class_weight, tanh, target_of
from .linear_nll_grad import sums_derivative

MAX_ROW, SUM_EXP_ROW, TARGET_ROW, LOGIT_SUM_ROW, EXP_SHIFT_ROW = (
    tl.constexpr(row) for row in (MAX, SUM_EXP, TARGET, LOGIT_SUM, EXP_SHIFT)
)

# Neighbouring logits that share a running maximum: one thread reads 16 bytes of 16-bit logits at
# once.
LANE_WIDTH = 8


def row_configuration(logits: torch.Tensor, plain: bool) -> tuple[dict, dict]:
    """Return tile size and launch options for rows [items, V, positions].

    A tile is no larger than a row. It has at most 4,096 logits, 16 a thread, where only the NLL is
    needed of rows that are read 16 bytes at a time, and 2,048 elsewhere. Registers are limited so
    that a multiprocessor has room for four blocks of 256 threads, whose reads fill the memory's
    pipe; for two where more sums, or an address per logit, take registers.
    """
    target = target_of(logits)
    light = (
        plain
        and logits.stride(1) == 1
        and logits.stride(0) % 16 == 0
        and logits.data_ptr() % 16 == 0
    )
    block = min(4096 if light else 2048, max(128, triton.next_power_of_2(logits.shape[1])))
    options = {} if target.backend == "interpreter" else dict(num_warps=8 if block >= 2048 else 4)
    return dict(BLOCK_V=block), options | (
        dict(maxnreg=64 if light else 128) if target.backend == "cuda" else {}
    )


@triton.jit
def _load_logits(
    pointers,
    mask,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load logits under the rule."""
    if MASKED:
        logits = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        logits = tl.load(pointers).to(tl.float32)
    if HAS_SCALE:
        logits *= logit_scale
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits * (1.0 / softcap))
    return logits


@triton.jit
def _fold_lanes(
    state,  # per lane [lanes]: maximum, sum_exp, logit_sum, exp_shift, weight_seen
    pointers,  # [lanes, LANE_WIDTH], to these columns
    weight_pointers,
    inside,  # bool [lanes, LANE_WIDTH], not past V
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    WITH_LOGIT_SUM: tl.constexpr,
    WITH_EXP_SHIFT: tl.constexpr,
    FLUSH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the state with a tile of logits added.

    Each thread works on its own logits and rescales once for LANE_WIDTH of them.
    """
    maximum, sum_exp, logit_sum, exp_shift, weight_seen = state
    logits = _load_logits(
        pointers=pointers,
        mask=inside,
        logit_scale=logit_scale,
        softcap=softcap,
        HAS_SCALE=HAS_SCALE,
        HAS_SOFTCAP=HAS_SOFTCAP,
        MASKED=MASKED,
    )
    if MASKED:
        logits = tl.where(inside, logits, -float("inf"))
    new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
    reference = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
    decay = exp_below(maximum - reference, FLUSH)
    shifted = logits - reference[:, None]
    exponentials = exp_below(shifted, FLUSH)
    if WITH_LOGIT_SUM:
        moved = tl.where(sum_exp > 0.0, maximum - reference, 0.0)
        class_weight = load_class_weight(weight_pointers, inside, HAS_CLASS_WEIGHT)
        weighted = class_weight * shifted
        if MASKED:
            class_weight = tl.where(inside, class_weight, 0.0)
            weighted = tl.where(inside, weighted, 0.0)
        logit_sum += weight_seen * moved + tl.sum(weighted, axis=1)
        weight_seen += tl.sum(class_weight, axis=1)
    if WITH_EXP_SHIFT:
        products = exponentials * tl.maximum(shifted, NO_POWER)
        below = tl.maximum(maximum - reference, NO_POWER)
        exp_shift = decay * (exp_shift + sum_exp * below) + tl.sum(products, axis=1)
    sum_exp = sum_exp * decay + tl.sum(exponentials, axis=1)
    return new_maximum, sum_exp, logit_sum, exp_shift, weight_seen


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _nll_kernel(
    logits_ptr,  # [N / T, V, T]
    target_ptr,  # int [N]
    class_weight_ptr,  # float32 [V]
    sums_ptr,  # float32 [5, N]
    N,
    T,
    V,
    logits_stride_n,
    logits_stride_t,
    logits_stride_v,
    target_stride,
    ignore_index,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    WITH_LOGIT_SUM: tl.constexpr,
    WITH_EXP_SHIFT: tl.constexpr,
    FLUSH: tl.constexpr,
    MASKED: tl.constexpr,  # V is not whole tiles
    LANE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row // T * logits_stride_n + row % T * logits_stride_t
    target = tl.load(target_ptr + row * target_stride).to(tl.int64)
    counted = target != ignore_index
    LANES: tl.constexpr = BLOCK_V // LANE_WIDTH
    lanes = tl.arange(0, LANES)[:, None] * LANE_WIDTH + tl.arange(0, LANE_WIDTH)[None, :]
    pointers = logits_ptr + lanes.to(tl.int64) * logits_stride_v
    weight_pointers = class_weight_ptr + lanes
    # Each lane has a running maximum and sums, folded once at the end: no reduction between threads
    # is in the loop.
    nothing = tl.zeros([LANES], dtype=tl.float32)
    state = nothing - float("inf"), nothing, nothing, nothing, nothing
    row_target = 0.0
    if counted:
        known = (target >= 0) & (target < V)
        row_target = _load_logits(
            pointers=logits_ptr + target * logits_stride_v,
            mask=known,
            logit_scale=logit_scale,
            softcap=softcap,
            HAS_SCALE=HAS_SCALE,
            HAS_SOFTCAP=HAS_SOFTCAP,
            MASKED=True,
        )
        row_target = tl.where(known, row_target, float("nan"))
        for start in range(0, V, BLOCK_V):
            state = _fold_lanes(
                state=state,
                pointers=pointers,
                weight_pointers=weight_pointers,
                inside=lanes < V - start,
                logit_scale=logit_scale,
                softcap=softcap,
                HAS_SCALE=HAS_SCALE,
                HAS_SOFTCAP=HAS_SOFTCAP,
                HAS_CLASS_WEIGHT=HAS_CLASS_WEIGHT,
                WITH_LOGIT_SUM=WITH_LOGIT_SUM,
                WITH_EXP_SHIFT=WITH_EXP_SHIFT,
                FLUSH=FLUSH,
                MASKED=MASKED,
            )
            pointers += (tl.zeros([], dtype=tl.int64) + BLOCK_V) * logits_stride_v
            weight_pointers += BLOCK_V
    maximum, sum_exp, logit_sum, exp_shift, weight_seen = state
    row_maximum = tl.max(maximum, axis=0)
    reference = tl.where(row_maximum == -float("inf"), 0.0, row_maximum)
    decay = tl.exp(maximum - reference)
    moved = tl.where(sum_exp > 0.0, maximum - reference, 0.0)
    row_exp_shift = tl.sum(decay * (exp_shift + sum_exp * tl.maximum(moved, NO_POWER)), axis=0)
    row_logit_sum = tl.sum(logit_sum + weight_seen * moved, axis=0)
    row_sum_exp = tl.sum(decay * sum_exp, axis=0)
    plane = N.to(tl.int64)
    sums_ptr += row
    tl.store(sums_ptr + MAX_ROW * plane, tl.where(counted, row_maximum, 0.0))
    tl.store(sums_ptr + SUM_EXP_ROW * plane, tl.where(counted, row_sum_exp, 1.0))
    tl.store(sums_ptr + TARGET_ROW * plane, row_target)
    tl.store(sums_ptr + LOGIT_SUM_ROW * plane, tl.where(counted, row_logit_sum, 0.0))
    tl.store(sums_ptr + EXP_SHIFT_ROW * plane, tl.where(counted, row_exp_shift, 0.0))


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _nll_grad_kernel(
    logits_ptr,  # [N / T, V, T]
    target_ptr,  # int [N]
    class_weight_ptr,  # float32 [V]
    maximum_ptr,  # float32 [N]
    upstream_ptr,  # float32 [5, N]
    # [N / T, V, T], may be logits_ptr: the same program reads each element before it writes it
    gradient_ptr,
    N,
    T,
    V,
    logits_stride_n,
    logits_stride_t,
    logits_stride_v,
    gradient_stride_n,
    gradient_stride_t,
    gradient_stride_v,
    target_stride,
    ignore_index,
    logit_scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    WITH_LOGIT_SUM: tl.constexpr,
    WITH_EXP_SHIFT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.zeros([1], dtype=tl.int64)
    logits_ptr += row // T * logits_stride_n + row % T * logits_stride_t
    gradient_ptr += row // T * gradient_stride_n + row % T * gradient_stride_t
    target = tl.load(target_ptr + row * target_stride).to(tl.int64)
    counted = tl.zeros([1], dtype=tl.int64) + target != ignore_index
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        pointers = logits_ptr + columns.to(tl.int64) * logits_stride_v
        logits = _load_logits(
            pointers=pointers,
            mask=columns < V,
            logit_scale=logit_scale,
            softcap=softcap,
            HAS_SCALE=HAS_SCALE,
            HAS_SOFTCAP=HAS_SOFTCAP,
            MASKED=True,
        )
        class_weight = load_class_weight(class_weight_ptr + columns, columns < V, HAS_CLASS_WEIGHT)
        gradient = sums_derivative(
            logits=logits[None, :],
            hit=(columns == target)[None, :],
            class_weight=class_weight,
            maximum_ptr=maximum_ptr,
            upstream_ptr=upstream_ptr,
            rows=rows,
            exists=rows < N,
            N=N,
            WITH_LOGIT_SUM=WITH_LOGIT_SUM,
            WITH_EXP_SHIFT=WITH_EXP_SHIFT,
        )
        if HAS_SOFTCAP:
            capped = logits * (1.0 / softcap)
            gradient *= tl.fma(-capped, capped, 1.0)[None, :]
        gradient = tl.where(counted[:, None], gradient * logit_scale, 0.0)
        tl.store(
            gradient_ptr + columns.to(tl.int64)[None, :] * gradient_stride_v,
            gradient.to(gradient_ptr.dtype.element_ty),
            mask=(columns < V)[None, :],
        )


def _arguments(
    logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None, rule: Rule
):
    """Return the arguments, constants and options that both kernels share."""
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"input: the triton backend expects float32, float16 or bfloat16, got {logits.dtype}; "
            "backend='torch' takes any floating dtype"
        )
    logits = with_positions(logits)
    items, vocabulary, positions = logits.shape
    constants, options = row_configuration(
        logits, not (rule.with_logit_sum or rule.with_exp_shift or rule.softcap is not None)
    )
    arguments = dict(
        logits_ptr=logits,
        target_ptr=target,
        class_weight_ptr=logits if class_weight is None else class_weight,
        N=items * positions,
        T=positions,
        V=vocabulary,
        logits_stride_n=logits.stride(0),
        logits_stride_t=logits.stride(2),
        logits_stride_v=logits.stride(1),
        target_stride=target.stride(0),
        ignore_index=rule.ignore_index,
        logit_scale=float(rule.logit_scale),
        softcap=0.0 if rule.softcap is None else float(rule.softcap),
    )
    constants |= dict(
        HAS_SCALE=rule.logit_scale != 1.0,
        HAS_SOFTCAP=rule.softcap is not None,
        HAS_CLASS_WEIGHT=class_weight is not None,
        WITH_LOGIT_SUM=rule.with_logit_sum,
        WITH_EXP_SHIFT=rule.with_exp_shift,
    )
    return arguments, constants, options


def nll(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
) -> torch.Tensor:
    """Return the five sums of every token, float32 [5, N · T], from logits [N, V] or [N, V, T].

    Targets are int [N · T]. No temporary memory is taken, whatever the plan.
    """
    arguments, constants, options = _arguments(logits, target, class_weight, rule)
    sums = logits.new_empty((SUMS, arguments["N"]), dtype=torch.float32)
    if arguments["N"]:
        constants |= dict(
            FLUSH=target_of(logits).backend == "cuda",
            MASKED=arguments["V"] % constants["BLOCK_V"] != 0,
            LANE_WIDTH=LANE_WIDTH,
        )
        launch(_nll_kernel, (arguments["N"],), arguments | dict(sums_ptr=sums), constants, options)
    return sums


def nll_grad(
    upstream: torch.Tensor,
    maximum: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of logits [N, V] or [N, V, T] from ``upstream`` float32 [5, N · T].

    ``out`` may be ``logits`` itself.
    """
    arguments, constants, options = _arguments(logits, target, class_weight, rule)
    out = torch.empty_like(logits) if out is None else out
    if arguments["N"]:
        gradient = with_positions(out)
        arguments |= dict(
            maximum_ptr=maximum,
            upstream_ptr=upstream.contiguous(),
            gradient_ptr=gradient,
            gradient_stride_n=gradient.stride(0),
            gradient_stride_t=gradient.stride(2),
            gradient_stride_v=gradient.stride(1),
        )
        launch(_nll_grad_kernel, (arguments["N"],), arguments, constants, options)
    return out
