"""The index of validation, and a pass over training text that keeps matches only.

Validation is the small side: its n-grams are held exactly, and training text of any size streams
past them. MinHash and Bloom filters are for two large sides; they miss matches and invent others,
which an exact table of the small side does not. A table of bits with one hash stands before the
exact table, and most training n-grams do not pass it.

``scan_batch`` is a plain function of an index and documents. ``Scan.merge`` is associative and
commutative. So a shard of training text can be scanned anywhere, by any engine, and the scans
merged in any order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import xxhash

from ..text.words import digest, grams, hashes, words

NGRAM = 13  # GPT-3 (arXiv:2005.14165, appendix C) and lm-evaluation-harness
SHINGLE = 4
FEWEST = 6  # shingles that a near copy shares at least: a phrase of eight words is no copy
COMMON = 100  # an n-gram of more documents than this is boilerplate, and names no document
BATCH = 1 << 20  # characters of text that one call scans
PASSAGE = 60  # words of a matching passage that are kept
BYTES_A_GRAM = 128  # of the two tables while they are sorted
# Similarity that a stretch of a longer text needs at least: a text has many stretches.
STRETCH = 0.35
FEWEST_OWN = 12  # own shingles of a document with a template: two names in its blanks have fewer
# A template's n-gram is in at least so many other documents of either side, in different contexts.
OTHERS = 3
CONTEXTS = 8  # contexts of an n-gram that are kept; the number of all is estimated from them
# Share of a document's n-grams from which its template matters, and from which a match is kept.
TEMPLATE = 0.1
# Share of its n-grams that a document has for itself: with less it is another version of one text.
OWN = 0.02
RARE = 0.3  # n-grams met this much less often than a template's fill the template's blanks
APART = 5.0  # how much more often a template's n-grams are met than the document's own
GAPS = 0.1  # share of other words inside the shared part from which those words are the context
ESTIMATED = 3  # n-grams that a judgement takes where only a part of them is kept


@dataclass(frozen=True)
class Text:
    """A document to check, or a piece of one.

    Args:
        id: its name.
        text: its text, or the piece.
        domain: what it is part of; default "text".
        last: whether the document ends here; default True.

    Example:
        >>> Text("a", "a document").domain
        'text'
    """

    id: str
    text: str
    domain: str = "text"
    last: bool = True


@dataclass(frozen=True)
class Batch:
    """Texts as words.

    Args:
        texts: the texts.
        words: the words of all texts.
        hashes: their hashes, uint64 [words].
        ends: where the words of each text end, int64 [texts].
    """

    texts: Sequence[Text]
    words: list[bytes]
    hashes: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Text]) -> Batch:
        """Return the texts as words."""
        every, ends = [], []
        for text in texts:
            every += words(text.text)
            ends.append(len(every))
        return cls(texts, every, hashes(every), np.array(ends, np.int64))

    @property
    def starts(self) -> np.ndarray:
        """Return where the words of each text start, int64 [texts]."""
        return np.concatenate([np.zeros(1, np.int64), self.ends])[:-1]

    def grams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of n-grams within a text, and the positions of their first words."""
        keys = grams(self.hashes, size)
        inside = np.ones(len(keys), bool)
        for end in self.ends[self.ends < len(self.hashes)].tolist():
            inside[max(0, end - size + 1) : end] = False
        positions = np.flatnonzero(inside)
        return keys[positions], positions

    def digests(self, texts: np.ndarray | list[int]) -> np.ndarray:
        """Return a hash of the words of each of these texts, uint64 [texts]."""
        ends, starts = self.ends, self.starts
        return np.array(
            [digest(self.hashes[starts[text] : ends[text]]) for text in texts], np.uint64
        )

    def outlines(self) -> np.ndarray:
        """Return a hash of the first word, last word and length of each text, uint64 [texts].

        It is 0 for a text without a word.
        """
        lengths = self.ends - self.starts
        outlines = np.zeros(len(self.ends), np.uint64)
        some = lengths > 0
        first, last = self.hashes[self.starts[some]], self.hashes[self.ends[some] - 1]
        outlines[some] = (first * np.uint64(3) + last) ^ lengths[some].astype(np.uint64)
        return outlines

    def texts_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the number of the text that each word is in."""
        return np.searchsorted(self.ends, positions, side="right")


class GramTable:
    """A table of the validation documents that each n-gram is in.

    It has the distinct n-grams ``grams`` uint64 [U], sorted. Those of row u are in the documents
    from ``starts[u]`` to ``starts[u + 1]`` of ``documents`` [P]; a place in ``documents`` is called
    an entry. ``sizes`` [documents] is the number of n-grams of each document.

    Args:
        keys: hashes of n-grams, uint64 [P].
        documents: the document of each, in order; a pair comes once.
        first: which documents are no copy of an earlier one, bool [documents].
    """

    def __init__(self, keys: np.ndarray, documents: np.ndarray, first: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")  # documents come in order, and stay so
        keys, self.documents = keys[order], documents[order]
        self.sizes = np.bincount(self.documents, minlength=len(first))
        self.grams, starts = np.unique(keys, return_index=True)
        self.starts = np.append(starts, len(keys)).astype(np.int64)
        few = np.repeat(np.diff(self.starts) <= COMMON, np.diff(self.starts))
        # How many of each document's n-grams name documents.
        self.named = np.bincount(self.documents[few], minlength=len(first))
        # How many other documents have each, copies of one counted once, int64 [U].
        self.others = (
            np.add.reduceat(first[self.documents].astype(np.int64), starts) - 1
            if len(keys)
            else starts
        )
        bits = min(26, max(16, 6 + len(self.grams).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[self.grams >> self._shift] = True

    def find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the places in ``wanted`` [n] of n-grams of the table, and their rows."""
        places = np.flatnonzero(self._filter[wanted >> self._shift])
        rows = np.searchsorted(self.grams, wanted[places])
        rows = np.minimum(rows, len(self.grams) - 1)
        known = (
            self.grams[rows] == wanted[places] if len(self.grams) else np.zeros(len(places), bool)
        )
        return places[known], rows[known]

    def pairs(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the entries of those of ``rows`` that at most ``COMMON`` documents have.

        Returns:
            Indices into ``rows``, and entries, int64 of one length.
        """
        counts = self.starts[rows + 1] - self.starts[rows]
        counts[counts > COMMON] = 0
        of = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        return of, self.starts[rows][of] + within

    @property
    def row_of(self) -> np.ndarray:
        """Return the row of each entry, int64 [P]."""
        return np.repeat(np.arange(len(self.grams)), np.diff(self.starts))

    def rows_of(self, documents: Sequence[int], own: np.ndarray) -> np.ndarray:
        """Return which rows these documents have among the entries ``own`` bool [P], bool [U]."""
        rows = np.zeros(len(self.grams), bool)
        rows[self.row_of[np.isin(self.documents, documents) & own]] = True
        return rows

    def seen(self, rows: np.ndarray, own: np.ndarray | bool = True) -> np.ndarray:
        """Count each document's n-grams among some rows and entries.

        Args:
            rows: which rows count, bool [U].
            own: which entries count, bool [P]; default all.

        Returns:
            int64 [documents].
        """
        return np.bincount(self.documents[rows[self.row_of] & own], minlength=len(self.sizes))

    def own(self, contexts: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Separate a document's own entries from the templates that other documents share.

        An n-gram is part of a template where ``OTHERS`` other documents have it in different
        contexts, and no fewer than ``RARE`` of the documents that have most of the template: rarer
        n-grams fill its blanks. One text in many versions is no template: a document has ``OWN`` of
        its n-grams for itself, and the template's are met ``APART`` times as often. The own part
        may have a template in turn.

        Args:
            contexts: contexts of each entry in training, [P]; default none.

        Returns:
            The entries that are their document's own, bool [P], and the documents with a template,
            bool [documents]. Every entry is own in a document without a template.
        """
        met = self.others[self.row_of] + contexts
        own, templated = np.ones(len(met), bool), np.zeros(len(self.sizes), bool)
        order = np.lexsort((-met, self.documents))
        while True:
            left = order[own[order]]
            sizes = np.bincount(self.documents[left], minlength=len(self.sizes))
            some = np.flatnonzero(sizes)
            most = np.zeros(len(sizes))
            firsts = np.cumsum(sizes) - sizes
            most[some] = met[left][(firsts + (TEMPLATE * sizes).astype(np.int64))[some]]
            common = own & (met >= np.maximum(OTHERS, RARE * most)[self.documents])
            shared = np.bincount(self.documents, common, len(sizes))
            rest = sizes - shared
            of_shared = np.bincount(self.documents, met * common, len(sizes))
            of_rest = np.bincount(self.documents, met * (own & ~common), len(sizes))
            more = (shared > 0) & (shared >= TEMPLATE * self.sizes) & (rest >= OWN * self.sizes)
            more &= of_shared * rest >= APART * of_rest * shared
            if not more.any():
                return own, templated
            own &= ~(common & more[self.documents])
            templated |= more


class Contexts:
    """The ``CONTEXTS`` least values met with each key: a sample that no order of arrival changes.

    Args:
        keys: int64 [n]; default none.
        values: uint64 [n]; a pair comes once, and pairs are in order once they are settled.
    """

    def __init__(self, keys: Sequence[int] = (), values: Sequence[int] = ()) -> None:
        self.keys, self.values = np.array(keys, np.int64), np.array(values, np.uint64)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting = 0

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Add pairs, in any order."""
        self._new.append((keys, values))
        self._waiting += len(keys)
        if self._waiting > max(BATCH >> 4, len(self.keys)):
            self.settle()

    def merge(self, other: Contexts) -> None:
        """Add the pairs of another sample."""
        other.settle()
        self.add(other.keys, other.values)

    def settle(self) -> None:
        """Sort the pairs, and keep the least values of each key."""
        if not self._new:
            return
        keys, values = (
            np.concatenate(side) for side in zip((self.keys, self.values), *self._new, strict=True)
        )
        order = np.lexsort((values, keys))
        keys, values = keys[order], values[order]
        once = np.append(True, (keys[1:] != keys[:-1]) | (values[1:] != values[:-1]))[: len(keys)]
        keys, values = keys[once], values[once]
        least = np.arange(len(keys)) - np.searchsorted(keys, keys) < CONTEXTS
        self.keys, self.values, self._new, self._waiting = keys[least], values[least], [], 0

    def counts(self, size: int) -> np.ndarray:
        """Return the number of values met with each key below ``size``, float64 [size].

        It is exact below ``CONTEXTS``, and else (CONTEXTS - 1) over the largest value that is kept,
        as a share of all possible values.
        """
        self.settle()
        counts = np.bincount(self.keys, minlength=size).astype(np.float64)
        lasts = np.cumsum(counts).astype(np.int64) - 1
        many = counts == CONTEXTS
        counts[many] = (CONTEXTS - 1) / ((self.values[lasts[many]] + 1.0) / 2.0**64)
        return counts


@dataclass(frozen=True, order=True)
class Candidate:
    """A training document, or a stretch of one, with shingles of a validation document.

    Args:
        document: number of the validation document.
        train_id: name of the training document.
        passage: the words of the stretch.
    """

    document: int
    train_id: str
    passage: str


@dataclass(frozen=True)
class Match:
    """The training document that has most of a validation document.

    Args:
        score: a similarity, or n-grams in common.
        train_id: name of the training document.
        passage: the first words that both share; default none.
    """

    score: float
    train_id: str
    passage: str = ""

    def better(self, other: Match | None) -> Match:
        """Return the better of two matches; ties go by name, so that no order decides them."""
        return self if other is None or self._order() <= other._order() else other

    def _order(self) -> tuple:
        return -self.score, self.train_id, self.passage


def sealed(content: str) -> str:
    """Return a line of JSON that holds ``content``, which is JSON, behind its checksum."""
    return f'["{xxhash.xxh3_64_hexdigest(content.encode())}", {content}]'


def unsealed(line: str) -> str:
    """Return what was sealed.

    Raises:
        ValueError: any of it was changed.
    """
    content = line[len('["0123456789abcdef", ') : -1]
    if sealed(content) != line:
        raise ValueError("its checksum does not fit")
    return content


_BEST = ("exact", "near", "overlap")
_CONTEXTS = ("ngrams", "shingles")


@dataclass
class Scan:
    """The parts of validation that a pass over training text met; scans can be merged.

    Args:
        seen: the rows of the table of n-grams that were met, bool [U].
        documents: training documents read to their end.
        words: words read.
        bytes: bytes read, UTF-8.
        exact: the best match of each validation document that was met as it is.
        near: the match of the largest Jaccard similarity, by validation document.
        overlap: the match of the most n-grams in common, by validation document.
        domains: documents of each domain.
        lengths: documents by the bits of their number of words.
        ngrams: contexts of rows of the table of n-grams.
        shingles: contexts of entries of the table of shingles.
        candidates: the document that each context of a shingle stands for.
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
    ngrams: Contexts = field(default_factory=Contexts)
    shingles: Contexts = field(default_factory=Contexts)
    candidates: dict[int, Candidate] = field(default_factory=dict)

    def merge(self, other: Scan) -> Scan:
        """Add what another pass met, and return this scan."""
        self.seen |= other.seen
        for name in ("documents", "words", "bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _BEST:
            best = getattr(self, name)
            for document, match in getattr(other, name).items():
                best[document] = match.better(best.get(document))
        self.domains += other.domains
        self.lengths += other.lengths
        for name in _CONTEXTS:
            getattr(self, name).merge(getattr(other, name))
        for value, candidate in other.candidates.items():
            self.add_candidate(value, candidate)
        if len(self.candidates) > max(BATCH >> 8, 2 * len(self.shingles.keys)):
            self.settle()
        return self

    def add_candidate(self, value: int, candidate: Candidate) -> None:
        """Add the document that context ``value`` stands for; of several the least is kept."""
        known = self.candidates.get(value)
        # Of copies in one context no order of arrival must decide which is kept.
        if known is None or candidate < known:
            self.candidates[value] = candidate

    def settle(self) -> Scan:
        """Remove the candidates that no entry names, and return this scan."""
        for name in _CONTEXTS:
            getattr(self, name).settle()
        named = set(self.shingles.values.tolist())
        self.candidates = {value: one for value, one in self.candidates.items() if value in named}
        return self

    def record(self) -> dict:
        """Return the scan as an object of JSON."""
        record = vars(self.settle()) | {
            "seen": [len(self.seen), *np.flatnonzero(self.seen).tolist()]
        }
        for name in _CONTEXTS:
            record[name] = [record[name].keys.tolist(), record[name].values.tolist()]
        for name in (*_BEST, "candidates"):
            record[name] = {key: asdict(one) for key, one in record[name].items()}
        return record

    @classmethod
    def of_record(cls, record: dict) -> Scan:
        """Return the scan that ``record`` gave."""
        size, *rows = record["seen"]
        record["seen"] = np.zeros(size, bool)
        record["seen"][rows] = True
        for name in _CONTEXTS:
            record[name] = Contexts(*record[name])
        for name in (*_BEST, "candidates"):
            kind = Candidate if name == "candidates" else Match
            record[name] = {int(key): kind(**one) for key, one in record[name].items()}
        record["domains"] = Counter(record["domains"])
        record["lengths"] = Counter({int(bits): count for bits, count in record["lengths"].items()})
        return cls(**record)

    def to_json(self) -> str:
        """Return a line of JSON with a checksum."""
        return sealed(json.dumps(self.record()))

    @classmethod
    def from_json(cls, text: str) -> Scan:
        """Return the scan that ``to_json`` wrote.

        Raises:
            ValueError: any of the text was changed.
        """
        return cls.of_record(json.loads(unsealed(text)))


class Index:
    """The validation side: its tables of n-grams and of shingles.

    Of more n-grams than fit into the memory limit those are kept, on both sides, whose hash falls
    into a part of all (``kept``). Shares become estimates then.

    Args:
        texts: validation documents, whole.
        memory_limit: bytes of the tables; default 1 GiB.
        near: Jaccard similarity of shingles from which a document is a copy; default 0.25.

    Example:
        >>> Index([Text("a", "a document of five words")]).lengths
        [5]
    """

    def __init__(
        self, texts: Iterable[Text], memory_limit: int = 1 << 30, near: float = 0.25
    ) -> None:
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
                if end > start:  # a text without words is no copy of another such text
                    known = self.digests.setdefault(digest(batch.hashes[start:end]), [])
                    self.repeated += bool(known)
                    known.append(len(self.ids))
                self.ids.append(text.id)
                self.domains.append(text.domain)
                self.lengths.append(int(end - start))
                self.bytes.append(len(text.text.encode(errors="replace")))
            ends.append(batch.outlines())
            for size, kept in parts.items():
                keys, positions = self._sampled(*batch.grams(size))
                of = batch.texts_of(positions)
                once = np.unique(np.stack([keys, of.astype(np.uint64)]), axis=1)
                kept.append((once[0], (at + once[1].astype(np.int64)).astype(np.int32)))
            while sum(len(keys) for kept in parts.values() for keys, _ in kept) > most:
                self._mask = 2 * self._mask + 1
                for size in parts:
                    parts[size] = [self._sampled(*pair) for pair in parts[size]]
        self._outlines = np.unique(np.concatenate(ends or [np.empty(0, np.uint64)]))
        first = np.ones(len(self.ids), bool)
        first[[copy for copies in self.digests.values() for copy in copies[1:]]] = False
        self.tables = {}
        for size, kept in parts.items():
            keys = np.concatenate([pair[0] for pair in kept] or [np.empty(0, np.uint64)])
            documents = np.concatenate([pair[1] for pair in kept] or [np.empty(0, np.int32)])
            self.tables[size] = GramTable(keys, documents, first)
        # Templates that validation shows by itself.
        self._own, self._templated = self.tables[SHINGLE].own()

    @property
    def kept(self) -> float:
        """Return the share of n-grams that is kept, 1 where all are."""
        return 1.0 / (self._mask + 1)

    def _sampled(self, keys: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of n-grams that are kept, and the values at their places."""
        if not self._mask:
            return keys, others
        inside = ((keys >> np.uint64(20)) & np.uint64(self._mask)) == 0
        return keys[inside], others[inside]

    def copies(self, batch: Batch) -> Iterator[tuple[int, int]]:
        """Yield a text's number and a validation document's, for texts of the same words."""
        # Only texts that begin and end as a validation document of their length are hashed whole.
        for text in np.flatnonzero(np.isin(batch.outlines(), self._outlines)).tolist():
            start, end = batch.starts[text], batch.ends[text]
            if end > start:
                yield from (
                    (text, document)
                    for document in self.digests.get(digest(batch.hashes[start:end]), ())
                )

    def scan(self) -> Scan:
        """Return an empty scan, to merge others into."""
        return Scan(np.zeros(len(self.tables[NGRAM].grams), bool))


def groups(texts: Iterable, characters: int = BATCH) -> Iterator[list]:
    """Yield lists of texts: a call of numpy costs as much for one document as for a thousand.

    Args:
        texts: anything with a ``text``.
        characters: a list has at least so many, but for the last one; default 1 MiB.

    Example:
        >>> texts = [Text("1", "ab"), Text("2", "cd"), Text("3", "e")]
        >>> [len(group) for group in groups(texts, characters=4)]
        [2, 1]
    """
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
    """Return what training documents have of validation.

    Args:
        index: the validation side.
        texts: training documents, or pieces of them.

    Example:
        >>> text = Text("a", "a document of some words")
        >>> scan_batch(Index([text]), [text]).exact[0].train_id
        'a'
    """
    batch, scan = Batch.of(texts), index.scan()
    scan.documents = sum(text.last for text in texts)
    scan.words, scan.bytes = (
        len(batch.words),
        sum(len(text.text.encode(errors="replace")) for text in texts),
    )
    scan.domains = Counter(text.domain for text in texts if text.last)
    lengths = (batch.ends - batch.starts).tolist()
    scan.lengths = Counter(
        length.bit_length() for text, length in zip(texts, lengths, strict=True) if text.last
    )
    for text, document in index.copies(batch):
        match = Match(1.0, texts[text].id, _passage(batch, batch.starts[text], batch.ends[text]))
        scan.exact[document] = match.better(scan.exact.get(document))
    _overlaps(index, batch, scan)
    _near(index, batch, scan)
    return scan


def _passage(batch: Batch, start: int, end: int) -> str:
    """Return the words from ``start`` to ``end``, the first ``PASSAGE`` of them."""
    shown = b" ".join(batch.words[start : min(end, start + PASSAGE)]).decode()
    return shown + (" …" if end - start > PASSAGE else "")


def _counted(
    texts: np.ndarray, documents: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct pairs of text and document, how often each comes, and where first."""
    keys, first, counts = np.unique(
        texts * count + documents, return_index=True, return_counts=True
    )
    return keys // count, keys % count, counts, first


def _overlaps(index: Index, batch: Batch, scan: Scan) -> None:
    """Add the n-grams of validation that the texts have, and the best overlap of each document."""
    table = index.tables[NGRAM]
    keys, positions = index._sampled(*batch.grams(NGRAM))
    places, rows = table.find(keys)
    scan.seen[rows] = True
    if not len(rows):
        return
    positions = positions[places]
    texts = batch.texts_of(positions)
    # An n-gram counts once a text, however often the text has it.
    _, once = np.unique(texts * len(table.grams) + rows, return_index=True)
    positions, texts, rows = positions[once], texts[once], rows[once]
    known, at = np.unique(texts, return_inverse=True)
    scan.ngrams.add(rows, batch.digests(known)[at])
    of, entries = table.pairs(rows)
    documents = table.documents[entries]
    order = np.lexsort((positions[of], documents, texts[of]))
    of, documents = of[order], documents[order]
    for text, document, count, first in zip(
        *_counted(texts[of], documents, len(index.ids)), strict=True
    ):
        run = positions[of[first : first + count]]
        match = Match(int(count), batch.texts[text].id)
        if match.better(scan.overlap.get(document)) is match:
            length = int(np.argmax(np.append(np.diff(run) != 1, True))) + NGRAM
            passage = _passage(batch, int(run[0]), int(run[0]) + length)
            scan.overlap[int(document)] = Match(match.score, match.train_id, passage)


def _near(index: Index, batch: Batch, scan: Scan) -> None:
    """Add texts, or stretches as long as a validation document, that are similar to the document.

    Those of a Jaccard similarity of ``near`` or more are matches. Those that have ``TEMPLATE`` of
    the document's shingles are candidates: boilerplate is known only when all texts are read, and a
    candidate may copy the rest of the document.
    """
    table = index.tables[SHINGLE]
    keys, positions = index._sampled(*batch.grams(SHINGLE))
    places, rows = table.find(keys)
    if not len(rows):
        return
    of, entries = table.pairs(rows)
    documents, at = table.documents[entries], positions[places[of]]
    texts = batch.texts_of(at)
    order = np.lexsort((at, documents, texts))
    at, rows, entries, documents, texts = (
        at[order],
        rows[of][order],
        entries[order],
        documents[order],
        texts[order],
    )
    bounds = np.searchsorted(batch.texts_of(positions), np.arange(len(batch.texts) + 1))
    texts, documents, counts, firsts = _counted(texts, documents, len(index.ids))
    least = np.maximum(min(index.near, TEMPLATE) * table.named, FEWEST)
    enough = counts >= least[documents]
    # A text that has nothing but the template that validation shows by itself is no match.
    if len(firsts):
        own = np.add.reduceat(index._own[entries].astype(np.int64), firsts)
        enough &= (own >= FEWEST) | ~index._templated[documents]
    distinct: dict[int, int] = {}
    digests: dict[int, np.ndarray] = {}
    pairs = (side[enough].tolist() for side in (texts, documents, counts, firsts))
    for text, document, count, first in zip(*pairs, strict=True):
        size, length, name = (
            int(table.sizes[document]),
            index.lengths[document],
            batch.texts[text].id,
        )
        there, mine = at[first : first + count], entries[first : first + count]
        if text not in distinct:
            distinct[text] = len(np.unique(keys[bounds[text] : bounds[text + 1]]))
            digests[text] = batch.digests([text])
        begin, end = _stretch(there, length)
        shared = np.unique(mine[begin:end])
        inside = max((length - SHINGLE + 1) * index.kept, len(shared))
        similarity = _jaccard(len(shared), inside, size)
        everywhere = np.unique(mine)
        whole = _jaccard(len(everywhere), distinct[text], size)
        at_begin = int(there[begin])
        score = float(max(similarity if similarity >= STRETCH else 0.0, whole))
        best = scan.near.get(document)
        if score >= index.near and (best is None or score >= best.score):
            passage = _passage(batch, at_begin, min(int(batch.ends[text]), at_begin + length))
            scan.near[document] = Match(score, name, passage).better(best)
        if whole > similarity:
            begin, end, shared = 0, count, everywhere
        if len(shared) < least[document]:
            continue
        # The context is the shared part with the other words inside, or the whole text where these
        # are few. So a copy with some words changed is one context on many pages, and a template is
        # met in as many contexts as texts have it.
        first_word, last_word = int(there[begin]), int(there[end - 1]) + SHINGLE
        span = last_word - first_word - SHINGLE + 1
        gaps = span - len(np.unique(there[begin:end])) / index.kept
        context = (
            digests[text] if gaps < GAPS * span else [digest(batch.hashes[first_word:last_word])]
        )
        value = digest(np.array([*context, document], np.uint64))
        scan.shingles.add(shared, np.full(len(shared), value, np.uint64))
        known = scan.candidates.get(value)
        if known is None or name <= known.train_id:
            passage = _passage(batch, at_begin, min(int(batch.ends[text]), at_begin + length))
            scan.add_candidate(value, Candidate(document, name, passage))


def _jaccard(shared: int, some: float, others: float) -> float:
    """Return the similarity of two sets by their sizes, 0 where they share too few to judge."""
    return shared / (some + others - shared) if shared >= FEWEST else 0.0


def _stretch(at: np.ndarray, length: int) -> tuple[int, int]:
    """Return the longest slice of ``at``, positions in order, that lies within ``length`` words."""
    ends = np.searchsorted(at, at + length)
    best = int(np.argmax(ends - np.arange(len(at))))
    return best, int(ends[best])


def own_matches(index: Index, scan: Scan, own: np.ndarray) -> dict[int, Match]:
    """Return the best candidate of each document by the entries ``own`` bool [P] alone.

    A candidate is compared as if it were as long as the document's own part: J = c / (2b - c) of b
    own shingles with c in common.
    """
    scan.settle()
    sizes = np.bincount(index.tables[SHINGLE].documents, own, len(index.ids))
    values, counts = np.unique(scan.shingles.values[own[scan.shingles.keys]], return_counts=True)
    best: dict[int, Match] = {}
    for value, shared in zip(values.tolist(), counts.tolist(), strict=True):
        one = scan.candidates[value]
        size = float(sizes[one.document])
        match = Match(_jaccard(shared, size, size), one.train_id, one.passage)
        if shared >= FEWEST_OWN and match.score >= index.near:
            best[one.document] = match.better(best.get(one.document))
    return best


def own_overlaps(index: Index, scan: Scan, own: np.ndarray) -> np.ndarray:
    """Return the most own entries of each document that one training document has.

    Args:
        index: the validation side.
        scan: what was met in training; only the contexts that are kept count.
        own: the entries, bool [P].

    Returns:
        int64 [documents].
    """
    table, contexts = index.tables[NGRAM], scan.ngrams
    contexts.settle()
    entries = np.flatnonzero(own)
    rows = table.row_of[entries]
    starts, ends = (np.searchsorted(contexts.keys, rows, side) for side in ("left", "right"))
    counts = ends - starts
    at = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    documents = np.repeat(table.documents[entries], counts)
    order = np.lexsort((contexts.values[at], documents))
    documents, values = documents[order], contexts.values[at][order]
    new = np.append(True, (documents[1:] != documents[:-1]) | (values[1:] != values[:-1]))[
        : len(documents)
    ]
    firsts = np.flatnonzero(new)
    most = np.zeros(len(index.ids), np.int64)
    np.maximum.at(most, documents[firsts], np.diff(np.append(firsts, len(documents))))
    return most
