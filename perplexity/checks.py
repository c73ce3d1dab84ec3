"""Checks of single arguments, one function for each kind of value.

Each raises an ``InputError`` of one line: the argument, what was expected and what came. A value of
another type is an ``InputTypeError``. What a check returns is the value as Python's own kind.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError, InputTypeError

SHOWN = 40  # characters of a value in a message
BUILTIN = (str, bytes, int, float, complex, list, tuple, dict, set)


def expect(
    condition: bool,
    name: str,
    expected: str,
    got: object,
    error: type[InputError] = InputError,
) -> None:
    if not condition:
        raise error(f"{name}: expected {expected}, got {got}")


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
    """Raise unless ``value`` is one of the texts ``choices``; a misspelt one is named."""
    if isinstance(value, str) and value in choices:
        return
    expected = expected or f"one of {', '.join(choices)}"
    if isinstance(value, str) or value is None:
        question = _did_you_mean(value, choices)
        raise InputError(f"{name}: expected {expected}, got {value!r:.{SHOWN}}{question}")
    raise InputTypeError(f"{name}: expected {expected}, got {shown(value)}")


def known_keywords(owner: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise for the first keyword that is not in ``known``, with the one it is spelled like."""
    for name in given:
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
    # Comparisons alone: a traced number has no isfinite. NaN fails them.
    inside = -math.inf < value < math.inf and least <= value <= most and above < value < below
    expect(inside, name, expected, value)


def integer(
    name: str,
    value: object,
    expected: str | None = None,
    least: int | None = None,
    most: int | None = None,
) -> int:
    """Return an integer as int: numpy's and a tensor's of no dimensions count, a bool does not."""
    value = scalar_of(value)
    limits = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        whole = expected or ", ".join(["a whole number", *limits])
        raise InputTypeError(f"{name}: expected {whole}, got {shown(value)}")
    inside = (least is None or least <= value) and (most is None or value <= most)
    expect(inside, name, expected or " and ".join(limits), value)
    return int(value)


def scalar_of(value: object) -> object:
    """Return the number in a tensor of no dimensions without gradient; any other value as it is."""
    # As torch's own functions take numbers. A gradient would be lost.
    if not isinstance(value, Tensor) or value.dim() or value.requires_grad or value.is_meta:
        return value
    return value.item()


def measured(name: str, value: object) -> float:
    """Return a number, or a tensor with one, as float; NaN and infinities are measured as well."""
    if type(value) is float:
        return value
    expected = "a number or a tensor with one element"
    refused = isinstance(value, bool | str | bytes | bytearray) or getattr(value, "is_meta", False)
    if not refused:
        try:
            return float(value)
        except OverflowError:
            return math.inf
        # Not RuntimeError: a tensor's is the device's, of an earlier call.
        except (TypeError, ValueError):
            pass
    raise InputTypeError(f"{name}: expected {expected}, got {shown(value)}")


def flag(name: str, value: object, expected: str = "True or False") -> None:
    expect(isinstance(value, bool), name, expected, shown(value), InputTypeError)


def instance(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    expect(isinstance(value, kinds), name, expected, shown(value), InputTypeError)


def text(name: str, value: object) -> None:
    instance(name, value, str, "a text (str)")


def function(name: str, value: object) -> None:
    """Raise unless ``value`` is None or can be called."""
    known = value is None or callable(value)
    expect(known, name, "a function or None", shown(value), InputTypeError)


def path(name: str, value: object) -> Path:
    """Return a path as ``Path``; an empty name is none."""
    known = isinstance(value, str | os.PathLike)
    expect(known, name, "a path (str or Path)", shown(value), InputTypeError)
    expect(os.fspath(value) != "", name, "a path", "an empty one")
    return Path(value)


def mapping(name: str, value: object, expected: str = "a dict") -> None:
    instance(name, value, Mapping, expected)


def several(name: str, value: object, of: str, single: tuple[type, ...] = ()) -> None:
    """Raise unless ``value`` is an iterable of many; ``single``: types of which one is meant."""
    one = isinstance(value, (str, bytes, bytearray, os.PathLike, Mapping, *single))
    got = f"{'one ' * one}{type(value).__name__}"
    known = isinstance(value, Iterable) and not one
    expect(known, name, f"a sequence of {of}", got, InputTypeError)


def optional(check: Callable, name: str, value: object, *arguments, **keywords):
    """Return what ``check`` makes of ``value``; None stays None."""
    return None if value is None else check(name, value, *arguments, **keywords)
