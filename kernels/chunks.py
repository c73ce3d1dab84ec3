"""Gradients of the linear loss from blocks of logit gradients: the loop that both backends share.

Logits are recomputed block by block (four matrix products a step instead of three), except those
that ``blockwise.py`` keeps in the memory of the weight's gradient. Between forward and backward
only vectors of N are held. Any upstream gradient costs the same, and a second backward is correct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .blocks import block_shape, multiplies_16_bits, values_are_here

# Columns of logit gradients: a kernel knows of a size whether it is a multiple of 16.
WHOLE = 16


def _buffer_dtype(hidden: torch.Tensor) -> torch.dtype | None:
    """Return the dtype of ``product_buffer``; None where no buffer is needed.

    16-bit products are rounded in the buffer, or 16-bit operands are widened in it where the device
    has no such products.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda or hidden.dtype == wide:
        return None
    return hidden.dtype if multiplies_16_bits(hidden.dtype, hidden.device) else wide


def product_buffer_bytes(hidden: torch.Tensor, memory_limit: int) -> int:
    """Return the bytes of ``product_buffer``: at most an eighth of the limit, at least one row."""
    dtype = _buffer_dtype(hidden)
    if dtype is None:
        return 0
    per_row = hidden.shape[1] * dtype.itemsize
    return per_row * max(1, min(512, memory_limit // (8 * per_row)))


def product_buffer(hidden: torch.Tensor, memory_limit: int) -> torch.Tensor | None:
    """Return a buffer [rows, D] for 16-bit products on their way to float32 sums, or None.

    A buffer is needed where no product of 16-bit inputs gives float32, that is, on a CPU.
    """
    dtype = _buffer_dtype(hidden)
    if dtype is None:
        return None
    size = product_buffer_bytes(hidden, memory_limit) // dtype.itemsize
    return hidden.new_empty(size, dtype=dtype).view(-1, hidden.shape[1])


def gradient_block(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    needs: tuple[bool, bool, bool],
    memory_limit: int,
    *,
    taken: int = 0,
    per_logit: int,
    per_token: int = 0,
    most_rows: Callable[[int], int] | None = None,
) -> tuple[int, int]:
    """Choose a block shape for ``accumulate_gradients`` that fits the limit after ``taken`` bytes.

    The float32 accumulators are counted; the other arguments are those of ``block_shape``.
    """

    def block(per_row: int) -> tuple[int, int]:
        return block_shape(
            hidden.shape[0],
            weight.shape[0],
            memory_limit - taken,
            per_logit=per_logit,
            per_token=per_token,
            per_row=per_row,
            most_rows=most_rows,
        )

    whole, wide = block(0), torch.promote_types(hidden.dtype, torch.float32)
    # 16-bit weight gradients have a float32 accumulator where a block has several products: chunks
    # of tokens, or widened operands.
    several = whole[0] < hidden.shape[0] or _buffer_dtype(hidden) == wide
    return block(4 * hidden.shape[1]) if needs[1] and hidden.dtype != wide and several else whole


def written_whole(
    block: tuple[int, int], element_size: int, memory_limit: int
) -> tuple[tuple[int, int], int]:
    """Return a block whose rows a kernel writes 16 bytes at a time, and the stride of its rows.

    Rows then start at multiples of ``WHOLE`` columns. A block of a part of the vocabulary has whole
    columns where it has that many; a block of all of it is followed by some that nobody reads,
    where the limit has room for them.
    """
    tokens, columns = block
    stride = -(-columns // WHOLE) * WHOLE
    if stride == columns or tokens * stride * element_size <= memory_limit:
        return block, stride
    if columns > WHOLE:
        columns = columns // WHOLE * WHOLE
    return (tokens, columns), columns


def without_ignored(hidden: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
    """Return hidden states [N, D] in which ``ignored`` tokens (bool [N]) are finite.

    The gradient of an ignored token is 0, and 0 times infinity would be NaN in the weight's
    gradient. On a GPU a look at the values would wait for the device: there the ignored tokens of a
    copy are set to 0.
    """
    if values_are_here(hidden):
        sums = hidden.sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        if not (ignored & ~sums.isfinite()).any():
            return hidden
    return hidden.masked_fill(ignored[:, None], 0.0)


def equal_chunk(tokens: int, most: int) -> int:
    """Return the size of the fewest equal chunks of at most ``most`` tokens.

    The size is a multiple of 128 where that fits.
    """
    size = -(-tokens // -(-tokens // most)) if tokens else 1
    whole = -(-size // 128) * 128
    return whole if whole <= most else size


def pieces(count: int, size: int) -> Iterator[slice]:
    """Return slices of at most ``size`` that cover ``count`` places."""
    return (slice(start, min(count, start + size)) for start in range(0, count, size))


def accumulate_gradients(
    logit_gradient: Callable[[slice, slice], torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
    block: tuple[int, int],
    buffer: torch.Tensor | None = None,
    grad_weight: torch.Tensor | None = None,
    ignored: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of hidden [N, D], weight [V, D] and bias [V], accumulated in float32.

    Rows of ``grad_weight`` are written after the gradient of their block's first tokens was
    computed, not before: the memory may hold kept products.

    Args:
        logit_gradient: Function of slices of tokens and of columns; returns the gradient of hidden
            @ weightᵀ + bias for that block, 0 in the rows of ignored tokens.
        hidden: Hidden states [N, D].
        weight: Vocabulary matrix [V, D].
        bias: Bias [V] or None.
        needs: Whether the gradients of hidden, weight and bias are needed; None stands for the
            others.
        block: Tokens and columns of a block.
        buffer: A ``product_buffer``. Default: None.
        grad_weight: Memory of the weight's gradient. Default: None, new memory.
        ignored: Ignored tokens, bool [N]. Default: None, no token.
    """
    (tokens, dimension), vocabulary = hidden.shape, weight.shape[0]
    needs_hidden, needs_weight, needs_bias = needs
    if needs_weight and ignored is not None:
        hidden = without_ignored(hidden, ignored)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden = hidden.new_zeros((tokens, dimension), dtype=wide) if needs_hidden else None
    grad_bias = bias.new_zeros(vocabulary) if needs_bias and bias is not None else None
    if needs_weight:
        if grad_weight is None:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        if tokens == 0:
            grad_weight.zero_()

    def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add ``left @ right`` to ``out`` in its dtype, without rounding where the device can."""
        if left.dtype == right.dtype == out.dtype:
            out.addmm_(left, right)
        elif out.is_cuda:
            torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
        elif buffer is None:
            out += left @ right
        elif left.dtype == out.dtype:
            for part in pieces(right.shape[0], len(buffer)):
                out.addmm_(left[:, part], buffer[: part.stop - part.start].copy_(right[part]))
        else:
            for part in pieces(out.shape[0], len(buffer)):
                out[part] += torch.mm(left[part], right, out=buffer[: part.stop - part.start])

    tokens_at_once, columns_at_once = block
    for first_column in range(0, vocabulary if tokens and any(needs) else 0, columns_at_once):
        columns = slice(first_column, min(vocabulary, first_column + columns_at_once))
        width = columns.stop - columns.start
        weight_block = None
        bias_block = None if grad_bias is None else hidden.new_zeros(width, dtype=wide)
        for first_token in range(0, tokens, tokens_at_once):
            chunk = slice(first_token, min(tokens, first_token + tokens_at_once))
            gradient = logit_gradient(chunk, columns)
            if grad_hidden is not None:
                add_product(grad_hidden[chunk], gradient, weight[columns])
            if grad_weight is not None and needs_weight and first_token == 0:
                one_product = gradient.dtype == grad_weight.dtype and (
                    tokens_at_once >= tokens or gradient.dtype == wide
                )
                if one_product:
                    weight_block = torch.mm(gradient.T, hidden[chunk], out=grad_weight[columns])
                elif hidden.is_cuda and gradient.dtype != wide:
                    # Written, not added to zeros: 8 bytes less of each sum go through memory.
                    weight_block = torch.mm(gradient.T, hidden[chunk], out_dtype=wide)
                else:
                    weight_block = hidden.new_zeros((width, dimension), dtype=wide)
                    add_product(weight_block, gradient.T, hidden[chunk])
            elif weight_block is not None:
                add_product(weight_block, gradient.T, hidden[chunk])
            if bias_block is not None:
                bias_block += gradient.sum(0, dtype=wide)
            del gradient  # as weight_block below: else two of them are in memory at once
        if grad_weight is not None and weight_block is not None and not one_product:
            grad_weight[columns] = weight_block
        if grad_bias is not None and bias_block is not None:
            grad_bias[columns] = bias_block.to(grad_bias.dtype)
        del weight_block
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias
