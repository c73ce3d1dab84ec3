"""Prepared values of the public functions' arguments: options, targets, a head's inputs.

``checks.py`` raises the errors.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, parallel, tensor_checks
from .checks import IGNORE_INDEX, wrong
from .errors import InputError, InputTypeError
from .kernels import operators, reference
from .kernels.blocks import values_are_here
from .kernels.devices import why_not
from .kernels.dispatch import (
    BACKWARD_LIMIT,
    FORWARD_LIMIT,
    Plan,
    Rule,
    default_backend,
    triton_available,
)
from .kernels.dispatch import plan as plan_of
from .kernels.sums import MAX
from .parallel import VocabularyShard
from .per_token import TokenStatistics, statistics_of

REDUCTIONS = ("none", "mean", "sum")
BACKENDS = ("triton", "torch")
# Share of scored tokens above which their hidden states are not worth a copy.
MOST_SCORED = 7 / 8


@dataclass(frozen=True)
class LossOptions:
    """Options by which per-token sums become a loss.

    Their meaning is that of the public functions' arguments.
    """

    reduction: str = "mean"
    ignore_index: Any = IGNORE_INDEX  # int or None from the caller, then an int
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0
    memory_limit: int | None = None
    temperature: float = 1.0

    def __post_init__(self):
        checks.choice("reduction", self.reduction, REDUCTIONS)
        checks.logit_rule(self.softcap, self.logit_scale)
        checks.temperature(self.temperature)
        checks.number("z_loss", self.z_loss, "a finite value of 0 or more", 0.0)
        smoothing, limit = checks.scalar_of(self.label_smoothing), self.memory_limit
        checks.number("label_smoothing", smoothing, "a value in [0, 1]", 0.0, 1.0)
        if limit is not None:
            limit = checks.integer(
                "memory_limit", limit, "None or a positive number of bytes", 1, 2**63 - 1
            )
        prepared = {
            "ignore_index": checks.ignored_label(self.ignore_index),
            "label_smoothing": smoothing,
            "memory_limit": limit,
        }
        for name, value in prepared.items():
            object.__setattr__(self, name, value)

    @property
    def memory(self) -> int:
        """Return the limit in bytes as the operators take it: 0 for their own default."""
        return self.memory_limit or 0

    def rule(self, *, with_logit_sum: bool = False, with_exp_shift: bool = False) -> Rule:
        """Return the kernels' ``Rule``: their part of these options, and the sums needed.

        The temperature divides the logits: softcap · tanh(z / softcap) / T is
        (softcap / T) · tanh((z / T) / (softcap / T)).
        """
        softcap = None if self.softcap is None else self.softcap / self.temperature
        scale = self.logit_scale / self.temperature
        return Rule(self.ignore_index, softcap, scale, with_logit_sum, with_exp_shift)


def check_backend(backend: object, source: str = "backend") -> None:
    """Raise unless ``backend`` is None or the name of an installed backend."""
    if backend is None:
        return
    checks.choice(source, backend, BACKENDS, f"one of {', '.join(BACKENDS)} or None")
    if backend == "triton" and not triton_available():
        got = "'triton' was asked for, but triton is not installed; 'torch' needs only torch"
        raise InputError(f"{source}: {got}")


def choose_backend(backend: str | None, tensor: Tensor) -> str:
    """Return ``backend``, else the environment's PERPLEXITY_BACKEND, else the default for a tensor.

    Raises:
        InputError: The named backend cannot run on this device.
        InputTypeError: The named backend does not take the tensor's dtype.
    """
    source = "backend"
    if backend is None and os.environ.get("PERPLEXITY_BACKEND"):
        backend, source = os.environ["PERPLEXITY_BACKEND"], "PERPLEXITY_BACKEND"
    if backend is None:
        return default_backend(tensor)
    check_backend(backend, source)
    if backend == "triton" and tensor.device.type == "cpu":
        from .kernels.gpu.launch import INTERPRETED

        if not INTERPRETED:
            raise InputError(
                f"{source}: 'triton' needs a GPU, got CPU tensors; use 'torch', "
                "or set TRITON_INTERPRET=1 before triton is imported to interpret the kernels"
            )
    if backend == "triton" and tensor.is_cuda and (reason := why_not(tensor.device)):
        raise InputError(f"{source}: 'triton' {reason}; use 'torch'")
    if backend == "triton" and tensor.dtype not in tensor_checks.TRITON_DTYPES:
        # The kernels raise a TypeError of their own, which a command line would report as a bug.
        raise InputTypeError(
            f"{source}: 'triton' takes an input of float32, float16 or bfloat16, "
            f"got {tensor.dtype}; 'torch' takes any floating dtype"
        )
    return backend


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError for tensors that carry a forward-mode tangent."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            operators.refuse_forward_mode()


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return operands of a matrix product in autocast's dtype, where it is on.

    float64 stays as it is, as in torch.
    """
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def widened(input: Tensor, linear_weight: Tensor) -> Tensor:
    """Return 16-bit hidden states in float32 where the head is float32; others unchanged.

    Widening is exact; the products are then float32's.
    """
    wide = linear_weight.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)
    return input.float() if wide else input


def class_weights(weight: Tensor | None, entries: int, input: Tensor) -> Tensor | None:
    """Return class weights as the kernels read them: contiguous, in the dtype of the sums."""
    if weight is None:
        return None
    tensor_checks.class_weights(weight, entries)
    tensor_checks.vector("weight", weight, entries, input.device)
    return weight.to(torch.promote_types(input.dtype, torch.float32)).contiguous()


def validates(validate: bool | None, device: torch.device) -> bool:
    """Return whether to check targets: by default where that does not wait for a device."""
    return device.type == "cpu" if validate is None else validate


@dataclass(frozen=True)
class Target:
    """Targets as the kernels take them, and the shape of a per-token result.

    ``places`` [N] are those of the targets among all that the caller gave; None: they are all.
    """

    flat: Tensor  # int [N], or class probabilities [N, V]
    shape: tuple[int, ...]
    shift: int = 0
    places: Tensor | None = None

    @property
    def probabilities(self) -> bool:
        """Return whether the targets are class probabilities."""
        return self.flat.is_floating_point()

    def unflatten(self, per_token: Tensor, ignored: int = 0) -> Tensor:
        """Return values [N] in the shape of the caller's targets, ``ignored`` where none is."""
        if self.places is not None:
            everywhere = per_token.new_full((math.prod(self.shape),), ignored)
            per_token = everywhere.index_copy(0, self.places, per_token)
        result = per_token.reshape(self.shape)
        return result[..., : max(0, self.shape[-1] - self.shift)] if self.shift else result


def prepare_target(
    target: Tensor,
    *,
    classes: tuple,
    probabilities: tuple,
    class_dimension: int,
    vocabulary: int,
    device: torch.device,
    options: LossOptions,
    shift: int,
    validate: bool | None,
) -> Target:
    """Return targets checked and flattened.

    ``shift`` moves them left along the last dimension and ignores the end. Hidden states stay where
    they are: the last ones of each sequence meet ``ignore_index``.
    """
    checks.validate(validate)
    tensor_checks.target(target, classes, probabilities, device, options.ignore_index)
    shift = checks.shift(shift)
    if target.is_floating_point():
        if shift:
            raise wrong("shift", "0 with class probabilities (shift them yourself)", shift)
        return Target(target.movedim(class_dimension, -1).reshape(-1, vocabulary), classes)
    if shift and not classes:
        raise wrong("shift", "0 for a target without dimensions", shift)
    if (
        target.dtype not in (torch.int64, torch.int32)
        or not -(2**31) <= options.ignore_index < 2**31
    ):
        target = target.long()
    if validates(validate, device):
        scored = target
        if shift:  # no position is scored with the first ``shift`` targets
            first = torch.full_like(target[..., :shift], options.ignore_index)
            scored = torch.cat([first, target[..., shift:]], -1)
        target = operators.checked_target(scored, vocabulary, options.ignore_index)
    if shift:
        length = classes[-1]
        shifted = torch.full_like(target, options.ignore_index)
        shifted[..., : max(0, length - shift)] = target[..., shift:]
        target = shifted
    return Target(target.reshape(-1), classes, shift)


@dataclass(frozen=True)
class LinearInputs:
    """Inputs of a head as the kernels take them.

    Hidden states are [N, D], weight [rows, D], bias [rows], class weights [V]; ``rows`` is V, or
    the shard's part of V.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Target
    class_weight: Tensor | None
    vocabulary: int
    options: LossOptions
    backend: str
    shard: VocabularyShard | None
    round_logits: bool

    @classmethod
    def prepare(
        cls,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None,
        weight: Tensor | None,
        options: LossOptions,
        backend: str | None,
        shift: int = 0,
        validate: bool | None = None,
        shard: VocabularyShard | None = None,
        round_logits: bool = False,
    ) -> LinearInputs:
        """Check the arguments of a public function and return them as the kernels take them."""
        checks.flag("round_logits", round_logits)
        tensor_checks.floating("input", input)
        tensor_checks.floating("linear_weight", linear_weight)
        if linear_bias is not None:
            tensor_checks.floating("linear_bias", linear_bias)
        input, linear_weight, linear_bias, shard = parallel.local(
            input, linear_weight, linear_bias, shard
        )
        refuse_forward_mode(input, linear_weight, linear_bias)
        input, linear_weight = cast(input, linear_weight)
        input = widened(input, linear_weight)
        tensor_checks.head(
            ("input", "linear_weight", "linear_bias"), input, linear_weight, linear_bias
        )
        vocabulary = linear_weight.shape[0] if shard is None else shard.size
        if vocabulary <= 0:
            raise wrong("linear_weight", "at least one row", tuple(linear_weight.shape))
        weight = class_weights(weight, vocabulary, input)
        leading = tuple(input.shape[:-1])
        prepared = prepare_target(
            target,
            classes=leading,
            probabilities=(*leading, vocabulary),
            class_dimension=-1,
            vocabulary=vocabulary,
            device=input.device,
            options=options,
            shift=shift,
            validate=validate,
        )
        if shard is not None:
            if prepared.probabilities:
                raise wrong(
                    "target", "class indices with a sharded vocabulary", "class probabilities"
                )
            if validates(validate, input.device):
                shard.check(input, target, linear_weight.shape[0])
        chosen = (
            "torch"
            if backend is None and prepared.probabilities
            else choose_backend(backend, input)
        )
        prepared_inputs = cls(
            input.reshape(-1, input.shape[-1]),
            linear_weight,
            linear_bias,
            prepared,
            weight,
            vocabulary,
            options,
            chosen,
            shard,
            round_logits,
        )
        return prepared_inputs.without_ignored()

    def without_ignored(self) -> LinearInputs:
        """Return the inputs of the scored tokens alone, where that spares work.

        On a CPU, where a look at the targets waits for nothing. The copy of the hidden states counts
        in the limit of temporary memory, and takes at most half of it.
        """
        hidden, target = self.hidden, self.target
        if (
            self.backend != "torch"
            or target.probabilities
            or not values_are_here(hidden)
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
        ):
            return self
        places = (target.flat != self.options.ignore_index).nonzero()[:, 0]
        copied = len(places) * hidden.shape[1] * hidden.element_size()
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        limit = self.options.memory or (BACKWARD_LIMIT if trains else FORWARD_LIMIT)
        if not 0 < len(places) <= MOST_SCORED * len(hidden) or copied > limit // 2:
            return self
        return replace(
            self,
            hidden=hidden.index_select(0, places),
            target=replace(target, flat=target.flat[places], places=places),
            options=replace(self.options, memory_limit=limit - copied),
        )

    def plan(
        self, rule: Rule, weights: Tensor | None = None, *, per_token: bool | None = None
    ) -> Plan:
        """Choose the plan of this call.

        ``weights`` are those of ``LOGIT_SUM``. ``per_token`` says whether values of tokens are
        returned; the default is what the reduction says.
        """
        one_number = (
            self.options.reduction != "none"
            and self.shard is None
            and not self.target.probabilities
        )
        return plan_of(
            rule,
            self.hidden,
            self.weight,
            self.bias,
            weights,
            backend=self.backend,
            rounded=self.round_logits,
            memory_limit=self.options.memory,
            total=one_number,
            per_token=self.options.reduction == "none" if per_token is None else per_token,
        )

    def logits(self) -> Tensor:
        """Return the full logits [N, V], for a derivative of that size."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        rule = self.options.rule()
        head = self.hidden.to(wide), self.weight.to(wide), bias
        return reference.logits(*head, softcap=rule.softcap, logit_scale=rule.logit_scale)

    def sums(self, rule: Rule, weights: Tensor | None = None, plan: Plan | None = None) -> Tensor:
        """Return the five sums [5, N] over the whole vocabulary, differentiable.

        ``weights`` are those of ``LOGIT_SUM``, where the rule asks for it. Without ``plan``, the
        plan is chosen here.
        """
        local = self._on_this_rank(rule, weights)
        plan = plan or self.plan(rule, local.weights)
        sums, _ = operators.linear_nll(*local.head, local.weights, *local.rule, *plan)
        return self._over_ranks(sums, local)

    def sums_and_choices(
        self, rule: Rule, weights: Tensor | None = None, *, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the five sums [5, N], differentiable but for the entropy, ranks and predictions.

        Ranks and predictions are int64 [N]. All three come from one sweep, and are over the whole
        vocabulary.
        """
        local = self._on_this_rank(rule, weights)
        with torch.no_grad():
            at_target = operators.target_logit(*local.head, *local.rule, *plan)
            if self.shard is not None:
                at_target = self.shard.gather(at_target).sum(0)  # 0 on all ranks but the target's
        sums, rank, predicted, _ = operators.linear_statistics(
            *local.head, at_target, local.weights, *local.rule, *plan
        )
        if self.shard is not None:
            rank, predicted = self.shard.merge_choices(sums[MAX].detach(), rank, predicted)
        return self._over_ranks(sums, local), rank, predicted

    def statistics(
        self, sums: Tensor, rank: Tensor, predicted: Tensor
    ) -> tuple[TokenStatistics, Tensor]:
        """Return the tokens' statistics and p(predicted) in the shape of the targets."""
        ignored = self.target.flat == self.options.ignore_index
        found, confidence = statistics_of(sums.detach(), rank, predicted, ignored)
        unflatten = self.target.unflatten
        per_token = TokenStatistics(
            unflatten(found.nll),
            unflatten(found.logsumexp),
            unflatten(found.entropy),
            unflatten(found.rank, ignored=-1),
            unflatten(found.predicted, ignored=-1),
        )
        return per_token, unflatten(confidence)

    def _on_this_rank(self, rule: Rule, weights: Tensor | None) -> _Local:
        """Return what this rank's operators take: for its rows of a sharded vocabulary."""
        target, hidden, own = self.target.flat, self.hidden, None
        if self.target.probabilities:
            target = target.new_zeros(target.shape[0], dtype=torch.int64)
            rule = rule._replace(ignore_index=parallel.IGNORED)
        if self.shard is not None:
            target, own = self.shard.local_target(target, self.weight.shape[0], rule.ignore_index)
            hidden = self.shard.replicated(hidden)
            rule = rule._replace(ignore_index=parallel.IGNORED)
            if weights is not None:
                weights = weights[self.shard.start :][: self.weight.shape[0]]
        head = hidden, self.weight, self.bias, target
        return _Local(head, weights if rule.with_logit_sum else None, rule, own)

    def _over_ranks(self, sums: Tensor, local: _Local) -> Tensor:
        """Return the sums over the whole vocabulary from those over this rank's rows."""
        if self.shard is None or local.own is None:
            return sums
        weight_sum = None
        if local.rule.with_logit_sum:
            rows = self.weight.shape[0]
            weight_sum = sums.new_full((), rows) if local.weights is None else local.weights.sum()
        return self.shard.merge(
            sums, self.target.flat, local.own, self.options.ignore_index, self.backend, weight_sum
        )


class _Local(NamedTuple):
    """Arguments of the operators on one rank.

    head: Hidden states, weight, bias and targets. weights: Those of ``LOGIT_SUM``. own: Whether a
    target is one of this rank's rows; None without a shard.
    """

    head: tuple[Tensor, Tensor, Tensor | None, Tensor]
    weights: Tensor | None
    rule: Rule
    own: Tensor | None
