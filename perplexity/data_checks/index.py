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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from .words import digest, grams, hashes, words

NGRAM = 13  # GPT-3 (arXiv:2005.14165, appendix C) and lm-evaluation-harness
SHINGLE = 4
FEWEST = 6  # shingles that a near copy shares: a phrase of eight words is none
COMMON = 100  # n-grams of more documents than these are boilerplate: they name no document
PASSAGE = 60  # words of a matching passage that are kept
BYTES_A_GRAM = 64  # of the two tables while they are sorted


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

    def texts_of(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, positions, side="right")


class GramTable:
    """Which validation documents an n-gram is in.

    grams: distinct ones, sorted, uint64 [U]; starts [U + 1], documents [P]: those of each; sizes [documents]: how many each has.
    """

    def __init__(self, found: np.ndarray, documents: np.ndarray, count: int) -> None:
        order = np.argsort(found, kind="stable")  # documents come in order, and stay so
        found, documents = found[order], documents[order]
        first = np.ones(len(found), bool)
        first[1:] = (found[1:] != found[:-1]) | (documents[1:] != documents[:-1])
        found, self.documents = found[first], documents[first].astype(np.int32)
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
        return self if other is None or (-self.score, self.train_id) <= (-other.score, other.train_id) else other


@dataclass
class Scan:
    """What was met in training text so far; ``merge`` adds what another pass met.

    exact, near, overlap: by validation document, the best match (near: Jaccard similarity of shingles; overlap: n-grams). seen:
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
        for batch in batches(texts):
            at = len(self.ids)
            for text, start, end in zip(batch.texts, batch.starts, batch.ends, strict=True):
                known = self.digests.setdefault(digest(batch.hashes[start:end]), [])
                self.repeated += bool(known)
                known.append(len(self.ids))
                self.ids.append(text.id)
                self.domains.append(text.domain)
                self.lengths.append(int(end - start))
                self.bytes.append(len(text.text.encode(errors="replace")))
            for size, kept in parts.items():
                found, positions = batch.grams(size)
                kept.append(self._sampled(found, (at + batch.texts_of(positions)).astype(np.int32)))
            while sum(len(found) for kept in parts.values() for found, _ in kept) > most:
                self._mask = 2 * self._mask + 1
                for size in parts:
                    parts[size] = [self._sampled(*pair) for pair in parts[size]]
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

    def scan(self) -> Scan:
        """An empty one, to merge into."""
        return Scan(np.zeros(len(self.tables[NGRAM].grams), bool))


def batches(texts: Iterable[Text], characters: int = 1 << 20) -> Iterable[Batch]:
    """Batches of texts with so many characters or more: numpy's calls cost as much for one document as for a thousand."""
    waiting, size = [], 0
    for text in texts:
        waiting.append(text)
        size += len(text.text)
        if size >= characters:
            yield Batch.of(waiting)
            waiting, size = [], 0
    if waiting:
        yield Batch.of(waiting)


def scan_batch(index: Index, texts: Sequence[Text]) -> Scan:
    """What of the validation text is in these training documents."""
    batch, scan = Batch.of(texts), index.scan()
    scan.documents = sum(text.last for text in texts)
    scan.words, scan.bytes = len(batch.words), sum(len(text.text.encode(errors="replace")) for text in texts)
    scan.domains = Counter(text.domain for text in texts if text.last)
    scan.lengths = Counter(int(length).bit_length() for length in (batch.ends - batch.starts).tolist())
    for text, start, end in zip(texts, batch.starts, batch.ends, strict=True):
        for document in index.digests.get(digest(batch.hashes[start:end]), ()) if end > start else ():
            scan.exact[document] = Match(1.0, text.id, _passage(batch, start, end)).better(scan.exact.get(document))
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
    """Jaccard similarity J = c / (a + b − c) ≥ t needs c ≥ t · b: only such pairs are looked at closely."""
    table = index.tables[SHINGLE]
    found, positions = index._sampled(*batch.grams(SHINGLE))
    places, rows = table.find(found)
    if not len(rows):
        return
    texts = batch.texts_of(positions)
    hit_texts, rows = np.divmod(np.unique(texts[places] * len(table.grams) + rows), len(table.grams))
    of, documents = table.pairs(rows)
    texts_, documents, counts, _ = _counted(hit_texts[of], documents, len(index.ids))
    enough = counts >= np.maximum(index.near * table.sizes[documents], FEWEST * index.kept)
    bounds = np.searchsorted(texts, np.arange(len(batch.texts) + 1))
    distinct: dict[int, int] = {}
    for text, document, count in zip(texts_[enough], documents[enough], counts[enough], strict=True):
        if text not in distinct:
            distinct[text] = len(np.unique(found[bounds[text] : bounds[text + 1]]))
        similarity = count / (distinct[text] + table.sizes[document] - count)
        if similarity >= index.near:
            start, end = batch.starts[text], batch.ends[text]
            match = Match(float(similarity), batch.texts[text].id)
            if match.better(scan.near.get(document)) is match:
                scan.near[int(document)] = Match(match.score, match.train_id, _passage(batch, start, end))
