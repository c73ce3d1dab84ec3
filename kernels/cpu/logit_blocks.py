"""Blocks of logits from hidden states and the vocabulary matrix, in a reused buffer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..blocks import (
    LEAST_ROWS,
    block_rows,
    cached_logits,
    multiplies_16_bits,
    product_rows,
    values_are_here,
)

NOTHING = torch.empty(0)  # in the place of a buffer that ``reserve`` does not need


@dataclass
class Logits:
    """Blocks of logits in one buffer, in float32 or wider.

    Logits are softcap · tanh(logit_scale · (hidden @ weightᵀ + bias) / softcap). ``rounded`` allows
    products of 16-bit inputs to be rounded to their dtype, where that is faster. ``kept`` [V, D]
    holds the products of the first tokens, in the rows of their block's columns: written there, or
    read from there with ``recall``.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    logit_scale: float
    rounded: bool = False
    kept: torch.Tensor | None = None
    recall: bool = False
    # Set from the tensors' dtypes and ``rounded``:
    wide: torch.dtype = field(init=False)  # dtype of logits
    widens: bool = field(init=False)  # 16-bit inputs are multiplied from wide copies
    # Gradients are rounded to the inputs' 16 bits before they are multiplied.
    narrow_gradients: bool = field(init=False)
    # Set by ``plan_products``:
    step: int = 0  # vocabulary rows of one product
    depth: int = 0  # columns of both matrices in one product
    per_token: int = 0  # bytes of the copy of a token
    # Set by ``reserve``:
    kept_tokens: int = 0
    _buffer: torch.Tensor = NOTHING
    _scratch: torch.Tensor | None = None
    _narrow: torch.Tensor = NOTHING
    _cast: dict = field(default_factory=dict)

    def __post_init__(self):
        dtype = self.hidden.dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        narrow_products = dtype != self.wide and multiplies_16_bits(dtype, self.hidden.device)
        self.rounded = self.rounded and narrow_products
        self.widens = dtype != self.wide and not self.rounded
        self.narrow_gradients = narrow_products

    def plan_products(self, memory_limit: int) -> int:
        """Set ``step``, ``depth``, ``per_token``; return the bytes of weight copied for a product.

        Copies of 1,024 tokens (of all, if there are fewer) take half of the limit, copies of weight
        rows a quarter. Where all of D would not fit, products of parts of D are added up.
        """
        tokens, dimension = self.hidden.shape
        self.depth, itemsize = dimension, self.wide.itemsize
        if self.widens:
            parts = -(
                -dimension // max(1, memory_limit // 2 // (max(1, min(tokens, 1024)) * itemsize))
            )
            self.depth = -(-dimension // parts)
        self.step = product_rows(self.depth, itemsize)
        if self.widens:
            self.step = max(1, min(self.step, memory_limit // 4 // (self.depth * itemsize)))
            self.per_token = self.depth * itemsize
        return self.step * self.per_token

    def most_rows(self, tokens: int) -> int:
        """Return the most vocabulary rows of a block of ``tokens`` tokens."""
        # One product: its library chooses its own steps, and a call costs more.
        if self.rounded:
            return max(LEAST_ROWS, cached_logits(self.hidden.element_size()) // tokens)
        return block_rows(tokens, self.step, self.wide.itemsize)

    def per_logit(self, copies: int, gradient: bool = False) -> int:
        """Return the bytes that an element of a block takes.

        That is ``copies`` of the element and, in 16 bits, a product or a gradient.
        """
        narrow = self.rounded or (gradient and self.narrow_gradients)
        slope = gradient and self.softcap is not None
        return (copies + slope) * self.wide.itemsize + narrow * self.hidden.element_size()

    def reserve(
        self, block: tuple[int, int], *, scratch: bool = False, gradient: bool = False
    ) -> None:
        """Allocate the buffers for blocks of this shape."""
        # Freed first, so that old and new buffers are never in memory together.
        self._buffer, self._scratch, self._narrow = NOTHING, None, NOTHING
        self._cast.clear()
        if self.kept is not None:
            # A row has room for D products. Those of later chunks would be overwritten by the first
            # chunk's gradient.
            self.kept_tokens = min(*self.hidden.shape, block[0])
        size = block[0] * block[1]
        self._buffer = self.hidden.new_empty(size, dtype=self.wide)
        if scratch:
            self._scratch = self.hidden.new_empty(size, dtype=self.wide)
        if self.widens:
            for name, rows in (("hidden", block[0]), ("weight", min(self.step, block[1]))):
                self._cast[name] = None, self.hidden.new_empty(rows * self.depth, dtype=self.wide)
        if self.rounded or (gradient and self.narrow_gradients):
            # Holds products on their way to logits, then gradients on their way from logits.
            self._narrow = self.hidden.new_empty(size)

    def scratch(self, like: torch.Tensor) -> torch.Tensor | None:
        """Return the second buffer in the shape of ``like``; None where none was reserved."""
        return None if self._scratch is None else self._scratch[: like.numel()].view(like.shape)

    def _operand(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        """Return a part of ``hidden`` or ``weight`` in the products' dtype; reuse the last copy."""
        part = getattr(self, name)[rows, columns]
        if not self.widens:
            return part
        known, buffer = self._cast[name]
        copied = buffer[: part.numel()].view(part.shape)
        if known != (rows, columns):
            copied.copy_(part)
            self._cast[name] = (rows, columns), buffer
        return copied

    def _multiply(self, tokens: slice, columns: slice, out: torch.Tensor) -> None:
        """Write hidden @ weightᵀ of ``tokens`` and ``columns`` to ``out``."""
        # The library of 16-bit products chooses its own steps.
        step = columns.stop - columns.start if self.rounded else self.step
        dimension = self.hidden.shape[1]
        for first in range(0, dimension, self.depth):
            part = slice(first, min(dimension, first + self.depth))
            hidden = self._operand("hidden", tokens, part)
            for start in range(columns.start, columns.stop, step):
                rows = slice(start, min(columns.stop, start + step))
                into = out[:, start - columns.start : rows.stop - columns.start]
                weight = self._operand("weight", rows, part)
                if first:
                    into.addmm_(hidden, weight.T)
                else:
                    torch.mm(hidden, weight.T, out=into)

    def block(self, tokens: slice, columns: slice) -> torch.Tensor:
        """Return logits [tokens, columns]; a later call overwrites them."""
        shape = tokens.stop - tokens.start, columns.stop - columns.start
        z = self._buffer[: shape[0] * shape[1]].view(shape)
        kept = max(0, min(tokens.stop, self.kept_tokens) - tokens.start)
        if self.kept is not None and kept:
            rows = (
                self.kept[columns]
                .view(-1)[: self.kept_tokens * shape[1]]
                .view(self.kept_tokens, shape[1])
            )
            products = rows[tokens.start : tokens.start + kept]
            if not self.recall:
                self._multiply(slice(tokens.start, tokens.start + kept), columns, products)
            z[:kept].copy_(products)
        if kept < shape[0]:
            rest = z[kept:]
            products = self._narrow[: rest.numel()].view(rest.shape) if self.rounded else rest
            self._multiply(slice(tokens.start + kept, tokens.stop), columns, products)
            if self.rounded:
                rest.copy_(products)
        return apply_rule(
            z, None if self.bias is None else self.bias[columns], self.softcap, self.logit_scale
        )

    def slope(self, z: torch.Tensor) -> torch.Tensor | None:
        """Return the softcap's derivative at logits z, 1 − (z / softcap)²."""
        return None if self.softcap is None else (z / self.softcap).square_().neg_().add_(1.0)

    def chain(
        self, gradient: torch.Tensor, slope: torch.Tensor | None, ignored: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of hidden @ weightᵀ + bias from that of the logits.

        The logits' gradient is overwritten. The result has the dtype in which gradients are
        multiplied.
        """
        if slope is not None:
            gradient *= slope
        if self.logit_scale != 1.0:
            gradient *= self.logit_scale
        zero_tokens(gradient, ignored)
        if not self.narrow_gradients:
            return gradient
        return self._narrow[: gradient.numel()].view(gradient.shape).copy_(gradient)


def apply_rule(
    z: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, logit_scale: float
) -> torch.Tensor:
    """Apply bias, scale and softcap in place to products z [tokens, columns]."""
    if bias is not None:
        z += bias
    if logit_scale != 1.0:
        z *= logit_scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def zero_tokens(z: torch.Tensor, tokens: torch.Tensor) -> None:
    """Set the rows of ``tokens`` (bool) of z [tokens, columns] to 0, NaN included.

    On a CPU a fill by mask would take 20 × as long as one by index.
    """
    if values_are_here(z):
        z.index_fill_(0, tokens.nonzero()[:, 0], 0.0)
    else:
        z.masked_fill_(tokens[:, None], 0.0)
