"""How much of the logits a CPU works on at a time: what follows from its caches, and from a limit in bytes.

A block is T tokens × R vocabulary rows of logits. A matrix product fills it, the softmax sweeps over it five times, and on
the way to a gradient two more products read it. Two caches matter:

- the weight rows of one product pass by every token: they stay in the second-level caches of the cores, taken together,
  ``step · D · itemsize ≤ cores · L2``, but 256 rows at least: below that a product is all edges;
- the block stays in what is between those caches and memory: ``T · R · 4 ≤ 2 · cores · L2``. The cache that cores share
  holds that on every CPU of the last ten years; its size itself cannot be asked for, a virtual machine reports its host's.

All tokens are in one block as long as 512 rows of them fit in the limit: the weight is then read once.
"""

from __future__ import annotations

import os
from functools import cache

import torch

LEAST_STEP = 256
LEAST_ROWS = 512


@cache
def level2_bytes() -> int:
    """Of one core; 1 MiB where the system does not say."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 1 << 20
    except (AttributeError, ValueError, OSError):
        return 1 << 20


def cached_logits() -> int:
    """Float32 logits of a block that stays in the caches."""
    return 2 * torch.get_num_threads() * level2_bytes() // 4


def product_rows(dimension: int, itemsize: int) -> int:
    """Weight rows that one product multiplies."""
    return max(LEAST_STEP, torch.get_num_threads() * level2_bytes() // (dimension * itemsize) // 128 * 128)


def block_shape(
    tokens: int,
    vocabulary: int,
    memory_limit: int,
    *,
    per_logit: int,
    per_token: int = 0,
    per_row: int = 0,
    most_logits: int | None = None,
) -> tuple[int, int]:
    """T tokens × R vocabulary rows with per_logit · T · R + per_token · T + per_row · R ≤ memory_limit bytes.

    All tokens if 512 rows of them fit (the weight is then read once, and a block of its gradient is one product), else
    fewer, chunks of one size; fewer rows only where 64 tokens do not fit; one of each at least, whatever the limit.
    ``most_logits`` caps T · R where there are 512 rows or more.
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
    rows = min(rows, vocabulary, max(LEAST_ROWS, (most_logits or vocabulary * count) // count))
    if 128 <= rows < vocabulary:
        rows -= rows % 128
    return count, rows
