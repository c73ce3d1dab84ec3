"""The oracle: every kernel's contract with full logits in plain PyTorch, meant for float64."""

from __future__ import annotations

import torch

from .sums import SUMS


def logits(hidden, weight, bias=None, *, softcap=None, logit_scale=1.0) -> torch.Tensor:
    """Return softcap · tanh(logit_scale · (hidden @ weightᵀ + bias) / softcap), [N, V]."""
    z = hidden @ weight.T
    z = logit_scale * (z if bias is None else z + bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def sums(z, target, class_weight=None, *, ignore_index=-100) -> torch.Tensor:
    """Return the five sums of ``sums.py``, [5, N], from logits [N, V]; differentiable."""
    valid = (target >= 0) & (target < z.shape[1])
    maximum = z.detach().amax(1)
    shifted = z - maximum[:, None]
    exponentials = shifted.exp()
    finite = shifted.masked_fill(shifted == -torch.inf, 0.0)  # x · exp(x) → 0 at −inf
    at_target = z.gather(1, target.where(valid, 0)[:, None])[:, 0]
    rows = torch.stack(
        [
            maximum,
            exponentials.sum(1),
            at_target.where(valid, torch.nan),
            (shifted if class_weight is None else shifted * class_weight).sum(1),
            (exponentials * finite).sum(1),
        ]
    )
    ignored = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0], dtype=z.dtype, device=z.device)[:, None]
    assert rows.shape[0] == SUMS
    return torch.where((target == ignore_index)[None, :], ignored, rows)


def kl_divergence(a, b) -> torch.Tensor:
    """Return Σ_v p_v (log p_v − log q_v) [N] of the softmaxes p of a and q of b, [N, V].

    0 · log 0 is 0. The result is differentiable.
    """
    log_p, log_q = a.log_softmax(1), b.log_softmax(1)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(1)
