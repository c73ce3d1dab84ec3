"""What of the validation text is in a training text: the index of the one, and a pass over the other that keeps matches only.

Validation is the small side: its n-grams are held, exactly, and training text of any size streams past them. So no MinHash and
no Bloom filter: those are for two large sides, miss some and invent some; an exact table of the small side does neither. In
front of it stands a table of bits with one hash (a Bloom filter of one), which most training n-grams do not pass.

``scan_batch`` is a plain function of an index and documents, ``Scan.merge`` is associative and commutative: a shard of training
text can be scanned anywhere, by any engine, and merged in any order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from .words import digest, grams, hashes, words

NGRAM = 13  # GPT-3 (arXiv:2005.14165, appendix C) and lm-evaluation-harness
SHINGLE = 4
FEWEST = 6  # shingles that a near copy shares: a phrase of eight words is none
COMMON = 100  # n-grams of more documents than these are boilerplate: they name no document
BATCH = 1 << 20  # characters of text that one call scans
PASSAGE = 60  # words of a matching passage that are kept
BYTES_A_GRAM = 128  # of the two tables while they are sorted
STRETCH = 0.35  # similarity that a stretch of a longer text needs at least: there are many stretches in a text
ESTIMATED = 3  # n-grams that are needed to judge a document by where only a part of them is kept


@dataclass(frozen=True)
class Text:
    """A document to check, or a piece of one whose end has not come yet (``last`` False)."""

    id: str
    text: str
    domain: str = "text"
    last: bool = True


@dataclass(frozen=True)
class Batch:
    """Texts as words: ``ends`` [texts] is where each one's words end."""

    texts: Sequence[Text]
    words: list[bytes]
    hashes: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Text]) -> Batch:
        every, ends = [], []
        for text in texts:
            every += words(text.text)
            ends.append(len(every))
        return cls(texts, every, hashes(every), np.array(ends, np.int64))

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([np.zeros(1, np.int64), self.ends])[:-1]

    def grams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of n-grams within a text, and the position of their first word."""
        found = grams(self.hashes, size)
        inside = np.ones(len(found), bool)
        for end in self.ends[self.ends < len(self.hashes)].tolist():
            inside[max(0, end - size + 1) : end] = False
        positions = np.flatnonzero(inside)
        return found[positions], positions

    def outlines(self) -> np.ndarray:
        """First word, last word and length of each text, as one number, uint64 [texts]; 0 where there is no word."""
        lengths = self.ends - self.starts
        found = np.zeros(len(self.ends), np.uint64)
        some = lengths > 0
        first, last = self.hashes[self.starts[some]], self.hashes[self.ends[some] - 1]
        found[some] = (first * np.uint64(3) + last) ^ lengths[some].astype(np.uint64)
        return found

    def texts_of(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, positions, side="right")


class GramTable:
    """Which validation documents an n-gram is in.

    Made of pairs (``found``, ``documents``), each once and documents in order. grams: distinct ones, sorted, uint64 [U]; starts
    [U + 1], documents [P]: those of each; sizes [documents]: how many each has.
    """

    def __init__(self, found: np.ndarray, documents: np.ndarray, count: int) -> None:
        order = np.argsort(found, kind="stable")  # documents come in order, and stay so
        found, self.documents = found[order], documents[order]
        self.sizes = np.bincount(self.documents, minlength=count)
        self.grams, starts = np.unique(found, return_index=True)
        self.starts = np.append(starts, len(found)).astype(np.int64)
        bits = min(26, max(16, 6 + len(self.grams).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[self.grams >> self._shift] = True

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in ``wanted`` [n] there are n-grams of the table, and which rows of it they are."""
        places = np.flatnonzero(self._filter[wanted >> self._shift])
        rows = np.searchsorted(self.grams, wanted[places])
        rows = np.minimum(rows, len(self.grams) - 1)
        known = self.grams[rows] == wanted[places] if len(self.grams) else np.zeros(len(places), bool)
        return places[known], rows[known]

    def pairs(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each of ``rows`` that is no boilerplate its documents: indices into ``rows``, and documents."""
        counts = self.starts[rows + 1] - self.starts[rows]
        counts[counts > COMMON] = 0
        of = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        return of, self.documents[self.starts[rows][of] + within]

    def rows_of(self, documents: Sequence[int]) -> np.ndarray:
        """Which rows these documents have, bool [U]."""
        of = np.repeat(np.arange(len(self.grams)), np.diff(self.starts))
        found = np.zeros(len(self.grams), bool)
        found[of[np.isin(self.documents, documents)]] = True
        return found

    def seen(self, rows: np.ndarray) -> np.ndarray:
        """How many of each document's n-grams are among the rows marked in ``rows`` bool [U]."""
        marked = np.repeat(rows, np.diff(self.starts))
        return np.bincount(self.documents[marked], minlength=len(self.sizes))


@dataclass(frozen=True)
class Match:
    """The training document that has most of a validation document, how much, and what they share."""

    score: float
    train_id: str
    passage: str = ""

    def better(self, other: Match | None) -> Match:
        """The order of arrival decides nothing: ties go by name."""
        return self if other is None or self._order() <= other._order() else other

    def _order(self) -> tuple:
        return -self.score, self.train_id, self.passage


@dataclass
class Scan:
    """What was met in training text so far; ``merge`` adds what another pass met.

    exact, near, overlap: by validation document, the best match (near: Jaccard similarity; overlap: n-grams in common). seen:
    rows of the table of n-grams, bool [U]. lengths: documents by the bits of their number of words.
    """

    seen: np.ndarray
    documents: int = 0
    words: int = 0
    bytes: int = 0
    exact: dict[int, Match] = field(default_factory=dict)
    near: dict[int, Match] = field(default_factory=dict)
    overlap: dict[int, Match] = field(default_factory=dict)
    domains: Counter = field(default_factory=Counter)
    lengths: Counter = field(default_factory=Counter)

    def merge(self, other: Scan) -> Scan:
        self.seen |= other.seen
        for name in ("documents", "words", "bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("exact", "near", "overlap"):
            best = getattr(self, name)
            for document, match in getattr(other, name).items():
                best[document] = match.better(best.get(document))
        self.domains += other.domains
        self.lengths += other.lengths
        return self

    def to_json(self) -> str:
        record = vars(self) | {"seen": [len(self.seen), *np.flatnonzero(self.seen).tolist()]}
        for name in ("exact", "near", "overlap"):
            record[name] = {document: asdict(match) for document, match in record[name].items()}
        return json.dumps(record)

    @classmethod
    def from_json(cls, text: str) -> Scan:
        record = json.loads(text)
        size, *rows = record["seen"]
        record["seen"] = np.zeros(size, bool)
        record["seen"][rows] = True
        for name in ("exact", "near", "overlap"):
            record[name] = {int(document): Match(**match) for document, match in record[name].items()}
        record["domains"] = Counter(record["domains"])
        record["lengths"] = Counter({int(bits): count for bits, count in record["lengths"].items()})
        return cls(**record)


class Index:
    """The validation side. ``memory_limit`` bounds its tables, in bytes: of more n-grams than fit only those are kept, on both
    sides, whose hash falls into a part of all (``kept``, 1 where none was left out), and shares become estimates."""

    def __init__(self, texts: Iterable[Text], memory_limit: int = 1 << 30, near: float = 0.25) -> None:
        self.near = near
        self.ids: list[str] = []
        self.domains: list[str] = []
        self.lengths: list[int] = []  # words
        self.bytes: list[int] = []
        self.digests: dict[int, list[int]] = {}
        self.repeated = 0  # validation documents that are another one again
        self._mask, most = 0, max(1, memory_limit // BYTES_A_GRAM)
        parts: dict[int, list] = {NGRAM: [], SHINGLE: []}
        ends = []
        for batch in map(Batch.of, groups(texts)):
            at = len(self.ids)
            for text, start, end in zip(batch.texts, batch.starts, batch.ends, strict=True):
                if end > start:  # no words are no copy of no words
                    known = self.digests.setdefault(digest(batch.hashes[start:end]), [])
                    self.repeated += bool(known)
                    known.append(len(self.ids))
                self.ids.append(text.id)
                self.domains.append(text.domain)
                self.lengths.append(int(end - start))
                self.bytes.append(len(text.text.encode(errors="replace")))
            ends.append(batch.outlines())
            for size, kept in parts.items():
                found, positions = self._sampled(*batch.grams(size))
                of = batch.texts_of(positions)
                once = np.unique(np.stack([found, of.astype(np.uint64)]), axis=1)
                kept.append((once[0], (at + once[1].astype(np.int64)).astype(np.int32)))
            while sum(len(found) for kept in parts.values() for found, _ in kept) > most:
                self._mask = 2 * self._mask + 1
                for size in parts:
                    parts[size] = [self._sampled(*pair) for pair in parts[size]]
        self._outlines = np.unique(np.concatenate(ends or [np.empty(0, np.uint64)]))
        count = len(self.ids)
        self.tables = {}
        for size, kept in parts.items():
            found = np.concatenate([pair[0] for pair in kept] or [np.empty(0, np.uint64)])
            documents = np.concatenate([pair[1] for pair in kept] or [np.empty(0, np.int32)])
            self.tables[size] = GramTable(found, documents, count)

    @property
    def kept(self) -> float:
        return 1.0 / (self._mask + 1)

    def _sampled(self, found: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self._mask:
            return found, others
        inside = ((found >> np.uint64(20)) & np.uint64(self._mask)) == 0
        return found[inside], others[inside]

    def copies(self, batch: Batch) -> Iterator[tuple[int, int]]:
        """(text of the batch, validation document) of the same words."""
        # Few texts begin and end as a validation document of their length: only those are hashed as a whole.
        for text in np.flatnonzero(np.isin(batch.outlines(), self._outlines)).tolist():
            start, end = batch.starts[text], batch.ends[text]
            if end > start:
                yield from ((text, document) for document in self.digests.get(digest(batch.hashes[start:end]), ()))

    def scan(self) -> Scan:
        """An empty one, to merge into."""
        return Scan(np.zeros(len(self.tables[NGRAM].grams), bool))


def groups(texts: Iterable, characters: int = BATCH) -> Iterator[list]:
    """Lists of what has a ``text``, of so many characters or a little more: numpy's calls cost as much for one document as for a
    thousand."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text.text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def scan_batch(index: Index, texts: Sequence[Text]) -> Scan:
    """What of the validation text is in these training documents."""
    batch, scan = Batch.of(texts), index.scan()
    scan.documents = sum(text.last for text in texts)
    scan.words, scan.bytes = len(batch.words), sum(len(text.text.encode(errors="replace")) for text in texts)
    scan.domains = Counter(text.domain for text in texts if text.last)
    lengths = (batch.ends - batch.starts).tolist()
    scan.lengths = Counter(length.bit_length() for text, length in zip(texts, lengths, strict=True) if text.last)
    for text, document in index.copies(batch):
        match = Match(1.0, texts[text].id, _passage(batch, batch.starts[text], batch.ends[text]))
        scan.exact[document] = match.better(scan.exact.get(document))
    _overlaps(index, batch, scan)
    _near(index, batch, scan)
    return scan


def _passage(batch: Batch, start: int, end: int) -> str:
    shown = b" ".join(batch.words[start : min(end, start + PASSAGE)]).decode()
    return shown + (" …" if end - start > PASSAGE else "")


def _counted(
    texts: np.ndarray, documents: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct (text, document) pairs, how often each came, and where first."""
    keys, first, counts = np.unique(texts * count + documents, return_index=True, return_counts=True)
    return keys // count, keys % count, counts, first


def _overlaps(index: Index, batch: Batch, scan: Scan) -> None:
    table = index.tables[NGRAM]
    found, positions = index._sampled(*batch.grams(NGRAM))
    places, rows = table.find(found)
    scan.seen[rows] = True
    if not len(rows):
        return
    positions = positions[places]
    texts = batch.texts_of(positions)
    # An n-gram counts once a text, however often it is there.
    _, once = np.unique(texts * len(table.grams) + rows, return_index=True)
    positions, texts, rows = positions[once], texts[once], rows[once]
    of, documents = table.pairs(rows)
    order = np.lexsort((positions[of], documents, texts[of]))
    of, documents = of[order], documents[order]
    for text, document, count, first in zip(*_counted(texts[of], documents, len(index.ids)), strict=True):
        run = positions[of[first : first + count]]
        match = Match(int(count), batch.texts[text].id)
        if match.better(scan.overlap.get(document)) is match:
            length = int(np.argmax(np.append(np.diff(run) != 1, True))) + NGRAM
            passage = _passage(batch, int(run[0]), int(run[0]) + length)
            scan.overlap[int(document)] = Match(match.score, match.train_id, passage)


def _near(index: Index, batch: Batch, scan: Scan) -> None:
    """Texts, or stretches of them as long as a validation document, that have a Jaccard similarity of ``near`` or more with it.

    With c shingles in common, a and b in all, J = c / (a + b − c) ≥ t needs c ≥ t · b: only such pairs are looked at closely.
    """
    table = index.tables[SHINGLE]
    found, positions = index._sampled(*batch.grams(SHINGLE))
    places, rows = table.find(found)
    if not len(rows):
        return
    of, documents = table.pairs(rows)
    texts = batch.texts_of(positions[places])[of]
    order = np.lexsort((positions[places[of]], documents, texts))
    at, rows, documents, texts = positions[places[of]][order], rows[of][order], documents[order], texts[order]
    bounds = np.searchsorted(batch.texts_of(positions), np.arange(len(batch.texts) + 1))
    distinct: dict[int, int] = {}
    for text, document, count, first in zip(*_counted(texts, documents, len(index.ids)), strict=True):
        size = int(table.sizes[document])
        if count < max(index.near * size, FEWEST):
            continue
        mine = slice(first, first + count)
        similarity, begin = _stretch(at[mine], rows[mine], size, index.lengths[document], index.kept)
        shared = len(np.unique(rows[mine]))
        if text not in distinct:
            distinct[text] = len(np.unique(found[bounds[text] : bounds[text + 1]]))
        whole = shared / (distinct[text] + size - shared) if shared >= FEWEST else 0.0
        similarity = max(similarity if similarity >= STRETCH else 0.0, whole)
        if similarity >= index.near:
            match = Match(float(similarity), batch.texts[text].id)
            if match.better(scan.near.get(document)) is match:
                end = min(int(batch.ends[text]), begin + index.lengths[document])
                scan.near[int(document)] = Match(match.score, match.train_id, _passage(batch, begin, end))


def _stretch(at: np.ndarray, rows: np.ndarray, size: int, length: int, kept: float) -> tuple[float, int]:
    """Similarity of a document of ``length`` words with the stretch of a text, as long as it, that has most of its shingles, and
    where that begins; at, rows: positions of shingles they have in common, in order."""
    ends = np.searchsorted(at, at + length)
    best = int(np.argmax(ends - np.arange(len(at))))
    shared = len(np.unique(rows[best : ends[best]]))
    inside = max((length - SHINGLE + 1) * kept, shared)
    return (shared / (inside + size - shared) if shared >= FEWEST else 0.0), int(at[best])
