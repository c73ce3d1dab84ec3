"""The bytes and words that each token stands for, and what a tokenizer loses of a text."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np


@dataclass(frozen=True)
class Spans:
    """The bytes of a text, each assigned to one token.

    Args:
        ends: int64 [tokens], never falling. Token i holds the bytes from the end of the token
            before to its own end, so that white space between tokens belongs to the token that
            follows.
        groups: int64 [tokens]. The tokens that one character was cut into are a group, and the last
            of them holds its bytes; −1 is a token that stands for no text, as a BOS in a token
            file.
        exact: False where ``ends`` are an estimate.
        deleted: Number of characters of the text that its tokens lost.
        changed: Number of characters of the text that its tokens replaced by others.
    """

    ends: np.ndarray
    groups: np.ndarray
    exact: bool = True
    deleted: int = 0
    changed: int = 0

    def whole(self, scored: np.ndarray) -> np.ndarray:
        """Return for each group whether all its tokens are scored; ``scored`` is bool [tokens]."""
        kept = self.groups >= 0
        count = int(self.groups.max(initial=-1)) + 1
        return np.bincount(self.groups[kept], ~scored[kept], count) == 0

    def bytes(self, scored: np.ndarray) -> tuple[int, int]:
        """Return the bytes of groups with all tokens scored, and the bytes of the others."""
        kept = self.groups >= 0
        counts = self.whole(scored)[self.groups[kept]]
        sizes = np.diff(self.ends, prepend=0)[kept]
        return int(sizes[counts].sum()), int(sizes[~counts].sum())

    def words(
        self, text: str, scored: np.ndarray, parts: Sequence[tuple[int, int]] = ()
    ) -> tuple[int, int]:
        """Return the words of ``text`` that are scored, and the others.

        A word belongs to the token that holds its last byte. Words are lm-eval's: an end of the
        text that is white space has an empty word, which belongs to the first or last token. A word
        that an end of ``parts`` [begin, end) cuts is two words.
        """
        if not text:
            return 0, 0
        # The ends of the pieces of re.split(r"\s+", text): white space begins there.
        ends = [match.start() for match in re.finditer(r"\s+", text)] + [len(text)]
        cuts = {place for part in parts for place in part if 0 < place < len(text)}
        ends += [place for place in cuts if re.fullmatch(r"\S\S", text[place - 1 : place + 1])]
        last_bytes = _byte_places(text, np.maximum(ends, 1)) - 1
        holders = np.searchsorted(self.ends, last_bytes, side="right")
        counts = self.whole(scored)[self.groups[holders]]
        return int(counts.sum()), int((~counts).sum())


def spans_of(text: str, offsets: Sequence[tuple[int, int]], first: str = "") -> Spans:
    """Return the spans of a text's tokens from the characters that each covers, [begin, end).

    first: the first token, as its vocabulary spells it.
    """
    count = len(offsets)
    if not count:
        return Spans(np.empty(0, np.int64), np.empty(0, np.int64))
    begins, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * count).reshape(-1, 2).T
    # A token without characters is placed where the text has been read to.
    read = np.maximum.accumulate(ends)
    empty = begins >= ends
    begins, ends = np.where(empty, read, begins), np.where(empty, read, ends)
    if empty[0] and count > 1:
        # White space trimmed off a first token of only white space belongs to that token.
        ends[0] = min(len(first), begins[1])
    # Tokens that share a character overlap: the later token holds the character.
    ends[:-1] = np.minimum(ends[:-1], begins[1:])
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(text)
    ends = _byte_places(text, ends)
    return Spans(ends, groups_of(ends))


def estimated_spans(text: str, ids: np.ndarray, decode: Callable[[int], str]) -> Spans:
    """Return spans in proportion to the bytes that each token decodes to alone."""
    if not len(ids):
        return Spans(np.empty(0, np.int64), np.empty(0, np.int64), exact=False)
    kinds, places = np.unique(ids, return_inverse=True)
    lengths = [len(decode(token).encode(errors="replace")) for token in kinds.tolist()]
    sizes = np.array(lengths)[places]
    if not sizes.sum():
        sizes = np.ones(len(ids))
    total = len(text.encode())
    ends = np.round(np.cumsum(sizes) * (total / sizes.sum())).astype(np.int64)
    return Spans(ends, groups_of(ends), exact=False)


def inside(spans: Spans, kept: np.ndarray) -> Spans:
    """Return ``spans`` of the tokens where ``kept``, bool [tokens]; others stand for no text."""
    sizes, groups = np.zeros(len(kept), np.int64), np.full(len(kept), -1, np.int64)
    sizes[kept], groups[kept] = np.diff(spans.ends, prepend=0), spans.groups
    return Spans(np.cumsum(sizes), groups, spans.exact)


def groups_of(ends: np.ndarray) -> np.ndarray:
    """Return the group of each token: tokens that hold no byte belong to the next one that does."""
    holds = np.diff(ends, prepend=0) > 0
    return np.minimum(np.cumsum(holds) - holds, max(0, int(holds.sum()) - 1))


def _byte_places(text: str, characters: np.ndarray) -> np.ndarray:
    """Return where each character begins, in bytes of UTF-8."""
    if text.isascii():
        return np.asarray(characters)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])[characters]


def lost_characters(text: str, decoded: str) -> tuple[int, int]:
    """Return how many characters of ``text`` ``decoded`` lacks, and how many became others.

    White space is left aside. Another case, an accent less, or another normal form is a change.
    """
    text, decoded = "".join(text.split()), "".join(decoded.split())
    if text == decoded:
        return 0, 0
    lost = (Counter(text) - Counter(decoded)).total()
    if not lost:
        return 0, 0
    deleted = (Counter(_folded(text)) - Counter(_folded(decoded))).total()
    return min(deleted, lost), max(0, lost - deleted)


def _folded(text: str) -> str:
    """Return letters without case, accents and normal form."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in apart if not unicodedata.combining(letter))
