"""Gradients of the linear loss from blocks of logit gradients: the loop both backends share.

Logits are recomputed block by block (four matrix products a step instead of three): nothing is kept between forward
and backward but vectors of N, any upstream gradient costs the same, and a second backward is simply right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def block_shape(
    tokens: int,
    vocabulary: int,
    memory_limit: int,
    *,
    per_logit: int,
    per_token: int = 0,
    per_row: int = 0,
    most_rows: int | None = None,
) -> tuple[int, int]:
    """T tokens × R vocabulary rows of one block, with per_logit · T · R + per_token · T + per_row · R ≤ memory_limit bytes.

    All tokens if 512 rows of them fit (a block of the weight gradient is then one product), else fewer tokens, and fewer
    rows only where 64 tokens do not fit; one of each at least, whatever the limit.
    """
    tokens, vocabulary = max(1, tokens), max(1, vocabulary)

    def rows_for(count: int) -> int:
        return (memory_limit - per_token * count) // (per_logit * count + per_row)

    def tokens_for(count: int) -> int:
        return (memory_limit - per_row * count) // (per_logit * count + per_token)

    least = min(vocabulary, 512)
    count, rows = tokens, rows_for(tokens)
    if rows < least:
        count, rows = min(tokens, tokens_for(least)), least
    if count < min(tokens, 64):
        count = min(tokens, 64)
        rows = rows_for(count)
    if rows < 1:
        count, rows = max(1, min(tokens, tokens_for(1))), 1
    rows = min(rows, vocabulary, most_rows or vocabulary)
    if 128 <= rows < vocabulary:
        rows -= rows % 128
    return count, rows


def gradient_block(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    needs: tuple[bool, bool, bool],
    memory_limit: int,
    *,
    per_logit: int,
    per_token: int = 0,
    per_row: int = 0,
) -> tuple[int, int]:
    """``block_shape`` for ``accumulate_gradients``, which itself takes a float32 block of the weight gradient.

    Where 16-bit products cannot be accumulated in float32 (not on CUDA), their results are temporaries too.
    """
    dimension = hidden.shape[1]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rounded = 0 if hidden.dtype == wide or hidden.is_cuda else dimension * hidden.element_size()
    if needs[0]:
        per_token += rounded
    if needs[1]:
        per_row += dimension * wide.itemsize + rounded
    return block_shape(
        hidden.shape[0], weight.shape[0], memory_limit, per_logit=per_logit, per_token=per_token, per_row=per_row
    )


def product_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``out += left @ right`` for float32 (or float64) ``out``; float32 accumulation to the end where the device can."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        out += left @ right


def accumulate_gradients(
    logit_gradient: Callable[[slice, slice], torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
    block: tuple[int, int],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden [N, D], weight [V, D] and bias [V] where ``needs`` says so, accumulated in float32.

    ``logit_gradient(tokens, columns)`` gives the gradient of the products hidden @ weightᵀ + bias for a block.
    """
    (tokens, dimension), vocabulary = hidden.shape, weight.shape[0]
    needs_hidden, needs_weight, needs_bias = *needs[:2], needs[2] and bias is not None
    wide = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden = hidden.new_zeros((tokens, dimension), dtype=wide) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
    grad_bias = bias.new_zeros(vocabulary) if needs_bias else None
    tokens_at_once, columns_at_once = block
    one_pass = tokens_at_once >= tokens
    for first_column in range(0, vocabulary if any(needs) and tokens else 0, columns_at_once):
        columns = slice(first_column, min(vocabulary, first_column + columns_at_once))
        width = columns.stop - columns.start
        weight_block = hidden.new_zeros((width, dimension), dtype=wide) if needs_weight and not one_pass else None
        bias_block = hidden.new_zeros(width, dtype=wide) if needs_bias else None
        for first_token in range(0, tokens, tokens_at_once):
            chunk = slice(first_token, min(tokens, first_token + tokens_at_once))
            gradient = logit_gradient(chunk, columns)
            if needs_hidden:
                product_into(grad_hidden[chunk], gradient, weight[columns])
            if needs_weight and one_pass:
                torch.mm(gradient.T, hidden, out=grad_weight[columns])
            elif needs_weight:
                product_into(weight_block, gradient.T, hidden[chunk])
            if needs_bias:
                bias_block += gradient.sum(0, dtype=wide)
            del gradient  # as weight_block below: it would stand beside its successor
        if weight_block is not None:
            grad_weight[columns] = weight_block
        if needs_bias:
            grad_bias[columns] = bias_block.to(grad_bias.dtype)
        del weight_block
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias
