"""Pure measures of repetition: by hand, and against the slow way."""

import random

import numpy as np
import pytest

from perplexity.probe.repetition import (
    Loop,
    compression_ratio,
    distinct,
    longest_loop,
    ngrams,
    repeated,
    shared,
)


def test_distinct_and_repeated_by_hand():
    words = ["a", "b", "a", "b", "a", "b"]
    assert distinct([words], 1) == 2 / 6
    assert distinct([words], 2) == 2 / 5
    assert distinct([words, words], 2) == 2 / 10
    assert repeated(words, 4) == 1 - 2 / 3  # abab, baba, abab
    assert repeated(["one", "two", "three", "four", "five"]) == 0
    assert repeated(["one", "two", "three"]) is None and distinct([], 1) is None


def test_shared_by_hand():
    assert shared(ngrams(["a", "b", "c", "d", "e"], 4), {tuple("abcd")}) == 0.5
    assert shared(ngrams(["a", "b", "c"], 4), set()) is None
    assert shared(ngrams(["a", "b", "c", "d", "e"], 4), {tuple("abcd")}, least=3) is None


def by_trial(tokens, copies):
    """Every start and period, one token at a time."""
    best = None
    for period in range(1, len(tokens) // copies + 1):
        for start in range(len(tokens) - period):
            end = start + period
            while end < len(tokens) and tokens[end] == tokens[end - period]:
                end += 1
            if end - start >= copies * period and (best is None or end - start > best.length):
                best = Loop(start, end - start, period)
    return best


def test_the_longest_loop_is_that_of_every_start_and_period():
    drawn = random.Random(0)
    seen = 0
    for _ in range(300):
        tokens = [drawn.randrange(3) for _ in range(drawn.randrange(0, 12))]
        unit = [drawn.randrange(4) for _ in range(drawn.randrange(1, 6))]
        tokens += (unit * 9)[: drawn.randrange(0, 30)] + [
            drawn.randrange(3) for _ in range(drawn.randrange(0, 12))
        ]
        found, expected = longest_loop(np.array(tokens, np.int64)), by_trial(tokens, 3)
        assert (found is None) == (expected is None)
        if found:
            assert found == expected
            seen += 1
    assert seen > 200


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 1, 2, 1], [1, 2, 3, 4, 5]])
def test_no_loop(tokens):
    assert longest_loop(np.array(tokens, np.int64)) is None


def test_a_loop_of_one_and_of_the_whole():
    assert longest_loop(np.zeros(7, np.int64)) == Loop(0, 7, 1)
    assert longest_loop(np.array([9, 1, 2, 1, 2, 1, 2, 1])) == Loop(1, 7, 2)


def test_compression():
    assert compression_ratio("") is None
    assert (
        compression_ratio("the same again, " * 40)
        > 2.4
        > 1.5
        > compression_ratio("Pack my box with five dozen jugs.")
        > 0
    )
