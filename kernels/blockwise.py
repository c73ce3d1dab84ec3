"""The kernels' contracts in plain PyTorch without N × V: the fallback everywhere, and the fast path on a CPU.

The vocabulary is walked in blocks with a running maximum and running sums (Milakov & Gimelshein 2018, arXiv:1805.02867);
the logits of a block live in one reused buffer. Formulas: ``kernels/__init__.py``. float64 inputs give float64 sums.

Cost: 2·N·V·D operations forward; the buffer, at most ``memory_limit`` bytes, and vectors of N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import SUMS
from .chunks import accumulate_gradients, block_shape

BLOCK_ROWS = 1024


def check_target(target: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise IndexError with the position of the first target outside [0, vocabulary) that is not ``ignore_index``."""
    invalid = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if invalid.any():
        position = int(invalid.nonzero()[0, 0])
        raise IndexError(
            f"target: expected values in [0, {vocabulary}) or ignore_index ({ignore_index}), "
            f"got {int(target[position])} at position {position}"
        )


@dataclass
class _RunningSums:
    """The five sums of N tokens while the vocabulary goes by."""

    target: torch.Tensor
    class_weight: torch.Tensor | None
    with_logit_sum: bool
    with_exp_shift: bool
    rows: torch.Tensor

    @classmethod
    def start(cls, target, class_weight, with_logit_sum, with_exp_shift, dtype) -> _RunningSums:
        rows = torch.zeros((SUMS, target.shape[0]), dtype=dtype, device=target.device)
        rows[0] = -torch.inf
        return cls(target, class_weight, with_logit_sum, with_exp_shift, rows)

    def add(self, z: torch.Tensor, first_column: int, tokens: slice) -> None:
        """Add the logits z [tokens, block]; overwrites z."""
        maximum, sum_exp, at_target, logit_sum, exp_shift = (row[tokens] for row in self.rows)
        local = self.target[tokens] - first_column
        inside = (local >= 0) & (local < z.shape[1])
        picked = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
        at_target += torch.where(inside, picked, 0.0)
        if self.with_logit_sum:
            if self.class_weight is None:
                logit_sum += z.sum(1)
            else:
                # In place: autocast would round the operands of `@` to 16 bits.
                logit_sum.addmv_(z, self.class_weight[first_column : first_column + z.shape[1]].to(z.dtype))
        new_maximum = torch.maximum(maximum, z.amax(1))
        # Logits of −inf alone (a bias may hold them): any finite reference avoids inf − inf.
        reference = torch.where(new_maximum == -torch.inf, 0.0, new_maximum)
        decay = (maximum - reference).exp_()
        z -= reference[:, None]
        if self.with_exp_shift:
            shifted = z.masked_fill(z == -torch.inf, 0.0)
            z.exp_()
            moved = torch.where(sum_exp > 0, sum_exp * (maximum - reference), 0.0)
            exp_shift.add_(moved).mul_(decay).add_(shifted.mul_(z).sum(1))
        else:
            z.exp_()
        sum_exp.mul_(decay).add_(z.sum(1))
        maximum.copy_(new_maximum)

    def finish(self, vocabulary: int, ignore_index: int) -> torch.Tensor:
        outside = (self.target < 0) | (self.target >= vocabulary)
        self.rows[2].masked_fill_(outside, torch.nan)
        ignored = self.target == ignore_index
        self.rows.masked_fill_(ignored, 0.0)
        self.rows[1].masked_fill_(ignored, 1.0)
        return self.rows


def _apply_rule(z: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, logit_scale: float) -> torch.Tensor:
    """Bias, scale and softcap in place on products z."""
    if bias is not None:
        z += bias
    if logit_scale != 1.0:
        z *= logit_scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _products(hidden, weight, out) -> torch.Tensor:
    """hidden @ weightᵀ into ``out`` (float32 or float64), its products rounded to the inputs' dtype only if out's is."""
    if out.dtype == hidden.dtype:
        return torch.mm(hidden, weight.T, out=out)
    return torch.mm(hidden.to(out.dtype), weight.T.to(out.dtype), out=out)


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
    memory_limit: int = 8 << 20,
) -> torch.Tensor:
    """The five sums of every token, [5, N], float32 (float64 for float64 inputs); logits are never rounded to 16 bits."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    running = _RunningSums.start(target, class_weight, with_logit_sum, with_exp_shift, wide)
    rows = min(BLOCK_ROWS, vocabulary)
    tokens_at_once = min(tokens, max(1, memory_limit // (rows * wide.itemsize)))
    buffer = hidden.new_empty(tokens_at_once * rows, dtype=wide)
    for first in range(0, vocabulary, rows):
        block = weight[first : first + rows]
        if block.dtype != wide and tokens_at_once < tokens:
            block = block.to(wide)
        for start in range(0, tokens, max(1, tokens_at_once)):
            chunk = hidden[start : start + tokens_at_once]
            z = buffer[: chunk.shape[0] * block.shape[0]].view(chunk.shape[0], block.shape[0])
            _products(chunk, block, z)
            _apply_rule(z, None if bias is None else bias[first : first + rows], softcap, logit_scale)
            running.add(z, first, slice(start, start + chunk.shape[0]))
    return running.finish(vocabulary, ignore_index)


def _sums_derivative(z, first_column, maximum, upstream, target, class_weight, ignored, with_logit_sum, with_exp_shift):
    """∂/∂z of the five sums weighted by ``upstream`` [5, N], for a block of logits; overwrites z."""
    _, per_sum, per_target, per_logit, per_shift = upstream
    z -= torch.where(maximum == -torch.inf, 0.0, maximum)[:, None]
    if with_exp_shift:
        factor = ((1.0 + z).masked_fill_(z == -torch.inf, 0.0)).mul_(per_shift[:, None]).add_(per_sum[:, None])
        z.exp_().mul_(factor)
    else:
        z.exp_().mul_(per_sum[:, None])
    local = target - first_column
    inside = (local >= 0) & (local < z.shape[1])
    z.scatter_add_(1, local.clamp(0, z.shape[1] - 1)[:, None], torch.where(inside, per_target, 0.0)[:, None])
    if with_logit_sum and class_weight is None:
        z += per_logit[:, None]
    elif with_logit_sum:
        z.addr_(per_logit, class_weight[first_column : first_column + z.shape[1]].to(z.dtype))
    return z.masked_fill_(ignored[:, None], 0.0)


def linear_nll_grad(
    upstream: torch.Tensor,
    maximum: torch.Tensor,
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
    needs: tuple[bool, bool, bool] = (True, True, True),
    memory_limit: int = 16 << 20,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias from ``upstream`` [5, N] and the forward's ``maximum`` [N]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    block = block_shape(hidden.shape[0], weight.shape[0], wide.itemsize, memory_limit)
    buffer = hidden.new_empty(block[0] * block[1], dtype=wide)

    def logit_gradient(tokens: slice, columns: slice) -> torch.Tensor:
        count, width = tokens.stop - tokens.start, columns.stop - columns.start
        z = _products(hidden[tokens], weight[columns], buffer[: count * width].view(count, width))
        _apply_rule(z, None if bias is None else bias[columns], softcap, logit_scale)
        slope = None if softcap is None else 1.0 - (z / softcap).square()
        gradient = _sums_derivative(
            z,
            columns.start,
            maximum[tokens],
            upstream[:, tokens],
            target[tokens],
            class_weight,
            target[tokens] == ignore_index,
            with_logit_sum,
            with_exp_shift,
        )
        if slope is not None:
            gradient *= slope
        if logit_scale != 1.0:
            gradient *= logit_scale
        return gradient.to(hidden.dtype)

    return accumulate_gradients(logit_gradient, hidden, weight, bias, needs=needs, block=block)


def _row_chunks(tokens: int, vocabulary: int, itemsize: int, memory_limit: int):
    size = max(1, memory_limit // max(1, vocabulary * itemsize))
    return (slice(start, min(tokens, start + size)) for start in range(0, tokens, size))


def nll(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_logit_sum: bool = False,
    with_exp_shift: bool = False,
    memory_limit: int = 4 << 20,
) -> torch.Tensor:
    """The five sums of every token, [5, N], from logits [N, V], a few rows at a time."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    running = _RunningSums.start(target, class_weight, with_logit_sum, with_exp_shift, wide)
    for tokens in _row_chunks(*logits.shape, wide.itemsize, memory_limit):
        z = _apply_rule(logits[tokens].to(wide, copy=True), None, softcap, logit_scale)
        running.add(z, 0, tokens)
    return running.finish(logits.shape[1], ignore_index)


def nll_grad(
    upstream: torch.Tensor,
    maximum: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_logit_sum: bool = False,
    with_exp_shift: bool = False,
    out: torch.Tensor | None = None,
    memory_limit: int = 4 << 20,
) -> torch.Tensor:
    """Gradient of logits [N, V] from ``upstream`` [5, N]; ``out`` may be ``logits`` itself."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    out = torch.empty_like(logits) if out is None else out
    for tokens in _row_chunks(*logits.shape, wide.itemsize, memory_limit):
        z = _apply_rule(logits[tokens].to(wide, copy=True), None, softcap, logit_scale)
        slope = None if softcap is None else 1.0 - (z / softcap).square()
        gradient = _sums_derivative(
            z,
            0,
            maximum[tokens],
            upstream[:, tokens],
            target[tokens],
            class_weight,
            target[tokens] == ignore_index,
            with_logit_sum,
            with_exp_shift,
        )
        if slope is not None:
            gradient *= slope
        out[tokens] = gradient.mul_(logit_scale)
    return out
