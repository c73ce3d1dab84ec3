"""Intervals that cover what they say: on a Markov chain, whose entropy rate and cross-entropy are
known exactly.
"""

import math

import numpy as np
import pytest

from perplexity.evaluation.uncertainty import (
    BLOCK,
    BLOCKS,
    bootstrap_interval,
    half_width,
    ratio_stderr,
    uncertainty,
)

STATES = 12
DRAWS = 1000


def chain(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A transition matrix, sticky enough for neighbouring losses to depend on each other, and its
    stationary distribution.
    """
    generator = np.random.default_rng(seed)
    matrix = generator.dirichlet(np.full(STATES, 0.4), STATES) * 0.5 + 0.5 * np.eye(STATES)
    values, vectors = np.linalg.eig(matrix.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    return matrix, stationary / stationary.sum()


def walk(
    matrix: np.ndarray, stationary: np.ndarray, count: int, length: int, generator
) -> np.ndarray:
    """``count`` stationary walks [count, length + 1]."""
    edges = matrix.cumsum(1)
    states = np.empty((count, length + 1), dtype=np.int64)
    states[:, 0] = generator.choice(STATES, size=count, p=stationary)
    for step in range(length):
        drawn = generator.random(count)
        states[:, step + 1] = np.minimum(
            (edges[states[:, step]] < drawn[:, None]).sum(1), STATES - 1
        )
    return states


def losses(
    states: np.ndarray, matrix: np.ndarray, stationary: np.ndarray, model: str
) -> np.ndarray:
    """Token NLL under the chain itself, or under its unigram distribution (whose losses depend on
    each other).
    """
    if model == "chain":
        return -np.log(matrix[states[:, :-1], states[:, 1:]])
    return -np.log(stationary)[states[:, 1:]]


def truth(matrix: np.ndarray, stationary: np.ndarray, model: str) -> float:
    """Entropy rate −Σ π_i P_ij log P_ij, or entropy of the stationary distribution."""
    if model == "chain":
        logs = np.log(np.where(matrix > 0, matrix, 1.0))
        return float(-(stationary[:, None] * matrix * logs).sum())
    return float(-(stationary * np.log(stationary)).sum())


@pytest.mark.parametrize("model", ["chain", "unigram"])
def test_the_interval_over_documents_covers(model):
    """95 % intervals hold the true loss in 93 to 97 % of 1,000 evaluations of 40 documents, by both
    methods.
    """
    matrix, stationary = chain()
    generator = np.random.default_rng(1)
    expected = truth(matrix, stationary, model)
    # Lengths vary, but not with the losses: else the ratio's own bias would be measured.
    lengths = np.linspace(20, 120, 40).astype(int)
    walks = walk(matrix, stationary, DRAWS * len(lengths), lengths.max(), generator).reshape(
        DRAWS, len(lengths), -1
    )
    by_delta = by_bootstrap = 0
    for states in walks:
        all_losses = losses(states, matrix, stationary, model)
        nll = np.array(
            [row[:length].sum() for row, length in zip(all_losses, lengths, strict=True)]
        )
        found = uncertainty(nll, lengths)
        assert found.unit == "document" and found.clusters == 40 and found.trusted
        low, high = found.perplexity_interval
        by_delta += low <= math.exp(expected) <= high
        low, high = found.bootstrap_interval
        by_bootstrap += low <= math.exp(expected) <= high
    assert 0.93 <= by_delta / DRAWS <= 0.97
    assert 0.93 <= by_bootstrap / DRAWS <= 0.97


@pytest.mark.parametrize("model", ["chain", "unigram"])
def test_the_interval_over_blocks_of_one_document_covers(model):
    matrix, stationary = chain()
    expected = truth(matrix, stationary, model)
    length = 64 * BLOCK
    walks = walk(matrix, stationary, DRAWS, length, np.random.default_rng(2))
    covered = naive = 0
    for states in walks:
        nll = losses(states[None], matrix, stationary, model)[0]
        sums = nll.reshape(-1, BLOCK).sum(1)
        found = uncertainty([nll.sum()], [length], (sums, np.full(len(sums), float(BLOCK))))
        assert found.unit == "block" and found.clusters == BLOCKS and found.trusted
        low, high = found.perplexity_interval
        covered += low <= math.exp(expected) <= high
        naive += abs(nll.mean() - expected) <= 1.96 * nll.std(ddof=1) / math.sqrt(length)
    assert 0.93 <= covered / DRAWS <= 0.97
    if model == "unigram":
        # What tools that take tokens for independent report: the reason for blocks.
        assert naive / DRAWS < 0.85


def test_effective_tokens_say_how_dependent_tokens_are():
    matrix, stationary = chain()
    states = walk(matrix, stationary, 400, 100, np.random.default_rng(3))
    dependent = losses(states, matrix, stationary, "unigram")
    shuffled = np.random.default_rng(4).permutation(dependent.ravel()).reshape(dependent.shape)
    found = [
        uncertainty(
            values.sum(1), np.full(400, 100), squares=float((values**2).sum())
        ).effective_tokens
        for values in (dependent, shuffled)
    ]
    assert found[0] < 0.6 * 40_000
    assert found[1] > 0.8 * 40_000


def test_the_ratio_stderr_of_equal_clusters_is_that_of_a_mean():
    values = np.random.default_rng(5).normal(size=30)
    assert ratio_stderr(7 * values, np.full(30, 7.0)) == pytest.approx(
        values.std(ddof=1) / math.sqrt(30), rel=1e-12
    )


def test_the_interval_uses_students_t():
    # t(0.975, 3 degrees of freedom), any table.
    assert half_width(1.0, 4) == pytest.approx(3.18245, abs=1e-5)


@pytest.mark.parametrize(
    ("nll", "tokens", "blocks", "unit", "clusters"),
    [
        ([5.0], [4], None, "document", 1),
        ([5.0, 0.0], [4, 0], None, "document", 1),
        ([], [], None, "document", 0),
        ([5.0], [4], (np.array([5.0]), np.array([4.0])), "block", 1),
    ],
)
def test_one_cluster_has_no_error_bar(nll, tokens, blocks, unit, clusters):
    found = uncertainty(nll, tokens, blocks)
    assert (found.unit, found.clusters, found.trusted) == (unit, clusters, False)
    assert (
        found.stderr is None
        and found.perplexity_interval is None
        and found.bootstrap_interval is None
    )


def test_few_documents_are_not_to_be_trusted():
    assert not uncertainty(np.arange(1.0, 20), np.full(19, 2)).trusted
    assert uncertainty(np.arange(1.0, 21), np.full(20, 2)).trusted


def test_the_bootstrap_is_the_same_every_time():
    values, sizes = np.random.default_rng(6).normal(3, 1, 50), np.full(50, 1.0)
    assert bootstrap_interval(values, sizes) == bootstrap_interval(values, sizes)
