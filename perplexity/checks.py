"""Checks of single arguments, one function per kind of value.

Each raises an ``InputError`` of one line, which names the argument, the expected value and the one
received. For a value of another type the error is an ``InputTypeError``. A check that returns the
value returns it as Python's own type.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, InputTypeError

IGNORE_INDEX = -100
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING_DTYPES = (*TRITON_DTYPES, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SHOWN = 40  # characters of a value in a message
BUILTIN = (str, bytes, int, float, complex, list, tuple, dict, set)


def wrong(
    name: str, expected: object, got: object, error: type[InputError] = InputError
) -> InputError:
    """Return the error of an argument, to be raised.

    Example:
        >>> wrong("stride", "at most 63", 64)
        InputError('stride: expected at most 63, got 64')
    """
    return error(f"{name}: expected {expected}, got {got}")


def shown(value: object) -> str:
    """Return a value's type and, for Python's own kinds, the beginning of its repr on one line."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} of {value.dtype}"
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, BUILTIN):
        text = " ".join(repr(value).split())
        kind += f" {text if len(text) <= SHOWN else text[:SHOWN] + '...'}"
    return kind


def _did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Return a question about the choice that is spelled like ``value``; empty where none is."""
    if not isinstance(value, str):
        return ""
    close = difflib.get_close_matches(value[:SHOWN].lower(), list(choices), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def choice(name: str, value: object, choices: Collection[str], expected: str | None = None) -> None:
    """Raise unless ``value`` is one of the strings ``choices``; suggest the closest one."""
    if isinstance(value, str) and value in choices:
        return
    expected = expected or f"one of {', '.join(choices)}"
    if isinstance(value, str) or value is None:
        question = _did_you_mean(value, choices)
        raise InputError(f"{name}: expected {expected}, got {value!r:.{SHOWN}}{question}")
    raise InputTypeError(f"{name}: expected {expected}, got {shown(value)}")


def known_keywords(owner: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise for the first keyword that is not in ``known``; suggest the closest one."""
    for name in names:
        if name not in known:
            expected = f"a keyword of {owner} ({', '.join(known)})"
            question = _did_you_mean(name, known)
            raise InputTypeError(f"{name}: expected {expected}, got an unknown one{question}")


def number(
    name: str,
    value: object,
    expected: str = "a finite number",
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise unless ``value`` is finite, in [least, most] and in (above, below)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputTypeError(f"{name}: expected {expected}, got {shown(value)}")
    # Comparisons only: a traced number has no isfinite. NaN fails each of them.
    real: Any = value  # numbers.Real declares no comparison with a float
    inside = -math.inf < real < math.inf and least <= real <= most and above < real < below
    if not inside:
        raise wrong(name, expected, value)


def integer(
    name: str,
    value: object,
    expected: str | None = None,
    least: int | None = None,
    most: int | None = None,
) -> int:
    """Return an integer as int; numpy's and 0-dimensional tensors are accepted, bools are not."""
    scalar = scalar_of(value)
    known = isinstance(scalar, numbers.Integral) and not isinstance(scalar, bool)
    if known and (least is None or least <= scalar) and (most is None or scalar <= most):
        return int(scalar)
    limits = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
    if known:
        raise wrong(name, expected or " and ".join(limits), scalar)
    raise wrong(
        name, expected or ", ".join(["a whole number", *limits]), shown(scalar), InputTypeError
    )


def scalar_of(value: object) -> Any:
    """Return the number in a 0-dimensional tensor without gradient; any other value as it is."""
    # torch's own functions take such tensors as numbers. A gradient would be lost.
    if not isinstance(value, Tensor) or value.dim() or value.requires_grad or value.is_meta:
        return value
    return value.item()


def measured(name: str, value: Any) -> float:
    """Return a number or a one-element tensor as float; NaN and infinities are accepted."""
    if type(value) is float:
        return value
    expected = "a number or a tensor with one element"
    refused = isinstance(value, bool | str | bytes | bytearray) or getattr(value, "is_meta", False)
    if isinstance(value, Tensor):
        value = value.detach()  # else torch warns that a loss loses its graph
    if not refused:
        try:
            return float(value)
        except OverflowError:
            return math.inf
        # Not RuntimeError: a tensor raises one for an earlier call on its device.
        except (TypeError, ValueError):
            pass
    raise InputTypeError(f"{name}: expected {expected}, got {shown(value)}")


def flag(name: str, value: object, expected: str = "True or False") -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise wrong(name, expected, shown(value), InputTypeError)


def instance(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise unless ``value`` is an instance of ``kinds``."""
    if not isinstance(value, kinds):
        raise wrong(name, expected, shown(value), InputTypeError)


def text(name: str, value: object) -> None:
    """Raise unless ``value`` is a str."""
    instance(name, value, str, "a text (str)")


def function(name: str, value: object) -> None:
    """Raise unless ``value`` is None or callable."""
    if value is not None and not callable(value):
        raise wrong(name, "a function or None", shown(value), InputTypeError)


def path(name: str, value: object) -> Path:
    """Return a path as ``Path``; raise for an empty one."""
    if not isinstance(value, str | os.PathLike):
        raise wrong(name, "a path (str or Path)", shown(value), InputTypeError)
    if os.fspath(value) == "":
        raise wrong(name, "a path", "an empty one")
    return Path(value)


def mapping(name: str, value: object, expected: str = "a dict") -> None:
    """Raise unless ``value`` is a mapping."""
    instance(name, value, Mapping, expected)


def several(name: str, value: object, of: str, single: tuple[type, ...] = ()) -> None:
    """Raise unless ``value`` is an iterable of items.

    A string, a path or a mapping is refused as one item, and so are the types ``single``.
    """
    one = isinstance(value, (str, bytes, bytearray, os.PathLike, Mapping, *single))
    if one or not isinstance(value, Iterable):
        raise wrong(
            name, f"a sequence of {of}", f"{'one ' * one}{type(value).__name__}", InputTypeError
        )


def optional(check: Callable, name: str, value: object, *arguments, **keywords):
    """Return ``check`` of ``value``, or None for None."""
    return None if value is None else check(name, value, *arguments, **keywords)


# --- arguments of the losses


def ignored_label(value: object) -> int:
    """Return an ``ignore_index`` as int; None is torch's default."""
    if value is None:
        return IGNORE_INDEX
    index = integer("ignore_index", value, "an integer or None")
    if not -(2**63) <= index < 2**63:
        raise wrong("ignore_index", "an integer of 64 bits", index)
    return index


def logit_rule(softcap: object, logit_scale: object, side: str = "") -> None:
    """Raise unless a head's softcap and scale are valid; ``side`` ends the arguments' names."""
    if softcap is not None:
        number(f"softcap{side}", softcap, "None or a positive finite value", above=0.0)
    number(f"logit_scale{side}", logit_scale)


def shift(value: object) -> int:
    """Return the distance that targets move by; False and True are 0 and 1."""
    if isinstance(value, bool):
        return int(value)
    return integer("shift", value, "False, True or a number of positions, 0 or more", 0)


def validate(value: object) -> None:
    """Raise unless ``value`` is a flag or None."""
    if value is not None:
        flag("validate", value, "True, False or None")


def dense(name: str, tensor: object) -> None:
    """Raise unless ``tensor`` is a dense (strided) tensor."""
    if not isinstance(tensor, Tensor):
        raise wrong(name, "a tensor", type(tensor).__name__, InputTypeError)
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = tensor.layout if tensor.layout is not torch.strided else "a nested tensor"
        raise wrong(name, "a dense tensor (to_dense(), or padding)", layout, InputTypeError)


def floating(name: str, tensor: Any) -> None:
    """Raise unless ``tensor`` is a dense floating tensor of 16 bits or more.

    Narrower ones have their scale elsewhere.
    """
    dense(name, tensor)
    if not tensor.is_floating_point():
        raise wrong(name, "a floating dtype", tensor.dtype, InputTypeError)
    if tensor.dtype not in FLOATING_DTYPES:
        known = "float32, float64, bfloat16 or float16 (dequantise it first)"
        raise wrong(name, known, tensor.dtype, InputTypeError)


def vector(name: str, tensor: Tensor | None, entries: int, device: torch.device) -> None:
    """Raise unless ``tensor`` is None or floating [entries] on ``device``."""
    if tensor is None:
        return
    floating(name, tensor)
    if tuple(tensor.shape) != (entries,):
        raise wrong(name, f"shape ({entries},), one value a class", tuple(tensor.shape))
    if tensor.device != device:
        raise wrong(name, f"a tensor on {device}, as input", tensor.device)


def head(
    names: tuple[str, str, str], input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> None:
    """Raise unless input [..., D], weight [V, D] and bias [V] have one dtype and device.

    ``names`` are what messages call these three.
    """
    input_name, weight_name, bias_name = names
    if input.dim() < 1:
        raise wrong(input_name, "shape [..., D]", "a scalar")
    if linear_weight.dim() != 2:
        raise wrong(weight_name, "shape [V, D]", tuple(linear_weight.shape))
    if input.shape[-1] != linear_weight.shape[1]:
        shape = f"shape [V, {input.shape[-1]}] for an {input_name} of {tuple(input.shape)}"
        raise wrong(weight_name, shape, tuple(linear_weight.shape))
    if input.shape[-1] == 0:
        raise wrong(input_name, "a hidden size of 1 or more", tuple(input.shape))
    if input.dtype != linear_weight.dtype:
        dtype = f"{input.dtype}, the dtype of {input_name} (or float32 for a 16-bit one)"
        raise wrong(weight_name, dtype, linear_weight.dtype, InputTypeError)
    if linear_weight.device != input.device:
        raise wrong(
            weight_name, f"a tensor on {input.device}, as {input_name}", linear_weight.device
        )
    vector(bias_name, linear_bias, linear_weight.shape[0], input.device)


def class_weights(weight: Tensor | None, entries: int | None = None) -> None:
    """Raise unless ``weight`` is None or class weights [V]; ``entries`` is V, None for any."""
    if weight is None:
        return
    floating("weight", weight)
    if weight.dim() != 1 or entries not in (None, weight.shape[0]):
        raise wrong(
            "weight",
            f"shape ({'V' if entries is None else entries},), one value a class",
            tuple(weight.shape),
        )
    if weight.requires_grad:
        raise wrong("weight", "class weights without gradient", "a tensor that requires grad")


def target(
    value: Any,
    classes: tuple[int, ...],
    probabilities: tuple[int, ...],
    device: torch.device,
    ignored: int,
) -> None:
    """Raise unless ``value`` has class indices or class probabilities in the expected shape.

    Class probabilities have no ignored class, as in torch: ``ignored`` has to be negative for them.

    Args:
        value: The argument ``target``.
        classes: Shape of class indices.
        probabilities: Shape of class probabilities.
        device: Device of the input.
        ignored: Class index that is not scored.
    """
    dense("target", value)
    shape = tuple(value.shape)
    if value.is_floating_point():
        floating("target", value)
        if shape != probabilities:
            wanted = (
                f"shape {probabilities} of class probabilities "
                f"(or {classes} of class indices, int64)"
            )
            kind = InputError if shape != classes else InputTypeError
            raise wrong("target", wanted, f"{shape} of {value.dtype}", kind)
        if ignored >= 0:
            raise wrong(
                "ignore_index", "None or a negative number with class probabilities", ignored
            )
    else:
        if value.dtype not in INDEX_DTYPES:
            known = "int64 class indices (or int32, int16, int8, uint8), or class probabilities"
            raise wrong("target", known, value.dtype, InputTypeError)
        if shape != classes:
            raise wrong("target", f"shape {classes}, as input without classes", shape)
    if value.device != device:
        raise wrong("target", f"a tensor on {device}, as input", value.device)
