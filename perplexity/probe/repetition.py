"""How much of a text has been said before: pure functions of words, tokens and bytes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# words of the n-grams: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training
# (arXiv:1908.04319)
N = 4
COPIES = 3  # of a stretch in a row that are a loop


@dataclass(frozen=True)
class Loop:
    """``length`` tokens from ``start`` on, the same ``period`` tokens again and again."""

    start: int
    length: int
    period: int


def ngrams(words: Sequence, n: int) -> list[tuple]:
    return list(zip(*(words[k:] for k in range(n)), strict=False))


def distinct(texts: Iterable[Sequence], n: int) -> float | None:
    """Distinct n-grams over all n-grams of all ``texts`` (Li et al. 2016, arXiv:1510.03055); None
    without one.

    Falls with the amount of text: compare equal amounts only.
    """
    found = [gram for words in texts for gram in ngrams(words, n)]
    return len(set(found)) / len(found) if found else None


def repeated(words: Sequence, n: int = N) -> float | None:
    """Share of a text's n-grams that were there before: 1 − distinct / all (seq-rep-n of Welleck et
    al. 2020).
    """
    share = distinct([words], n)
    return None if share is None else 1 - share


def shared(grams: Sequence[tuple], known: set[tuple], least: int = 1) -> float | None:
    """Share of ``grams`` that are among ``known``; None of fewer than ``least``."""
    return sum(gram in known for gram in grams) / len(grams) if len(grams) >= least else None


def longest_loop(tokens: np.ndarray, copies: int = COPIES) -> Loop | None:
    """The longest stretch of ``tokens`` [n] that repeats one period ``copies`` times or more, of
    equal ones the shortest period.
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
    """UTF-8 bytes over those of zlib's compressed form: above 2.4 Whisper takes a text for a loop
    (arXiv:2212.04356).
    """
    raw = text.encode(errors="replace")
    return len(raw) / len(zlib.compress(raw)) if raw else None
