"""A document to evaluate: its text, or its tokens where somebody else cut it into them."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import InputError, check_unicode, spelled


@dataclass(frozen=True)
class Document:
    """``ids``: the tokens of a pre-tokenised document; ``text`` is then what they decode to, filled
    in by ``evaluate``.
    """

    id: str
    text: str
    domain: str = "text"
    ids: np.ndarray | None = None

    @cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())

    @cached_property
    def words(self) -> int:
        """Words as lm-evaluation-harness counts them: pieces between runs of white space."""
        return len(re.split(r"\s+", self.text)) if self.text else 0

    @property
    def size(self) -> int:
        """Bytes of text, or tokens where it comes as tokens: what there is to do, for a progress
        bar.
        """
        return self.bytes if self.ids is None else len(self.ids)


def checked_document(index: int, document: Document | str) -> Document:
    """``document`` with an id and a domain that are texts; InputError unless it is a document of
    Unicode text or integer ids.
    """
    if isinstance(document, str):
        document = Document(str(index), document)
    if not (isinstance(document, Document) and isinstance(document.text, str)):
        raise InputError(
            f"documents: expected strings or Documents, got {type(document).__name__} at {index}"
        )
    # A file's name need not be text, nor an id in JSON: no table and no report holds half of a
    # surrogate pair.
    names = [spelled(str(name)) for name in (document.id, document.domain)]
    if names != [document.id, document.domain]:
        document = dataclasses.replace(document, id=names[0], domain=names[1])
    if document.ids is not None:
        ids = np.asarray(document.ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InputError(
                f"document {document.id}: expected integer ids [tokens], got {ids.dtype} {list(ids.shape)}"
            )
    check_unicode(f"document {document.id}", document.text)
    return document


def check_ids(document: Document, ids: np.ndarray, limit: int, whose: str, tokenizer=None) -> None:
    """InputError naming the first of ``ids`` outside [0, limit), its position, and its token in
    ``tokenizer``.

    A tokenizer with more entries than ``limit`` is no error by itself: padding and other tokens are
    often added and never used.
    """
    outside = np.flatnonzero((ids < 0) | (ids >= limit))
    if not len(outside):
        return
    place = int(outside[0])
    token, hint = "", ""
    if tokenizer is not None and 0 <= ids[place] < len(tokenizer):
        token = f" ({tokenizer.convert_ids_to_tokens(int(ids[place]))!r})"
        hint = f"; the tokenizer has {len(tokenizer)} entries: check that it is this model's, or leave that token out"
    raise InputError(
        f"document {document.id}: token id {ids[place]}{token} at position {place}, expected below {limit}, "
        f"{whose}{hint}"
    )
