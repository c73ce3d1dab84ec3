"""Calibration of next-token predictions: confidence against accuracy, from ``token_statistics``."""

from __future__ import annotations

import numpy as np

BINS = 15  # Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599)
ENTROPY_BINS = 12
WIDEST = 12.0  # nats; the last bin of entropy has no upper bound


class CalibrationBins:
    """Sums of tokens by confidence and by entropy, in memory that does not grow with the tokens."""

    def __init__(self) -> None:
        self.by_confidence = np.zeros((3, BINS))  # tokens, Σ confidence, correct predictions
        self.by_entropy = np.zeros((3, ENTROPY_BINS))  # tokens, Σ entropy, Σ NLL

    def add(self, ids: np.ndarray, values: np.ndarray) -> None:
        """Add tokens; those with a NaN or infinite NLL are left out.

        Args:
            ids: Token ids [n].
            values: NLL, entropy, rank, predicted and confidence of each, [5, n].
        """
        nll, entropy, _, predicted, confidence = values.astype(np.float64)
        known = np.isfinite(nll) & (predicted >= 0)
        nll, entropy, confidence = nll[known], entropy[known], confidence[known]
        right = (predicted[known] == ids[known]).astype(np.float64)
        _add(self.by_confidence, confidence * BINS, confidence, right)
        _add(self.by_entropy, entropy * (ENTROPY_BINS / WIDEST), entropy, nll)

    def summary(self) -> dict | None:
        """Compute accuracy, confidence and their expected difference.

        ece = Σ_b n_b / n · |accuracy_b − confidence_b| over 15 bins of equal width. It is 0 for a
        model that is right as often as it is confident. A calibrated model's loss is its entropy; a
        larger loss is overconfidence, in nats.

        Returns:
            None without a token, else: ``tokens``; ``accuracy``, the share of first choices that
                are right; ``confidence``, their mean probability; ``ece``; ``entropy`` and ``loss``
                in nats; ``bins`` and ``entropy_bins``.
        """
        tokens, confidence, right = self.by_confidence
        count = tokens.sum()
        if not count:
            return None
        return {
            "tokens": int(count),
            "accuracy": right.sum() / count,
            "confidence": confidence.sum() / count,
            "ece": np.abs(right - confidence).sum() / count,
            "entropy": self.by_entropy[1].sum() / count,
            "loss": self.by_entropy[2].sum() / count,
            "bins": _means(self.by_confidence, "confidence", "accuracy"),
            "entropy_bins": _means(self.by_entropy, "entropy", "loss"),
        }


def _add(table: np.ndarray, place: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Add each token's 1, ``first`` and ``second`` to the column of ``table`` at its ``place``."""
    bins = np.clip(place.astype(np.int64), 0, table.shape[1] - 1)
    for row, weights in zip(table, (None, first, second), strict=True):
        row += np.bincount(bins, weights, minlength=table.shape[1])


def _means(table: np.ndarray, first: str, second: str) -> list[dict]:
    """Return the number of tokens and two means of each nonempty bin, in order."""
    return [
        {"tokens": int(tokens), first: float(a / tokens), second: float(b / tokens)}
        for tokens, a, b in table.T
        if tokens
    ]


def rows(c: dict) -> list[tuple[str, str, str]]:
    """Return (measure, value, meaning) rows of a ``CalibrationBins.summary``."""
    over = c["confidence"] - c["accuracy"]
    sure = (
        "as sure as it is right"
        if abs(over) < 0.005
        else "surer than it is right"
        if over > 0
        else "less sure than right"
    )
    return [
        (
            "right first choices",
            f"{c['accuracy']:.2%}",
            f"of the tokens; it gives them {c['confidence']:.2%}: {sure}",
        ),
        (
            "calibration error",
            f"{c['ece']:.4f}",
            f"expected, over {len(c['bins'])} bins of confidence; 0 is calibrated",
        ),
        (
            "entropy",
            f"{c['entropy']:.4f}",
            f"nats; a calibrated model's loss, this one's is {c['loss'] - c['entropy']:+.4f}",
        ),
    ]
