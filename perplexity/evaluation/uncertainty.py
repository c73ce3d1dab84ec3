"""The uncertainty of a loss: standard errors and intervals over clusters of dependent tokens.

Tokens of one document depend on each other, so documents are the clusters; of a single document
these are long blocks. Intervals are by the delta method and by bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..nats import exp

CONFIDENCE = 0.95
TRUSTED_CLUSTERS = 20  # with fewer the spread between clusters is itself a guess
BLOCK = 128  # the fewest tokens of a block
# Of a single document: long enough to hold the tokens that depend on each other, and enough blocks
# to show a spread.
BLOCKS = 32
RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class Uncertainty:
    """The uncertainty of a loss and of its perplexity; None of fewer than two clusters.

    Args:
        unit: of the clusters, "document", or "block" of one document.
        clusters: number of them.
        trusted: whether there are enough for the interval.
        stderr: standard error of the loss, nats.
        perplexity_stderr: perplexity times ``stderr``.
        perplexity_interval: 95% interval of the perplexity, by the delta method.
        bootstrap_interval: 95% interval of the perplexity, by bootstrap.
        effective_tokens: independent tokens that would give this standard error.
    """

    unit: str
    clusters: int
    trusted: bool
    stderr: float | None
    perplexity_stderr: float | None
    perplexity_interval: tuple[float, float] | None
    bootstrap_interval: tuple[float, float] | None
    effective_tokens: float | None


def ratio_stderr(numerator: np.ndarray, denominator: np.ndarray) -> float | None:
    """Return the standard error of r = Σ numerator / Σ denominator over independent clusters.

    It is the ratio estimator's linearisation, sqrt(K / (K − 1) · Σ_k (a_k − r·b_k)²) / Σ b over K
    clusters (Cochran, Sampling Techniques, 3rd ed., ch. 6).

    Args:
        numerator: float64 [K], a sum for each cluster.
        denominator: float64 [K], its size.

    Returns:
        The standard error, or None of fewer than two clusters.

    Example:
        >>> ratio_stderr(np.array([2.0, 4.0]), np.array([1.0, 1.0]))
        1.0
    """
    count = len(numerator)
    if count < 2:
        return None
    total = denominator.sum()
    residuals = numerator - numerator.sum() / total * denominator
    return math.sqrt(count / (count - 1) * float(np.dot(residuals, residuals))) / float(total)


def half_width(stderr: float, clusters: float) -> float:
    """Return half of the 95% interval of a mean, by Student's t.

    Args:
        stderr: standard error of the mean.
        clusters: K, of K - 1 degrees of freedom.
    """
    return float(scipy_stats().t.ppf((1 + CONFIDENCE) / 2, clusters - 1)) * stderr


def p_value_of(difference: float, stderr: float, degrees: float) -> float:
    """Return the two-sided p-value of a difference under Student's t.

    Args:
        difference: the estimate.
        stderr: its standard error.
        degrees: degrees of freedom, above 0.
    """
    if stderr == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * scipy_stats().t.sf(abs(difference) / stderr, degrees))


def scipy_stats():
    """Return scipy.stats.

    Raises:
        InputError: scipy is not installed.
    """
    try:
        import scipy.stats
    except ImportError:
        raise InputError("intervals need scipy; install fused-perplexity[eval]")
    return scipy.stats


def bootstrap_interval(
    numerator: np.ndarray, denominator: np.ndarray
) -> tuple[float, float] | None:
    """Return the 95% percentile interval of Σ numerator / Σ denominator by bootstrap.

    Clusters are drawn with replacement, from a fixed seed.

    Args:
        numerator: float64 [K], a sum for each cluster.
        denominator: float64 [K], its size.

    Returns:
        The lower and the upper end, or None of fewer than two clusters.
    """
    count = len(numerator)
    if count < 2:
        return None
    drawn = scipy_stats().bootstrap(
        (numerator, denominator),
        lambda a, b, axis=-1: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // count),
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def blocks_of(nll: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge consecutive blocks into at most ``BLOCKS``, of about as many blocks each.

    Args:
        nll: float64 [B], the sum for each block.
        tokens: float64 [B], its tokens.

    Returns:
        The same sums of the merged blocks that have tokens.
    """
    edges = np.linspace(0, len(nll), min(BLOCKS, len(nll)) + 1).astype(int)[:-1]
    nll, tokens = np.add.reduceat(nll, edges), np.add.reduceat(tokens, edges)
    return nll[tokens > 0], tokens[tokens > 0]


def uncertainty(
    nll: Sequence[float],
    tokens: Sequence[int],
    blocks: tuple[np.ndarray, np.ndarray] | None = None,
    squares: float | None = None,
    bootstrap: bool = True,
) -> Uncertainty:
    """Return the uncertainty of the loss over documents, or over blocks of a single document.

    Args:
        nll: the sum for each document, nats.
        tokens: its scored tokens.
        blocks: sums of nll and of tokens over ``BLOCK`` tokens each; default None.
        squares: Σ nll² over the tokens, for the effective number of tokens; default None.
        bootstrap: draw the bootstrap interval as well; default True.

    Returns:
        Its fields are None where fewer than two clusters have tokens.

    Example:
        >>> uncertainty([2.0, 4.0], [1, 1], bootstrap=False).stderr
        1.0
    """
    sums, counts = np.asarray(nll, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    sums, counts = sums[counts > 0], counts[counts > 0]
    unit = "document"
    if len(counts) == 1 and blocks is not None:
        unit, (sums, counts) = "block", blocks_of(*blocks)
    clusters, total = len(counts), float(counts.sum())
    stderr = ratio_stderr(sums, counts)
    if stderr is None or not math.isfinite(stderr):
        return Uncertainty(unit, clusters, False, None, None, None, None, None)
    loss = float(sums.sum()) / total
    width = half_width(stderr, clusters)
    drawn = bootstrap_interval(sums, counts) if bootstrap else None
    effective = None
    if squares is not None and stderr > 0:
        effective = min(total, max(0.0, squares / total - loss * loss) / stderr**2)
    return Uncertainty(
        unit,
        clusters,
        clusters >= TRUSTED_CLUSTERS,
        stderr,
        exp(loss) * stderr,
        (exp(loss - width), exp(loss + width)),
        None if drawn is None else (exp(drawn[0]), exp(drawn[1])),
        effective,
    )
