"""Perplexity as a ``torchmetrics.Metric``: works in a ``MetricCollection``, in checkpoints and over
ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..errors import InputError, needing
from ..losses import cross_entropy
from ..metric import float64_sum, has_float64, scored

with needing(__name__, "integrations"):
    import torchmetrics


class Perplexity(torchmetrics.Metric):
    """exp(Σ NLL / Σ tokens) of all that was seen, as ``torchmetrics.text.Perplexity``, in float64
    sums, no softmax in memory.

    ``update(preds, target)`` takes logits [..., V] and target [...]. ``update_nll(nll,
    target=target)`` takes known NLL, of ``token_nll`` for example, and needs no logits. Targets of
    ``ignore_index`` (None: −100) do not count. ``compute`` gives a 0-dimensional float64 tensor,
    NaN before the first token. The sum stays on the CPU where the metric's device has no float64
    (MPS).
    """

    nll: Tensor  # added as states
    tokens: Tensor
    is_differentiable, higher_is_better, full_state_update = False, False, False

    def __init__(self, ignore_index: int | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.ignore_index = checks.ignored_label(ignore_index)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, preds: Tensor, target: Tensor) -> None:
        checks.floating("preds", preds)
        checks.dense("target", target)
        if not preds.dim():
            raise InputError("preds: expected logits [..., V], got a scalar")
        if preds.shape[:-1] != target.shape:
            raise InputError(
                f"target: expected the shape {tuple(preds.shape[:-1])} of preds' tokens, got {tuple(target.shape)}"
            )
        target = target.reshape(-1)
        nll = cross_entropy(
            preds.reshape(-1, preds.shape[-1]),
            target,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        self._add(nll, target != self.ignore_index)

    def update_nll(
        self,
        nll: Tensor,
        mask: Tensor | bool | None = None,
        *,
        target: Tensor | None = None,
    ) -> None:
        """Add known NLL of any shape; ``target`` and ``mask`` as in ``Perplexity.update``."""
        kept = scored("nll", nll, target, self.ignore_index, mask)
        # as torchmetrics does around update
        self._computed, self._update_count = None, self._update_count + 1
        self._add(nll, torch.ones_like(nll, dtype=torch.bool) if kept is None else kept)

    @torch.no_grad()
    def _add(self, nll: Tensor, kept: Tensor) -> None:
        self.nll = self.nll + float64_sum(torch.where(kept, nll, 0.0)).to(self.nll.device)
        self.tokens = self.tokens + kept.sum()

    def _apply(self, fn, exclude_state=()):
        device = fn(torch.zeros(1, device=self.device)).device.type
        return super()._apply(fn, exclude_state if has_float64(device) else (*exclude_state, "nll"))

    def compute(self) -> Tensor:
        return (self.nll / self.tokens.to(self.nll.device)).exp()
