"""Launches: the target of a compilation, the precision of products, and a recorder of launches.

The compile check reads the recorder.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton._C import libtriton

from .. import sums
from ..devices import Target, device_target, index_of

INTERPRETED: bool = triton.knobs.runtime.interpret
# Older versions of the interpreter round a ``tl.fma`` twice.
ROUNDS_TWICE = tl.constexpr(INTERPRETED and not hasattr(libtriton.interpreter, "fma_fp32"))

_override: Target | None = None
_recorded: list[Launch] | None = None


def _driver_target() -> Target:
    target = triton.runtime.driver.active.get_current_target()
    return Target(target.backend, target.arch, target.warp_size)


def target_of(tensor: torch.Tensor) -> Target:
    """Return the target that launchers choose for: the recorder's, the interpreter or a GPU.

    The GPU is the tensor's own: a machine may have several kinds.
    """
    if _override is not None:
        return _override
    if INTERPRETED:
        return Target("interpreter", 0)
    if tensor.is_cuda:
        return device_target(index_of(tensor.device))
    return _driver_target()


@dataclass(frozen=True)
class Launch:
    """A recorded kernel launch, which can be compiled without a device."""

    kernel: object
    arguments: dict
    constants: dict
    options: dict


def may_fuse(arguments: dict, constants: dict) -> bool:
    """Return whether the compiler may fuse a multiplication with an addition.

    Not where the last step to a logit is a multiplication, by a scale or a softcap. It would be
    rounded in a row's maximum and fused in the difference from the maximum: a peaked row's
    exponential would exceed 1, and its NLL fall below 0. There only ``tl.fma`` is fused.
    """
    scales = (value for name, value in arguments.items() if name.endswith("logit_scale"))
    capped = (value for name, value in constants.items() if name.endswith("HAS_SOFTCAP"))
    return all(scale == 1.0 for scale in scales) and not any(capped)


def launch(kernel, grid: tuple[int, ...], arguments: dict, constants: dict, options: dict) -> None:
    """Run ``kernel`` over ``grid``, or record the launch under ``recording``.

    The compiler may fuse multiplications and additions (``may_fuse``); Triton's own default differs
    from version to version.
    """
    if _recorded is not None or not INTERPRETED:
        options = options | dict(enable_fp_fusion=may_fuse(arguments, constants))
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, constants, options))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    if device.type == "cuda":
        # Triton launches on the current device, which may differ from the tensors'.
        with torch.cuda.device(device):
            kernel[grid](**arguments, **constants, **options)
    else:
        kernel[grid](**arguments, **constants, **options)


@contextmanager
def recording(target: Target):
    """Record launches for ``target`` in the yielded list; none is run.

    Launchers choose what they would choose on that target.
    """
    global _override, _recorded
    previous = _override, _recorded
    _override, _recorded = target, []
    try:
        yield _recorded
    finally:
        _override, _recorded = previous


def widen_products(target: Target, dtype: torch.dtype) -> bool:
    """Return whether tiles are cast to float32 before a product.

    The interpreter multiplies the raw bits of bfloat16. Tiles are cast there, and only there.
    """
    return target.backend == "interpreter" and dtype != torch.float32


LOG2_E = tl.constexpr(1.4426950408889634)
NO_POWER = tl.constexpr(sums.NO_POWER)
# Float32 numbers from here on are 64 apart or more.
EXACT_FROM = tl.constexpr(2.0**30)


@triton.jit
def load_row(rows_ptr, ROW: tl.constexpr, plane, exists):
    """Load row ``ROW`` of float32 [rows, N] for the tokens that ``rows_ptr`` points at.

    ``plane`` is N in 64 bits.
    """
    return tl.load(rows_ptr + ROW * plane, mask=exists, other=0.0)


@triton.jit
def load_target(target_ptr, rows, target_stride, exists, ignore_index, V):
    """Load the tokens' targets, int32, −1 for those that are no column, and whether tokens count.

    32 bits are enough for a column, and take half the registers of 64.
    """
    target = tl.load(target_ptr + rows * target_stride, mask=exists, other=ignore_index).to(
        tl.int64
    )
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32), target != ignore_index


@triton.jit
def load_class_weight(pointers, inside, HAS_CLASS_WEIGHT: tl.constexpr):
    """Load the class weights of columns, 0 where not ``inside``; ones without class weights."""
    class_weight = tl.full(inside.shape, 1.0, dtype=tl.float32)
    if HAS_CLASS_WEIGHT:
        class_weight = tl.load(pointers, mask=inside, other=0.0)
    return class_weight


@triton.jit
def power_of_two(x, FLUSH: tl.constexpr):
    """Return 2 to the power x to 2 units in the last place.

    With FLUSH (NVIDIA) that is one instruction, and results under 2⁻¹²⁶ are 0. Without, as in
    ``tl.exp2``, it is four, which keep such small results; a logit has few instructions.
    """
    if FLUSH:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        power = tl.exp2(x)
    return power


@triton.jit
def exp_below(x, FLUSH: tl.constexpr):
    """Return exp(x) for x ≤ 0 as ``power_of_two`` does."""
    if FLUSH:
        power = power_of_two(x * LOG2_E, FLUSH)
    else:
        power = tl.exp(x)
    return power


@triton.jit
def fused(factor, logits, offset):
    """Return factor · logits + offset, rounded once, of three tensors of one shape."""
    if ROUNDS_TWICE:
        result = (factor.to(tl.float64) * logits.to(tl.float64) + offset.to(tl.float64)).to(
            tl.float32
        )
    else:
        result = tl.fma(factor, logits, offset)
    return result


@triton.jit
def exponent_of(reference):
    """Return factor, offset and rest: exp(z − reference) is 2^(factor · z + offset − rest).

    So a logit's exponent is one ``fused`` operation, and the rest, which is one number a row, is
    taken from a sum of powers. It is what the rounding of the offset −log₂e · reference leaves of
    the reference's own exponent: at most 64 below ``EXACT_FROM``. From there on different logits
    are 64 or more apart, and their powers 1 or as good as 0 to any base: with a factor of 1
    nothing is rounded, and nothing overflows.
    """
    factor = tl.where(tl.abs(reference) < EXACT_FROM, LOG2_E, 1.0)
    offset = -(reference * factor)
    return factor, offset, fused(factor, reference, offset)


@triton.jit
def tanh(x):
    """Return tanh(x) to 2e-7 relative, from exp alone (the interpreter has no libdevice).

    (1 − e) / (1 + e) with e = exp(−2|x|) cancels near 0; there the Taylor series to x¹¹ is exact to
    1e-9 relative.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    square = x * x
    series = tl.fma(square, -1382.0 / 155925.0, 62.0 / 2835.0)
    series = tl.fma(square, series, -17.0 / 315.0)
    series = tl.fma(square, series, 2.0 / 15.0)
    series = tl.fma(square, series, -1.0 / 3.0)
    small = x * tl.fma(square, series, 1.0)
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0.0, -large, large))


@triton.jit
def narrow_cap(x, softcap, FLUSH: tl.constexpr):
    """Return softcap · tanh(x / softcap) to 2.5e-7 · softcap, as softcap · (1 − 2 / (1 + e^2x)).

    It is monotonic but for its rounding, and within ±softcap. ``tanh`` takes 4 times as many
    instructions.
    """
    above_one = 1.0 + power_of_two(x * (2.0 * LOG2_E / softcap), FLUSH)
    if FLUSH:
        share = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            "=f,f",
            [above_one],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        share = 1.0 / above_one
    return tl.fma(share, -2.0 * softcap, softcap)
