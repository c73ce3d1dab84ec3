"""Sizes of the blocks of logits on a CPU, derived from its caches and from a limit in bytes.

A block is T tokens × R vocabulary rows of logits. Matrix products fill it, the softmax sweeps over
it five times, and on the way to a gradient two more products read it. Three bounds decide its size:

- The weight rows of one product are read again for every token. They should stay in the
  second-level caches of all cores together, ``step · D · itemsize ≤ cores · L2``, but a product of
  fewer than 512 rows is inefficient at its edges.
- The block should stay in the cache between those caches and memory: ``T · R · itemsize ≤ 2 · cores
  · L2``. The cache that cores share holds that much on every CPU of the last ten years. Its own
  size cannot be asked for: a virtual machine reports its host's.
- A block has at least 2¹⁷ logits, in several products of ``step`` rows if necessary. Its twenty or
  so Python calls of a microsecond or two are then cheap compared with its products.

All tokens are in one block as long as 512 rows of them fit in the limit. The weight is then read
once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch

LEAST_ROWS = 512
LEAST_LOGITS = 1 << 17


@cache
def level2_bytes() -> int:
    """Return the size of a core's second-level cache; 1 MiB where the system does not report it."""
    try:
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):
        size = 0
    return size if size > 0 else 1 << 20


def multiplies_16_bits(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the device multiplies ``dtype`` without emulation."""
    if device.type != "cpu":
        return dtype in (torch.float16, torch.bfloat16)
    return dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and _bfloat16_products()


def values_are_here(tensor: torch.Tensor) -> bool:
    """Return whether reading values does not wait for a device."""
    return tensor.device.type == "cpu"


def _bfloat16_products() -> bool:
    """Return whether the CPU has instructions for products of bfloat16."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()


def cached_logits(itemsize: int = 4) -> int:
    """Return the number of logits in a block that stays in the caches."""
    return 2 * torch.get_num_threads() * level2_bytes() // itemsize


def product_rows(dimension: int, itemsize: int) -> int:
    """Return the number of weight rows in one product."""
    return max(
        LEAST_ROWS, torch.get_num_threads() * level2_bytes() // (dimension * itemsize) // 128 * 128
    )


def block_rows(tokens: int, step: int, itemsize: int) -> int:
    """Return the number of vocabulary rows in a block of ``tokens`` tokens."""
    least = -(-LEAST_LOGITS // (max(1, tokens) * step)) * step
    return max(LEAST_ROWS, min(max(step, least), cached_logits(itemsize) // max(1, tokens)))


def block_shape(
    tokens: int,
    vocabulary: int,
    memory_limit: int,
    *,
    per_logit: int,
    per_token: int = 0,
    per_row: int = 0,
    most_rows: Callable[[int], int] | None = None,
) -> tuple[int, int]:
    """Return the tokens T and vocabulary rows R of a block that fits in ``memory_limit`` bytes.

    The block takes per_logit · T · R + per_token · T + per_row · R bytes. All tokens are taken if
    512 rows of them fit: the weight is then read once, and a block of its gradient is one product.
    Otherwise T is smaller, in chunks of equal size. R is below 512 only where 64 tokens would not
    fit. Both are at least 1, whatever the limit. ``most_rows(T)`` is an upper bound of R.
    """
    tokens, vocabulary = max(1, tokens), max(1, vocabulary)

    def rows_for(count: int) -> int:
        return (memory_limit - per_token * count) // (per_logit * count + per_row)

    def tokens_for(count: int) -> int:
        return (memory_limit - per_row * count) // (per_logit * count + per_token)

    least = min(vocabulary, LEAST_ROWS)
    count, rows = tokens, rows_for(tokens)
    if rows < least:
        count, rows = min(tokens, tokens_for(least)), least
    if count < min(tokens, 64):
        count = min(tokens, 64)
        rows = rows_for(count)
    if rows < 1:
        count, rows = max(1, min(tokens, tokens_for(1))), 1
    count = -(-tokens // -(-tokens // count))
    rows = min(rows, vocabulary, most_rows(count) if most_rows else vocabulary)
    if 128 <= rows < vocabulary:
        rows -= rows % 128
    return count, rows
