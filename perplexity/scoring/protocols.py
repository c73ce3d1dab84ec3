"""Protocols: how a text becomes the positions a model reads; BOS policy, special tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import checks
from ..errors import InputError, theirs
from ..text.documents import Document
from ..text.spans import Spans
from ..text.tokenizers import as_tokenizer
from ..text.tokens import special_ids
from .windows import WINDOWS, Window, rolling_windows

PROTOCOLS = tuple(WINDOWS)
BOS_POLICIES = ("auto", "always", "never")
SPECIAL_TEXTS = ("tokens", "text")
LLAMA_CPP_CONTEXT = 512

# Reasons why a token that was read is not scored.
NO_CONTEXT = "no-context"  # the first token of a document that starts without BOS
CONTEXT = "context"  # outside the spans of a document of which a part is scored
FIRST_HALF = "first-half"  # the first half of a llama.cpp chunk is context only
TAIL = "tail"  # after the last whole llama.cpp chunk
SPECIAL = "special"  # BOS, EOS, padding and other special tokens, spelled in the text
NON_FINITE = "non-finite"  # the model's loss is NaN or infinite


@dataclass
class Positions:
    """A document as the model reads it.

    Args:
        document: The document.
        ids: Token ids with the protocol's prefix, int64.
        added: 1 where a BOS was put before the document's own tokens, else 0.
        skipped: Number of tokens that are read and not scored, by reason.
        spans: Spans of the document's own tokens; None where bytes are not needed.
        asked: bool [ids], the tokens of the parts to score; None for the whole document.
    """

    document: Document
    ids: np.ndarray  # int64
    added: int
    skipped: Counter = field(default_factory=Counter)
    spans: Spans | None = None
    asked: np.ndarray | None = None

    @property
    def tokens_read(self) -> int:
        """Return the number of the document's own tokens."""
        return len(self.ids) - self.added


@dataclass(frozen=True)
class Protocol:
    """A protocol prepared for one tokenizer and one context length.

    Args:
        name: Name of the protocol.
        context_length: The most positions of a window.
        stride: Distance of the windows' first positions.
        prefix: Token before each document; None for none.
        prefix_of_context: Token before a document that begins with context; None for none.
        first_of_window: Token that replaces the first one of every window, as llama.cpp does with
            BOS; None for none.
        unscored: Ids that are read and never scored.
        special_text: "tokens" where a special token spelled in a text is read as that token, "text"
            where its characters are read.
        bos: The BOS policy that was asked for.
    """

    name: str
    context_length: int
    stride: int
    prefix: int | None
    prefix_of_context: int | None
    first_of_window: int | None
    unscored: np.ndarray
    special_text: str = "tokens"
    bos: str = "auto"

    def settings(self) -> dict[str, Any]:
        """Return a protocol's settings for the journal."""
        return {
            "protocol": self.name,
            "context_length": self.context_length,
            "stride": self.stride,
            "bos": self.bos,
            "special_text": self.special_text,
        }

    def positions(
        self,
        document: Document,
        ids: np.ndarray,
        spans: Spans | None = None,
        asked: np.ndarray | None = None,
    ) -> Positions:
        """Return a document's tokens with the prefix, and count what is not scored.

        A BOS that the text spells itself is not doubled.

        Args:
            document: The document.
            ids: Its tokens, int [tokens].
            spans: Spans of these tokens.
            asked: bool [tokens], the tokens of the parts to score; None for all.
        """
        ids = np.asarray(ids, dtype=np.int64)
        in_context = asked is not None and not asked[:1].all()
        prefix = self.prefix_of_context if in_context else self.prefix
        doubled = (
            prefix is not None
            and (self.name != "lm-eval" or asked is not None)
            and len(ids) > 0
            and ids[0] == prefix
        )
        added = int(prefix is not None and not doubled)
        positions = Positions(document, np.concatenate([[prefix], ids]) if added else ids, added)
        positions.spans = spans
        if asked is not None:
            positions.asked = np.concatenate([np.zeros(added, dtype=bool), asked])
            self._count_skipped(positions)
            return positions
        length = len(positions.ids)
        if self.name == "llama.cpp":
            whole = length - length % self.context_length
            scored = sum(window.end - window.first_scored for window in self.windows(length))
            positions.skipped[FIRST_HALF] = max(0, whole - scored - added)
            positions.skipped[TAIL] = length - whole - (added if not whole else 0)
        elif length and not added and not doubled:  # a BOS spelled in the text counts as special
            positions.skipped[NO_CONTEXT] = 1
        return positions

    def _count_skipped(self, positions: Positions) -> None:
        """Count what is not scored of a document of which a part is to be scored."""
        asked, length = positions.asked, len(positions.ids)
        assert asked is not None
        positions.skipped[CONTEXT] = int((~asked).sum()) - positions.added
        reached = np.zeros(length, dtype=bool)
        for window in self.windows_of(positions):
            reached[window.first_scored : window.end] = True
        missed = np.flatnonzero(asked & ~reached)
        if self.name == "llama.cpp":
            whole = length - length % self.context_length
            positions.skipped[FIRST_HALF] = int((missed < whole).sum())
            positions.skipped[TAIL] = int((missed >= whole).sum())
        # A BOS that is spelled in the text counts as special.
        elif len(missed) and positions.ids[0] != self.prefix:
            positions.skipped[NO_CONTEXT] = 1

    def windows(self, length: int) -> Iterator[Window]:
        """Return the windows over ``length`` positions."""
        return WINDOWS[self.name](length, self.context_length, self.stride)

    def windows_of(self, positions: Positions) -> Iterator[Window]:
        """Return the windows over a document.

        A part of a document is scored in the windows of the whole document. Under "lm-eval" each
        part is a continuation with windows of its own, which end where the part does.
        """
        length = len(positions.ids)
        if positions.asked is None or self.name != "lm-eval":
            return self.windows(length)
        edges = np.flatnonzero(np.diff(positions.asked, prepend=False, append=False))
        return (
            window
            for first, end in edges.reshape(-1, 2).tolist()
            for window in rolling_windows(end, self.context_length, self.stride, max(1, first))
        )


def choose_protocol(
    name: str,
    tokenizer,
    *,
    limit: int | None,
    context_length: int | None,
    stride: int | None,
    bos: str,
    score_special: bool | None,
    special_text: str | None = None,
) -> Protocol:
    """Return the ``Protocol`` of a name for a model that reads ``limit`` positions (None: any).

    Raises:
        InputError: The model or the tokenizer does not allow an option; the message names it.
    """
    tokenizer = as_tokenizer(tokenizer)
    checks.choice("protocol", name, PROTOCOLS)
    checks.choice("bos", bos, BOS_POLICIES)
    checks.optional(checks.choice, "special_text", special_text, SPECIAL_TEXTS)
    checks.optional(checks.flag, "score_special", score_special, "True, False or None")
    whole = "a whole number"
    context_length = checks.optional(checks.integer, "context_length", context_length, whole)
    stride = checks.optional(checks.integer, "stride", stride, whole)
    if context_length is None:
        context_length = {
            "sliding": min(limit or 1024, 1024),
            # As HFLM: the model's limit, else the tokenizer's, else 2,048.
            "lm-eval": limit or _tokenizer_limit(tokenizer) or 2048,
            "llama.cpp": LLAMA_CPP_CONTEXT,
        }[name]
    if context_length < 2 or (limit and context_length > limit):
        raise InputError(
            f"context_length: expected 2 to {limit or 'any'}, the model's limit, "
            f"got {context_length}"
        )
    if name != "sliding":
        if stride not in (None, context_length):
            raise InputError(
                f"stride: expected none, {name} moves on by its context length, got {stride}"
            )
        stride = context_length
    else:
        stride = max(1, context_length // 2) if stride is None else stride
        if not 1 <= stride < context_length:
            raise InputError(
                f"stride: expected 1 to context_length - 1 = {context_length - 1}, got {stride}"
            )

    own = tokenizer.bos_token_id
    if bos == "always" and own is None:
        raise InputError("bos: 'always' was asked for, but the tokenizer has no BOS token")
    prefix = by_tokenizer = None if bos == "never" else own
    if name == "lm-eval":
        if bos == "never":
            raise InputError("bos: lm-eval puts a token before each document always, got 'never'")
        prefix = tokenizer.eos_token_id if own is None else own
        if prefix is None:
            raise InputError(
                "tokenizer: expected a BOS or EOS token, which lm-eval puts before each document, "
                "got none"
            )
    if name != "sliding" and bos == "auto" and own is not None:
        # llama.cpp follows the model's add_bos flag, which its converter derives from what the
        # tokenizer does. lm-eval's loglikelihood calls the tokenizer as it is for a context.
        with theirs("tokenizer: expected one that takes every Unicode text, got one that fails"):
            first = list(tokenizer("a")["input_ids"][:1])
        by_tokenizer = own if first == [own] else None
        prefix = by_tokenizer if name == "llama.cpp" else prefix
    special_text = _special_text(name, tokenizer, special_text)
    if score_special is None:
        score_special = name != "sliding"  # the other tools score them
    return Protocol(
        name,
        context_length,
        stride,
        prefix,
        by_tokenizer if bos != "always" else own,
        prefix if name == "llama.cpp" else None,
        np.array([] if score_special else sorted(special_ids(tokenizer)), dtype=np.int64),
        special_text,
        bos,
    )


def _special_text(protocol: str, tokenizer, asked: str | None) -> str:
    """Return how a protocol reads special tokens spelled in a text; "sliding" as asked."""
    if protocol == "llama.cpp":  # llama-perplexity's common_tokenize leaves parse_special off
        tools = "text"
    else:  # HFLM.tok_encode calls the tokenizer as it is
        tools = "text" if getattr(tokenizer, "split_special_tokens", False) else "tokens"
    if protocol != "sliding" and asked not in (None, tools):
        raise InputError(
            f"special_text: expected {tools!r}, which is how {protocol} reads them, got {asked!r}"
        )
    return asked or tools


def _tokenizer_limit(tokenizer) -> int | None:
    """Return the tokenizer's longest text in tokens; None where it has no limit."""
    limit = getattr(tokenizer, "model_max_length", None)
    return limit if limit and limit < 10**9 else None
