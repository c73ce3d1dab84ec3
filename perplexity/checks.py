"""Checks of single arguments, one function per kind of value.

Each raises an ``InputError`` of one line, which names the argument, the expected value and the one
received. For a value of another type the error is an ``InputTypeError``. A check that returns the
value returns it as Python's own type. Those of tensors are in ``tensor_checks``.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, InputTypeError

IGNORE_INDEX = -100
SHOWN = 40  # characters of a value in a message
NO_NUMBERS = (bool, str, bytes, bytearray)  # though float() takes them
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


def is_tensor(value: Any) -> bool:
    """Return whether ``value`` is a torch tensor; torch, which takes seconds, is not imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def shown(value: Any) -> str:
    """Return a value's type and, for Python's own kinds, the beginning of its repr on one line."""
    kind = type(value).__name__
    if is_tensor(value):
        return f"{kind} of {value.dtype}"
    if type(value).__module__ == "torch" and kind in ("dtype", "device"):
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


def scalar_of(value: Any) -> Any:
    """Return the number in a 0-dimensional tensor without gradient; any other value as it is."""
    # torch's own functions take such tensors as numbers. A gradient would be lost.
    if not is_tensor(value) or value.dim() or value.requires_grad or value.is_meta:
        return value
    return value.item()


def measured(name: str, value: Any) -> float:
    """Return a number or a one-element tensor as float; NaN and infinities are accepted."""
    if type(value) is float:
        return value
    expected = "a number or a tensor with one element"
    # Of Python's own int the rest is known: a loop logs one a step.
    plain = type(value) is int
    refused = not plain and (isinstance(value, NO_NUMBERS) or getattr(value, "is_meta", False))
    if not plain and is_tensor(value):
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


def temperature(value: object) -> None:
    """Raise unless ``value`` is a positive finite number."""
    number("temperature", value, "a positive finite value", above=0.0)


def shift(value: object) -> int:
    """Return the distance that targets move by; False and True are 0 and 1."""
    if isinstance(value, bool):
        return int(value)
    return integer("shift", value, "False, True or a number of positions, 0 or more", 0)


def validate(value: object) -> None:
    """Raise unless ``value`` is a flag or None."""
    if value is not None:
        flag("validate", value, "True, False or None")
