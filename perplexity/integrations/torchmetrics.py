"""Perplexity as a ``torchmetrics.Metric``, for collections, checkpoints and several ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, tensor_checks
from ..errors import InputError, needing
from ..losses import cross_entropy
from ..metric import float64_sum, has_float64, scored

with needing(__name__, "integrations"):
    import torchmetrics


class Perplexity(torchmetrics.Metric):
    """Metric exp(Σ NLL / Σ tokens), the interface of ``torchmetrics.text.Perplexity``.

    Sums are in float64, and no softmax is held in memory. The sum stays on the CPU where the
    metric's device has no float64 (MPS).

    Args:
        ignore_index: Target of tokens that do not count; None: −100.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        InputError: ``ignore_index`` is no whole number.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(2, 3, 8), torch.tensor([[1, 5, 7], [0, 2, -100]]))
        >>> metric.compute()  # of a uniform guess among 8
        tensor(8.0000, dtype=torch.float64)
    """

    nll: Tensor  # a state of the metric
    tokens: Tensor  # likewise
    is_differentiable, higher_is_better, full_state_update = False, False, False

    def __init__(self, ignore_index: int | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.ignore_index = checks.ignored_label(ignore_index)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add the tokens of logits.

        Args:
            preds: Logits [..., V], floating.
            target: Class indices [...], integer.

        Raises:
            InputError: Shapes or dtypes do not fit, or a target is no class.
        """
        tensor_checks.floating("preds", preds)
        tensor_checks.dense("target", target)
        if not preds.dim():
            raise InputError("preds: expected logits [..., V], got a scalar")
        if preds.shape[:-1] != target.shape:
            raise InputError(
                f"target: expected the shape {tuple(preds.shape[:-1])} of preds' tokens, "
                f"got {tuple(target.shape)}"
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
        """Add the known NLL of tokens, such as ``token_nll`` returns, without logits.

        Args:
            nll: NLL in nats, of any shape.
            mask: Tokens that count, of the same shape; None: all.
            target: Class indices of the same shape: those of ``ignore_index`` do not count.

        Raises:
            InputError: Shapes or dtypes do not fit.

        Example:
            >>> metric = Perplexity()
            >>> metric.update_nll(torch.full((4,), 2.0), target=torch.tensor([3, 1, -100, 0]))
            >>> metric.compute()
            tensor(7.3891, dtype=torch.float64)
        """
        kept = scored("nll", nll, target, self.ignore_index, mask)
        # torchmetrics does the same around ``update``.
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
        """Return the perplexity, a float64 scalar; NaN before the first token."""
        return (self.nll / self.tokens.to(self.nll.device)).exp()
