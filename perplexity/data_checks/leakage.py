"""The validation documents that training has: exactly, nearly, or inside a longer document."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..findings import Finding
from ..journal import FORMAT, Journal
from ..text.words import grams, hashes, words
from ..wording import by_number, counted
from .index import (
    ESTIMATED,
    FEWEST,
    NGRAM,
    SHINGLE,
    GramTable,
    Index,
    Match,
    Scan,
    Text,
    groups,
    own_matches,
    own_overlaps,
    scan_batch,
)
from .texts import BLANK

# The fewest words of a document that can leak: "example" and "is equivalent to" are in every text.
FEWEST_WORDS = 4
CONTAINED = 0.5  # share of a document's n-grams from which it counts as leaked
SAVE_EVERY = 20.0  # seconds between the rows of a journal


@dataclass(frozen=True)
class Leak:
    """A validation document that training has.

    Where the document has a template, similarity and overlap are of its own parts (``Own``).

    Args:
        document: its number, from 0.
        id: its name.
        domain: its domain.
        kind: "exact" (apart from case, spaces and punctuation), "near" or "contained".
        train_id: name of the training document; empty where there are many.
        similarity: Jaccard similarity of shingles, from 0 to 1.
        overlap: share of its n-grams that training has, from 0 to 1.
        words: its words.
        passage: the first words that both share.
    """

    document: int
    id: str
    domain: str
    kind: str
    train_id: str
    similarity: float
    overlap: float
    words: int
    passage: str


_worker_index: Index  # set by ``_start_worker`` in a worker


def _start_worker(index: Index, parent: int) -> None:
    """Keep the index in a worker, which ends when process ``parent`` does."""
    global _worker_index
    _worker_index = index

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # the process that takes the results was killed

    # On Windows the number of an ended parent stays; there a worker ends when its queue breaks.
    if os.name != "nt":
        threading.Thread(target=watch, daemon=True).start()


def _scan_in_worker(texts: list[Text]) -> Scan:
    return scan_batch(_worker_index, texts)


def scan_texts(
    index: Index,
    texts: Iterable[Text],
    *,
    workers: int = 1,
    state: str | Path | None = None,
    identity: dict | None = None,
    progress: Callable[[Scan], None] | None = None,
) -> Scan:
    """Return what one pass over training texts meets of validation.

    Args:
        index: the validation side.
        texts: training texts, read once.
        workers: processes that scan; default 1.
        state: a folder to resume from: the same call reads what a killed one has scanned, but does
            not scan it again. Damaged rows are scanned again.
        identity: what the texts are of, as JSON; a journal of another identity is refused.
        progress: called with the ``Scan`` so far as texts are read.

    Raises:
        InputError: ``state`` is of another call or cannot be used, or workers cannot be started.

    Example:
        >>> text = Text("a", " ".join(map(str, range(20))))
        >>> scan_texts(Index([text]), [text]).documents
        1
    """
    resumption = None if state is None else _Resumption(Path(state), index, identity or {})
    numbers: deque[int] = deque()

    def left(known: set[int]) -> Iterator[list[Text]]:
        for number, part in enumerate(groups(texts)):
            if number not in known:
                numbers.append(number)
                yield part

    try:
        scan, known = (index.scan(), set()) if resumption is None else resumption.load()
        for met in _scanned(index, left(known), workers):
            number = numbers.popleft()
            if resumption is not None:
                resumption.add(number, met)
            scan.merge(met)
            if progress is not None:
                progress(scan)
        if resumption is not None:
            resumption.save()
    finally:
        if resumption is not None:
            resumption.journal.close()
    return scan


def _scanned(index: Index, parts: Iterator[list[Text]], workers: int) -> Iterator[Scan]:
    """Yield the scans of groups of texts, in their order."""
    if workers <= 1:
        yield from (scan_batch(index, part) for part in parts)
        return
    # A fork shares the index instead of copying it. On macOS a fork after threads may crash.
    context = get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, context, _start_worker, (index, os.getpid())) as pool:
        waiting: deque[Future[Scan]] = deque()
        try:
            for part in parts:
                try:
                    waiting.append(pool.submit(_scan_in_worker, part))
                except OSError as error:
                    raise InputError(
                        f"workers: {workers} processes cannot be started ({error.strerror}); "
                        "take fewer"
                    )
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                f"workers: one of {workers} processes was ended from outside, for memory perhaps; "
                "take fewer"
            )


class _Resumption:
    """A pass over training text in a journal: what was met, by the numbers of the groups.

    A row covers the groups of about ``SAVE_EVERY`` seconds. Rows come in any order and with gaps.
    """

    def __init__(self, folder: Path, index: Index, identity: dict) -> None:
        if (folder / "identity.json").exists():
            raise InputError(
                f"journal: expected format {FORMAT}, got {folder / 'identity.json'}, which another "
                "version of fused-perplexity wrote; give it an empty folder"
            )
        identity = identity | {
            "ngram": NGRAM,
            "shingle": SHINGLE,
            "near": index.near,
            "kept": index.kept,
            "validation": _fingerprint(index),
        }
        self.index, self.journal = index, Journal(folder, identity, "scan")
        self._start()

    def _start(self) -> None:
        self.numbers: list[int] = []  # groups since the last row
        self.scan, self.saved = self.index.scan(), time.monotonic()

    def load(self) -> tuple[Scan, set[int]]:
        """Return what was met before, and in which groups; damaged rows are left out."""
        known: set[int] = set()
        scan = self.index.scan()
        for key, value in self.journal.items():
            numbers, record = json.loads(value)
            # The key holds the identity, which the journal cannot compare where its row is damaged.
            if key == self._key(numbers) and known.isdisjoint(numbers):
                scan.merge(Scan.of_record(record))
                known.update(numbers)
        return scan, known

    def add(self, number: int, met: Scan) -> None:
        """Take what was met in a group, and write a row every ``SAVE_EVERY`` seconds."""
        self.numbers.append(number)
        self.scan.merge(met)
        if time.monotonic() - self.saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what was met since the last row."""
        if self.numbers:
            value = json.dumps([self.numbers, self.scan.record()]).encode()
            self.journal.write(self._key(self.numbers), value)
        self._start()

    def _key(self, numbers: list[int]) -> bytes:
        return self.journal.key(json.dumps(numbers).encode())


def _fingerprint(index: Index) -> str:
    """Return a hash of all validation documents, in their order."""
    order = sorted((document, value) for value, of in index.digests.items() for document in of)
    return hashlib.sha256(json.dumps([order, index.ids, index.domains]).encode()).hexdigest()[:16]


def overlaps(index: Index, scan: Scan) -> np.ndarray:
    """Return the share of each validation document's n-grams that training has.

    Args:
        index: the validation side.
        scan: what was met in training.

    Returns:
        float64 [documents], NaN for a document without an n-gram.
    """
    table = index.tables[NGRAM]
    with np.errstate(invalid="ignore"):
        return table.seen(scan.seen) / table.sizes


@dataclass(frozen=True)
class Own:
    """The parts of validation documents that are their own, and not of a shared template.

    ``GramTable.own`` tells the two apart, by n-grams and by shingles.

    Args:
        ngrams: entries of the table of n-grams that are their document's own, bool [P].
        ngrams_templated: documents with a template by n-grams, bool [documents].
        shingles: entries of the table of shingles, likewise.
        shingles_templated: documents with a template by shingles.
    """

    ngrams: np.ndarray
    ngrams_templated: np.ndarray
    shingles: np.ndarray
    shingles_templated: np.ndarray

    @classmethod
    def of(cls, index: Index, scan: Scan) -> Own:
        """Return what all of validation and the training text of ``scan`` show."""
        ngrams, shingles = index.tables[NGRAM], index.tables[SHINGLE]
        return cls(
            *ngrams.own(scan.ngrams.counts(len(ngrams.grams))[ngrams.row_of]),
            *shingles.own(scan.shingles.counts(len(shingles.documents))),
        )


def leaks(index: Index, scan: Scan, own: Own | None = None) -> list[Leak]:
    """Return the validation documents that count as leaked, in their order.

    A document is exact, or else the stronger of near and contained.

    Args:
        index: the validation side.
        scan: what was met in training.
        own: what is each document's own; default what the training text of ``scan`` shows.

    Example:
        >>> text = Text("a", " ".join(map(str, range(20))))
        >>> index = Index([text])
        >>> [leak.kind for leak in leaks(index, scan_texts(index, [text]))]
        ['exact']
    """
    table, leaked = index.tables[NGRAM], []
    own = Own.of(index, scan) if own is None else own
    counts = table.seen(scan.seen, own.ngrams)
    sizes = np.bincount(table.documents, own.ngrams, len(index.ids))
    by_shingles = own.shingles_templated
    templated = own.ngrams_templated | by_shingles
    # The words that fill a template's blanks are scattered over training. A copy has them all in
    # one document.
    counts[templated] = own_overlaps(index, scan, own.ngrams & templated[table.documents])[
        templated
    ]
    of_templated = by_shingles[index.tables[SHINGLE].documents]
    matches = own_matches(index, scan, own.shingles & of_templated)
    for document, name in enumerate(index.ids):
        if index.lengths[document] < FEWEST_WORDS:
            continue
        share = float(counts[document] / max(1, sizes[document]))
        near = (matches if by_shingles[document] else scan.near).get(document)
        overlap = scan.overlap.get(document)
        similarity = near.score if near else 0.0
        contained = share >= CONTAINED and (index.kept == 1 or counts[document] >= ESTIMATED)
        if templated[document]:
            contained &= bool(sizes[document] >= FEWEST) and (
                near is not None or not by_shingles[document]
            )
        if document in scan.exact:
            kind, match, similarity = "exact", scan.exact[document], 1.0
        elif contained and share > similarity:
            # Boilerplate names no training document.
            kind, match = "contained", overlap or Match(float(counts[document]), "", "")
        elif near is not None:
            kind, match = "near", near
        else:
            continue
        domain, length = index.domains[document], index.lengths[document]
        leaked.append(
            Leak(
                document,
                name,
                domain,
                kind,
                match.train_id,
                similarity,
                share,
                length,
                match.passage,
            )
        )
    return leaked


def leakage_findings(index: Index, scan: Scan, leaked: list[Leak]) -> list[Finding]:
    """Return findings on leaked documents, shared passages, repeated and short documents.

    Args:
        index: the validation side.
        scan: what was met in training.
        leaked: what ``leaks`` returns for both.
    """
    findings, count = [], len(index.ids)
    total = max(1, sum(index.lengths))
    if leaked:
        share, of_words = len(leaked) / count, sum(leak.words for leak in leaked) / total
        kinds = {
            kind: sum(leak.kind == kind for leak in leaked)
            for kind in ("exact", "near", "contained")
        }
        by_kind = ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
        first = leaked[0]
        findings.append(
            Finding(
                "leakage",
                "danger" if min(share, of_words) >= 0.01 else "warning",
                f"{len(leaked)} of {counted(count, 'validation document')} ({share:.1%}; "
                f"{of_words:.1%} of the words) {by_number(len(leaked), 'is', 'are')} in training: "
                f"{by_kind}; for example {first.id} in {first.train_id or 'several documents'}",
                "validation loss is too low by what was learnt by heart: evaluate on what is left "
                "(--write-clean), or train without the copies",
                dict(leaked_fraction=share, leaked_word_fraction=of_words, **kinds),
            )
        )
    shares = overlaps(index, scan)
    known = ~np.isnan(shares)
    partial = known & (shares > 0.1)
    partial[[leak.document for leak in leaked]] = False
    all_shared = index.tables[NGRAM].seen(scan.seen)[partial].sum() / max(
        1, index.tables[NGRAM].sizes.sum()
    )
    if partial.any():
        findings.append(
            Finding(
                "shared-passages",
                "warning" if all_shared >= 0.01 else "info",
                f"{counted(int(partial.sum()), 'further validation document')} "
                f"{by_number(int(partial.sum()), 'shares', 'share')} more than a tenth of the "
                f"{NGRAM}-grams with training and less than half of what is their own: no copies",
                "look at the passages: quotations and templates are harmless, copied paragraphs "
                "are not",
                dict(documents=int(partial.sum())),
            )
        )
    if index.repeated:
        findings.append(
            Finding(
                "repeated-validation",
                "warning" if index.repeated >= 0.01 * count else "info",
                f"{index.repeated} of {counted(count, 'validation document')} "
                f"{by_number(index.repeated, 'is a copy', 'are copies')} of another",
                "they count more than once in the loss, and its interval is too narrow",
                dict(documents=index.repeated),
            )
        )
    short = int((np.array(index.lengths) < NGRAM).sum())
    if short and short >= 0.1 * count:
        findings.append(
            Finding(
                "overlap-unknown",
                "info",
                f"{short} of {counted(count, 'validation document')} "
                f"{by_number(short, 'has', 'have')} fewer than {NGRAM} words: only whole copies are "
                "found",
                "check longer pieces (--unit document) where these are lines or headings",
                dict(documents=short),
            )
        )
    return findings


def without_leaks(texts: Callable[[], Iterable[Text]], index: Index) -> Iterator[Text]:
    """Yield training texts without copies of validation documents.

    Copies are dropped whole, and copied paragraphs from longer texts. The rest may still hold a
    document in pieces, over several texts: of such a document every paragraph that has one of its
    n-grams is dropped.

    Args:
        texts: returns the training texts, at each of several calls.
        index: the validation side.

    Example:
        >>> copy = Text("1", " ".join(map(str, range(20))))
        >>> [text.id for text in without_leaks(lambda: [copy, Text("2", "own")], Index([copy]))]
        ['2']
    """
    table = index.tables[NGRAM]
    own = Own.of(index, scan_texts(index, texts()))  # a single text does not show a template
    scan = scan_texts(index, _without_copies(texts(), index, own))
    left = leaks(index, scan)
    forbidden = table.rows_of([leak.document for leak in left], Own.of(index, scan).ngrams)
    for text in _without_copies(texts(), index, own):
        text = (
            _without_paragraphs(text, lambda part: forbidden[_rows_in(part, table)].any())
            if left
            else text
        )
        if text.text.strip():
            yield text


def without_quotations(texts: Iterable[Text], index: Index) -> Iterator[Text]:
    """Yield training texts without the paragraphs that share an n-gram with validation.

    Stricter than ``without_leaks``: a single quotation of ``NGRAM`` words is enough. An n-gram may
    straddle two paragraphs, so a paragraph is read after the last words that were kept before it.

    Args:
        texts: whole training documents; one without a paragraph left is dropped.
        index: the validation side.

    Example:
        >>> valid = "a b c d e f g h i j k l m n o p"
        >>> train = Text("0", f"Own words.\\n\\nHe said: {valid}.\\n\\nThe end.")
        >>> [left] = without_quotations([train], Index([Text("1", valid)]))
        >>> left.text.split()
        ['Own', 'words.', 'The', 'end.']
    """
    table = index.tables[NGRAM]
    for text in texts:
        before = np.empty(0, np.uint64)

        def shares(paragraph: str) -> bool:
            nonlocal before
            read = np.append(before, hashes(words(paragraph)))
            if len(table.find(grams(read, NGRAM))[1]):
                return True
            before = read[-NGRAM + 1 :]
            return False

        left = _without_paragraphs(text, shares)
        if left.text.strip():
            yield left


def _without_copies(texts: Iterable[Text], index: Index, own: Own) -> Iterator[Text]:
    """Yield texts that copy no validation document, without their copied paragraphs."""
    for group in groups(texts):
        if not leaks(index, scan_batch(index, group), own):
            yield from group
            continue
        for text in group:
            if not _leaks(text, index, own):
                yield text
                continue
            left = _without_paragraphs(text, lambda part: _copied(part, index, own))
            if left.text.strip() and left.text != text.text and not _leaks(left, index, own):
                yield left


def _without_paragraphs(text: Text, unwanted: Callable[[str], bool]) -> Text:
    """Return a text without the paragraphs for which ``unwanted`` is true."""
    parts = re.split(f"({BLANK})", text.text)
    return replace(
        text, text="".join(part for part in parts if not (part.strip() and unwanted(part)))
    )


def _leaks(text: Text, index: Index, own: Own) -> bool:
    """Return whether a text by itself leaks a validation document."""
    return bool(leaks(index, scan_batch(index, [text]), own))


def _rows_in(part: str, table: GramTable) -> np.ndarray:
    """Return the rows of the table whose n-grams a text has, int64."""
    return table.find(grams(hashes(words(part)), NGRAM))[1]


def _copied(part: str, index: Index, own: Own) -> bool:
    """Return whether a paragraph is a validation document, or mostly part of one."""
    most = CONTAINED * max(1, len(words(part)) - NGRAM + 1)
    return _leaks(Text("", part), index, own) or len(_rows_in(part, index.tables[NGRAM])) >= most
