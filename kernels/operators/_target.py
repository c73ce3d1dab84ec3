"""``checked_target``: targets, or an error that names the first bad one. It waits for the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._schema import operator


@operator("(Tensor target, int vocabulary, int ignore_index) -> Tensor")
def checked_target(target: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """``target``, copied, or IndexError with the position of the first value outside [0,
    vocabulary) ∪ {ignore_index}.
    """
    invalid = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if invalid.any():
        position = tuple(invalid.nonzero()[0].tolist())
        raise IndexError(
            f"target: expected values in [0, {vocabulary}) or ignore_index ({ignore_index}), "
            f"got {int(target[position])} at position {position[0] if len(position) == 1 else position}"
        )
    return target.clone()


@checked_target.register_fake
def _(target, *_):
    return torch.empty_like(target)


@checked_target.register_vmap
def _(info, in_dims, target, *options):
    return checked_target(target.movedim(in_dims[0], 0), *options), 0
