"""Tiles of logits: their computation and their sizes, shared by every kernel from hidden states.

z = softcap · tanh(logit_scale · (hidden @ weightᵀ + bias) / softcap), float32, BLOCK_N tokens ×
BLOCK_V vocabulary rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..devices import Target
from ..dispatch import Rule, describable
from .launch import narrow_cap, tanh, target_of, widen_products

# Kinds of softcap. Up to here ``narrow_cap`` is within 1e-5 of the exact logit.
NARROW, WIDE = tl.constexpr(1), tl.constexpr(2)
WIDEST_NARROW = 40.0


def cap_kind(softcap: float | None) -> int:
    """Return how a softcap is computed: 0 where there is none."""
    if softcap is None:
        return 0
    return NARROW.value if abs(softcap) <= WIDEST_NARROW else WIDE.value


def tile_configuration(
    target: Target, dtype: torch.dtype, vectorised: bool, work: str, described: bool = False
) -> tuple[dict, dict]:
    """Return tile sizes and launch options of the kernels that multiply hidden by weight.

    ``work`` on a tile of logits is "nll", or "capped nll" under a softcap; "sums" (one beyond NLL),
    "all sums"; "statistics" (ranks), or "ruled statistics" with a bias or a softcap; "divergence"
    (a second tile).

    The tile is the largest whose accumulator (BLOCK_N · BLOCK_V floats over num_warps) stays in
    registers. Less room is left for more work, for float32 (three tf32 products a tile need both
    operands split), and for rows that cannot be read 16 bytes at a time (their addresses take
    registers). None spills: `make compile-check`. ``described`` tiles are read through tensor
    descriptors (``describable``).
    """
    if target.backend == "interpreter":
        return dict(BLOCK_N=64, BLOCK_V=128, BLOCK_D=64), {}
    if described:
        return _described_configuration(target, work)
    two_tiles = work == "divergence"
    if target.backend == "hip":
        whole = target.multiplies(dtype)
        if dtype == torch.float32:
            # Without matrix instructions every lane holds operands of its own as well.
            tiles = dict(BLOCK_N=64 if whole else 32, BLOCK_V=64, BLOCK_D=32 if whole else 16)
            return tiles, dict(num_warps=4, num_stages=2)
        # RDNA's registers are of 32 lanes: half as many sums a lane where each has an address.
        small = two_tiles or (target.facts.matrix_unit == "wmma" and not vectorised)
        tiles = dict(BLOCK_N=64 if small else 128, BLOCK_V=128, BLOCK_D=32)
        return tiles, dict(num_warps=8, num_stages=2)
    # Without a limit, NVIDIA's assembler spills a register rather than run one block less on a
    # multiprocessor.
    limit = (
        dict(maxnreg=255)
        if work in ("all sums", "divergence")
        or (work != "nll" and work != "capped nll" and not vectorised)
        else {}
    )
    if dtype == torch.float32 or not vectorised:
        # The split operands of two products take twice the registers: half the depth.
        tiles = dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=32 if vectorised and not two_tiles else 16)
        return tiles, dict(num_warps=8, num_stages=2) | limit
    if work == "nll":
        return dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64), dict(num_warps=8, num_stages=3)
    return dict(BLOCK_N=64, BLOCK_V=128, BLOCK_D=64), dict(num_warps=8, num_stages=3) | limit


def _described_configuration(target: Target, work: str) -> tuple[dict, dict]:
    """Return the configuration with the copy engine: a tile of twice the columns fits in registers.

    No thread holds an address. Hopper's accumulator takes 128 registers of each of 256 threads: a
    softcap, or a sum that neither NLL nor statistics need, would be one value too many, and so
    would a fourth stage. Blackwell's is in a memory of its own, from which the sums take a part at
    a time. Where there are many sums the parts are narrower still, and the assembler is limited to
    one block a multiprocessor. The other Blackwell (compute capability 12) has Ampere's products,
    whose operands are in registers too, and less shared memory: half the columns, fewer stages.
    """
    own, many = target.own_accumulator, work in ("all sums", "divergence")
    if not target.wide_accumulator:
        columns = 128 if work in ("nll", "capped nll", "sums") else 64
        tiles = dict(BLOCK_N=128, BLOCK_V=columns, BLOCK_D=64)
        return tiles, dict(num_warps=8, num_stages=3)
    wide = work in ("nll", "statistics")
    columns = 256 if wide else 64 if own and many else 128
    tiles = dict(BLOCK_N=128, BLOCK_V=columns, BLOCK_D=64)
    limit = dict(maxnreg=255) if own and not wide else {}
    return tiles, dict(num_warps=8, num_stages=4 if own or not wide else 3) | limit


def work_of(rule: Rule, bias: torch.Tensor | None = None, ranks: bool = False) -> str:
    """Return the ``work`` of a rule's sums, or of ranks."""
    plain = rule.softcap is None
    if ranks:
        return "statistics" if plain and bias is None else "ruled statistics"
    if rule.with_logit_sum and rule.with_exp_shift:
        return "all sums"
    if rule.with_logit_sum or rule.with_exp_shift:
        return "sums"
    return "nll" if plain else "capped nll"


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
    """Return hidden @ weightᵀ of the rows that the offsets point at, float32 [BLOCK_N, BLOCK_V]."""
    offsets = tl.arange(0, BLOCK_D)
    accumulator = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            hidden = tl.load(hidden_ptr + hidden_offsets)
            weight = tl.load(weight_ptr + weight_offsets)
        else:
            hidden = tl.load(
                hidden_ptr + hidden_offsets, mask=(offsets < D - start)[None, :], other=0.0
            )
            weight = tl.load(
                weight_ptr + weight_offsets, mask=(offsets < D - start)[:, None], other=0.0
            )
        if WIDEN:
            hidden = hidden.to(tl.float32)
            weight = weight.to(tl.float32)
        accumulator = tl.dot(hidden, weight, accumulator, input_precision=PRECISION)
        hidden_ptr += BLOCK_D * hidden_stride_d
        weight_ptr += BLOCK_D * weight_stride_d
    return accumulator


@triton.jit
def described_products(
    hidden,  # descriptor of [N, D], tiles [BLOCK_N, BLOCK_D]
    weight,  # descriptor of [V, D], tiles [BLOCK_V, BLOCK_D]
    first_row,
    first_column,
    D,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return ``products`` of whole tiles read by the copy engine, which reads 0 past N, V and D."""
    accumulator = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        hidden_part = hidden.load([first_row, start])
        weight_part = weight.load([first_column, start])
        if WIDEN:
            hidden_part = hidden_part.to(tl.float32)
            weight_part = weight_part.to(tl.float32)
        accumulator = tl.dot(hidden_part, weight_part.T, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def column_parts(tile, PARTS: tl.constexpr):
    """Return a tile [BLOCK_N, BLOCK_V] as a tuple of 1, 2 or 4 equal parts, left to right."""
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()
        if PARTS == 2:
            # The types differ, but PARTS is a constant when Triton compiles this.
            parts = (left, right)  # type: ignore[assignment]
        else:
            first, second = (
                left.reshape(left.shape[0], 2, left.shape[1] // 2).permute(0, 2, 1).split()
            )
            third, fourth = (
                right.reshape(right.shape[0], 2, right.shape[1] // 2).permute(0, 2, 1).split()
            )
            parts = (first, second, third, fourth)  # type: ignore[assignment]
    return parts


@triton.jit
def apply_rule(
    logits,  # float32 [BLOCK_N, BLOCK_V]
    bias_ptr,  # [V], read where HAS_BIAS
    columns,
    bias_stride,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,  # 0, or NARROW or WIDE, as in ``cap_kind``
    FLUSH: tl.constexpr,
    HAS_SCALE: tl.constexpr = True,
):
    """Return softcap · tanh(logit_scale · (logits + bias) / softcap)."""
    if HAS_BIAS:
        logits += tl.load(bias_ptr + columns.to(tl.int64) * bias_stride).to(tl.float32)[None, :]
    if HAS_SCALE:
        logits *= logit_scale
    if HAS_SOFTCAP == NARROW:
        logits = narrow_cap(logits, softcap, FLUSH)
    if HAS_SOFTCAP == WIDE:
        logits = softcap * tanh(logits * (1.0 / softcap))
    return logits


@triton.jit
def product_tile(
    hidden_ptr,  # [N, D], a descriptor where DESCRIBED
    weight_ptr,  # [V, D], likewise
    first_row,  # int64
    first_column,
    N,
    V,
    D,
    hidden_stride_n,
    hidden_stride_d,
    weight_stride_v,
    weight_stride_d,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIBED: tl.constexpr = False,
):
    """Return hidden @ weightᵀ of a tile, float32 [BLOCK_N, BLOCK_V], not masked.

    Lanes past N or V hold the last row's or column's products, or 0.
    """
    if DESCRIBED:
        accumulator = described_products(
            hidden=hidden_ptr,
            weight=weight_ptr,
            first_row=first_row.to(tl.int32),
            first_column=first_column,
            D=D,
            WIDEN=WIDEN,
            PRECISION=PRECISION,
            BLOCK_N=BLOCK_N,
            BLOCK_V=BLOCK_V,
            BLOCK_D=BLOCK_D,
        )
    else:
        # One 64-bit address per tile and 32-bit offsets within it: 64-bit offsets would take half
        # of the registers.
        rows = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_row).to(tl.int32))
        columns = tl.minimum(tl.arange(0, BLOCK_V), V - 1 - first_column)
        wide_column = first_column + tl.zeros([], dtype=tl.int64)
        offsets = tl.arange(0, BLOCK_D)
        accumulator = products(
            hidden_ptr=hidden_ptr + first_row * hidden_stride_n,
            weight_ptr=weight_ptr + wide_column * weight_stride_v,
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
    return accumulator


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
    FLUSH: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIBED: tl.constexpr = False,
):
    """Return the logits of a tile: ``product_tile`` under the rule."""
    accumulator = product_tile(
        hidden_ptr=hidden_ptr,
        weight_ptr=weight_ptr,
        first_row=first_row,
        first_column=first_column,
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
    columns = tl.minimum(first_column + tl.arange(0, BLOCK_V), V - 1)
    return apply_rule(
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


def vectorised(matrix: torch.Tensor) -> bool:
    """Return whether Triton reads rows 16 bytes at a time.

    It must see that each row starts at a multiple of 16 bytes, and where the row ends. A kernel
    knows of strides and sizes only whether they are multiples of 16.
    """
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) % 16 == 0
        and matrix.shape[1] % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def described(arguments: dict, tiles: dict, side: str = "") -> dict:
    """Return ``arguments`` with descriptors of hidden and weight."""
    blocks = ((f"{side}hidden_ptr", tiles["BLOCK_N"]), (f"{side}weight_ptr", tiles["BLOCK_V"]))
    return arguments | {
        name: TensorDescriptor.from_tensor(arguments[name], [rows, tiles["BLOCK_D"]])
        for name, rows in blocks
    }


def within_32_bits(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix, copied if a tile of 256 × 256 of it would span more than 2³¹ elements."""
    return matrix if 256 * sum(map(abs, matrix.stride())) < 2**31 else matrix.contiguous()


def head_arguments(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rule: Rule
) -> tuple[dict, dict]:
    """Return the arguments and constants that define the logits."""
    if (
        hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16)
        or weight.dtype != hidden.dtype
    ):
        raise TypeError(
            "input and linear_weight: the triton backend expects one dtype of float32, float16, "
            "bfloat16 for both, "
            f"got {hidden.dtype} and {weight.dtype}; backend='torch' takes any floating dtype"
        )
    hidden, weight = within_32_bits(hidden), within_32_bits(weight)
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
        logit_scale=float(rule.logit_scale),
        softcap=0.0 if rule.softcap is None else float(rule.softcap),
    )
    return arguments, dict(HAS_BIAS=bias is not None, HAS_SOFTCAP=cap_kind(rule.softcap))


def logit_arguments(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rule: Rule,
    work: str,
    may_describe: bool = False,
) -> tuple[dict, dict, dict]:
    """Return arguments, constants and launch options of the kernels that compute tiles of logits.

    With ``may_describe`` the kernel accepts descriptors, and ``DESCRIBED`` says whether they are
    used.
    """
    target = target_of(hidden)
    arguments, constants = head_arguments(hidden, weight, bias, rule)
    matrices = arguments["hidden_ptr"], arguments["weight_ptr"]
    describes = may_describe and all(describable(target, matrix) for matrix in matrices)
    tiles, options = tile_configuration(
        target, hidden.dtype, all(map(vectorised, matrices)), work, describes
    )
    if describes:
        arguments = described(arguments, tiles)
    if may_describe:
        constants["DESCRIBED"] = describes
    constants |= dict(
        EVEN_D=arguments["D"] % tiles["BLOCK_D"] == 0,
        WIDEN=widen_products(target, hidden.dtype),
        PRECISION=target.float32_products,
        FLUSH=target.backend == "cuda",
        **tiles,
    )
    return arguments, constants, options
