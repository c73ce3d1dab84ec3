"""Documents that a command scores."""

from __future__ import annotations

from collections.abc import Iterable

from ..files import STANDARD_INPUT
from ..text.documents import Document
from ..text.readers import read_documents
from .parts import Reading


class Texts:
    """Documents of files, all of which are read once before a model is loaded.

    So errors in the files are reported before the time that loading takes. Documents of standard
    input are held in memory.

    Attributes:
        count: Number of documents; None with token files, which need a tokenizer to be cut.
        size: Bytes of all texts, or tokens of token files.
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
        """Return the documents; token files are cut at the tokenizer's separator."""
        if self.held is not None:
            return self.held
        return read_documents(self.paths, self.reading.options_with(tokenizer))
