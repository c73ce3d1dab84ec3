"""A vocabulary matrix sharded by rows over ranks.

Each rank sums over its own rows, and one small collective merges the sums: Megatron-LM's
vocabulary-parallel cross-entropy (arXiv:1909.08053) with the merge of the kernels' vocabulary
spans. Each rank sends [5, N] values, never a logit.
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

# Local targets: of ignored tokens, and of tokens whose target is in another shard.
IGNORED, ELSEWHERE = -100, -1


def check_distributed(name: str) -> None:
    """Raise InputError, naming ``name``, unless this process is in a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise checks.wrong(name, "an initialised torch.distributed (init_process_group)", "none")


@dataclass(frozen=True)
class VocabularyShard:
    """Rows of the vocabulary matrix that this rank holds: from ``start`` on, of ``size`` in all.

    Rows follow the order of the ranks; a rank may hold none. ``input`` and ``target`` are the same
    on every rank, and targets are indices into the whole vocabulary. ``linear_bias`` is sharded as
    the weight; class weights are whole. The loss and the gradient of ``input`` are the same on
    every rank; the gradients of weight and bias are the shard's.

    Args:
        start: Index of the first row.
        size: Number of rows over all ranks, V.
        group: Process group of ``torch.distributed``. Default: None, all ranks.

    Example:
        >>> import torch
        >>> from perplexity import VocabularyShard, token_nll
        >>> _ = torch.distributed.init_process_group(
        ...     "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        ... )
        >>> weight, hidden, target = torch.zeros(100, 8), torch.zeros(2, 8), torch.tensor([1, 2])
        >>> shard = VocabularyShard.of(weight)
        >>> token_nll(hidden, weight, target, shard=shard)
        tensor([4.6052, 4.6052])
        >>> shard.check(hidden, target, rows=100)
        >>> local, own = shard.local_target(target, rows=100, ignore_index=-100)
        >>> shard.gather(hidden).shape, shard.replicated(hidden).shape
        (torch.Size([1, 2, 8]), torch.Size([2, 8]))
        >>> sums = torch.tensor([[0.0, 0.0], [100.0, 100.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        >>> shard.merge(sums, target, own, -100, "torch")[1]  # Σ exp(z − max)
        tensor([100., 100.])
        >>> shard.merge_choices(sums[0], torch.zeros(2), torch.tensor([7, 8]))
        (tensor([0., 0.]), tensor([7., 8.]))
        >>> torch.distributed.destroy_process_group()
    """

    start: int
    size: int
    group: object = None

    def __post_init__(self) -> None:
        # ``check`` compares the ranges over all ranks: a rank that raised alone would leave the
        # others waiting.
        for name in ("start", "size"):
            object.__setattr__(self, name, checks.integer(name, getattr(self, name)))

    @classmethod
    def of(cls, linear_weight: Tensor, group=None) -> VocabularyShard:
        """Return the shard of this rank's rows, by one collective over ``group``.

        Once per model is enough, not once per step.

        Args:
            linear_weight: This rank's rows [V_rank, D].
            group: Process group. Default: None, all ranks.

        Returns:
            The shard.

        Raises:
            InputError: ``torch.distributed`` is not initialised.
            InputTypeError: ``linear_weight`` is no tensor.
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
        """Return targets as rows of this shard, and which targets are in this shard.

        Args:
            target: Class indices [N] into the whole vocabulary.
            rows: Number of rows of this shard.
            ignore_index: Class index that is not scored.

        Returns:
            Rows [N], with IGNORED for ignored targets and ELSEWHERE for those of other shards; bool
            [N], True for targets of this shard.
        """
        own = (target >= self.start) & (target < self.start + rows) & (target != ignore_index)
        local = torch.where(own, target - self.start, ELSEWHERE)
        return torch.where(target == ignore_index, IGNORED, local), own

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensor of every rank, differentiable.

        The gradient of a rank's tensor is that of its own part of the result.

        Args:
            tensor: Tensor [...] of the same shape on every rank.

        Returns:
            Tensor [ranks, ...].
        """
        return _Gather.apply(tensor, self.group)

    def replicated(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` with a gradient that is summed over the ranks.

        Each rank computes only the gradient that its own rows contribute.

        Args:
            tensor: Tensor that is the same on every rank.

        Returns:
            View of the tensor.
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
        """Return the whole vocabulary's sums [5, N] from this rank's.

        Args:
            sums: This rank's sums [5, N].
            target: Class indices [N] into the whole vocabulary.
            own: Bool [N], True for targets of this shard.
            ignore_index: Class index that is not scored.
            backend: "torch" or "triton".
            weight_sum: Σ w of this rank's rows, a scalar tensor, where ``LOGIT_SUM`` is needed.
                Default: None.

        Returns:
            Sums [5, N], the same on every rank.
        """
        rows = list(sums.unbind())
        rows[TARGET] = torch.where(own, rows[TARGET], 0.0)
        parts = self.gather(torch.stack(rows)).movedim(0, 1).contiguous()
        weights = None if weight_sum is None else self.gather(weight_sum)
        return operators.merge(parts, target, weights, self.size, ignore_index, backend)

    def merge_choices(self, maximum: Tensor, above: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Return rank and prediction over the whole vocabulary.

        Of equal largest logits, the first column is predicted.

        Args:
            maximum: Largest logit [N] of this shard.
            above: Number of this shard's logits above the target's, [N].
            best: Row of this shard's largest logit, [N].

        Returns:
            Number of logits above the target's [N]; column of the largest logit [N].
        """
        parts = self.gather(torch.stack([above, best + self.start]))
        maxima = self.gather(maximum)
        column = torch.where(maxima == maxima.amax(0), parts[:, 1], self.size)
        return parts[:, 0].sum(0), column.amin(0)

    def check(self, input: Tensor, target: Tensor, rows: int) -> None:
        """Raise unless ranks have equal inputs and targets, and their rows follow each other.

        Args:
            input: Hidden states.
            target: Class indices.
            rows: Number of rows of this shard.

        Raises:
            InputError: Inputs or targets differ, or the shards do not make up ``size`` rows in
                order.
        """
        # Compared as bits, in which NaN equals itself.
        bits = input.detach().double().sum().view(torch.int64)
        weights = torch.arange(1, target.numel() + 1, device=target.device)
        numbers = torch.tensor([self.start, rows, self.size, input.numel()], device=target.device)
        parts = self.gather(
            torch.cat([numbers, torch.stack([bits, (target.reshape(-1) * weights).sum()])])
        )
        if not bool((parts[:, 2:] == parts[0, 2:]).all()):
            raise InputError(
                "input and target: expected the same on every rank of a sharded linear_weight, got "
                "different ones; a weight that is sharded over data-parallel ranks (FSDP) is to be "
                "gathered first, by full_tensor()"
            )
        counts = parts[:, 1].tolist()
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        if parts[:, 0].tolist() != starts or sum(counts) != self.size:
            raise InputError(
                f"shard: expected starts {starts} and size {sum(counts)} for ranks of {counts} "
                f"rows, got {parts[:, 0].tolist()} and {self.size}"
            )


class _Gather(torch.autograd.Function):
    """Tensors of all ranks, stacked; the gradient is that of this rank's part."""

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
    """A tensor whose gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, upstream):
        # Summed in float32 or wider and rounded once.
        total = upstream.to(torch.promote_types(upstream.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(upstream.dtype), None


def local(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabularyShard | None]:
    """Return this rank's tensors of a head, and their shard.

    A DTensor weight brings its shard.
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
    """Return whether ``tensor`` is a DTensor."""
    return getattr(tensor, "device_mesh", None) is not None


def _localised(
    input: Tensor, linear_weight: DTensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabularyShard]:
    """Return DTensors as this rank's tensors, and their shard.

    Gradients come back as DTensors.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh = linear_weight.device_mesh
    if mesh.ndim != 1 or linear_weight.placements[0] != Shard(0):
        raise InputError(
            "linear_weight: expected a DTensor sharded over its rows, [Shard(0)] on a mesh of one "
            f"dimension, got {list(linear_weight.placements)} on {mesh.ndim}; gather it with "
            "full_tensor() or take to_local()"
        )
    for name, tensor, placement in (
        ("input", input, Replicate()),
        ("linear_bias", linear_bias, Shard(0)),
    ):
        if is_dtensor(tensor) and (tensor.device_mesh != mesh or tensor.placements[0] != placement):
            raise InputError(
                f"{name}: expected {placement} on the mesh of linear_weight, "
                f"got {list(tensor.placements)}; redistribute it"
            )
    if linear_bias is not None and not is_dtensor(linear_bias):
        raise InputError(
            "linear_bias: expected a DTensor sharded as linear_weight, got a plain tensor"
        )
    vocabulary, ranks, rank = linear_weight.shape[0], mesh.size(), mesh.get_local_rank()
    rows = -(-vocabulary // ranks)  # DTensor shards as torch.chunk splits
    shard = VocabularyShard(min(rank * rows, vocabulary), vocabulary, mesh.get_group())
    return (
        input.to_local() if is_dtensor(input) else input,
        linear_weight.to_local(),
        linear_bias.to_local() if is_dtensor(linear_bias) else None,
        shard,
    )
