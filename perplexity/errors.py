"""Errors that a user can mend: the command line prints them as one line and exits with status 2."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
# Characters a terminal acts on: control characters except tabs and line breaks, and marks that
# change the direction of writing.
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class InputError(ValueError):
    """An unusable argument, option or file.

    The message names it, what was expected, and what was received.
    """


class InputTypeError(InputError, TypeError):
    """An ``InputError`` that is a TypeError: an argument has another type than expected."""


def visible(text: str) -> str:
    """Return a text whose control characters a terminal shows instead of acting on them.

    Example:
        >>> visible("a\\x1b[31m.txt")
        'a\\\\x1b[31m.txt'
    """
    return spelled(ACTING.sub(lambda match: ascii(match[0])[1:-1], text))


def spelled(text: str) -> str:
    r"""Return Unicode text, with half of a surrogate pair written as \udcff, say.

    A file's name that is not UTF-8 holds such halves.
    """
    return text.encode(errors="backslashreplace").decode()


# The first bytes of files of other kinds: the kind, and what to do.
_KINDS = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "a gzip file; its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "a Zstandard file; its name must end in .zst",
    b"\xff\xfe": "UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
}
_LOOKED_AT = 4096  # bytes of a file's beginning
_TAR_MARK_AT = 257


def check_encoding(name: str, raw: bytes) -> None:
    """Raise InputError where ``raw``, the beginning of a file, is of a kind that is no UTF-8 text.

    UTF-16 without a byte order mark is valid UTF-8 where the text is English: every second byte is
    0.
    """
    kind = next((kind for mark, kind in _KINDS.items() if raw.startswith(mark)), None)
    if raw[_TAR_MARK_AT:].startswith(b"ustar"):  # a header of ASCII and zeros is valid UTF-8
        kind = "a tar archive; unpack it"
    if kind is None and b"\0" in raw[:_LOOKED_AT]:
        raw = raw[:_LOOKED_AT]
        even, odd = raw[::2], raw[1::2]
        for order, zeros, letters in (("LE", odd, even), ("BE", even, odd)):
            if 2 * zeros.count(0) > len(zeros) and not letters.count(0):
                kind = (
                    f"UTF-16 without a byte order mark; convert it (iconv -f UTF-16{order} -t "
                    "UTF-8)"
                )
    if kind is not None:
        raise InputError(f"{name}: expected UTF-8, got {kind}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type where it has none."""
    return (
        next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        .strip()
        .rstrip(": ")
    )


def out_of_memory(error: BaseException) -> bool:
    """Return whether the error is the end of the machine's or a device's memory."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    ):
        return True
    # torch has no exception type for the end of the machine's memory.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(
        error
    )


@contextmanager
def theirs(expected: str) -> Iterator[None]:
    """Raise whatever another library or the user's code raises as an InputError.

    The message begins with ``expected``. The block holds calls of foreign code only: a bug of this
    package must not look like bad input. An InputError and the end of memory pass unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        reason, kind = first_line(error), type(error).__name__
        raise InputError(
            f"{expected} ({reason if reason == kind else f'{kind}: {reason}'})"
        ) from error


def each_of_theirs(expected: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items of another library's iterator, with the errors of ``theirs``."""
    with theirs(expected):
        iterator = iter(items)
    while True:
        with theirs(expected):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextmanager
def needing(name: str, extra: str) -> Iterator[None]:
    """Raise an import's failure as an ImportError that names the extra with the package."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").split(".")[0] or "a package"
        if package == "perplexity":  # a bug of this package
            raise
        message = f"{name}: needs {package}; install fused-perplexity[{extra}]"
        raise ImportError(message, name=error.name) from None


def check_unicode(name: str, text: str) -> None:
    """Raise InputError, naming ``name``, where ``text`` holds half of a surrogate pair.

    No tokenizer takes such a text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: expected Unicode text, got a lone surrogate at character {error.start}"
        )
