"""What the public functions take, checked once and in one place: an error names the argument, what was expected, what came."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks, parallel
from .checks import expect
from .errors import InputError, InputTypeError
from .kernels import operators, reference
from .kernels.dispatch import Plan, Rule, default_backend, triton_available
from .kernels.dispatch import plan as plan_of
from .parallel import VocabularyShard

REDUCTIONS = ("none", "mean", "sum")
BACKENDS = ("triton", "torch")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING_DTYPES = (*TRITON_DTYPES, torch.float64)
IGNORE_INDEX = -100
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class LossOptions:
    """How per-token sums become a loss; the meaning of each is the public functions'."""

    reduction: str = "mean"
    ignore_index: int | None = IGNORE_INDEX
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0
    memory_limit: int | None = None

    def __post_init__(self):
        checks.choice("reduction", self.reduction, REDUCTIONS)
        object.__setattr__(self, "ignore_index", ignored_label(self.ignore_index))
        object.__setattr__(self, "label_smoothing", checks.scalar_of(self.label_smoothing))
        checks.number("label_smoothing", self.label_smoothing, "a value in [0, 1]", 0.0, 1.0)
        check_logit_rule(self.softcap, self.logit_scale)
        checks.number("z_loss", self.z_loss, "a finite value of 0 or more", 0.0)
        bytes_, most = "None or a positive number of bytes", 2**63 - 1
        limit = checks.optional(checks.integer, "memory_limit", self.memory_limit, bytes_, 1, most)
        object.__setattr__(self, "memory_limit", limit)

    @property
    def memory(self) -> int:
        """As the operators take it: 0 for their own default."""
        return self.memory_limit or 0

    def rule(self, *, with_logit_sum: bool = False, with_exp_shift: bool = False) -> Rule:
        """Return what of these options the kernels take, and which sums they are asked for."""
        return Rule(self.ignore_index, self.softcap, self.logit_scale, with_logit_sum, with_exp_shift)


def check_logit_rule(softcap: object, logit_scale: object, side: str = "") -> None:
    """Raise unless a head's softcap and scale can be used; ``side`` ends the arguments' names."""
    positive = "None or a positive finite value"
    checks.optional(checks.number, f"softcap{side}", softcap, positive, above=0.0)
    checks.number(f"logit_scale{side}", logit_scale)


def ignored_label(value: object) -> int:
    """Return an ``ignore_index`` as int; None is torch's default."""
    if value is None:
        return IGNORE_INDEX
    index = checks.integer("ignore_index", value, "an integer or None")
    expect(-(2**63) <= index < 2**63, "ignore_index", "an integer of 64 bits", index)
    return index


def check_backend(backend: object, source: str = "backend") -> None:
    """Raise unless ``backend`` is None or one that is installed, whatever tensors will come."""
    if backend is None:
        return
    checks.choice(source, backend, BACKENDS, f"one of {', '.join(BACKENDS)} or None")
    if backend == "triton" and not triton_available():
        got = "'triton' was asked for, but triton is not installed; 'torch' needs only torch"
        raise InputError(f"{source}: {got}")


def choose_backend(backend: str | None, tensor: Tensor) -> str:
    """Return ``backend``, the environment's PERPLEXITY_BACKEND, or the ``default_backend`` for a tensor.

    One that is named is taken as it is: ValueError where it cannot run.
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
                f"{source}: 'triton' needs a GPU, got CPU tensors; use 'torch', or set TRITON_INTERPRET=1 before "
                "triton is imported to interpret the kernels"
            )
    if backend == "triton" and tensor.dtype not in TRITON_DTYPES:
        # As the kernels say it, before a command line comes to them: their own TypeError would look like a bug there.
        raise InputTypeError(
            f"{source}: 'triton' takes an input of float32, float16 or bfloat16, got {tensor.dtype}; "
            "'torch' takes any floating dtype"
        )
    return backend


def check_dense(name: str, tensor: object) -> None:
    """Raise unless ``tensor`` is a tensor whose values lie in memory by strides."""
    expect(isinstance(tensor, Tensor), name, "a tensor", type(tensor).__name__, InputTypeError)
    dense = tensor.layout is torch.strided and not tensor.is_nested
    layout = str(tensor.layout) if tensor.layout is not torch.strided else "a nested tensor"
    expect(dense, name, "a dense tensor (to_dense(), or padding)", layout, InputTypeError)


def check_floating(name: str, tensor: object) -> None:
    check_dense(name, tensor)
    expect(tensor.is_floating_point(), name, "a floating dtype", tensor.dtype, InputTypeError)
    _check_width(name, tensor.dtype)


def _check_width(name: str, dtype: torch.dtype) -> None:
    """Raise for a floating dtype of 8 bits or fewer, whose scale is kept somewhere else."""
    known = "float32, float64, bfloat16 or float16 (dequantise it first)"
    expect(dtype in FLOATING_DTYPES, name, known, dtype, InputTypeError)


def _check_target(target: object, classes: tuple, probabilities: tuple, device: torch.device) -> None:
    """Class indices in the shape ``classes``, or class probabilities in the shape ``probabilities``."""
    check_dense("target", target)
    if target.is_floating_point():
        _check_width("target", target.dtype)
        expect(
            tuple(target.shape) == probabilities,
            "target",
            f"shape {probabilities} of class probabilities (or {classes} of class indices, int64)",
            f"{tuple(target.shape)} of {target.dtype}",
            InputError if tuple(target.shape) != classes else InputTypeError,
        )
    else:
        expect(
            target.dtype in INDEX_DTYPES,
            "target",
            "int64 class indices (or int32, int16, int8, uint8), or class probabilities",
            target.dtype,
            InputTypeError,
        )
        expect(
            tuple(target.shape) == classes, "target", f"shape {classes}, as input without classes", tuple(target.shape)
        )
    expect(target.device == device, "target", f"a tensor on {device}, as input", target.device)


def check_vector(name: str, vector: Tensor | None, entries: int, device: torch.device) -> None:
    if vector is None:
        return
    check_floating(name, vector)
    expect(tuple(vector.shape) == (entries,), name, f"shape ({entries},), one value a class", tuple(vector.shape))
    expect(vector.device == device, name, f"a tensor on {device}, as input", vector.device)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Refuse tensors that carry a tangent."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            operators.refuse_forward_mode()


def cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, operands of a matrix product in its dtype; as torch, float64 stays what it is."""
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def widened(input: Tensor, linear_weight: Tensor) -> Tensor:
    """Return 16-bit hidden states in float32 where the head is float32, unchanged elsewhere.

    No number changes; the products are float32's.
    """
    wide = linear_weight.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)
    return input.float() if wide else input


def check_head(names: tuple[str, str, str], input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """input [..., D], linear_weight [V, D] of one dtype and device, linear_bias [V]."""
    input_name, weight_name, bias_name = names
    expect(input.dim() >= 1, input_name, "shape [..., D]", "a scalar")
    expect(linear_weight.dim() == 2, weight_name, "shape [V, D]", tuple(linear_weight.shape))
    expect(
        input.shape[-1] == linear_weight.shape[1],
        weight_name,
        f"shape [V, {input.shape[-1]}] for an {input_name} of {tuple(input.shape)}",
        tuple(linear_weight.shape),
    )
    expect(input.shape[-1] > 0, input_name, "a hidden size of 1 or more", tuple(input.shape))
    expect(
        input.dtype == linear_weight.dtype,
        weight_name,
        f"{input.dtype}, the dtype of {input_name} (or float32 for a 16-bit one)",
        linear_weight.dtype,
        InputTypeError,
    )
    expect(
        linear_weight.device == input.device,
        weight_name,
        f"a tensor on {input.device}, as {input_name}",
        linear_weight.device,
    )
    check_vector(bias_name, linear_bias, linear_weight.shape[0], input.device)


def check_class_weights(weight: Tensor | None, entries: int | None = None) -> None:
    """Raise unless ``weight`` is None or class weights [V]; None: any number of ``entries``."""
    if weight is None:
        return
    check_floating("weight", weight)
    of = "V" if entries is None else entries
    fits = weight.dim() == 1 and entries in (None, weight.shape[0])
    expect(fits, "weight", f"shape ({of},), one value a class", tuple(weight.shape))
    free = not weight.requires_grad
    expect(free, "weight", "class weights without gradient", "a tensor that requires grad")


def class_weights(weight: Tensor | None, entries: int, input: Tensor) -> Tensor | None:
    """As the kernels read them: contiguous, in the dtype of the sums."""
    if weight is None:
        return None
    check_class_weights(weight, entries)
    check_vector("weight", weight, entries, input.device)
    return weight.to(torch.promote_types(input.dtype, torch.float32)).contiguous()


def check_round_logits(value: object) -> None:
    checks.flag("round_logits", value)


def check_shift(shift: object) -> int:
    """Return the positions that targets move by; False and True are 0 and 1."""
    expected = "False, True or a number of positions, 0 or more"
    return int(shift) if isinstance(shift, bool) else checks.integer("shift", shift, expected, 0)


def check_validate(validate: object) -> None:
    checks.optional(checks.flag, "validate", validate, "True, False or None")


def _validates(validate: bool | None, device: torch.device) -> bool:
    check_validate(validate)
    return device.type == "cpu" if validate is None else validate


@dataclass(frozen=True)
class Target:
    """Targets as the kernels take them, and the shape of a result per token."""

    flat: Tensor  # int [N], or class probabilities [N, V]
    shape: tuple[int, ...]
    shift: int = 0

    @property
    def probabilities(self) -> bool:
        return self.flat.is_floating_point()

    def unflatten(self, per_token: Tensor) -> Tensor:
        """[N] in the shape of the targets that were scored."""
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
    """Checked and flattened; ``shift`` moves targets left by so many positions of the last dimension, and ignores the end.

    Hidden states stay where they are: the last ones of each sequence meet ``ignore_index``.
    """
    validated = _validates(validate, device)
    _check_target(target, classes, probabilities, device)
    shift = check_shift(shift)
    if target.is_floating_point():
        expect(not shift, "shift", "0 with class probabilities (shift them yourself)", shift)
        # As torch: probabilities know no ignored class, and a negative one is none.
        negative = options.ignore_index < 0
        expect(negative, "ignore_index", "None or a negative number with class probabilities", options.ignore_index)
        return Target(target.movedim(class_dimension, -1).reshape(-1, vocabulary), classes)
    expect(not shift or len(classes) > 0, "shift", "0 for a target without dimensions", shift)
    if target.dtype not in (torch.int64, torch.int32) or not -(2**31) <= options.ignore_index < 2**31:
        target = target.long()
    if validated:
        # The first ones are nobody's targets.
        seen = (
            torch.cat([torch.full_like(target[..., :shift], options.ignore_index), target[..., shift:]], -1)
            if shift
            else target
        )
        target = operators.checked_target(seen, vocabulary, options.ignore_index)
    if shift:
        length = classes[-1]
        shifted = torch.full_like(target, options.ignore_index)
        shifted[..., : max(0, length - shift)] = target[..., shift:]
        target = shifted
    return Target(target.reshape(-1), classes, shift)


@dataclass(frozen=True)
class LinearInputs:
    """A head's inputs as the kernels take them: hidden [N, D], weight [rows, D], bias [rows], class weights [V]."""

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
        check_round_logits(round_logits)
        check_floating("input", input)
        check_floating("linear_weight", linear_weight)
        checks.optional(check_floating, "linear_bias", linear_bias)
        parallel.check_shard(shard)
        if parallel.is_dtensor(linear_weight):
            expect(shard is None, "shard", "None with a DTensor linear_weight, which says it itself", shard)
            input, linear_weight, linear_bias, shard = parallel.localise(input, linear_weight, linear_bias)
        expect(
            not parallel.is_dtensor(input),
            "input",
            "a plain tensor with a plain linear_weight",
            "a DTensor (take to_local())",
        )
        refuse_forward_mode(input, linear_weight, linear_bias)
        input, linear_weight = cast(input, linear_weight)
        input = widened(input, linear_weight)
        check_head(("input", "linear_weight", "linear_bias"), input, linear_weight, linear_bias)
        vocabulary = linear_weight.shape[0] if shard is None else shard.size
        expect(vocabulary > 0, "linear_weight", "at least one row", tuple(linear_weight.shape))
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
            expect(
                not prepared.probabilities, "target", "class indices with a sharded vocabulary", "class probabilities"
            )
            if _validates(validate, input.device):
                shard.check(input, target, linear_weight.shape[0])
        chosen = "torch" if backend is None and prepared.probabilities else choose_backend(backend, input)
        return cls(
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

    def plan(self, rule: Rule, weights: Tensor | None = None) -> Plan:
        """Choose the way of this call; ``weights`` are those of ``LOGIT_SUM``."""
        one_number = self.options.reduction != "none" and self.shard is None and not self.target.probabilities
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
        )

    def logits(self) -> Tensor:
        """Return the logits [N, V] in full, for what is as large as they are."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        rule = {"softcap": self.options.softcap, "logit_scale": self.options.logit_scale}
        return reference.logits(self.hidden.to(wide), self.weight.to(wide), bias, **rule)

    def sums(self, rule: Rule, weights: Tensor | None = None, plan: Plan | None = None) -> Tensor:
        """Return the five sums [5, N] over the whole vocabulary, differentiable.

        ``weights`` are those of ``LOGIT_SUM``, where the rule wants it. ``plan`` is chosen here where the caller has none.
        """
        target, hidden = self.target.flat, self.hidden
        if self.target.probabilities:
            target, rule = (
                target.new_zeros(target.shape[0], dtype=torch.int64),
                rule._replace(ignore_index=parallel.IGNORED),
            )
        if self.shard is not None:
            target, own = self.shard.local_target(target, self.weight.shape[0], rule.ignore_index)
            hidden, rule = self.shard.replicated(hidden), rule._replace(ignore_index=parallel.IGNORED)
            weights = None if weights is None else weights[self.shard.start :][: self.weight.shape[0]]
        weights = weights if rule.with_logit_sum else None
        plan = plan or self.plan(rule, weights)
        sums, _ = operators.linear_nll(hidden, self.weight, self.bias, target, weights, *rule, *plan)
        if self.shard is None:
            return sums
        weight_sum = None
        if rule.with_logit_sum:
            rows = self.weight.shape[0]
            weight_sum = sums.new_full((), rows) if weights is None else weights.sum()
        return self.shard.merge(sums, self.target.flat, own, self.options.ignore_index, self.backend, weight_sum)
