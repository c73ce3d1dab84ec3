"""Windows: the tokens that a model reads and those it scores, one function a protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Window:
    """Positions [begin, end − 1) that the model reads, and [first_scored, end) that are scored.

    The hidden state of a position predicts the next one.
    """

    begin: int
    end: int
    first_scored: int


def sliding_windows(length: int, context_length: int, stride: int) -> Iterator[Window]:
    """Yield windows over ``length`` positions; each position but the first is scored exactly once.

    Window k begins at k · stride and scores what the window before did not. Windows overlap by
    context_length − stride, the last one too, which ends where the text does. This is Hugging
    Face's perplexity guide, corrected: a window scores its first new position too, whose
    predecessor is in the window because stride < context_length.

    Raises:
        InputError: Unless 1 ≤ stride < context_length.
    """
    if context_length < 2:
        raise InputError(f"context_length: expected at least 2, got {context_length}")
    if not 1 <= stride < context_length:
        raise InputError(
            f"stride: expected 1 to context_length - 1 = {context_length - 1}, got {stride}"
        )
    begin, scored = 0, 1
    while scored < length:
        end = min(begin + context_length, length)
        yield Window(begin, end, scored)
        begin, scored = begin + stride, end


def rolling_windows(
    length: int, context_length: int, stride: int, first: int = 1
) -> Iterator[Window]:
    """Yield lm-evaluation-harness 0.4's rolling windows.

    Each position but the first is scored exactly once. A window reads ``context_length`` positions
    and scores as many, one further on: the next one reads from the last position scored. The last
    window is moved left to read ``context_length``, too, and scores what is new. ``stride`` is
    ``context_length``. With ``first``, the first position to score, one window ends at ``length``
    as that of lm-eval's ``loglikelihood`` does; a longer continuation rolls on.
    """
    scored = first
    while scored < length:
        end = min(scored + context_length, length)
        yield Window(max(0, end - 1 - context_length), end, scored)
        scored = end


def chunk_windows(length: int, context_length: int, stride: int) -> Iterator[Window]:
    """Yield llama.cpp's chunks: disjoint windows without the tail.

    Each is scored from one position after its middle on. ``stride`` is ``context_length``.
    """
    for begin in range(0, length - context_length + 1, context_length):
        yield Window(begin, begin + context_length, begin + context_length // 2 + 1)


WINDOWS: dict[str, Callable[[int, int, int], Iterator[Window]]] = {
    "sliding": sliding_windows,
    "lm-eval": rolling_windows,
    "llama.cpp": chunk_windows,
}
