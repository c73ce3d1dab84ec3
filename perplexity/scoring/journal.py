"""The journal of a run, which resumes a killed run where it stopped, to the same bits.

Each rank has a SQLite file. A batch's values are stored by a hash of the batch itself (its tokens
and targets), so that no other batch can be mistaken for it. The documents' hashes are stored to
tell another text. Every row has a checksum; a damaged row is scored again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import numpy as np

from ..errors import InputError

# Changes with the content of a file; SQLite stores it as the file's user_version.
FORMAT = 2


def _checksum(*parts: bytes) -> bytes:
    """Return the 8 bytes that a row stores as the checksum of its key and value.

    A flipped bit passes with probability 2⁻⁶⁴.
    """
    blake2b = hashlib.blake2b(digest_size=8)
    for part in parts:
        blake2b.update(len(part).to_bytes(8, "little") + part)
    return blake2b.digest()


class Journal:
    """Stored values of a run.

    Args:
        folder: Folder of the ranks' files.
        identity: What decides a batch's values and is not in the batch; every run on this folder
            must have an equal one.
        rank: This process's rank. Default: 0.
    """

    def __init__(self, folder: str | Path, identity: dict, rank: int = 0) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"journal: expected a folder that can be written, got {folder} ({error.strerror})"
            )
        self.identity = json.dumps(identity, sort_keys=True)
        own = self.folder / f"rank{rank}.sqlite"
        # Another run's folder is refused before anything is written there.
        others = [
            self._open(path) for path in sorted(set(self.folder.glob("rank*.sqlite")) - {own})
        ]
        for other in others:
            self._compare("identity", self.identity, self._agreed(other, "identity"))
        self.own = self._open(own)
        self._agree("identity", self.identity)
        self.files = [self.own, *others]

    def _open(self, path: Path) -> sqlite3.Connection:
        """Return a connection to a rank's file, whose tables are created if necessary."""
        try:
            connection = sqlite3.connect(path, timeout=60, isolation_level=None)
            # Each statement is whole after SIGKILL. A power cut may lose the last ones, and then
            # their batches are scored again.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            version = self._format(connection)
            if version is None:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS agreed (name TEXT PRIMARY KEY, value TEXT, "
                    "checksum BLOB)"
                )
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS batches (key BLOB PRIMARY KEY, scored BLOB, "
                    "checksum BLOB)"
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

    def _agree(self, name: str, value: str) -> None:
        """Write ``value`` where no run did, or its row is damaged.

        Raises InputError where an earlier run wrote another value.
        """
        known = self._agreed(self.own, name)
        if known is None:
            checksum = _checksum(name.encode(), value.encode())
            self._write("INSERT OR REPLACE INTO agreed VALUES (?, ?, ?)", (name, value, checksum))
        self._compare(name, value, known)

    def _agreed(self, connection: sqlite3.Connection, name: str) -> str | None:
        """Return an earlier run's value of ``name``; None for no row or a damaged one."""
        row = self._query(connection, "SELECT value, checksum FROM agreed WHERE name = ?", name)
        # The batches' keys contain the identity. So no value of another run is read after a damaged
        # row was written anew.
        intact = (
            row and isinstance(row[0], str) and row[1] == _checksum(name.encode(), row[0].encode())
        )
        return row[0] if row and intact else None

    def _compare(self, name: str, value: str, known: str | None) -> None:
        """Raise InputError, naming the differences, if an earlier run's value is another."""
        # None: a rank was killed before it wrote, or the row is damaged.
        if known in (None, value):
            return
        if name == "identity":
            then, now = _object(known), json.loads(value)
            different = [key for key in {**then, **now} if then.get(key) != now.get(key)]
            was = ", ".join(f"{key} {then.get(key)!r} (now {now.get(key)!r})" for key in different)
        else:
            was = f"another text in {name}"
        raise InputError(
            f"journal: {self.folder} is of another run, with {was}; give it an empty folder"
        )

    def _write(self, statement: str, values: tuple) -> None:
        """Execute a statement that writes into this rank's file."""
        try:
            self.own.execute(statement, values)
        except sqlite3.Error as error:
            raise InputError(
                f"journal: {self.folder} cannot be written ({error}); what it holds is kept"
            )

    def document(self, index: int, text_hash: str) -> None:
        """Record a document's hash; raise InputError where an earlier run read another document."""
        self._agree(f"document {index}", text_hash)

    def key(self, *arrays: np.ndarray) -> bytes:
        """Return the key of a batch: a hash of its arrays and of the identity."""
        sha256 = hashlib.sha256(self.identity.encode())
        for array in arrays:
            sha256.update(repr(array.shape).encode())
            sha256.update(np.ascontiguousarray(array).data)
        return sha256.digest()

    def read(self, key: bytes, count: int) -> np.ndarray | None:
        """Return the ``count`` float32 values that any rank wrote for ``key``, or None."""
        for connection in self.files:
            row = self._query(connection, "SELECT scored, checksum FROM batches WHERE key = ?", key)
            # A damaged row is scored again.
            if (
                row
                and isinstance(row[0], bytes)
                and len(row[0]) == 4 * count
                and row[1] == _checksum(key, row[0])
            ):
                return np.frombuffer(row[0], dtype=np.float32)
        return None

    def _query(self, connection: sqlite3.Connection, statement: str, value) -> tuple | None:
        """Return the row of a statement that reads; None where there is none."""
        try:
            return connection.execute(statement, (value,)).fetchone()
        except sqlite3.Error as error:
            raise InputError(f"journal: {self.folder} cannot be read ({error})")

    def write(self, key: bytes, scored: np.ndarray) -> None:
        """Write the values of a batch."""
        values = scored.astype(np.float32).tobytes()
        self._write(
            "INSERT OR REPLACE INTO batches VALUES (?, ?, ?)", (key, values, _checksum(key, values))
        )

    def close(self) -> None:
        """Close the files."""
        for connection in self.files:
            connection.close()


def _object(text) -> dict:
    """Return a JSON object; an empty one where a damaged journal holds something else."""
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
