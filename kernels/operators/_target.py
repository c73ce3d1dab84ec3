"""``checked_target``: targets, or an error that names the first bad one.

The check waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._schema import operator


@operator("(Tensor target, int vocabulary, int ignore_index) -> Tensor")
def checked_target(target: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """Return a copy of the targets; raise for the first outside [0, V) ∪ {ignore_index}.

    Args:
        target: Class indices, an integer tensor of any shape.
        vocabulary: Number of classes V.
        ignore_index: Class index that is not scored.

    Returns:
        Copy of ``target``.

    Raises:
        IndexError: A target is outside; the message has its position.

    Example:
        >>> checked_target(torch.tensor([1, 7]), 5, -100)
        Traceback (most recent call last):
            ...
        IndexError: target: expected values in [0, 5) or ignore_index (-100), got 7 at position 1
    """
    invalid = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if invalid.any():
        position = tuple(invalid.nonzero()[0].tolist())
        raise IndexError(
            f"target: expected values in [0, {vocabulary}) or ignore_index ({ignore_index}), "
            f"got {int(target[position])} at position "
            f"{position[0] if len(position) == 1 else position}"
        )
    return target.clone()


@checked_target.register_fake
def _(target, *_):
    return torch.empty_like(target)


@checked_target.register_vmap
def _(info, in_dims, target, *options):
    return checked_target(target.movedim(in_dims[0], 0), *options), 0
