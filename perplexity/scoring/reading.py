"""Documents to the positions that models read."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .. import checks
from ..errors import InputError, theirs
from ..text.documents import Document, check_ids, checked_document
from ..text.parts import tokens_asked, turns
from ..text.readers import ReadOptions, document_of
from ..text.spans import Spans, estimated_spans, inside, lost_characters, spans_of
from ..text.tokens import encoded, special_ids, text_of, unknown_id
from .ahead import in_thread
from .protocols import Positions, Protocol

if TYPE_CHECKING:
    from .run import ScoringRun

TOKENIZED_AT_ONCE = 64
# As much text as the batches that ``stream`` forms together on a GPU, half a million positions.
CHARACTERS_AHEAD = 2_500_000
# What a caller gives as a document, and as the part of it that is scored.
Given: TypeAlias = Document | str | Mapping[str, Any]
Score: TypeAlias = str | Callable[[Document], Sequence[tuple[int, int]] | None]


def read_positions(
    run: ScoringRun,
    documents: Iterable[Given],
    protocol: Protocol,
    score: Score = "auto",
) -> Iterator[Positions]:
    """Yield documents as the models of ``run`` read them.

    The models are verified on the first document with two positions.

    Args:
        run: The pass that reads them.
        documents: Texts, Documents, or rows with the columns of ``ReadOptions``.
        protocol: The protocol.
        score: What is scored of them, one of ``SCORES``, or a function of a Document that returns
            its spans.
    """
    for token in (protocol.prefix, protocol.first_of_window):
        if token is None or token < run.vocabulary:
            continue
        raise InputError(
            f"bos: token id {token} ({run.tokenizer.convert_ids_to_tokens(token)!r}), which the "
            f"protocol puts before each document, is not below {run.vocabulary}, the model's "
            "vocabulary: check that the tokenizer is this model's, or leave it out (bos='never')"
        )
    for index, (document, ids, spans) in enumerate(
        _tokenized(run.tokenizer, documents, protocol, score, run.device.type != "cpu")
    ):
        run.read(index, document.text, document.spans)
        asked = None
        if document.spans is not None:
            ids, asked = tokens_asked(
                run.tokenizer,
                document,
                ids,
                as_lm_eval=protocol.name == "lm-eval",
                split_special_tokens=protocol.special_text == "text",
            )
        check_ids(document, ids, run.vocabulary, "the model's vocabulary", run.tokenizer)
        positions = protocol.positions(document, ids, spans, asked)
        if len(positions.ids) > 1:
            run.verify(positions.ids, protocol.context_length)
        yield positions


def _tokenized(
    tokenizer, documents: Iterable[Given], protocol: Protocol, score: Score, elsewhere: bool
) -> Iterator[tuple[Document, np.ndarray, Spans]]:
    """Yield documents with their text, token ids and spans.

    ``elsewhere``: the model is on another device than the CPU. A thread then tokenises ahead of
    the model. Documents are read, and errors raised, in this thread and in order.
    """
    checks.several("documents", documents, "them", (Document,))
    special = np.array(sorted(special_ids(tokenizer)), dtype=np.int64)
    checked = (
        _prepared(tokenizer, index, document, score) for index, document in enumerate(documents)
    )
    groups = iter(lambda: list(islice(checked, TOKENIZED_AT_ONCE)), [])
    tokenized = partial(
        _tokenized_group,
        special=special,
        unknown=unknown_id(tokenizer),
        split_special_tokens=protocol.special_text == "text",
    )
    other = _copy(tokenizer) if elsewhere else None
    if other is None:
        yield from chain.from_iterable(tokenized(tokenizer, group) for group in groups)
    else:
        yield from chain.from_iterable(
            in_thread(partial(tokenized, other), groups, _characters, CHARACTERS_AHEAD)
        )


def _copy(tokenizer):
    """Return a copy of a transformers tokenizer of the tokenizers library, for another thread.

    One object in two threads raises "Already borrowed". Returns None where there is no such copy:
    the thread that holds Python's lock would hinder the model.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    try:
        return copy.deepcopy(tokenizer)
    except Exception:  # a subclass may hold anything
        return None


def _characters(group: list[Document]) -> int:
    """Return the characters of documents, or their number of token ids."""
    return sum(len(d.text) if d.ids is None else len(d.ids) for d in group)


def _tokenized_group(
    tokenizer,
    group: list[Document],
    *,
    special: np.ndarray,
    unknown: int | None,
    split_special_tokens: bool,
) -> list[tuple[Document, np.ndarray, Spans]]:
    """Return documents with their text, token ids and spans; ``special`` are special ids."""
    texts = [document.text for document in group if document.ids is None]
    tokens = iter(encoded(tokenizer, texts, split_special_tokens=split_special_tokens))
    found = []
    for document in group:
        if document.ids is None:
            ids, encoding = next(tokens)
            found.append((document, ids, _spans(tokenizer, document.text, ids, encoding, unknown)))
            continue
        ids = np.asarray(document.ids).astype(np.int64)
        # Special tokens at the start and end of a document in a token file are no text; those
        # within the document are.
        kept = (ids >= 0) & (ids < len(tokenizer))  # ``check_ids`` refuses others
        text = np.flatnonzero(~np.isin(ids, special) & kept)
        kept[: text[0] if len(text) else None] = False
        kept[text[-1] + 1 if len(text) else 0 :] = False
        document = dataclasses.replace(document, text=text_of(tokenizer, ids[kept]))
        again, encoding = None, None
        if getattr(tokenizer, "is_fast", False):
            again, encoding = encoded(tokenizer, [document.text])[0]
        if again is None or encoding is None or not np.array_equal(again, ids[kept]):
            spans = _estimated_spans(tokenizer, document.text, ids[kept])
        else:
            spans = spans_of(document.text, encoding.offsets, _first(tokenizer, ids[kept]))
        found.append((document, ids, inside(spans, kept)))
    return found


def _prepared(tokenizer, index: int, given: Given, score: Score) -> Document:
    """Return a checked document with its text and the spans to score."""
    if isinstance(given, Mapping):
        # Spans are dropped below, also those of messages, which the chat template makes.
        options = ReadOptions(score="auto" if callable(score) or score == "all" else score)
        given = document_of(given, index, options)
    if not callable(score):
        _check_asked(index, given, score)
    document = checked_document(index, given)
    if document.messages is not None:
        text, spans = turns(tokenizer, document.id, document.messages)
        document = dataclasses.replace(document, text=text, spans=spans, messages=None)
    if score == "all":
        return dataclasses.replace(document, spans=None)
    if callable(score):
        with theirs(f"score: expected spans of document {document.id}, got a function that fails"):
            asked = score(document)
        return checked_document(index, dataclasses.replace(document, spans=asked))
    return document


def _check_asked(index: int, given: Document | str, score: str) -> None:
    """Raise InputError where a document lacks the part that ``score`` names."""
    found = {
        "assistant": getattr(given, "messages", None) is not None,
        "spans": getattr(given, "spans", None) is not None,
    }
    found["completion"] = found["spans"]
    if not found.get(score, True):
        needs = "messages" if score == "assistant" else "spans"
        raise InputError(
            f"score: {score!r} needs documents with {needs}, got one without at {index}"
        )


def _spans(tokenizer, text: str, ids: np.ndarray, encoding, unknown: int | None) -> Spans:
    """Return which bytes of ``text`` its tokens stand for, and what the tokens lost of the text."""
    known = ids if unknown is None else ids[ids != unknown]
    if encoding is None:
        spans = _estimated_spans(tokenizer, text, ids)
        if len(known) < len(ids):  # the characters of unknown tokens are not known
            return spans
    else:
        offsets = encoding.offsets
        spans = spans_of(text, offsets, _first(tokenizer, ids))
        # Unknown tokens are counted and noted separately: their characters are not deleted.
        for place in np.flatnonzero(ids == unknown)[::-1].tolist() if len(known) < len(ids) else []:
            text = text[: offsets[place][0]] + text[offsets[place][1] :]
    as_read = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
    decoded = text_of(tokenizer, known, **as_read)
    deleted, changed = lost_characters(text, decoded)
    return dataclasses.replace(spans, deleted=deleted, changed=changed)


def _first(tokenizer, ids: np.ndarray) -> str:
    """Return the first token as its vocabulary spells it; "" without tokens."""
    return tokenizer.convert_ids_to_tokens(int(ids[0])) if len(ids) else ""


def _estimated_spans(tokenizer, text: str, ids: np.ndarray) -> Spans:
    """Return spans in proportion to the bytes that each token decodes to."""
    return estimated_spans(text, ids, lambda token: text_of(tokenizer, [token]))
