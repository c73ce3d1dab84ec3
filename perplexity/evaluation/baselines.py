"""Losses of guesses without context, and the warning where a model does worse than they do."""

from __future__ import annotations

import math

import numpy as np

from ..wording import by_number, counted

# Relative error of a sum of float32 losses: a head of zeros is as good as the uniform guess, and
# must not count as worse.
ROUNDING = 1e-6


def unigram_losses(counts: np.ndarray, vocabulary: int) -> tuple[float, float]:
    """Return the losses of two guesses by the frequencies of a text's tokens, nats a token.

    The first is the entropy of the frequencies. No guess without context has a lower loss on this
    text, and a guess cannot know them: of 5 different tokens their perplexity is 5. The second is
    the mean loss of each token under the frequencies of all others, with a half added to each of
    the V counts (Krichevsky and Trofimov 1981), and at most ln V. A guess can have that loss.

    Args:
        counts: int64 [n], how often each token occurs; zeros count for nothing.
        vocabulary: V, entries of the vocabulary.

    Returns:
        Both losses; 0 of no tokens.

    Example:
        >>> unigram_losses(np.array([1, 1]), 2)
        (0.6931471805599453, 0.6931471805599453)
    """
    counts = counts[counts > 0].astype(np.float64)
    count = counts.sum()
    shares = counts / max(1.0, count)
    unigram = -(shares * np.log(shares)).sum()
    left_out = -(shares * np.log((counts - 0.5) / (count - 1 + 0.5 * vocabulary))).sum()
    return float(unigram), min(float(left_out), math.log(vocabulary))


def baseline_notes(
    loss: float, tokens: int, *, uniform: float, unigram: float, left_out: float
) -> list[str]:
    """Return a warning where a guess without context is better than the model.

    Args:
        loss: of the model, nats a token.
        tokens: tokens scored.
        uniform: ln V.
        unigram: first of ``unigram_losses``.
        left_out: second of them. Between the two, the text is too short for a warning.

    Example:
        >>> baseline_notes(2.0, 9, uniform=3.0, unigram=2.1, left_out=2.5)
        []
    """
    if loss > uniform * (1 + ROUNDING):
        return [
            f"warning: the loss is above the uniform guess's ({loss:.4f} and {uniform:.4f} nats): "
            "the model does worse than equal probabilities. Check for a mismatched tokenizer, "
            "mis-shifted labels, scored padding, or divergence"
        ]
    if not loss > unigram * (1 + ROUNDING):
        return []
    both = f"the loss is above the unigram baseline's ({loss:.4f} and {unigram:.4f} nats)"
    if loss > left_out * (1 + ROUNDING):
        return [
            f"warning: {both}: the model does worse than this text's own token frequencies. "
            "Check for a mismatched tokenizer"
        ]
    return [
        f"{both}, which is fitted to {by_number(tokens, 'this', 'these')} {counted(tokens, 'token')} "
        "and too low on so few: score more text to compare with it"
    ]
