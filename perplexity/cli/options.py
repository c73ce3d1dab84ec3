"""Layer over argparse: a frozen dataclass of options makes a command's parser and its help.

A field is an ``argument`` (given by position), an ``option`` (``--its-name``; the field's type says
how the value is read) or a ``part``: another such dataclass, which several commands share. The
options themselves are declared by the commands and, where they are shared, in ``parts.py``.

Example:
    >>> import argparse
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Options:
    ...     text: list[str] = argument("text files", nargs="+")
    ...     batch_size: int = option("windows at a time (%(default)s)", 8, metavar="N")
    >>> parser = argparse.ArgumentParser()
    >>> add_options(parser, Options)
    >>> parsed(Options, parser.parse_args(["a.txt", "--batch-size", "4"]))
    Options(text=['a.txt'], batch_size=4)
"""

from __future__ import annotations

import argparse
import math
from dataclasses import field, fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


def argument(help: str, *, nargs: str | None = None, metavar: str | None = None) -> Any:
    """Declare an argument that is given by position.

    Args:
        help: Text of the help.
        nargs: "+" or "*" for a list.
        metavar: Name in the help; by default the field's.
    """
    return field(metadata=_without_none(help=help, nargs=nargs, metavar=metavar))


def option(
    help: str | None = None,
    default: Any = None,
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    nargs: str | None = None,
    repeated: bool = False,
    short: str | None = None,
) -> Any:
    """Declare the option ``--its-name``, for a field called ``its_name``.

    Args:
        help: Text of the help.
        default: Value where the option is absent.
        metavar: Name of the value in the help; by default the field's in capitals.
        choices: The values that are accepted; None accepts any.
        nargs: "+" for a list from one use.
        repeated: Whether several uses make a list.
        short: A second spelling, such as ``-o``.
    """
    keywords = _without_none(help=help, metavar=metavar, choices=choices, nargs=nargs)
    if repeated:
        keywords["action"] = "append"
    return field(default=default, metadata={"spelled": (short,) if short else (), **keywords})


def part(kind: type, title: str | None = None) -> Any:
    """Declare a field that is itself a dataclass of options.

    Args:
        kind: The dataclass.
        title: Heading of its options in the help; None puts them among the command's own.
    """
    return field(default_factory=kind, metadata={"title": title})


def _without_none(**keywords: Any) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if value is not None}


def typed(name: str) -> str:
    """Return the spelling of an option on the command line.

    Example:
        >>> typed("batch_size")
        '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def by_option(options: object, *names: str) -> dict[str, Any]:
    """Return the values of some options by their spellings on the command line."""
    return {typed(name): getattr(options, name) for name in names}


def add_options(parser: argparse._ActionsContainer, options: type) -> None:
    """Add the options that a dataclass declares to a parser."""
    kinds: dict[str, type] = get_type_hints(options)
    for each in fields(options):
        kind, keywords = kinds[each.name], dict(each.metadata)
        if is_dataclass(kind):
            title = keywords["title"]
            add_options(parser if title is None else parser.add_argument_group(title), kind)
        elif "spelled" in keywords:
            spelled = (*keywords.pop("spelled"), typed(each.name))
            parser.add_argument(
                *spelled, dest=each.name, default=each.default, **keywords, **_reading(kind)
            )
        else:
            parser.add_argument(each.name, **keywords, **_reading(kind))


def parsed(options: type[Options], namespace: argparse.Namespace) -> Options:
    """Return an instance of the dataclass ``options`` with the values in a parser's namespace."""
    kinds: dict[str, type] = get_type_hints(options)
    values = {
        each.name: parsed(kind, namespace) if is_dataclass(kind) else getattr(namespace, each.name)
        for each in fields(options)
        for kind in [kinds[each.name]]
    }
    return options(**values)


def _reading(kind: Any) -> dict[str, Any]:
    """Return argparse's keywords for a value of type ``kind``, which may be optional or a list."""
    kind = (
        next((each for each in get_args(kind) if each is not NoneType), kind)
        if get_origin(kind) is not list
        else str
    )
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is tuple:
        return {"type": _integers}
    return {"type": {int: _integer, float: _number}[kind]} if kind in (int, float) else {}


def _integer(text: str) -> int:
    """Read a whole number of 64 bits: a longer one would overflow in torch or numpy."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number of 64 bits, got {text[:40]!r}")
    return value


def _integers(text: str) -> tuple[int, ...]:
    """Read whole numbers between commas."""
    return tuple(_integer(part) for part in text.split(","))


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text[:40]!r}")
    return value
