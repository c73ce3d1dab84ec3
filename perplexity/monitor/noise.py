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
    """Return the standard deviation of ``values`` [n] about a smooth curve, NaN below 4 of them.

    The smaller of the estimates from second and from third differences, each by the median of its
    size: a bend of the curve is in one of them at most. Values ``apart`` from each other are
    compared: 1 sees independent noise, 3 a slow wander too.

    >>> round(about_its_curve(np.arange(20.0) ** 2), 6)  # a bend and no noise
    0.0
    """
    sizes = []
    for weights in (SECOND, THIRD):
        count = len(values) - (len(weights) - 1) * apart
        if count >= 2:
            parts = [w * values[i * apart : i * apart + count] for i, w in enumerate(weights)]
            sizes.append(MAD_TO_SIGMA * float(np.median(np.abs(np.sum(parts, axis=0)))))
    return min(sizes, default=math.nan)


def validation_noise(losses: np.ndarray, settings: Settings) -> float:
    """Return the standard deviation of one validation loss about its curve, in nats.

    From ``losses`` [n], without the early third where the curve falls fastest, drawn towards
    ``noise_prior`` of the loss while there are few.
    """
    s = settings
    late = losses[len(losses) // 3 :] if len(losses) >= 9 else losses
    seen = [about_its_curve(late, apart) for apart in (1, 3)]
    noise = max([value for value in seen if not math.isnan(value)], default=0.0)
    count = max(0, len(late) - 3) if noise else 0
    prior, weight = s.noise_prior * abs(float(np.median(late))), s.noise_prior_evaluations
    return math.sqrt((count * noise**2 + weight * prior**2) / (count + weight))
