"""The per-token sums of both backends: their definitions, and the merge of sums of parts.

**The five sums** over the vocabulary are the rows of one ``[5, N]`` tensor. With logits ``z[n, v]``
and class weights ``w[v]`` (1 where there are none):

===============  ==========================================  =====================================
row              value                                       needed for
===============  ==========================================  =====================================
``MAX``          m = max_v z                                 a reference point, not differentiated
``SUM_EXP``      s = Σ_v exp(z − m)                          everything
``TARGET``       z at the target                             everything
``LOGIT_SUM``    Σ_v w · (z − m)                             label smoothing
``EXP_SHIFT``    u = Σ_v exp(z − m) · (z − m)                entropy
===============  ==========================================  =====================================

From them, per token:

    logsumexp = m + log s
    nll = (m − z_target) + log s
    entropy = log s − u / s

A loss is then arithmetic on vectors of N, which autograd differentiates. A kernel only has to know
the derivative of the sums:

    ∂/∂z = exp(z − m) · (g_SUM_EXP + g_EXP_SHIFT · (1 + z − m))
           + g_TARGET · [v = target] + g_LOGIT_SUM · w

The maximum counts as a constant. No quantity above depends on its reference point, so moving m
changes nothing, and leaving out its derivative is exact. Keeping m and s apart, and taking every
sum from m, keeps 1e-7 of relative precision at logits of 1e4. (Σ w · log s − LOGIT_SUM is a loss;
LOGIT_SUM alone moves with m.)

A token whose target is ``ignore_index`` has the sums (0, 1, 0, 0, 0): its loss, logsumexp and
entropy are 0, and its gradient is 0. A target outside [0, V) gives NaN in ``TARGET``.

**The divergence** KL(P‖Q) of two heads with logits a and b has five rows, too, with the maxima m_p
and m_q:

    m_p    s_p = Σ exp(a − m_p)    m_q    s_q = Σ exp(b − m_q)
    gap = Σ exp(a − m_p) · ((a − m_p) − (b − m_q))
"""

from __future__ import annotations

import torch

MAX, SUM_EXP, TARGET, LOGIT_SUM, EXP_SHIFT = range(5)
SUMS = 5
DIVERGENCE_ROWS = 5  # m_p, s_p, m_q, s_q, gap
# e and 2 to this power are 0, in float64 too, and so is their product with a finite number. A
# difference of finite logits may be −inf, and 0 · −inf is NaN: it is clamped to this power first.
NO_POWER = -2000.0

# hidden [N, D], weight [V, D], bias [V]
Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def finite(maximum: torch.Tensor) -> torch.Tensor:
    """Return maxima with 0 in the place of −inf, so that differences from them are defined.

    A bias may make all logits −inf. Any finite reference point avoids inf − inf.
    """
    return torch.where(maximum == -torch.inf, 0.0, maximum)


def finished(
    rows: torch.Tensor, target: torch.Tensor, vocabulary: int, ignore_index: int
) -> torch.Tensor:
    """Overwrite the sums [5, N] of ignored tokens and of targets outside [0, ``vocabulary``).

    Returns the sums. Only the whole vocabulary shows whether a target is in it.
    """
    rows[TARGET].masked_fill_((target < 0) | (target >= vocabulary), torch.nan)
    ignored = target == ignore_index
    rows.masked_fill_(ignored, 0.0)
    rows[SUM_EXP].masked_fill_(ignored, 1.0)
    return rows


def merge(
    partials: torch.Tensor,
    target: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    vocabulary: int,
    ignore_index: int,
) -> torch.Tensor:
    """Fold the sums of parts of the vocabulary, [5, parts, N], into ``finished`` sums [5, N].

    Parts are folded in their order. ``weights`` [parts] is Σ w of each part, where ``LOGIT_SUM`` is
    needed. A target in [0, ``vocabulary``) lies in one part; the other parts have 0 in ``TARGET``.
    An empty part is −inf, 0, 0, 0, 0.
    """
    maximum, sum_exp, at_target, logit_sum, exp_shift = partials
    top = maximum.amax(0)
    moved = torch.where(sum_exp > 0, maximum - finite(top), 0.0)
    decay = torch.where(sum_exp > 0, moved.exp(), 0.0)
    folded = [
        top,
        (decay * sum_exp).sum(0),
        at_target.sum(0),
        (logit_sum if weights is None else logit_sum + weights[:, None] * moved).sum(0),
        (decay * (exp_shift + sum_exp * moved.clamp_min(NO_POWER))).sum(0),
    ]
    return finished(torch.stack(folded), target, vocabulary, ignore_index)


def merge_divergence(parts: torch.Tensor) -> torch.Tensor:
    """Fold the divergence's rows of parts of the vocabulary, [5, parts, N], into [5, N]."""
    p_maximum, p_sum, q_maximum, q_sum, gap = parts
    p_top, q_top = p_maximum.amax(0), q_maximum.amax(0)
    p_decay = (p_maximum - finite(p_top)).exp()
    q_decay = (q_maximum - finite(q_top)).exp()
    moved = (finite(p_maximum) - finite(p_top)) - (finite(q_maximum) - finite(q_top))
    weighted = torch.where(p_decay * p_sum > 0, p_decay * (gap + p_sum * moved), 0.0)
    return torch.stack(
        [p_top, (p_decay * p_sum).sum(0), q_top, (q_decay * q_sum).sum(0), weighted.sum(0)]
    )


def divergence(rows: torch.Tensor) -> torch.Tensor:
    """Return KL(P‖Q) [N] in nats from rows [5, N].

    Rounding may leave −1e-7, which becomes 0; NaN stays NaN.
    """
    _, p_sum, _, q_sum, gap = rows
    return (gap / p_sum - (p_sum.log() - q_sum.log())).clamp_min(0.0)


def divergence_vectors(upstream: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the vectors [6, N] that the gradient of a token's logits depends on.

    They are m_p, log s_p, m_q, log s_q, KL and the upstream gradient.
    """
    return torch.stack(
        [
            finite(rows[0]),
            rows[1].log(),
            finite(rows[2]),
            rows[3].log(),
            divergence(rows),
            upstream.to(rows.dtype),
        ]
    )


def with_positions(logits: torch.Tensor) -> torch.Tensor:
    """Return logits [N, V] or [N, V, T] as [N, V, T]; token n · T + t is logits[n, :, t]."""
    return logits if logits.dim() == 3 else logits[:, :, None]
