"""The kernels' contracts in plain PyTorch without N × V: the fallback everywhere, and the fast path on a CPU.

The vocabulary is walked in blocks with a running maximum and running sums (Milakov & Gimelshein 2018, arXiv:1805.02867);
the logits of a block live in one reused buffer. Formulas: ``kernels/__init__.py``. float64 inputs give float64 sums.
Class weights may also be [N, V] here, weights of a token's own: what class-probability targets are.

Cost: 2·N·V·D operations forward; blocks of at most ``memory_limit`` bytes, all copies counted, and vectors of N.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from . import SUMS
from .chunks import accumulate_gradients, block_shape, gradient_block

BLOCK_ROWS = 1024
FORWARD_LIMIT, BACKWARD_LIMIT, ROWS_LIMIT = 8 << 20, 16 << 20, 4 << 20


@dataclass
class Logits:
    """Blocks of softcap · tanh(logit_scale · (hidden @ weightᵀ + bias) / softcap), in float32 or wider, in one buffer."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    logit_scale: float
    _buffer: torch.Tensor | None = None
    _cast: dict = field(default_factory=dict)

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def per_row(self) -> int:
        """Bytes of the copy that a token, or a vocabulary row, in 16 bits is multiplied from."""
        return 0 if self.hidden.dtype == self.wide else self.hidden.shape[1] * self.wide.itemsize

    def per_gradient(self, copies: int) -> int:
        """Bytes an element of a block takes on its way to a logit gradient, with ``copies`` of it beside the slope's."""
        rounded = 0 if self.hidden.dtype == self.wide else self.hidden.element_size()
        return (copies + (self.softcap is not None)) * self.wide.itemsize + rounded

    def reserve(self, block: tuple[int, int]) -> None:
        self._buffer = None  # freed before its successor is made
        self._buffer = self.hidden.new_empty(block[0] * block[1], dtype=self.wide)

    def _widened(self, name: str, rows: slice) -> torch.Tensor:
        """Rows of ``hidden`` or ``weight`` in the buffer's dtype; the last ones asked for are kept."""
        matrix = getattr(self, name)
        if matrix.dtype == self.wide:
            return matrix[rows]
        if name not in self._cast or self._cast[name][0] != rows:
            self._cast[name] = None  # freed before its successor is made
            self._cast[name] = rows, matrix[rows].to(self.wide)
        return self._cast[name][1]

    def block(self, tokens: slice, columns: slice) -> torch.Tensor:
        """Logits [tokens, columns]; a later call overwrites them."""
        count, width = tokens.stop - tokens.start, columns.stop - columns.start
        z = self._buffer[: count * width].view(count, width)
        torch.mm(self._widened("hidden", tokens), self._widened("weight", columns).T, out=z)
        return apply_rule(z, None if self.bias is None else self.bias[columns], self.softcap, self.logit_scale)

    def slope(self, z: torch.Tensor) -> torch.Tensor | None:
        """The softcap's derivative at logits z, 1 − (z / softcap)²."""
        return None if self.softcap is None else (z / self.softcap).square_().neg_().add_(1.0)

    def chain(self, gradient: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
        """From the gradient of logits, overwritten, to that of hidden @ weightᵀ + bias, in the inputs' dtype."""
        if slope is not None:
            gradient *= slope
        if self.logit_scale != 1.0:
            gradient *= self.logit_scale
        return gradient.to(self.hidden.dtype)


def row_maximum(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row, NaN where there is one, and its column, the first of equal ones.

    By ``argmax``: on a CPU ``amax`` and ``max`` over the last dimension take ten times its time (torch 2.13).
    """
    column = z.argmax(1)
    return z.gather(1, column[:, None])[:, 0], column


@dataclass
class _RunningSums:
    """The five sums of N tokens while the vocabulary goes by."""

    target: torch.Tensor
    class_weight: torch.Tensor | None
    with_logit_sum: bool
    with_exp_shift: bool
    rows: torch.Tensor
    weight_seen: torch.Tensor  # Σ w of the columns so far, [N]

    @classmethod
    def start(cls, target, class_weight, with_logit_sum, with_exp_shift, dtype) -> _RunningSums:
        rows = torch.zeros((SUMS, target.shape[0]), dtype=dtype, device=target.device)
        rows[0] = -torch.inf
        return cls(target, class_weight, with_logit_sum, with_exp_shift, rows, torch.zeros_like(rows[1]))

    def add(self, z: torch.Tensor, first_column: int, tokens: slice, largest: torch.Tensor | None = None) -> None:
        """Add the logits z [tokens, block], and their maxima where they are known; overwrites z."""
        maximum, sum_exp, at_target, logit_sum, exp_shift = (row[tokens] for row in self.rows)
        local = self.target[tokens] - first_column
        inside = (local >= 0) & (local < z.shape[1])
        picked = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
        at_target += torch.where(inside, picked, 0.0)
        if largest is None:
            largest, _ = row_maximum(z)
        new_maximum = torch.maximum(maximum, largest)
        # Logits of −inf alone (a bias may hold them): any finite reference avoids inf − inf.
        reference = torch.where(new_maximum == -torch.inf, 0.0, new_maximum)
        decay = (maximum - reference).exp_()
        moved = torch.where(sum_exp > 0, maximum - reference, 0.0)
        z -= reference[:, None]
        if self.with_logit_sum:
            columns = slice(first_column, first_column + z.shape[1])
            seen = self.weight_seen[tokens]
            logit_sum += seen * moved
            if self.class_weight is None:
                logit_sum += z.sum(1)
                seen += z.shape[1]
            elif self.class_weight.dim() == 2:
                logit_sum += (z * self.class_weight[tokens, columns]).sum(1)
                seen += self.class_weight[tokens, columns].sum(1)
            else:
                block_weight = self.class_weight[columns].to(z.dtype)
                # In place: autocast would round the operands of `@` to 16 bits.
                logit_sum.addmv_(z, block_weight)
                seen += block_weight.sum()
        if self.with_exp_shift:
            shifted = z.masked_fill(z == -torch.inf, 0.0)
            z.exp_()
            exp_shift.add_(sum_exp * moved).mul_(decay).add_(shifted.mul_(z).sum(1))
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


def apply_rule(z: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, logit_scale: float) -> torch.Tensor:
    """Bias, scale and softcap in place on products z."""
    if bias is not None:
        z += bias
    if logit_scale != 1.0:
        z *= logit_scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


@dataclass
class _Choices:
    """How many logits are above the target's, and the column of the largest, while the vocabulary goes by."""

    target: torch.Tensor
    target_logit: torch.Tensor
    above: torch.Tensor
    best: torch.Tensor

    def add(self, z: torch.Tensor, first_column: int, tokens: slice, maximum: torch.Tensor) -> torch.Tensor:
        """Add the logits z [tokens, block], given the ``maximum`` [tokens] of the columns before; returns the block's."""
        own = self.target_logit[tokens, None]
        larger = z > own
        local = self.target[tokens] - first_column
        # The target's own column never counts, whatever its rounding.
        inside = (local >= 0) & (local < z.shape[1])
        column = local.clamp(0, z.shape[1] - 1)[:, None]
        larger.scatter_(1, column, larger.gather(1, column) & ~inside[:, None])
        self.above[tokens] += larger.sum(1)
        largest, column = row_maximum(z)
        self.best[tokens] = torch.where(largest > maximum, first_column + column, self.best[tokens])
        return largest


def _sweep(
    logits: Logits,
    running: _RunningSums,
    choices: _Choices | None,
    memory_limit: int,
) -> None:
    """Add every block of the vocabulary to the running sums."""
    tokens, vocabulary = logits.hidden.shape[0], logits.weight.shape[0]
    # The block itself; its shifted copy; a block of weights of the token's own, or of a mask.
    copies = 1 + running.with_exp_shift + (running.class_weight is not None and running.class_weight.dim() == 2)
    block = block_shape(
        tokens,
        vocabulary,
        memory_limit,
        per_logit=copies * logits.wide.itemsize + (choices is not None or running.with_exp_shift),
        per_token=logits.per_row,
        per_row=logits.per_row,
        most_rows=BLOCK_ROWS,
    )
    logits.reserve(block)
    for first in range(0, vocabulary, block[1]):
        columns = slice(first, min(vocabulary, first + block[1]))
        for start in range(0, tokens, block[0]):
            chunk = slice(start, min(tokens, start + block[0]))
            z = logits.block(chunk, columns)
            largest = None if choices is None else choices.add(z, first, chunk, running.rows[0, chunk])
            running.add(z, first, chunk, largest)


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
    memory_limit: int = FORWARD_LIMIT,
) -> torch.Tensor:
    """The five sums of every token, [5, N], float32 (float64 for float64 inputs); logits are never rounded to 16 bits."""
    logits = Logits(hidden, weight, bias, softcap, logit_scale)
    running = _RunningSums.start(target, class_weight, with_logit_sum, with_exp_shift, logits.wide)
    _sweep(logits, running, None, memory_limit)
    return running.finish(weight.shape[0], ignore_index)


def target_logit(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_limit: int = FORWARD_LIMIT,
) -> torch.Tensor:
    """The logit of every token's target, [N], 0 where it is no row of ``weight``; what ``linear_statistics`` takes.

    The diagonal of a product of tokens with rows, not a dot product a token: the library then usually sums in the order in
    which it sums the sweep's blocks, and equal logits tie. Usually: its edge tiles and vectors may take other routines.
    """
    tokens, dimension = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = hidden.new_zeros(tokens, dtype=wide)
    inside = (target >= 0) & (target < weight.shape[0])
    rows = torch.where(inside, target, 0)
    # The gathered rows, and both operands again where they are widened.
    per_token = dimension * (hidden.element_size() + (2 * wide.itemsize if wide != hidden.dtype else 0))
    side = max(16, min(256, memory_limit // (per_token + 256 * wide.itemsize)))
    buffer = hidden.new_empty(side * side, dtype=wide)
    for start in range(0, tokens if weight.shape[0] else 0, side):
        start = max(0, min(start, tokens - side))
        chunk = slice(start, min(tokens, start + side))
        count = chunk.stop - start
        columns = rows[chunk].repeat(-(-side // count))[:side]
        # Into a buffer: autocast would round the operands of `@` to 16 bits.
        z = torch.mm(hidden[chunk].to(wide), weight[columns].to(wide).T, out=buffer[: count * side].view(count, side))
        apply_rule(z, None if bias is None else bias[columns], softcap, logit_scale)
        out[chunk] = z.diagonal()
    return out.masked_fill_(~inside, 0.0)


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
    memory_limit: int = FORWARD_LIMIT,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The five sums [5, N] (``LOGIT_SUM`` left 0), how many logits are above ``target_logit`` [N], and the largest's column.

    Both int64 [N]; 0 for ignored tokens. Of equal largest logits the first column is taken.
    """
    logits = Logits(hidden, weight, bias, softcap, logit_scale)
    running = _RunningSums.start(target, None, False, True, logits.wide)
    above, best = (torch.zeros(target.shape, dtype=torch.int64, device=target.device) for _ in range(2))
    _sweep(logits, running, _Choices(target, target_logit, above, best), memory_limit)
    ignored = target == ignore_index
    return running.finish(weight.shape[0], ignore_index), above.masked_fill_(ignored, 0), best.masked_fill_(ignored, 0)


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
    elif with_logit_sum and class_weight.dim() == 2:
        z.addcmul_(class_weight[:, first_column : first_column + z.shape[1]].to(z.dtype), per_logit[:, None])
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
    logits = Logits(hidden, weight, bias, softcap, logit_scale)
    dense = class_weight is not None and class_weight.dim() == 2
    block = gradient_block(
        hidden,
        weight,
        needs,
        memory_limit,
        per_logit=logits.per_gradient(1 + with_exp_shift + dense) + with_exp_shift,
        per_token=logits.per_row,
        per_row=logits.per_row,
    )
    logits.reserve(block)

    def logit_gradient(tokens: slice, columns: slice) -> torch.Tensor:
        z = logits.block(tokens, columns)
        ignored = target[tokens] == ignore_index
        slope = logits.slope(z)
        if slope is not None:
            slope.masked_fill_(ignored[:, None], 0.0)  # of logits that may be no numbers
        gradient = _sums_derivative(
            z,
            columns.start,
            maximum[tokens],
            upstream[:, tokens],
            target[tokens],
            class_weight[tokens] if dense else class_weight,
            ignored,
            with_logit_sum,
            with_exp_shift,
        )
        return logits.chain(gradient, slope)

    return accumulate_gradients(logit_gradient, hidden, weight, bias, needs=needs, block=block)


def merge(
    partials: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    vocabulary: int,
    ignore_index: int,
) -> torch.Tensor:
    """Fold the sums of parts of the vocabulary, [5, parts, N], into [5, N] in their order; marks as the kernel of that name.

    A target in [0, ``vocabulary``) lies in one part; the others have 0 in ``TARGET``. An empty part is −inf, 0, 0, 0, 0.
    """
    maximum, sum_exp, at_target, logit_sum, exp_shift = partials
    top = maximum.amax(0)
    moved = torch.where(sum_exp > 0, maximum - torch.where(top == -torch.inf, 0.0, top), 0.0)
    decay = torch.where(sum_exp > 0, moved.exp(), 0.0)
    folded = [
        top,
        (decay * sum_exp).sum(0),
        at_target.sum(0),
        (logit_sum if weights is None else logit_sum + weights[:, None] * moved).sum(0),
        (decay * (exp_shift + sum_exp * moved)).sum(0),
    ]
    running = _RunningSums(target, None, False, False, torch.stack(folded), top)
    return running.finish(vocabulary, ignore_index)


def with_positions(logits: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] or [N, V, T] as [N, V, T]; token n · T + t is logits[n, :, t]."""
    return logits if logits.dim() == 3 else logits[:, :, None]


def _row_chunks(logits: torch.Tensor, wide: torch.dtype, copies: int, memory_limit: int):
    """Flat tokens, where in [N, V, T] they are, and a wide copy of their logits [tokens, V], as many at a time as fit."""
    logits = with_positions(logits)
    N, V, T = logits.shape
    size = max(1, memory_limit // max(1, copies * V * wide.itemsize))
    if T == 0:
        return
    items, positions = (size // max(1, T), T) if size >= T else (1, size)
    for n in range(0, N, items):
        for t in range(0, T, positions):
            here = slice(n, n + items), slice(None), slice(t, t + positions)
            z = logits[here].movedim(1, 2).to(wide, copy=True, memory_format=torch.contiguous_format).view(-1, V)
            yield slice(n * T + t, n * T + t + z.shape[0]), here, z


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
    memory_limit: int = ROWS_LIMIT,
) -> torch.Tensor:
    """The five sums of every token, [5, N · T], from logits [N, V] or [N, V, T], a few rows at a time."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    running = _RunningSums.start(target, class_weight, with_logit_sum, with_exp_shift, wide)
    for tokens, _, z in _row_chunks(logits, wide, 2 + with_exp_shift, memory_limit):
        running.add(apply_rule(z, None, softcap, logit_scale), 0, tokens)
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
    memory_limit: int = ROWS_LIMIT,
) -> torch.Tensor:
    """Gradient of logits [N, V] or [N, V, T] from ``upstream`` [5, N · T]; ``out`` may be ``logits`` itself."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    out = torch.empty_like(logits) if out is None else out
    dense = class_weight is not None and class_weight.dim() == 2
    copies = 2 + with_exp_shift + (softcap is not None)
    for tokens, here, z in _row_chunks(logits, wide, copies, memory_limit):
        apply_rule(z, None, softcap, logit_scale)
        ignored = target[tokens] == ignore_index
        slope = (
            None if softcap is None else (z / softcap).square_().neg_().add_(1.0).masked_fill_(ignored[:, None], 0.0)
        )
        gradient = _sums_derivative(
            z,
            0,
            maximum[tokens],
            upstream[:, tokens],
            target[tokens],
            class_weight[tokens] if dense else class_weight,
            ignored,
            with_logit_sum,
            with_exp_shift,
        )
        if slope is not None:
            gradient *= slope
        place = with_positions(out)[here]
        place.copy_(gradient.mul_(logit_scale).view(place.shape[0], place.shape[2], -1).movedim(2, 1))
    return out
