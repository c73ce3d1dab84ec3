"""The part of a document that is scored: its spans as tokens, and the turns of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, theirs
from .documents import Document, merged_spans
from .tokens import token_ids

# Stands for an assistant's turn while the template's own text is found. Private-use characters are
# in no template and in no sensible text.
MARK = "\ue0f0turn\ue0f1"
TEMPLATE = "tokenizer: expected a chat template that takes the messages of document"


def tokens_asked(
    tokenizer,
    document: Document,
    ids: np.ndarray,
    *,
    as_lm_eval: bool,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that the model reads of a document, and which lie in its spans.

    This is lm-eval's rule at both ends of a span. The text is tokenised as a whole, then cut at the
    number of tokens that the text before the end has alone: a token that straddles the end belongs
    to the side that this count gives. White space before the end moves to the text after the end
    where the tokens before it would not be the whole text's first tokens: in "the cat " + "sat",
    " sat" is one token, and belongs to "sat".

    Args:
        tokenizer: The tokenizer.
        document: A document with spans.
        ids: Its tokens [tokens].
        as_lm_eval: White space always moves to the text after the end, and a continuation (one
            span, to the end of the text) is read after the tokens that its context has alone.
        options: Further keywords of the tokenizer's call.

    Returns:
        Ids int64 [tokens], and bool [tokens].
    """
    text, spans = document.text, document.spans or ()
    asked = np.zeros(len(ids), dtype=bool)
    places = {0: 0, len(text): len(ids)}
    ends = sorted({end for span in spans for end in span} - set(places))
    before = [text[:end] for end in ends]
    bare = [part.rstrip() for part in before]
    counted = token_ids(tokenizer, bare if as_lm_eval else before, **options)
    if not as_lm_eval:
        again = [
            place
            for place, part in enumerate(counted)
            if len(bare[place]) < len(before[place]) and not np.array_equal(part, ids[: len(part)])
        ]
        moved = token_ids(tokenizer, [bare[place] for place in again], **options)
        for place, part in zip(again, moved, strict=True):
            counted[place] = part
    places |= {end: min(len(part), len(ids)) for end, part in zip(ends, counted, strict=True)}
    for begin, end in spans:
        asked[places[begin] : places[end]] = True
    if as_lm_eval and len(spans) == 1 and spans[0][1] == len(text) and counted:
        ids = np.concatenate([counted[0], ids[len(counted[0]) :]])[: len(ids)]
    return ids, asked


def turns(
    tokenizer, name: str, messages: Sequence[Mapping[str, Any]]
) -> tuple[str, tuple[tuple[int, int], ...] | None]:
    """Return the text of a conversation and the spans of the assistant's turns in it.

    A turn is its content as the chat template writes it, with the special token that ends it.
    What the template puts around it is context.

    Args:
        tokenizer: A tokenizer with a chat template.
        name: Id of the document, for errors.
        messages: The messages, each with "role" and "content".

    Raises:
        InputError: A message has no role or content, the template does not take the messages, or it
            leaves out an assistant's turn.
    """
    checked = [_checked(name, number, message) for number, message in enumerate(messages)]
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "tokenizer: expected one with a chat template, which messages need, got one without; "
            "use prompt and completion, or the tokenizer of the chat model"
        )
    marked = [message | {"content": MARK} if _own(message) else message for message in checked]
    with theirs(f"{TEMPLATE} {name}, got one that refuses them"):
        text = tokenizer.apply_chat_template(checked, tokenize=False)
        pieces = tokenizer.apply_chat_template(marked, tokenize=False).split(MARK)
    contents = [message["content"] for message in checked if _own(message)]
    if len(pieces) != len(contents) + 1:
        raise InputError(
            f"{TEMPLATE} {name}, got one that writes {len(pieces) - 1} of {len(contents)} "
            "assistant turns"
        )
    spans, place = [], 0
    for content, before, after in zip(contents, pieces, pieces[1:], strict=False):
        begin = place + len(before)
        end = _end(text, begin, content, after)
        if end is None or not text.startswith(before, place):
            raise InputError(
                f"{TEMPLATE} {name}, got one that changes the assistant's turn {content[:40]!r}"
            )
        spans.append((begin, end + _closing(tokenizer, after)))
        place = end
    return text, merged_spans(f"document {name}", spans, len(text))


def _checked(name: str, number: int, message: Any) -> dict[str, Any]:
    """Return a message whose content is a string, that of several text parts joined."""
    if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
        raise InputError(
            f"document {name}, message {number}: expected an object with role and content, "
            f"got {message!r:.100}"
        )
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise InputError(
            f"document {name}, message {number}: expected a string as content, "
            f"got {type(content).__name__}"
        )
    return dict(message) | {"content": content}


def _own(message: Mapping[str, Any]) -> bool:
    """Return whether a message is an assistant's text, which is scored."""
    return message["role"] == "assistant" and message["content"] is not None


def _end(text: str, begin: int, content: str, after: str) -> int | None:
    """Return where a turn ends that begins at ``begin``; None where the template changed it."""
    for written in (content, content.strip(), content.lstrip(), content.rstrip()):
        if text.startswith(written + after, begin):
            return begin + len(written)
    place = text.find(after, begin) if after else len(text)
    return None if place < 0 else place


def _closing(tokenizer, after: str) -> int:
    """Return the length of the special token at the beginning of ``after``, 0 without one."""
    spaces = len(after) - len(after.lstrip())
    closing = [
        token
        for token in getattr(tokenizer, "all_special_tokens", [])
        if token and after.startswith(token, spaces)
    ]
    return spaces + max(map(len, closing)) if closing else 0
