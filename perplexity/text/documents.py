"""A document to evaluate: its text, or its token ids where the file holds those."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import InputError, check_unicode, spelled


@dataclass(frozen=True)
class Document:
    """A text to evaluate, or a pre-tokenised document.

    Args:
        id: Name of the document in results.
        text: Its text; of a pre-tokenised document ``evaluate`` fills in the decoded text.
        domain: Name of a group that results have a row for. Default: "text".
        ids: Token ids of a pre-tokenised document, int [tokens]. Default: None.
    """

    id: str
    text: str
    domain: str = "text"
    ids: np.ndarray | None = None

    @cached_property
    def bytes(self) -> int:
        """Return the number of UTF-8 bytes of the text."""
        return len(self.text.encode())

    @cached_property
    def words(self) -> int:
        """Return the number of words as lm-eval counts them: pieces between white space."""
        return len(re.split(r"\s+", self.text)) if self.text else 0

    @property
    def size(self) -> int:
        """Return the bytes of text, or the number of tokens of a pre-tokenised document.

        A progress bar counts them.
        """
        return self.bytes if self.ids is None else len(self.ids)


def checked_document(index: int, document: Document | str) -> Document:
    """Return a document with a text, an id and a domain that are Unicode.

    Args:
        index: Position among the documents, which is the id of a plain string.
        document: Document or text.

    Raises:
        InputError: The document is neither, its text is not Unicode, or its ids are no integers.
    """
    if isinstance(document, str):
        document = Document(str(index), document)
    if not (isinstance(document, Document) and isinstance(document.text, str)):
        raise InputError(
            f"documents: expected strings or Documents, got {type(document).__name__} at {index}"
        )
    # A file's name need not be Unicode, nor an id in JSON: half of a surrogate pair must not reach
    # tables and reports.
    names = [spelled(str(name)) for name in (document.id, document.domain)]
    if names != [document.id, document.domain]:
        document = dataclasses.replace(document, id=names[0], domain=names[1])
    if document.ids is not None:
        ids = np.asarray(document.ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InputError(
                f"document {document.id}: expected integer ids [tokens], "
                f"got {ids.dtype} {list(ids.shape)}"
            )
    check_unicode(f"document {document.id}", document.text)
    return document


def check_ids(document: Document, ids: np.ndarray, limit: int, whose: str, tokenizer=None) -> None:
    """Raise InputError for the first of ``ids`` outside [0, limit).

    The message names its position and its token in ``tokenizer``. A tokenizer with more entries
    than ``limit`` is no error by itself: padding and other tokens are often added and never used.
    """
    outside = np.flatnonzero((ids < 0) | (ids >= limit))
    if not len(outside):
        return
    place = int(outside[0])
    token, hint = "", ""
    if tokenizer is not None and 0 <= ids[place] < len(tokenizer):
        token = f" ({tokenizer.convert_ids_to_tokens(int(ids[place]))!r})"
        hint = (
            f"; the tokenizer has {len(tokenizer)} entries: "
            "check that it is this model's, or leave that token out"
        )
    raise InputError(
        f"document {document.id}: token id {ids[place]}{token} at position {place}, expected below "
        f"{limit}, {whose}{hint}"
    )
