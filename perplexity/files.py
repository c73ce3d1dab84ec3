"""Output files that are written whole or not at all, and checks of their names before the work."""

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
# Characters of a file's name in the name of its unfinished part: names have at most 255 bytes.
SHOWN_OF_A_NAME = 40


class Output:
    """A binary file that is written under another name and renamed when it is whole.

    Symbolic links stay, their target is replaced. A replaced file's permissions are kept. A device,
    a pipe and the process's own standard streams are written into, never replaced. Leaving the
    ``with`` block finishes the file; an error in the block discards it. The methods suit libraries
    that write into a file object.

    Args:
        path: Name of the file.
        name: Option or argument that an error names. Default: None, the path alone.

    Raises:
        InputError: The file cannot be written, at construction or at any later write; its earlier
            content is kept.

    Example:
        >>> with Output("/dev/null") as file:
        ...     _ = file.write(b"text")
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path, self.name, self.part = path, name, None
        self.written = 0
        target = check_output(name, path)
        try:
            status = _stat(target)
            if status is not None and (stream := _own_stream(status)) is not None:
                self.file = os.fdopen(os.dup(stream), "wb")
            elif status is not None and not stat.S_ISREG(status.st_mode):
                self.file = open(path, "wb")  # noqa: SIM115
            else:
                self.target, part = target, _part_of(target)
                self.file, self.part = open(part, "xb"), part  # noqa: SIM115
                if status is not None:
                    if hasattr(os, "fchown"):
                        # fails for another user's file: who writes it anew owns it
                        with suppress(OSError):
                            os.fchown(self.file.fileno(), status.st_uid, status.st_gid)
                    os.chmod(part, stat.S_IMODE(status.st_mode))
        except OSError as error:
            self.discard()
            raise self._refused(error) from error

    def write(self, content: bytes) -> int:
        """Write bytes and return their number."""
        try:
            count = self.file.write(content)
        except BrokenPipeError:  # the reader of a pipe has closed it
            raise
        except OSError as error:
            raise self._refused(error) from error
        self.written += count
        return count

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self.written

    def flush(self) -> None:
        """Do nothing: nobody reads the file before it is whole."""

    @property
    def closed(self) -> bool:
        """Return whether the file is closed."""
        return self.file.closed

    def close(self) -> None:
        """Do nothing: a library that closes the file does not know whether it is whole."""

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
        """Remove an unfinished file; leave a finished one."""
        if (file := getattr(self, "file", None)) is not None:
            with suppress(OSError):  # closing writes, too, and the disk may be full
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
    """Write a file whole, or leave it as it was.

    Raises InputError, naming ``name``, where the system refuses.
    """
    with Output(path, name) as file:
        file.write(content)


def write_text(path: str | Path, text: str, name: str | None = None) -> None:
    """Write UTF-8 as ``write_bytes`` does.

    Half of a surrogate pair, which has no UTF-8, becomes a question mark.
    """
    write_bytes(path, text.encode("utf-8", "replace"), name)


def check_output(name: str | None, path: str | Path) -> str:
    """Return the file that a write to ``path`` replaces, with links followed.

    Args:
        name: Option or argument that an error names; None for the path alone.
        path: Name of the file.

    Raises:
        InputError: No file can be written there.
    """
    text, called = os.fspath(path), _called(name)
    if not text or "\0" in text:
        raise InputError(f"{called}expected the name of a file, got {text!r}")
    try:
        target, status = os.path.realpath(text), _stat(text)
    except OSError as error:
        raise InputError(
            f"{called}expected a file that can be written, got {text} ({error.strerror})"
        ) from error
    kind = 0 if status is None else stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise InputError(f"{called}expected a file, got the folder {text}")
    if kind in (stat.S_IFBLK, stat.S_IFSOCK):
        raise InputError(
            f"{called}expected a file, got a {'disk' if kind == stat.S_IFBLK else 'socket'}, {text}"
        )
    if status is not None and (kind != stat.S_IFREG or _own_stream(status) is not None):
        if not os.access(text, os.W_OK):
            raise InputError(f"{called}expected a file that can be written, got {text}")
        return text
    folder = os.path.dirname(target)
    if not os.path.isdir(folder) or text.endswith(os.sep):
        raise InputError(f"{called}expected a file in an existing folder, got {text}")
    if status is not None and not os.access(target, os.W_OK):
        raise InputError(f"{called}expected a file that can be written, got {text}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{called}expected a file in a folder that can be written, got {text}")
    return target


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (- reads standard input, where texts are expected)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a disk",
}


def other_than_file(path: str | Path) -> str | None:
    """Return the kind of what is at ``path`` where it is no regular file, and None for a file.

    Reading a pipe that nobody writes to would wait forever, and a device may have no end.

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
    """Raise InputError unless every output can be written and is a file of its own.

    An output may not be an input, inside an input, or another output. The check belongs before
    hours of work.

    Args:
        outputs: Files to write, by the option or argument that names them; None is no output.
        inputs: Files and folders that the same call reads. Names that are no path here, such as a
            model's on the Hub, are harmless.
        folders: Folders to write into, such as a journal's, by option or argument. A folder need
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
    """Raise InputError where ``target`` is taken already, or is inside a folder that is read."""
    got = taken.get(target)
    if got is None and any(
        os.path.isdir(folder) and target.startswith(folder + os.sep) for folder in read
    ):
        got = "one inside an input"
    if got is not None:
        raise InputError(f"{name}: expected a file of its own, got {got}, {path}")


def _called(name: str | None) -> str:
    """Return the beginning of a message that names an option or argument."""
    return "" if name is None else f"{name}: "


def _stat(path: str) -> os.stat_result | None:
    """Return the status of a file; None where there is none."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _own_stream(status: os.stat_result) -> int | None:
    """Return the number of the standard stream that is this file, or None.

    /dev/stdout may lead to a file. A second opening of the file would have a position of its own,
    and writes to both would overlap.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError):
            if stream is not None and os.path.samestat(status, os.fstat(number)):
                stream.flush()
                return number
    return None


def _part_of(target: str) -> str:
    """Return a new name in the folder of ``target`` for its unfinished part."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f"{name[:SHOWN_OF_A_NAME]}.{secrets.token_hex(4)}.part")
