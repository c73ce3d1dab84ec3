"""Text to evaluate: .txt (a file is a document) and .jsonl (a line is one)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError


@dataclass(frozen=True)
class Document:
    id: str
    text: str
    domain: str = "text"

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())

    @property
    def words(self) -> int:
        """Words as lm-evaluation-harness counts them: pieces between runs of white space."""
        return len(re.split(r"\s+", self.text)) if self.text else 0


def read_documents(paths: Iterable[str | Path], *, text_field: str = "text") -> Iterator[Document]:
    """Documents of .txt and .jsonl files in order; a file's stem is its domain where a line names none.

    Raises InputError that names the file, and the line or byte, where one is missing, empty or cannot be read.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise InputError(f"{path}: expected a text file, got {'a folder' if path.is_dir() else 'no such file'}")
        if path.suffix not in (".txt", ".jsonl"):
            raise InputError(f"{path}: expected a name that ends in .txt or .jsonl, got {path.suffix or 'no suffix'!r}")
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: expected UTF-8, got byte 0x{error.object[error.start]:02x} at offset {error.start}"
            )
        if not text.strip():
            raise InputError(f"{path}: expected text, got an empty file")
        if path.suffix == ".txt":
            yield Document(path.name, text, path.stem)
        else:
            yield from _read_lines(path, text, text_field)


def _read_lines(path: Path, text: str, text_field: str) -> Iterator[Document]:
    # Not splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: expected a JSON object, got broken JSON ({error})")
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            raise InputError(
                f"{path}, line {number}: expected an object with a string {text_field!r}, got {line[:60]!r}"
            )
        yield Document(
            str(record.get("id", f"{path.name}:{number}")), record[text_field], str(record.get("domain", path.stem))
        )
