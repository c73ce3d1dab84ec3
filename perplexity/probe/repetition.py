"""Measures of repetition: pure functions of words, tokens and bytes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Words of an n-gram, as in Welleck et al. 2020, Neural Text Generation with Unlikelihood Training
# (arXiv:1908.04319).
N = 4
COPIES = 3  # copies of a stretch in a row that make a loop


@dataclass(frozen=True)
class Loop:
    """Loop in a text: ``length`` tokens from ``start`` on that repeat their first ``period``."""

    start: int
    length: int
    period: int


def ngrams(words: Sequence, n: int) -> list[tuple]:
    """Return the n-grams of a text in order.

    Example:
        >>> ngrams(["a", "b", "c"], 2)
        [('a', 'b'), ('b', 'c')]
    """
    return list(zip(*(words[k:] for k in range(n)), strict=False))


def distinct(texts: Iterable[Sequence], n: int) -> float | None:
    """Return distinct n-grams over all n-grams of ``texts`` together (distinct-n).

    The share decreases with more text: compare equal amounts only. Source: Li et al. 2016
    (arXiv:1510.03055).

    Args:
        texts: The words of each text.
        n: Words of an n-gram.

    Returns:
        A share of 1; None where no text has ``n`` words.

    Example:
        >>> distinct([["a", "b", "a", "b"]], 2)
        0.6666666666666666
    """
    grams = [gram for words in texts for gram in ngrams(words, n)]
    return len(set(grams)) / len(grams) if grams else None


def repeated(words: Sequence, n: int = N) -> float | None:
    """Return the share of a text's n-grams that occurred before in it; None for a text without one.

    It is 1 − distinct / all: seq-rep-n of Welleck et al. 2020.
    """
    share = distinct([words], n)
    return None if share is None else 1 - share


def shared(grams: Sequence[tuple], known: set[tuple], least: int = 1) -> float | None:
    """Return the share of ``grams`` that are among ``known``; None for fewer than ``least``."""
    return sum(gram in known for gram in grams) / len(grams) if len(grams) >= least else None


def longest_loop(tokens: np.ndarray, copies: int = COPIES) -> Loop | None:
    """Return the longest loop of a text; of several, the one with the shortest period.

    Args:
        tokens: Token ids [n].
        copies: The fewest copies of a period that make a loop, 3 by default.

    Returns:
        The loop; None where there is none.

    Example:
        >>> longest_loop(np.array([5, 1, 2, 1, 2, 1, 2, 1]))
        Loop(start=1, length=7, period=2)
    """
    best = None
    for period in range(1, len(tokens) // copies + 1):
        same = tokens[period:] == tokens[:-period]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
        if not len(edges):
            continue
        begins, ends = edges[::2], edges[1::2]
        place = int(np.argmax(ends - begins))
        length = int(ends[place] - begins[place]) + period
        if length >= copies * period and (best is None or length > best.length):
            best = Loop(int(begins[place]), length, period)
    return best


def compression_ratio(text: str) -> float | None:
    """Return a text's UTF-8 bytes over the bytes of its zlib-compressed form; None for "".

    Whisper takes a text with a ratio above 2.4 for a loop (arXiv:2212.04356).
    """
    raw = text.encode(errors="replace")
    return len(raw) / len(zlib.compress(raw)) if raw else None
