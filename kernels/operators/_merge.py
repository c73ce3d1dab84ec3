"""``merge``: sums of parts of the vocabulary into those of the whole, and its derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sums import MAX
from ._derivatives import register_derivative
from ._schema import implementation, operator


@operator(
    "(Tensor partials, Tensor target, Tensor? weights, int vocabulary, int ignore_index, "
    "str backend) -> Tensor"
)
def merge(
    partials: Tensor,
    target: Tensor,
    weights: Tensor | None,
    vocabulary: int,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Fold the sums of parts of the vocabulary, [5, parts, N], into [5, N], in their order.

    Args:
        partials: Sums of the parts [5, parts, N].
        target: Class indices int [N].
        weights: Σ w of each part [parts], where ``LOGIT_SUM`` is needed; else None.
        vocabulary: Number of rows of the whole vocabulary, V.
        ignore_index: Class index that is not scored.
        backend: "torch" or "triton".

    Returns:
        Sums [5, N].

    Example:
        >>> halves = torch.tensor([[0.0, 0.0], [50.0, 50.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        >>> merge(halves[:, :, None], torch.tensor([1]), None, 100, -100, "torch")[1]
        tensor([100.])
    """
    return implementation(backend).merge(
        partials, target, weights, vocabulary=vocabulary, ignore_index=ignore_index
    )


@merge.register_fake
def _(partials, *_):
    return partials.new_empty((partials.shape[0], partials.shape[2]))


def _setup(ctx, inputs, output):
    partials, target, _, _, ctx.ignore_index, _ = inputs
    ctx.save_for_backward(partials, target, output)


def _backward(ctx, upstream):
    """Return the derivative by ``partials``, with the maxima as constants.

    S = Σ s · e^(m − M) and U = Σ e^(m − M) · (u + s · (m − M)), as in ``sums.merge``.
    """
    partials, target, sums = ctx.saved_tensors
    moved = torch.where(partials[1] > 0, partials[MAX] - sums[MAX], -torch.inf)
    decay = moved.exp()
    _, per_sum, per_target, per_logit, per_shift = upstream
    moved = torch.where(decay > 0, moved, 0.0)
    rows = torch.stack(
        [
            torch.zeros_like(decay),
            decay * (per_sum + per_shift * moved),
            per_target.expand_as(decay),
            per_logit.expand_as(decay),
            decay * per_shift,
        ]
    )
    return rows.masked_fill(target == ctx.ignore_index, 0.0), *([None] * 5)


register_derivative(merge, _setup, _backward)
