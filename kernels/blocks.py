"""How much of the logits a CPU works on at a time: what follows from its caches, and from a limit
in bytes.

A block is T tokens × R vocabulary rows of logits. Matrix products fill it, the softmax sweeps over
it five times, and on the way to a gradient two more products read it. Three things bound it:

- the weight rows of one product pass by every token: they stay in the second-level caches of the cores, taken together,
  ``step · D · itemsize ≤ cores · L2``, but 512 rows at least: a product of fewer is all edges;
- the block stays in what is between those caches and memory: ``T · R · itemsize ≤ 2 · cores · L2``. The cache that cores
  share holds that on every CPU of the last ten years; its size itself cannot be asked for, a
  virtual machine reports its host's;
- a block has 2¹⁷ logits at least, several products of ``step`` rows if need be: what Python does for one, some twenty
  calls of a microsecond or two, is little beside its products.

All tokens are in one block as long as 512 rows of them fit in the limit: the weight is then read
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
    """Of one core; 1 MiB where the system does not say."""
    try:
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):
        size = 0
    return size if size > 0 else 1 << 20


def multiplies_16_bits(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the device has products of ``dtype`` that are no emulation."""
    if device.type != "cpu":
        return dtype in (torch.float16, torch.bfloat16)
    return dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and _bfloat16_products()


def values_are_here(tensor: torch.Tensor) -> bool:
    """Return whether looking at values waits for nothing."""
    return tensor.device.type == "cpu"


def _bfloat16_products() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()


def cached_logits(itemsize: int = 4) -> int:
    """Logits of a block that stays in the caches."""
    return 2 * torch.get_num_threads() * level2_bytes() // itemsize


def product_rows(dimension: int, itemsize: int) -> int:
    """Weight rows that one product multiplies."""
    return max(
        LEAST_ROWS, torch.get_num_threads() * level2_bytes() // (dimension * itemsize) // 128 * 128
    )


def block_rows(tokens: int, step: int, itemsize: int) -> int:
    """Vocabulary rows of a block of so many tokens."""
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
    """T tokens × R vocabulary rows with per_logit · T · R + per_token · T + per_row · R ≤
    memory_limit bytes.

    All tokens if 512 rows of them fit (the weight is then read once, and a block of its gradient is
    one product), else fewer, chunks of one size; fewer rows only where 64 tokens do not fit; one of
    each at least, whatever the limit. ``most_rows(T)`` caps R.
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
