"""Output files: whole under their names or as they were before, checked before the work that they
are for.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from .errors import InputError

STANDARD_INPUT = "-"  # the name that reads standard input, where texts are expected
# characters of a file's name in the name of its unfinished part: names have 255 bytes at most
SHOWN_OF_A_NAME = 40


class Output:
    """A binary file that is written beside its name and renamed when it is whole.

    Symbolic links stay, their target is replaced. The permissions of a file that is replaced are
    kept. A device, a pipe and the process's own standard streams are written into, never replaced.
    Leaving the ``with`` block finishes the file, an error in the block discards it. The methods
    suit libraries that write into a file object.

    Args:
        path: name of the file.
        name: what an error calls the file, an option or argument; by default nothing but the path.

    Raises:
        InputError: the file cannot be written, at construction or at any later write; what it held
        before is kept.

    Example:
        >>> with Output("/dev/null") as file:
        ...     _ = file.write(b"text")
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name, self.part = path, name, None
        self.written = 0
        target = check_output(name, path)
        try:
            found = _stat(target)
            if found is not None and (stream := _own_stream(found)) is not None:
                self.file = os.fdopen(os.dup(stream), "wb")
            elif found is not None and not stat.S_ISREG(found.st_mode):
                self.file = open(path, "wb")  # noqa: SIM115
            else:
                self.target, part = target, _part_of(target)
                self.file, self.part = open(part, "xb"), part  # noqa: SIM115
                if found is not None:
                    if hasattr(os, "fchown"):
                        # of another user's file: who writes it anew is its owner
                        with suppress(OSError):
                            os.fchown(self.file.fileno(), found.st_uid, found.st_gid)
                    os.chmod(part, stat.S_IMODE(found.st_mode))
        except OSError as error:
            self.discard()
            raise self._refused(error) from error

    def write(self, content: bytes) -> int:
        try:
            count = self.file.write(content)
        except BrokenPipeError:  # the reader of a pipe has seen enough
            raise
        except OSError as error:
            raise self._refused(error) from error
        self.written += count
        return count

    def tell(self) -> int:
        return self.written

    def flush(self) -> None:
        """Do nothing: what is written is looked at when it is whole."""

    @property
    def closed(self) -> bool:
        return self.file.closed

    def close(self) -> None:
        """Do nothing: a library that closes the file does not know whether it is wanted."""

    def finish(self) -> None:
        """Give the file its name."""
        try:
            self.file.close()
            if self.part is not None:
                os.replace(self.part, self.target)
                self.part = None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._refused(error) from error

    def discard(self) -> None:
        """Remove a file that has not been finished; nothing where it has been."""
        if (file := getattr(self, "file", None)) is not None:
            with suppress(OSError):  # of a disk that is full: closing writes, too
                file.close()
        if self.part is not None:
            with suppress(OSError):
                os.unlink(self.part)
            self.part = None

    def _refused(self, error: OSError) -> InputError:
        return InputError(
            f"{_called(self.name)}{self.path} cannot be written ({error.strerror or error})"
        )

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()


def write_bytes(path: str | Path, content: bytes, name: str | None = None) -> None:
    """Write a file whole, or leave it as it was; InputError, with ``name``, where the system
    refuses.
    """
    with Output(path, name) as file:
        file.write(content)


def write_text(path: str | Path, text: str, name: str | None = None) -> None:
    """Write UTF-8 as ``write_bytes`` does; half of a surrogate pair, which has no UTF-8, becomes a
    question mark.
    """
    write_bytes(path, text.encode("utf-8", "replace"), name)


def check_output(name: str | None, path: str | Path) -> str:
    """Return the file that a write to ``path`` replaces, links followed; InputError where there can
    be none.

    Args:
        name: what an error calls the file, an option or argument.
        path: name of the file.
    """
    given, called = os.fspath(path), _called(name)
    if not given or "\0" in given:
        raise InputError(f"{called}expected the name of a file, got {given!r}")
    try:
        target, found = os.path.realpath(given), _stat(given)
    except OSError as error:
        raise InputError(
            f"{called}expected a file that can be written, got {given} ({error.strerror})"
        ) from error
    kind = 0 if found is None else stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise InputError(f"{called}expected a file, got the folder {given}")
    if kind in (stat.S_IFBLK, stat.S_IFSOCK):
        raise InputError(
            f"{called}expected a file, got a {'disk' if kind == stat.S_IFBLK else 'socket'}, {given}"
        )
    if found is not None and (kind != stat.S_IFREG or _own_stream(found) is not None):
        if not os.access(given, os.W_OK):
            raise InputError(f"{called}expected a file that can be written, got {given}")
        return given
    folder = os.path.dirname(target)
    if not os.path.isdir(folder) or given.endswith(os.sep):
        raise InputError(f"{called}expected a file in an existing folder, got {given}")
    if found is not None and not os.access(target, os.W_OK):
        raise InputError(f"{called}expected a file that can be written, got {given}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{called}expected a file in a folder that can be written, got {given}")
    return target


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (- reads standard input, where texts are expected)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a disk",
}


def other_than_file(path: str | Path) -> str | None:
    """Return what stands at ``path`` where no regular file does, and None for a file.

    A pipe that nobody writes to would be waited for, a device may have no end.

    Example:
        >>> other_than_file("/dev/null")
        'a device'
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return "no such file" + (", but a link that leads nowhere" if os.path.islink(path) else "")
    except OSError as error:
        return f"one that cannot be read ({error.strerror})"
    return None if kind == stat.S_IFREG else _KINDS.get(kind, "no regular file")


def check_outputs(
    outputs: Mapping[str, str | Path | None],
    inputs: Iterable[str | Path | None] = (),
    *,
    folders: Mapping[str, str | Path | None] | None = None,
) -> None:
    """Raise InputError unless every output can be written and none is an input, inside an input, or
    another output.

    To be called before hours of work, not after them.

    Args:
        outputs: files to write, by the option or argument that names them; None is no output.
        inputs: files and folders that the same call reads; names that are no path here, a model's
        on the Hub, do no harm. folders: folders to write into, a journal's, likewise. A folder need
        not exist.
    """
    read = [os.path.realpath(path) for path in inputs if path]
    taken = dict.fromkeys(read, "an input")
    for name, path in outputs.items():
        if path is None:
            continue
        target = check_output(name, path)
        if os.path.isfile(target) or not os.path.exists(target):
            _check_apart(name, path, target, read, taken)
            taken[target] = "another output"
    for name, path in (folders or {}).items():
        if path is None:
            continue
        if os.path.lexists(path) and not os.path.isdir(path):
            raise InputError(f"{name}: expected a folder, got the file {path}")
        _check_apart(name, path, os.path.realpath(path), read, taken)


def _check_apart(
    name: str, path: str | Path, target: str, read: list[str], taken: Mapping[str, str]
) -> None:
    got = taken.get(target)
    if got is None and any(
        os.path.isdir(folder) and target.startswith(folder + os.sep) for folder in read
    ):
        got = "one inside an input"
    if got is not None:
        raise InputError(f"{name}: expected a file of its own, got {got}, {path}")


def _called(name: str | None) -> str:
    return "" if name is None else f"{name}: "


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _own_stream(found: os.stat_result) -> int | None:
    """Return the number of the standard stream that is this file: /dev/stdout may lead to a file,
    which must stay.

    A second opening of the file would have a place of its own, and what is written to both would
    overlap.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError):
            if stream is not None and os.path.samestat(found, os.fstat(number)):
                stream.flush()
                return number
    return None


def _part_of(target: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f"{name[:SHOWN_OF_A_NAME]}.{secrets.token_hex(4)}.part")
