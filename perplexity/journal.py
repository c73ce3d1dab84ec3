"""The one journal of all that resumes: results by key, on disk, of a run that may be killed.

A SQLite file for each part of a run. A key says what a result is of, so that nothing that differs
is taken for it. Every row has a checksum: a damaged row is as if it had not been written, and what
it held is computed again. A journal belongs to one run, by its identity; another run is refused.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

# Changes with what a file holds; SQLite keeps it as the file's user_version.
FORMAT = 2
SHOWN = 60  # characters of a value in an error


def _checksum(*parts: bytes) -> bytes:
    """Return the 8 bytes that a row keeps of its key and value.

    A flipped bit passes with probability 2⁻⁶⁴.
    """
    checksum = hashlib.blake2b(digest_size=8)
    for part in parts:
        checksum.update(len(part).to_bytes(8, "little") + part)
    return checksum.digest()


class Journal:
    """Results of a run in a folder, to resume from.

    Args:
        folder: where the files lie; made if need be.
        identity: what decides a result and is not in its key, as JSON; every run on this folder
            must have the same.
        part: name of this process's file; the files whose names begin alike are read as well.
        number: number of this process among those that share the folder; default 0.

    Raises:
        InputError: the folder cannot be used, or is of another run or version.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(folder, {"model": "a"}, "rank")
        ...     journal.write(b"key", b"value")
        ...     print(journal.read(b"key"), journal.read(b"other"))
        ...     journal.close()
        b'value' None
    """

    def __init__(
        self, folder: str | Path, identity: dict[str, Any], part: str, number: int = 0
    ) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"journal: expected a folder that can be written, got {folder} ({error.strerror})"
            )
        self.identity = json.dumps(identity, sort_keys=True)
        own = self.folder / f"{part}{number}.sqlite"
        # Another run's folder is refused before anything is written into it.
        others = [
            self._open(path) for path in sorted(set(self.folder.glob(f"{part}*.sqlite")) - {own})
        ]
        for other in others:
            self._compare("identity", self.identity, self._agreed(other, "identity"))
        self.own = self._open(own)
        self.agree("identity", self.identity)
        self.files = [self.own, *others]

    def _open(self, path: Path) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(path, timeout=60, isolation_level=None)
            # Each statement is whole after SIGKILL; after a power cut the last ones may be gone,
            # and their results are computed again.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            version = self._format(connection)
            if version is None:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS agreed "
                    "(name TEXT PRIMARY KEY, value TEXT, checksum BLOB)"
                )
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS batches "
                    "(key BLOB PRIMARY KEY, scored BLOB, checksum BLOB)"
                )
                connection.execute(f"PRAGMA user_version = {FORMAT}")
            elif version != FORMAT:
                raise InputError(
                    f"journal: expected format {FORMAT}, got format {version} in {self.folder}, "
                    "which another version of fused-perplexity wrote; give it an empty folder"
                )
        except sqlite3.Error as error:
            raise InputError(
                f"journal: expected a journal's own file at {path}, or none, got another ({error})"
            )
        return connection

    @staticmethod
    def _format(connection: sqlite3.Connection) -> int | None:
        """Return the format of the file; None where it is new, or was left before it had one."""
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version:
            return version
        for table in ("agreed", "batches"):
            columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
            if columns and "checksum" not in columns:
                return 1
        return None

    def agree(self, name: str, value: str) -> None:
        """Keep a fact of the run, and compare it with what an earlier run kept under its name.

        Args:
            name: of the fact, such as "document 3".
            value: the fact. A damaged row is written anew.

        Raises:
            InputError: an earlier run kept another value, or the journal cannot be written.
        """
        known = self._agreed(self.own, name)
        if known is None:
            checksum = _checksum(name.encode(), value.encode())
            self._write("INSERT OR REPLACE INTO agreed VALUES (?, ?, ?)", (name, value, checksum))
        self._compare(name, value, known)

    def _agreed(self, connection: sqlite3.Connection, name: str) -> str | None:
        row = self._query(connection, "SELECT value, checksum FROM agreed WHERE name = ?", name)
        # Keys hold the identity: where its damaged row is written anew, no result of another run
        # is read.
        intact = (
            row and isinstance(row[0], str) and row[1] == _checksum(name.encode(), row[0].encode())
        )
        return row[0] if row and intact else None

    def _compare(self, name: str, value: str, known: str | None) -> None:
        if known in (None, value):  # None: killed before the row was written, or a damaged row
            return
        if name == "identity":
            then, now = _object(known), json.loads(value)
            different = [key for key in {**then, **now} if then.get(key) != now.get(key)]
            was = ", ".join(
                f"{key} {then.get(key)!r:.{SHOWN}} (now {now.get(key)!r:.{SHOWN}})"
                for key in different
            )
        else:
            was = f"another text in {name}"
        raise InputError(
            f"journal: {self.folder} is of another run, with {was}; give it an empty folder"
        )

    def _write(self, statement: str, values: tuple) -> None:
        try:
            self.own.execute(statement, values)
        except sqlite3.Error as error:
            raise InputError(
                f"journal: {self.folder} cannot be written ({error}); what it holds is kept"
            )

    def _query(self, connection: sqlite3.Connection, statement: str, value) -> tuple | None:
        try:
            return connection.execute(statement, (value,)).fetchone()
        except sqlite3.Error as error:
            raise InputError(f"journal: {self.folder} cannot be read ({error})")

    def key(self, *parts: bytes) -> bytes:
        """Return the key of a result: a hash of the identity and of ``parts``, in order."""
        key = hashlib.sha256(self.identity.encode())
        for part in parts:
            key.update(part)
        return key.digest()

    def read(self, key: bytes) -> bytes | None:
        """Return what any process wrote for ``key``; None where nothing is, or a damaged row."""
        for connection in self.files:
            row = self._query(connection, "SELECT scored, checksum FROM batches WHERE key = ?", key)
            if row and _intact(key, *row):
                return row[0]
        return None

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the keys and results of all intact rows, in no order.

        Raises:
            InputError: a file cannot be read.
        """
        for connection in self.files:
            try:
                rows = connection.execute("SELECT key, scored, checksum FROM batches")
                for key, value, checksum in rows:
                    if _intact(key, value, checksum):
                        yield key, value
            except sqlite3.Error as error:
                raise InputError(f"journal: {self.folder} cannot be read ({error})")

    def write(self, key: bytes, value: bytes) -> None:
        """Keep the result of ``key``.

        Raises:
            InputError: the system refuses; what was kept before is still there.
        """
        self._write(
            "INSERT OR REPLACE INTO batches VALUES (?, ?, ?)", (key, value, _checksum(key, value))
        )

    def close(self) -> None:
        """Close the files."""
        for connection in self.files:
            connection.close()


def _intact(key: object, value: object, checksum: object) -> bool:
    """Return whether a row is as it was written."""
    return isinstance(key, bytes) and isinstance(value, bytes) and checksum == _checksum(key, value)


def _object(text: str | None) -> dict:
    """Return a JSON object; an empty one where a damaged journal holds something else."""
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
