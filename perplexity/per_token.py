"""Values of every token from its five sums: NLL, log-probability, entropy, statistics.

The sums are of ``kernels/sums.py``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .kernels.sums import EXP_SHIFT, MAX, SUM_EXP, TARGET


def token_log_probability(sums: Tensor) -> Tensor:
    """Return log p(target) [N] in nats from the five sums [5, N]."""
    return (sums[TARGET] - sums[MAX]) - sums[SUM_EXP].log()


def negative_log_likelihood(sums: Tensor) -> Tensor:
    """Return −log p(target) [N] in nats from the five sums [5, N].

    The formula is separate from ``token_log_probability``: 0 negated would be −0.
    """
    return (sums[MAX] - sums[TARGET]) + sums[SUM_EXP].log()


def token_entropy(sums: Tensor) -> Tensor:
    """Return the entropy [N] of the predicted distribution in nats from the five sums [5, N]."""
    return sums[SUM_EXP].log() - sums[EXP_SHIFT] / sums[SUM_EXP]


class TokenStatistics(NamedTuple):
    """Statistics of every token, each a tensor in the shape of ``target``.

    At ignored positions the first three are 0, ``rank`` and ``predicted`` −1. Where the NLL is NaN
    (NaN logits, or a target outside [0, V)), ``rank`` and ``predicted`` are −1, too.

    Args:
        nll: −log p(target) in nats, float32.
        logsumexp: Log of the sum of the logits' exponentials, float32.
        entropy: Entropy of the predicted distribution in nats, float32.
        rank: Number of logits above the target's, int64; 0 is the model's first choice.
        predicted: Column of the largest logit, the first of equal ones, int64.

    Example:
        >>> import torch
        >>> from perplexity import token_statistics
        >>> one, target = torch.eye(3), torch.tensor([0, 1, -100])
        >>> statistics = token_statistics(one, one, target)
        >>> statistics.rank
        tensor([ 0,  0, -1])
    """

    nll: Tensor
    logsumexp: Tensor
    entropy: Tensor
    rank: Tensor
    predicted: Tensor


def statistics_of(
    sums: Tensor, rank: Tensor, predicted: Tensor, ignored: Tensor
) -> tuple[TokenStatistics, Tensor]:
    """Return the statistics of tokens [N], and p(predicted), 0 where ``predicted`` is −1.

    Args:
        sums: The five sums [5, N].
        rank: Number of logits above the target's, int64 [N].
        predicted: Column of the largest logit, int64 [N].
        ignored: Whether a token is not scored, bool [N].
    """
    nll = negative_log_likelihood(sums)
    unknown = ignored | nll.isnan()
    statistics = TokenStatistics(
        nll.float(),
        (sums[MAX] + sums[SUM_EXP].log()).float(),
        token_entropy(sums).float(),
        rank.masked_fill(unknown, -1),
        predicted.masked_fill(unknown, -1),
    )
    # The largest logit's term of Σ exp(z − max) is 1.
    return statistics, (1 / sums[SUM_EXP]).float().masked_fill(unknown, 0)
