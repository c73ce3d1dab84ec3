"""Heads of transformers causal models: the last linear layer and the rule that follows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import InputError, theirs
from ..kernels import reference
from ..parallel import is_dtensor


@dataclass(frozen=True)
class Head:
    """A head: logits = softcap · tanh((logit_scale · (hidden @ weightᵀ + bias)) / softcap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float = 1.0
    quantised: bool = False  # the model's own layer may compute in 16 bits inside

    def arguments(self) -> dict:
        """Return the keywords of ``token_nll`` and ``token_statistics``."""
        return {"linear_bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the float32 logits [n, V] of ``hidden`` [n, D]; meant for a few positions."""
        bias = None if self.bias is None else self.bias.float()
        rule = dict(softcap=self.softcap, logit_scale=self.logit_scale)
        with torch.autocast(hidden.device.type, enabled=False):
            return reference.logits(hidden.float(), self.weight.float(), bias, **rule)


# Names in configurations of the logits' factor (Cohere, Falcon H1), divisor (Granite) and softcap
# (Gemma, RecurrentGemma, xLSTM).
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Parts of other names for a factor, tried where the names above do not explain the logits.
FACTOR_WORDS = ("logit", "scal", "multipl", "mup", "temperature")


@dataclass(frozen=True)
class Rule:
    """Fields of a configuration that decide what follows the product; factors with exponents."""

    powers: tuple[tuple[str, int], ...]
    softcap: str | None
    columns: str | None = None  # field with the number of the head's rows that the logits have

    def head(self, config, weight: Tensor, bias: Tensor | None, quantised: bool = False) -> Head:
        """Return the head of these numbers under ``config``."""
        scale = 1.0
        for name, power in self.powers:
            scale *= getattr(config, name) ** power
        if self.columns is not None:
            columns = getattr(config, self.columns)
            weight, bias = weight[:columns], None if bias is None else bias[:columns]
        return Head(
            weight,
            bias,
            None if self.softcap is None else getattr(config, self.softcap),
            scale,
            quantised,
        )


# Rules by model class, where a model's own logits showed another one than its configuration's usual
# reading.
SHOWN: WeakKeyDictionary[type, Rule] = WeakKeyDictionary()


def usual_rule(config) -> Rule:
    """Return the rule of ``config`` by the names that most families use."""
    candidates = [(name, 1) for name in FACTORS] + [(name, -1) for name in DIVISORS]
    powers = tuple((name, power) for name, power in candidates if getattr(config, name, None))
    return Rule(powers, next((name for name in SOFTCAPS if getattr(config, name, None)), None))


def find_rule(model, head: Head, hidden: Tensor, logits: Tensor) -> None:
    """Find the rule that explains ``logits`` by ``hidden``, and store it for the model's class.

    The usual rule stays where it explains the logits. Otherwise each numeric field of the
    configuration is tried whose name speaks of a factor or a softcap. Logits that no rule explains
    are left to ``verify``.

    Args:
        model: A transformers model.
        head: The whole weight and bias; its rule is not used.
        hidden: Hidden states [n, D] of some positions.
        logits: The model's own logits [n, at most V] of the same positions.
    """
    config, rows = model.config.get_text_config(), head.weight.shape[0]
    usual, columns = usual_rule(config), None
    if logits.shape[-1] < rows:
        columns = next(
            (name for name, value in _numbers(config) if value == logits.shape[-1]), None
        )
        if columns is None:
            return
    SHOWN.pop(type(model), None)
    for rule in _rules(config, usual, columns):
        if _explains(rule.head(config, head.weight, head.bias, head.quantised), hidden, logits):
            if rule != usual:
                SHOWN[type(model)] = rule
            return


def _rules(config, usual: Rule, columns: str | None) -> Iterator[Rule]:
    """Yield the usual rule first, then others; with and without a softcap."""
    names = [
        name
        for name, value in _numbers(config)
        if value not in (0, 1) and any(word in name for word in FACTOR_WORDS) and "cap" not in name
    ]
    powers = [usual.powers, (), *(((name, power),) for name in names for power in (1, -1))]
    caps = [
        name for name, value in _numbers(config) if "logit" in name and "cap" in name and value > 0
    ]
    for softcap in dict.fromkeys((usual.softcap, None, *caps)):
        yield from (Rule(each, softcap, columns) for each in powers)


def _numbers(config) -> list[tuple[str, float]]:
    """Return the numeric fields of a configuration, flags excluded."""
    kinds = (int, float)
    return [
        (k, v) for k, v in vars(config).items() if isinstance(v, kinds) and not isinstance(v, bool)
    ]


def _explains(head: Head, hidden: Tensor, logits: Tensor) -> bool:
    """Return whether the head's logits of ``hidden`` are ``logits``, but for rounding."""
    return difference(head, hidden, logits)[0] <= tolerance(head, hidden, logits)


def difference(head: Head, hidden: Tensor, logits: Tensor) -> tuple[float, float]:
    """Return the largest relative and absolute difference of ``logits`` [n, V] from the head's.

    The head's logits are those of ``hidden`` [n, D]. The relative difference refers to the largest
    logit, and is infinite where the two are finite at different places.
    """
    got, expected = head.logits(hidden), logits.to(hidden.device).float()
    finite = expected.isfinite()  # a model with NaN both ways is reported by its tokens
    apart = (got - expected).where(finite, 0).abs().max().item()
    largest = expected.where(finite, 0).abs().max().item()
    if not torch.equal(finite, got.isfinite()):
        return torch.inf, apart
    return apart / max(1.0, largest), apart


def no_rounding(*tensors: Tensor) -> bool:
    """Return whether a model with weights and results ``tensors`` has no 16-bit numbers."""
    wide = all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)
    return wide and not torch.is_autocast_enabled(tensors[0].device.type)


def tolerance(head: Head, *tensors: Tensor) -> float:
    """Return the largest relative difference between logits that is rounding."""
    # 16-bit logits or hidden states are rounded by the model: 2⁻⁸ relative for bfloat16.
    return 1e-3 if no_rounding(head.weight, *tensors) and not head.quantised else 2e-2


def output_layer(model) -> torch.nn.Module:
    """Return a transformers model's last linear layer: its output embedding, or its last part."""
    layer = model.get_output_embeddings()
    if layer is None:  # some classes (Clvp) do not define it
        layer = getattr(model, "lm_head", None)
    if not isinstance(layer, torch.nn.Module):
        raise InputError(
            f"model: expected an output embedding, {type(model).__name__} has none: define "
            "get_output_embeddings(), or give a LanguageModel (hidden_states, head, logits)"
        )
    if isinstance(layer, torch.nn.Sequential) and len(layer):  # a head of several layers
        layer = layer[-1]
    if isinstance(layer, torch.nn.ModuleList):
        raise InputError(
            f"model: expected one output embedding, {type(model).__name__} has {len(layer)}: give "
            "a LanguageModel (hidden_states, head, logits) that chooses one"
        )
    return layer


def head_of(model, held: tuple | None = None) -> Head:
    """Return weight, bias and logit rule of a transformers model; differentiable.

    They come from its modules and its configuration. ``verify`` finds what a configuration does not
    say. ``held`` is ``weight_and_bias``'s result, where it is known.
    """
    config = model.config.get_text_config()
    rule = SHOWN.get(type(model)) or usual_rule(config)
    return rule.head(config, *(weight_and_bias(model) if held is None else held))


def weight_and_bias(model) -> tuple[Tensor, Tensor | None, bool]:
    """Return weight [V, D] and bias [V] of a model's output layer, and whether they were quantised.

    PEFT's adapters are part of them: a copy that is trained instead of the layer, or low-rank
    additions (LoRA). Offloaded weights are fetched, quantised ones dequantised.
    """
    layer: Any = output_layer(model)
    if hasattr(layer, "modules_to_save"):
        adapters = layer.active_adapters if not layer.disable_adapters else []
        layer = layer.modules_to_save[adapters[0]] if adapters else layer.original_module
    if not type(layer).__module__.startswith("peft."):
        return _held(layer, model)
    if not (hasattr(layer, "get_delta_weight") and hasattr(layer, "lora_A")):
        raise InputError(
            f"model: expected plain LoRA on the head, got PEFT's {type(layer).__name__}"
        )
    for option in ("use_dora", "lora_bias"):
        if any((getattr(layer, option, None) or {}).values()):
            raise InputError(f"{option}: expected plain LoRA on the head")
    weight, bias, quantised = _held(layer.get_base_layer(), model)
    if not (layer.merged or layer.disable_adapters):
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight = weight + layer.get_delta_weight(adapter).to(weight)
    return weight, bias, quantised


def _held(layer, model) -> tuple[Tensor, Tensor | None, bool]:
    """Return weight and bias of a layer without adapters, and whether they were quantised."""
    with fetched(layer):
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if _plain(weight) and (bias is None or _plain(bias)):
            if weight.dim() != 2:
                raise InputError(
                    "model: expected a last linear layer with a weight [V, D], got "
                    f"{type(layer).__name__} with a weight of shape {tuple(weight.shape)}; give a "
                    "LanguageModel (hidden_states, head, logits)"
                )
            return weight, bias, False
        width = getattr(model.config.get_text_config(), "hidden_size", None)
        # bitsandbytes computes differently in training.
        training, layer.training = layer.training, False
        try:
            return *_dequantised(
                layer, getattr(layer, "in_features", None) or width, model.dtype
            ), True
        finally:
            layer.training = training


def _plain(tensor) -> TypeGuard[Tensor]:
    """Return whether a tensor's numbers are its elements: neither packed nor scaled by others."""
    if not isinstance(tensor, Tensor) or tensor.is_quantized or not tensor.is_floating_point():
        return False
    if tensor.element_size() == 1 or getattr(tensor, "quant_state", None) is not None:
        return False
    return is_dtensor(tensor) or not hasattr(tensor, "__tensor_flatten__")


def fetched(layer):
    """Return a context in which accelerate's offloaded weights of ``layer`` are on its device."""
    if not any(parameter.is_meta for parameter in layer.parameters(recurse=False)) or not hasattr(
        layer, "_hf_hook"
    ):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(layer)


COLUMNS_AT_ONCE = 256
# Relative root mean square: a layer that rounds inputs and results to bfloat16 differs by at most
# 2e-3, a layer that rounds its inputs to 8 bits by 6e-3 or more.
ROUNDS_INPUTS = 3.5e-3


@torch.no_grad()
def _dequantised(layer, width: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of a quantised layer, from its products with unit vectors.

    So every quantiser's own kernel decides what the weight is.
    """
    kind = type(layer).__name__
    if width is None:
        raise InputError(f"model: expected a head that says its in_features, got {kind}")
    weight = getattr(layer, "weight", None)
    held = [t for t in (weight, *layer.parameters(), *layer.buffers()) if isinstance(t, Tensor)]
    device = held[0].device if held else torch.device("cpu")
    # Candidates: the dtype of torchao's tensors, the model's, any other that the layer accepts.
    scaled = isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1
    first = [weight.dtype] if weight is not None and scaled else []
    wanted = list(dict.fromkeys([*first, dtype, torch.float32, torch.bfloat16, torch.float16]))
    expected = (
        f"model: expected a head whose weight can be read, got {kind}: if it is quantised, load "
        "the model with the head kept out of that (lm_head among modules_to_not_convert or "
        "llm_int8_skip_modules); if it is not one linear layer, give a LanguageModel "
        "(hidden_states, head, logits)"
    )
    dtype = _taken(layer, width, device, wanted, expected)
    with theirs(expected), _without_bias(layer) as bias:
        zeros = layer(torch.zeros(1, width, dtype=dtype, device=device))[0]
        rest = zeros.float() if zeros.any() else 0.0  # a bias under another name
        weight = torch.empty(len(zeros), width, dtype=zeros.dtype, device=zeros.device)
        for begin in range(0, width, COLUMNS_AT_ONCE):
            units = torch.zeros(
                min(COLUMNS_AT_ONCE, width - begin), width, dtype=dtype, device=device
            )
            units[:, begin:].fill_diagonal_(1)
            weight[:, begin : begin + len(units)] = (layer(units) - rest).T
    bias = rest if isinstance(rest, Tensor) else bias
    trial = torch.randn(16, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with theirs(expected):
        own = layer(trial)
    apart = (
        Head(weight, bias).logits(trial) - own.float()
    ).norm().item() / own.float().norm().item()
    if not apart <= ROUNDS_INPUTS:
        raise InputError(
            f"{expected}; its products differ from those with its dequantised weight by "
            f"{apart:.2g}, for it rounds its inputs, too, or is not linear"
        )
    return weight, bias


@contextmanager
def _without_bias(layer) -> Iterator[Tensor | None]:
    """Remove a layer's bias for a while, and yield it: a 16-bit sum has the bias's digits only."""
    bias = getattr(layer, "bias", None)
    if not (isinstance(bias, Tensor) and _plain(bias)):
        yield None
        return
    layer.bias = None
    try:
        yield bias
    finally:
        layer.bias = bias


def _taken(layer, width: int, device, dtypes: list[torch.dtype], expected: str) -> torch.dtype:
    """Return the first of ``dtypes`` that a layer accepts, or raise the last one's error."""
    *first, last = dtypes
    for dtype in first:
        try:
            layer(torch.zeros(1, width, dtype=dtype, device=device))
            return dtype
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError):
            continue
    with theirs(expected):
        layer(torch.zeros(1, width, dtype=last, device=device))
    return last


class _Reached(BaseException):
    """The end of a forward pass where its head begins; no handler of a model catches it."""


@contextmanager
def _watched(layer, seen: list[Tensor], stop: bool) -> Iterator[None]:
    """Append the input of ``layer`` to ``seen``; ``stop`` ends the forward pass there."""

    def watch(module, args, kwargs):
        seen.append(args[0] if args else next(iter(kwargs.values())))
        if stop:
            raise _Reached

    handle = layer.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


def before_head(model, forward: Callable | None = None, **inputs) -> Tensor | None:
    """Return the input of a transformers model's output layer [B, T, D]; None if it is not called.

    The input includes everything between the body and the last linear layer, whatever the
    architecture: a dense layer and a norm, or a factor. The product itself is not computed.

    Args:
        model: A transformers model.
        forward: Function called instead of the model, within the model's own call. Default: None.
        inputs: Keywords of the forward pass.
    """
    seen: list[Tensor] = []
    with _watched(output_layer(model), seen, stop=True):
        (forward or model)(**inputs)
    return seen[0] if seen else None


def options(call: Callable, **wanted: Any) -> dict:
    """Return those of the keywords ``wanted`` that ``call`` accepts."""
    parameters = inspect.signature(call).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return wanted
    return {name: value for name, value in wanted.items() if name in parameters}
