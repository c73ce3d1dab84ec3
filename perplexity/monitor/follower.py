"""A history that grows: what was added since the last look."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .history import History, Names
from .readers import add_csv, add_json_lines, csv_header, read_history, repair_order

TAIL = 64  # bytes before the offset, by which a file that was written anew is known


class NotYet(InputError):
    """Nothing to read for now."""


class Follower:
    """New rows of a .csv or .jsonl file each time it is asked; of other histories the whole, read
    anew.

    Raises NotYet where waiting may help: nothing is there yet, or a file that is written as a whole
    is half written. InputError where it will not: a whole line that cannot be read.
    """

    def __init__(
        self, path: str | Path, *, tags: dict[str, str] | None = None, unit: str = "nats"
    ) -> None:
        self.path, self.tags, self.unit = Path(path), tags, unit
        self.names = Names(tags, unit)
        self.lines = self.path.suffix in (".csv", ".jsonl", ".ndjson") and not self.path.is_dir()
        self.offset, self.tail = 0, b""
        self.header: list[str] | None = None
        self.identity: int | None = None

    def new(self) -> tuple[History, bool]:
        """What was added, and whether it is the whole: at first, and after the file was replaced or
        cut.
        """
        if not self.lines:
            try:
                return read_history(self.path, tags=self.tags, unit=self.unit), True
            except InputError as error:
                raise NotYet(str(error))
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            raise NotYet(f"{self.path}: expected a history, got no such file")
        history = History(str(self.path))
        with self.path.open("rb") as file:
            begin = max(0, self.offset - len(self.tail))
            file.seek(begin)
            raw = file.read()
            # another file by now
            if self.offset == 0 or stat.st_ino != self.identity or not raw.startswith(self.tail):
                file.seek(0)
                return self._whole(history, file.read(), stat.st_ino), True
        raw = raw[len(self.tail) :]
        raw = raw[: raw.rfind(b"\n") + 1]
        where = f"{self.path}, after byte {self.offset:,}"
        if raw.strip() and self.header is not None:
            add_csv(history, raw, self.names, where, self.header)
        elif raw.strip():
            add_json_lines(history, raw, self.names, where)
        self._read(raw)
        self.names.tell(history)
        return history, False

    def _read(self, raw: bytes) -> None:
        self.offset += len(raw)
        self.tail = (self.tail + raw)[-TAIL:]

    def _whole(self, history: History, raw: bytes, identity: int) -> History:
        raw = raw[: raw.rfind(b"\n") + 1]
        self.offset, self.tail, self.identity = 0, b"", identity
        if not raw.strip():
            raise NotYet(f"{self.path}: expected a history, got no whole line yet")
        if self.path.suffix == ".csv":
            self.header = csv_header(raw, str(self.path))
            add_csv(history, raw, self.names, str(self.path))
        else:
            add_json_lines(history, raw, self.names, str(self.path))
        if not len(history):
            raise NotYet(
                f"{self.path}: expected a training loss or a validation loss, got none so far"
            )
        self.names.tell(history)
        repair_order(history)
        self._read(raw)
        return history
