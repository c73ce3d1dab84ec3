"""How sure a loss is: standard error over clusters of dependent tokens, intervals by the delta
method and by bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..metric import exp

CONFIDENCE = 0.95
TRUSTED_CLUSTERS = 20  # fewer: the spread between clusters is itself a guess
BLOCK = 128  # tokens a block has at least
# of a single document: long enough to hold what depends on each other, enough for a spread
BLOCKS = 32
RESAMPLES = 2000


@dataclass(frozen=True)
class Uncertainty:
    """``unit``: "document" or "block" of one document; ``stderr`` of the loss in nats; intervals of
    the perplexity, 95 %.

    None where fewer than two clusters leave nothing to compare. effective_tokens: independent
    tokens that would give this standard error.
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
    """Standard error of Σ numerator / Σ denominator over independent clusters: the ratio
    estimator's linearisation.

    sqrt(K / (K − 1) · Σ_k (a_k − r·b_k)²) / Σ b over K clusters (Cochran, Sampling Techniques, 3rd
    ed., ch. 6); None for K < 2.
    """
    count = len(numerator)
    if count < 2:
        return None
    total = denominator.sum()
    residuals = numerator - numerator.sum() / total * denominator
    return math.sqrt(count / (count - 1) * float(np.dot(residuals, residuals))) / float(total)


def half_width(stderr: float, clusters: int) -> float:
    """Half of the 95 % interval of a mean over ``clusters``: Student's t with K − 1 degrees of
    freedom.
    """
    return float(scipy_stats().t.ppf((1 + CONFIDENCE) / 2, clusters - 1)) * stderr


def scipy_stats():
    try:
        import scipy.stats
    except ImportError:
        raise InputError("intervals need scipy; install fused-perplexity[eval]")
    return scipy.stats


def bootstrap_interval(
    numerator: np.ndarray, denominator: np.ndarray
) -> tuple[float, float] | None:
    """95 % percentile interval of Σ numerator / Σ denominator, clusters drawn again with
    replacement (a fixed seed).
    """
    count = len(numerator)
    if count < 2:
        return None
    found = scipy_stats().bootstrap(
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
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def blocks_of(nll: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums over at most ``BLOCKS`` runs of consecutive blocks, as equal in number as can be."""
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
    """Of a loss: ``nll`` sums and ``tokens`` of each document; for a single one ``blocks``, its
    sums over ``BLOCK`` tokens each.

    ``squares``: Σ nll² over the tokens, for the effective number of them. ``bootstrap``: draw that
    interval, too.
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
