"""A document to evaluate: its text, or its token ids where the file holds those."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import InputError, check_unicode, spelled


@dataclass(frozen=True)
class Document:
    """A text to evaluate, a part of a text, a conversation, or a pre-tokenised document.

    ``Document(text)`` is short for a document whose id is its position among the documents.

    Args:
        id: Name of the document in results; the text, where ``text`` is left out.
        text: Its text; of messages and of a pre-tokenised document ``evaluate`` fills it in.
        domain: Name of a group that results have a row for. Default: "text".
        ids: Token ids of a pre-tokenised document, int [tokens]. Default: None.
        spans: Parts of the text to score, [begin, end) in characters. The rest of the text is
            context: shown to the model and never scored. Default: None, all of the text.
        messages: A conversation, each message with "role" and "content". The tokenizer's chat
            template makes the text, and the assistant's turns are scored. Default: None.

    Example:
        >>> document = Document("the cat sat on the mat", spans=[(7, 22)])
        >>> document.text[7:22]
        ' sat on the mat'
    """

    id: str
    text: str = None  # type: ignore[assignment]  # replaced in __post_init__
    domain: str = "text"
    ids: np.ndarray | None = None
    spans: Sequence[tuple[int, int]] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if self.text is None:
            alone = self.messages is None and self.ids is None
            object.__setattr__(self, "text", self.id if alone else "")
            object.__setattr__(self, "id", None if alone else self.id)

    @property
    def plain_text(self) -> str:
        """Return the text; of messages their contents, a line each, without a chat template."""
        if self.messages is None:
            return self.text
        return "\n".join(str(message.get("content") or "") for message in self.messages)

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
        if self.messages is not None:
            return len(self.plain_text.encode(errors="replace"))
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
    if document.id is None:
        document = dataclasses.replace(document, id=str(index))
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
    if document.spans is not None:
        if document.ids is not None or document.messages is not None:
            raise InputError(
                f"document {document.id}: expected spans of a text, got spans of "
                f"{'token ids' if document.ids is not None else 'messages'}"
            )
        spans = merged_spans(f"document {document.id}", document.spans, len(document.text))
        document = dataclasses.replace(document, spans=spans)
    return document


def merged_spans(
    where: str, spans: Iterable[Sequence[int]], length: int
) -> tuple[tuple[int, int], ...] | None:
    """Return spans in order, without empty ones, those that overlap or touch as one.

    Args:
        where: What an error names.
        spans: Pairs [begin, end) of characters.
        length: Characters of the text.

    Returns:
        The spans, or None where they are all of the text.

    Raises:
        InputError: A span is no pair of whole numbers, or lies outside the text.

    Example:
        >>> merged_spans("document a", [(4, 6), (0, 2), (5, 9), (3, 3)], 12)
        ((0, 2), (4, 9))
    """
    checked = []
    try:
        for begin, end in spans:
            checked.append((operator.index(begin), operator.index(end)))
    except (TypeError, ValueError):
        raise InputError(f"{where}: expected spans as pairs [begin, end), got {spans!r:.200}")
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(checked):
        if not 0 <= begin <= end <= length:
            raise InputError(
                f"{where}: expected spans within its {length} characters, got [{begin}, {end})"
            )
        if begin == end:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return None if length and merged == [(0, length)] else tuple(merged)


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
