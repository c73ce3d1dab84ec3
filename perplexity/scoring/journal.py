"""The journal of what has been scored: a run that was killed resumes to the same bits.

``ScoringRun.keep_in`` (run.py) opens it; the scorer of batches (stream.py) reads and writes it.
A batch's values are kept under a hash of the batch itself, its tokens and targets. The hashes of
the documents are kept as well, to tell another text from the same one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..journal import Journal


class ScoringJournal(Journal):
    """A journal of batches, a file a rank.

    Args:
        folder: where the files lie; made if need be.
        identity: what decides a batch's values and is not in the batch.
        rank: number of this process; default 0.

    Raises:
        InputError: the folder cannot be used, or is of another run or version.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], rank: int = 0) -> None:
        super().__init__(folder, identity, "rank", rank)

    def document(self, index: int, text_hash: str) -> None:
        """Keep a document's hash.

        Raises:
            InputError: an earlier run read another document at ``index``.
        """
        self.agree(f"document {index}", text_hash)

    def batch_key(self, *arrays: np.ndarray) -> bytes:
        """Return the key of a batch by its arrays, shapes and order included."""
        parts = [
            part
            for array in arrays
            for part in (repr(array.shape).encode(), np.ascontiguousarray(array).data)
        ]
        return self.key(*parts)  # type: ignore[arg-type]  # a hash takes any buffer

    def values(self, key: bytes, count: int) -> np.ndarray | None:
        """Return the ``count`` float32 values that any rank wrote for ``key``, or None."""
        value = self.read(key)
        if value is None or len(value) != 4 * count:
            return None
        return np.frombuffer(value, dtype=np.float32)

    def keep(self, key: bytes, values: np.ndarray) -> None:
        """Keep the values of a batch, as float32."""
        self.write(key, values.astype(np.float32).tobytes())
