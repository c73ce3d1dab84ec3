"""How far a value may lie from its curve by chance: noise apart from the curve's own bend."""

from __future__ import annotations

import math

import numpy as np

from .settings import Settings

MAD_TO_SIGMA = 1.4826  # median absolute deviation to standard deviation, of a normal distribution
# Differences of this order of a straight line and of a parabola are 0; their noise has unit variance.
SECOND = np.array([1.0, -2.0, 1.0]) / math.sqrt(6)
THIRD = np.array([1.0, -3.0, 3.0, -1.0]) / math.sqrt(20)


def about_its_curve(values: np.ndarray, apart: int = 1) -> float:
    """Return the standard deviation of ``values`` [n] about a smooth curve, NaN where n is small.

    The smaller of the estimates from second and from third differences, each by their
    mean size: a bend of the curve is in one of them at most. Values ``apart`` from each other are
    compared: 1 sees independent noise, 3 a slow wander too.

    >>> round(about_its_curve(np.arange(20.0) ** 2), 6)  # a bend and no noise
    0.0
    """
    if len(values) < (5 if apart == 1 else 10 * apart):  # the far ones hold more of the bend
        return math.nan
    sizes = []
    for weights in (SECOND, THIRD):
        count = len(values) - (len(weights) - 1) * apart
        parts = [w * values[i * apart : i * apart + count] for i, w in enumerate(weights)]
        sizes.append(_spread(np.sum(parts, axis=0)))
    return min(sizes)


def _spread(values: np.ndarray) -> float:
    """Return the standard deviation of values about 0 by the mean size of the lower four fifths.

    A few jumps are left out, and it varies less than the median of few sizes. Of a normal
    distribution this mean is 0.5586 σ.
    """
    sizes = np.sort(np.abs(values))
    return float(sizes[: max(2, math.ceil(0.8 * len(sizes)))].mean()) / 0.5586


def validation_noise(losses: np.ndarray, settings: Settings) -> float:
    """Return the standard deviation of one validation loss about its curve, in nats.

    From ``losses`` [n], without the early third where the curve falls fastest, drawn towards
    ``noise_prior`` of the loss while there are few.
    """
    s = settings
    late = losses[len(losses) // 3 :] if len(losses) >= 9 else losses
    # Behind the best a rise would count as a wander.
    best = int(np.argmin(losses))
    seen = [about_its_curve(late), about_its_curve(losses[best // 3 : best + 1], apart=3)]
    noise = max([value for value in seen if not math.isnan(value)], default=0.0)
    count = max(0, len(late) - 3) if noise else 0
    prior, weight = s.noise_prior * abs(float(np.median(late))), s.noise_prior_evaluations
    # An estimate from few may be low by chance: by one and a half of its standard errors.
    noise *= 1 + 1.5 / math.sqrt(count) if count else 1.0
    return math.sqrt((count * noise**2 + weight * prior**2) / (count + weight))
