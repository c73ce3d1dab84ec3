"""What has been scored, on disk: a run that was killed at any moment goes on where it stopped, to the same bits.

A SQLite file a rank: a batch's values are found by a hash of the batch itself (its tokens and targets), so that nothing
that differs can be taken for it. The documents' hashes are kept to tell another text from the same one.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import numpy as np

from ..errors import InputError


class Journal:
    """``identity``: what decides a batch's values and is not in the batch; every run on this folder must have the same."""

    def __init__(self, folder: str | Path, identity: dict, rank: int = 0) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"journal: expected a folder that can be written, got {folder} ({error.strerror})")
        self.identity = json.dumps(identity, sort_keys=True)
        own = self.folder / f"rank{rank}.sqlite"
        # Another run's folder is refused before anything is written into it.
        others = [self._open(path) for path in sorted(set(self.folder.glob("rank*.sqlite")) - {own})]
        for other in others:
            self._compare("identity", self.identity, self._agreed(other, "identity"))
        self.own = self._open(own)
        self._agree("identity", self.identity)
        self.files = [self.own, *others]

    def _open(self, path: Path) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(path, timeout=60, isolation_level=None)
            # Each statement is whole after SIGKILL; after a power cut the last ones may be gone, and are scored again.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS agreed (name TEXT PRIMARY KEY, value TEXT)")
            connection.execute("CREATE TABLE IF NOT EXISTS batches (key BLOB PRIMARY KEY, scored BLOB)")
        except sqlite3.Error as error:
            raise InputError(f"journal: expected a journal's own file at {path}, or none, got another ({error})")
        return connection

    def _agree(self, name: str, value: str) -> None:
        """Write down ``value``, or InputError where an earlier run wrote another."""
        self._write("INSERT OR IGNORE INTO agreed VALUES (?, ?)", (name, value))
        self._compare(name, value, self._agreed(self.own, name))

    def _agreed(self, connection: sqlite3.Connection, name: str) -> str | None:
        row = self._query(connection, "SELECT value FROM agreed WHERE name = ?", name)
        return row and row[0]

    def _compare(self, name: str, value: str, known: str | None) -> None:
        if known in (None, value):  # None: a rank that was killed before it wrote
            return
        if name == "identity":
            then, now = _object(known), json.loads(value)
            different = [key for key in {**then, **now} if then.get(key) != now.get(key)]
            was = ", ".join(f"{key} {then.get(key)!r} (now {now.get(key)!r})" for key in different)
        else:
            was = f"another text in {name}"
        raise InputError(f"journal: {self.folder} is of another run, with {was}; give it an empty folder")

    def _write(self, statement: str, values: tuple) -> None:
        try:
            self.own.execute(statement, values)
        except sqlite3.Error as error:
            raise InputError(f"journal: {self.folder} cannot be written ({error}); what it holds is kept")

    def document(self, index: int, text_hash: str) -> None:
        """InputError where an earlier run read another document here."""
        self._agree(f"document {index}", text_hash)

    def key(self, *arrays: np.ndarray) -> bytes:
        digest = hashlib.sha256(self.identity.encode())
        for array in arrays:
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array))
        return digest.digest()

    def read(self, key: bytes, count: int) -> np.ndarray | None:
        """The ``count`` float32 values that were written for ``key``, by any rank."""
        for connection in self.files:
            row = self._query(connection, "SELECT scored FROM batches WHERE key = ?", key)
            if row and isinstance(row[0], bytes) and len(row[0]) == 4 * count:  # else damaged: scored again
                return np.frombuffer(row[0], dtype=np.float32)
        return None

    def _query(self, connection: sqlite3.Connection, statement: str, value) -> tuple | None:
        try:
            return connection.execute(statement, (value,)).fetchone()
        except sqlite3.Error as error:
            raise InputError(f"journal: {self.folder} cannot be read ({error})")

    def write(self, key: bytes, scored: np.ndarray) -> None:
        self._write("INSERT OR REPLACE INTO batches VALUES (?, ?)", (key, scored.astype(np.float32).tobytes()))

    def close(self) -> None:
        for connection in self.files:
            connection.close()


def _object(text) -> dict:
    """A JSON object; empty where a damaged journal holds something else."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
