"""The documents that a command evaluates."""

from __future__ import annotations

from collections.abc import Iterable

from ..text.documents import Document
from ..text.readers import read_documents
from .parts import STANDARD_INPUT, Reading


class Texts:
    """Documents, read once to the end before the model is loaded, so that bad input is reported
    first.

    ``count`` is their number, None where token files must be cut by a tokenizer first; ``size``
    their bytes, or tokens of token files.
    """

    def __init__(self, paths: list[str], reading: Reading) -> None:
        self.paths, self.reading = paths, reading
        documents: Iterable[Document] = read_documents(paths, reading.options())
        self.held = list(documents) if STANDARD_INPUT in paths else None
        self.count: int | None = 0
        self.size = 0
        for document in self.held or documents:
            self.size += document.size
            self.count = None if self.count is None or document.ids is not None else self.count + 1

    def documents(self, tokenizer) -> Iterable[Document]:
        """Return the documents, token files cut by the separator that the tokenizer knows."""
        if self.held is not None:
            return self.held
        return read_documents(self.paths, self.reading.options_with(tokenizer))
