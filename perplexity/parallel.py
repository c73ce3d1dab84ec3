"""A vocabulary matrix sharded by rows over ranks: each rank sums over its own rows, one small
collective merges the sums.

Megatron-LM's vocabulary-parallel cross-entropy (arXiv:1909.08053) with the merge of the kernels'
vocabulary spans: what travels is [5, N] a rank, never a logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .errors import InputError
from .kernels import operators
from .kernels.sums import TARGET

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

IGNORED, ELSEWHERE = -100, -1  # what a target is to a shard that does not hold it


def check_distributed(name: str) -> None:
    """InputError naming ``name`` where this process is in no group of ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        raise checks.wrong(name, "an initialised torch.distributed (init_process_group)", "none")


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the vocabulary matrix this rank holds: ``start`` and on, of ``size`` over the
    ranks of ``group``.

    Rows follow the order of ranks; a rank may hold none. ``input`` and ``target`` are the same on
    every rank, targets are numbered over the whole vocabulary, ``linear_bias`` is sharded as the
    weight, class weights are whole. The loss and the gradient of ``input`` are the same on every
    rank; those of weight and bias are the shard's.
    """

    start: int
    size: int
    group: object = None

    def __post_init__(self) -> None:
        # Ranges are compared over the ranks by ``check``: one that raised alone would leave the
        # others waiting.
        for name in ("start", "size"):
            object.__setattr__(self, name, checks.integer(name, getattr(self, name)))

    @classmethod
    def of(cls, linear_weight: Tensor, group=None) -> VocabularyShard:
        """From this rank's rows [V_rank, D], by one collective over ``group`` (None: all ranks);
        once a model, not once a step.
        """
        checks.instance("linear_weight", linear_weight, Tensor, "a tensor")
        check_distributed("VocabularyShard.of")
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        rows = [
            torch.zeros(1, dtype=torch.int64, device=linear_weight.device) for _ in range(ranks)
        ]
        dist.all_gather(rows, rows[0].new_tensor([linear_weight.shape[0]]), group=group)
        counts = [int(count) for count in rows]
        return cls(sum(counts[:rank]), sum(counts), group)

    def local_target(self, target: Tensor, rows: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Targets as rows of this shard (IGNORED, ELSEWHERE where they are not), and which are its
        own.
        """
        own = (target >= self.start) & (target < self.start + rows) & (target != ignore_index)
        local = torch.where(own, target - self.start, ELSEWHERE)
        return torch.where(target == ignore_index, IGNORED, local), own

    def gather(self, tensor: Tensor) -> Tensor:
        """The ``tensor`` [...] of every rank, [ranks, ...], differentiable: a rank's gradient is
        that of its own part.
        """
        return _Gather.apply(tensor, self.group)

    def replicated(self, tensor: Tensor) -> Tensor:
        """``tensor``, whose gradient is the sum over ranks: each sees only what its own rows make
        of it.
        """
        return _Replicated.apply(tensor, self.group)

    def merge(
        self,
        sums: Tensor,
        target: Tensor,
        own: Tensor,
        ignore_index: int,
        backend: str,
        weight_sum: Tensor | None = None,
    ) -> Tensor:
        """The whole vocabulary's sums [5, N] from this rank's; ``weight_sum``: Σ w of its rows,
        where ``LOGIT_SUM`` counts.
        """
        rows = list(sums.unbind())
        rows[TARGET] = torch.where(own, rows[TARGET], 0.0)
        parts = self.gather(torch.stack(rows)).movedim(0, 1).contiguous()
        weights = None if weight_sum is None else self.gather(weight_sum)
        return operators.merge(parts, target, weights, self.size, ignore_index, backend)

    def merge_choices(self, maximum: Tensor, above: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Rank and prediction over the whole vocabulary; of equal largest logits the first
        column's.
        """
        parts = self.gather(torch.stack([above, best + self.start]))
        maxima = self.gather(maximum)
        column = torch.where(maxima == maxima.amax(0), parts[:, 1], self.size)
        return parts[:, 0].sum(0), column.amin(0)

    def check(self, input: Tensor, target: Tensor, rows: int) -> None:
        """ValueError where ranks have different inputs or targets, or their rows do not follow each
        other up to ``size``.
        """
        # By bits: a sum of floats could agree by rounding, and NaN differs from itself.
        bits = input.detach().double().sum().view(torch.int64)
        weights = torch.arange(1, target.numel() + 1, device=target.device)
        numbers = torch.tensor([self.start, rows, self.size, input.numel()], device=target.device)
        parts = self.gather(
            torch.cat([numbers, torch.stack([bits, (target.reshape(-1) * weights).sum()])])
        )
        if not bool((parts[:, 2:] == parts[0, 2:]).all()):
            raise InputError(
                "input and target: expected the same on every rank of a sharded linear_weight, got different ones; "
                "a weight that is sharded over data-parallel ranks (FSDP) is to be gathered first, by full_tensor()"
            )
        counts = parts[:, 1].tolist()
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        if parts[:, 0].tolist() != starts or sum(counts) != self.size:
            raise InputError(
                f"shard: expected starts {starts} and size {sum(counts)} for ranks of {counts} rows, "
                f"got {parts[:, 0].tolist()} and {self.size}"
            )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.rank = dist.get_rank(group)
        parts = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, upstream):
        return upstream[ctx.rank], None


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, upstream):
        # Added in float32 at least, rounded once.
        total = upstream.to(torch.promote_types(upstream.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(upstream.dtype), None


def local(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabularyShard | None]:
    """Return a head's tensors as this rank holds them, and their shard; a DTensor weight says its
    own.
    """
    if shard is not None:
        checks.instance("shard", shard, VocabularyShard, "a VocabularyShard or None")
        check_distributed("shard")
    if is_dtensor(linear_weight):
        if shard is not None:
            raise checks.wrong(
                "shard", "None with a DTensor linear_weight, which says it itself", shard
            )
        input, linear_weight, linear_bias, shard = _localised(input, linear_weight, linear_bias)
    if is_dtensor(input):
        raise checks.wrong(
            "input", "a plain tensor with a plain linear_weight", "a DTensor (take to_local())"
        )
    return input, linear_weight, linear_bias, shard


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    return getattr(tensor, "device_mesh", None) is not None


def _localised(
    input: Tensor, linear_weight: DTensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabularyShard]:
    """Return DTensors as this rank's tensors and the shard they are of; gradients come back as
    DTensors.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh = linear_weight.device_mesh
    if mesh.ndim != 1 or linear_weight.placements[0] != Shard(0):
        raise InputError(
            "linear_weight: expected a DTensor sharded over its rows, [Shard(0)] on a mesh of one dimension, "
            f"got {list(linear_weight.placements)} on {mesh.ndim}; gather it with full_tensor() or take to_local()"
        )
    for name, tensor, placement in (
        ("input", input, Replicate()),
        ("linear_bias", linear_bias, Shard(0)),
    ):
        if is_dtensor(tensor) and (tensor.device_mesh != mesh or tensor.placements[0] != placement):
            raise InputError(
                f"{name}: expected {placement} on the mesh of linear_weight, got {list(tensor.placements)}; redistribute it"
            )
    if linear_bias is not None and not is_dtensor(linear_bias):
        raise InputError(
            "linear_bias: expected a DTensor sharded as linear_weight, got a plain tensor"
        )
    vocabulary, ranks, rank = linear_weight.shape[0], mesh.size(), mesh.get_local_rank()
    rows = -(-vocabulary // ranks)  # DTensor shards as torch.chunk does
    shard = VocabularyShard(min(rank * rows, vocabulary), vocabulary, mesh.get_group())
    return (
        input.to_local() if is_dtensor(input) else input,
        linear_weight.to_local(),
        linear_bias.to_local() if is_dtensor(linear_bias) else None,
        shard,
    )
