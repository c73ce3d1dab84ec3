"""Which tokens a window shows the model and which it scores: one pure function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The model reads positions [begin, end) and is scored on [first_scored, end)."""

    begin: int
    end: int
    first_scored: int


def sliding_windows(length: int, context_length: int, stride: int) -> Iterator[Window]:
    """Windows over ``length`` positions in which each position but the first is scored exactly once.

    The first window scores positions 1 to context_length − 1; each later one moves on by at most ``stride`` and scores
    what is new, reading as much context before it as fits (Hugging Face's perplexity guide, corrected: a window scores
    its first new token too, whose predecessor is in the window because stride < context_length).
    Raises ValueError unless 1 ≤ stride < context_length.
    """
    if context_length < 2:
        raise ValueError(f"context_length: expected at least 2, got {context_length}")
    if not 1 <= stride < context_length:
        raise ValueError(f"stride: expected 1 to context_length - 1 = {context_length - 1}, got {stride}")
    end = min(context_length, length)
    if length > 1:
        yield Window(0, end, 1)
    while end < length:
        scored = end
        end = min(end + stride, length)
        yield Window(max(0, end - context_length), end, scored)
