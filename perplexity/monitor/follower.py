"""A history that grows: what was added since the last look."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError, check_encoding
from .history import History
from .names import Memory, Names
from .readers import extend, files_of, history_of, read_histories, read_history
from .readers.assemble import say_left_out
from .readers.cells import Log
from .readers.console import ConsoleReader
from .readers.delimited import TableReader, blocks_of_lines, prefix_of
from .readers.files import HEAD, by_run, has_loss, readers_of
from .readers.json_text import LineReader

TAIL = 64  # bytes before the offset, by which a file that was written anew is known
LineByLine = TableReader | LineReader | ConsoleReader
# Files that are read whole each time: no line of them stands alone.
MAGIC = (b"SQLite format 3\0", b"PAR1", b":W&B")


class NotYet(InputError):
    """Nothing to read for now."""


class Follower:
    """New rows of a file of lines each time it is asked; of other histories the whole, read anew
    when it has changed.

    Lines that cannot be read cost a note. A second header begins new columns. A file that was
    rotated (replaced, or cut and written anew) goes on with the same history where its steps go on.

    Args:
        path, tags, unit, run, patterns, bytes_per_token: As for ``read_history``.

    Raises:
        NotYet: From ``new``, where waiting may help.
        InputError: Where waiting will not help.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "a.csv"
        ...     _ = path.write_text("step,loss\\n1,3.0\\n2,2.5\\n")
        ...     follower = Follower(path)
        ...     first = follower.new()[0].train_loss.tolist()
        ...     with path.open("a") as file:
        ...         _ = file.write("3,2.25\\n")
        ...     first, follower.new()[0].train_loss.tolist()
        ([3.0, 2.5], [2.25])
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tags: dict[str, str] | None = None,
        unit: str = "nats",
        run: str | None = None,
        patterns: tuple[str, ...] | list[str] = (),
        bytes_per_token: float | None = None,
    ) -> None:
        self.path, self.run, self.patterns = Path(path), run, tuple(patterns)
        self.how = {"tags": tags, "unit": unit, "bytes_per_token": bytes_per_token}
        self.names = Names(tags, unit, bytes_per_token)
        self.reader: LineByLine | None = None
        self.offset, self.tail = 0, b""
        self.identity: int | None = None
        self.last_step = float("-inf")
        self.first_step = float("inf")
        self.signature: tuple = ()
        self.waiting = ""

    def new(self) -> tuple[History, bool]:
        """Return what was added, and whether it is the whole: at first, and where the file begins
        anew or tells only as a whole what its rows mean.
        """
        try:
            if not self.path.exists():
                raise NotYet(f"{self.path}: expected a history, got no such file")
            if self.path.is_dir() or not self.path.is_file():
                return self._all()
            if self.reader is None:
                return self._first()
            return self._more()
        except FileNotFoundError as error:
            raise NotYet(f"{self.path}: expected a history, got no such file ({error.filename})")

    # --- files that are read as a whole ------------------------------------------------------------

    def _all(self) -> tuple[History, bool]:
        signature = self._stat()
        if signature == self.signature and signature:
            if self.waiting:
                raise NotYet(self.waiting)
            return History(str(self.path)), False
        try:
            found = read_histories(self.path, run=self.run, patterns=self.patterns, **self.how)  # type: ignore[arg-type]
        except InputError as error:
            self.signature, self.waiting = signature, str(error)
            raise NotYet(str(error))
        if len(found) > 1:  # says so
            read_history(self.path, patterns=self.patterns, **self.how)  # type: ignore[arg-type]
        self.signature, self.waiting = signature, ""
        return next(iter(found.values())), True

    def _stat(self) -> tuple:
        """Return size and time of every file, to know whether one has changed."""
        files = sorted(files_of(self.path)) if self.path.is_dir() else [self.path]
        if not files:
            files = sorted(file for file in self.path.glob("**/*") if file.is_file())[:1000]
        found = []
        for file in files:
            stat = file.stat()
            found.append((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino))
        if (
            files and self.path.is_file() and _is_sqlite(self.path)
        ):  # what its log holds is not in it
            log = self.path.with_name(f"{self.path.name}-wal")
            found.append((str(log), log.stat().st_size if log.exists() else 0, 0, 0))
        return tuple(found)

    # --- files of lines ----------------------------------------------------------------------------

    def _first(self) -> tuple[History, bool]:
        """Read the whole of a file, and keep the reader where it can go on with more lines."""
        with self.path.open("rb") as file:
            head = file.read(HEAD)
            if not head.startswith(MAGIC) and ".tfevents." not in self.path.name:
                check_encoding(str(self.path), head)
            if not self._is_of_lines(head):
                return self._all()
            if b"\n" not in head:
                raise NotYet(f"{self.path}: expected a history, got no whole line yet")
            file.seek(0)
            identity = os.fstat(file.fileno()).st_ino
            for make in self._readers(head):
                self.names.memory = Memory()
                self.names.scale = {}
                reader = make(Log())
                file.seek(0)
                try:
                    offset, tail = self._feed(reader, file)
                except InputError:
                    continue
                if isinstance(reader, LineReader) and reader.log.broken_count >= reader.objects:
                    break
                runs = by_run({"": reader.log})
                if [*runs] != [""] or self.run is not None:
                    return self._all()
                if not has_loss(reader.log, self.names):
                    continue
                history = self._history(reader)
                if self.names.memory.repaired or self.names.memory.stale:
                    return self._all()
                self.reader, self.offset, self.tail, self.identity = reader, offset, tail, identity
                self._remember(history)
                return history, True
        try:  # for the message
            read_history(self.path, patterns=self.patterns, **self.how)  # type: ignore[arg-type]
        except InputError as error:
            raise NotYet(str(error))
        raise NotYet(f"{self.path}: expected a training loss or a validation loss, got none so far")

    def _is_of_lines(self, head: bytes) -> bool:
        if head.startswith(MAGIC) or ".tfevents." in self.path.name:
            return False
        if self.patterns or not head.strip():
            return True
        return readers_of(self.path, head)[0].__name__ in ("_table", "_lines", "_console")

    def _readers(self, head: bytes):
        """Return functions from a log to a reader, the likeliest first."""
        makers = {
            "_table": lambda log: TableReader(
                self.names, log, str(self.path), prefix_of(self.path)
            ),
            "_lines": lambda log: LineReader(self.names, log, prefix_of(self.path)),
            "_console": lambda log: ConsoleReader(self.names, log, self.patterns),
        }
        if self.patterns:
            return [makers["_console"]]
        names = [reader.__name__ for reader in readers_of(self.path, head)]
        return [makers[name] for name in names if name in makers]

    def _feed(self, reader: LineByLine, file) -> tuple[int, bytes]:
        """Give the reader the file's whole lines; returns where they end and the bytes before."""
        offset, tail = file.tell(), b""
        for raw in blocks_of_lines(file):
            raw = raw[: raw.rfind(b"\n") + 1]
            if raw:
                reader.add(raw)
                offset += len(raw)
                tail = (tail + raw[-TAIL:])[-TAIL:]
        return offset, tail

    def _history(self, reader: LineByLine) -> History:
        """Return the history of what the reader has read since the last time."""
        log, reader.log = reader.log, Log()
        if not has_loss(log, self.names):
            history = History(str(self.path))
            say_left_out(log, self.names, history)
            return history
        return history_of(log, self.names, str(self.path))

    def _more(self) -> tuple[History, bool]:
        reader, memory = self.reader, self.names.memory
        assert reader is not None and memory is not None
        stat = self.path.stat()
        with self.path.open("rb") as file:
            file.seek(max(0, self.offset - len(self.tail)))
            same = (
                stat.st_ino == self.identity
                and stat.st_size >= self.offset
                and file.read(len(self.tail)) == self.tail
            )
            if not same:
                return self._rotated()
            begin = self.offset
            self.offset, tail = self._feed(reader, file)
        if self.offset == begin:
            return History(str(self.path)), False
        self.tail = (self.tail + tail)[-TAIL:]
        history = self._history(reader)
        if memory.stale or memory.repaired:
            self.reader = None
            return self._first()
        self._remember(history)
        return history, False

    def _rotated(self) -> tuple[History, bool]:
        """Go on with another file under the same name: behind the rest of the old one, where its
        steps go on; else as a new run.
        """
        old = self.reader
        assert old is not None
        history = History(str(self.path))
        if (rest := self._old_file()) is not None:
            with rest.open("rb") as file:
                file.seek(self.offset)
                self._feed(old, file)
            extend(history, self._history(old))
            self._remember(history)
        before, memory = (self.first_step, self.last_step), self.names.memory
        scale = dict(self.names.scale)
        raw = self.path.read_bytes()
        if not raw[: raw.rfind(b"\n") + 1].strip():
            if not raw and len(history):  # the rest first, the new file at the next look
                self.offset, self.tail, self.identity = 0, b"", self.path.stat().st_ino
                return history, False
            raise NotYet(f"{self.path}: expected a history, got no whole line yet")
        reader: LineByLine = type(old)(self.names, Log(), *self._rest_of_arguments(old))
        if isinstance(old, TableReader) and isinstance(reader, TableReader):
            first = raw.split(b"\n", 1)[0].decode(errors="replace")
            if not reader.is_header(first):  # a header stands in the first file alone
                reader.header, reader.delimiter = old.header, old.delimiter
        self.names.memory, self.names.scale = memory, scale
        try:
            with self.path.open("rb") as file:
                identity = os.fstat(file.fileno()).st_ino
                offset, tail = self._feed(reader, file)
            more = self._history(reader)
        except InputError as error:
            self.reader = None
            raise NotYet(str(error))
        steps = [*more.train_step[:1], *(event[1] for event in more.events[:1])]
        goes_on = bool(steps) and min(steps) > before[0] and (memory is None or not memory.stale)
        if not goes_on:
            self.reader = None
            self.last_step, self.first_step = float("-inf"), float("inf")
            return self._first()
        self.reader, self.offset, self.tail, self.identity = reader, offset, tail, identity
        extend(history, more)
        history.say("the file was rotated: read on from the new one")
        self._remember(history)
        return history, False

    def _rest_of_arguments(self, reader: LineByLine) -> tuple:
        if isinstance(reader, ConsoleReader):
            return (self.patterns,)
        if isinstance(reader, TableReader):
            return (str(self.path), reader.prefix)
        return (reader.prefix,)

    def _old_file(self) -> Path | None:
        """Return the file that was followed until now, where it lies beside under another name."""
        for file in self.path.parent.glob(f"{self.path.stem}*"):
            if file.is_file() and file.stat().st_ino == self.identity and file != self.path:
                return file if file.stat().st_size >= self.offset else None
        return None

    def _remember(self, history: History) -> None:
        steps = [*history.train_step, *(event[1] for event in history.events)]
        if steps:
            self.first_step = min(self.first_step, steps[0])
            self.last_step = max(self.last_step, steps[-1])


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == MAGIC[0]
