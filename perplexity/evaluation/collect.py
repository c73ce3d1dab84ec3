"""From the values of windows, in order, to sums of documents, extremes and Parquet files."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration import CalibrationBins
from ..errors import InputError
from ..files import Output
from ..metric import measures
from ..scoring.protocols import NON_FINITE, SPECIAL, Positions
from ..scoring.stream import Scored
from ..text.spans import Spans
from ..text.tokens import text_of, unknown_id
from ..wording import by_number, counted
from .positions import PositionSums
from .results import DocumentScore
from .uncertainty import BLOCK

KEPT = 10  # extremes of each kind
# The beginning of a document whose token losses are kept: within so many bytes two tokenizers have
# a boundary in common.
FIRST_BYTES, FIRST_TOKENS = 32, 64
LOSS_DIGITS = 7  # of the losses of first tokens: as many as float32 holds
CONTEXT_SHOWN = 8  # tokens shown before a surprising one
ROWS = 1 << 16  # of a Parquet row group


class ParquetTable:
    """A Parquet file that is written as rows come and has its name only once it is whole.

    Args:
        path: the file.
        columns: name of pyarrow's type by name of column.
        option: how an error names the file.

    Raises:
        InputError: pyarrow is not installed, or the file cannot be written.
    """

    def __init__(self, path: str | Path, columns: dict[str, str], option: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise InputError(f"{option}: needs pyarrow; install fused-perplexity[eval]")
        self.schema = pyarrow.schema(
            [(name, getattr(pyarrow, kind)()) for name, kind in columns.items()]
        )
        self.table, self.rows = pyarrow.Table, 0
        self.file = Output(path, option)
        self.writer = pyarrow.parquet.ParquetWriter(self.file, self.schema)
        self.pending: dict[str, list] = {name: [] for name in columns}

    def add(self, rows: int, **columns) -> None:
        """Add ``rows`` rows; each of ``columns`` is a list or an array of so many values."""
        for name, values in columns.items():
            self.pending[name].extend(values)
        self.rows += rows
        if self.rows >= ROWS:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(self.table.from_pydict(self.pending, schema=self.schema))
        self.pending, self.rows = {name: [] for name in self.pending}, 0

    def finish(self) -> None:
        """Write the last rows and give the file its name."""
        self._flush()
        self.writer.close()
        self.file.finish()

    def discard(self) -> None:
        """Remove a file that has not been finished."""
        with suppress(InputError, BrokenPipeError):  # closing writes as well, on a full disk
            self.writer.close()
        self.file.discard()


TOKEN_COLUMNS = {
    "document": "string",
    "position": "int64",
    "token_id": "int64",
    "text": "string",
    "nll": "float32",
    "entropy": "float32",
    "rank": "int64",
    "predicted": "int64",
    "confidence": "float32",
}
DOCUMENT_COLUMNS = {
    "id": "string",
    "domain": "string",
    "nll": "float64",
    "tokens": "int64",
    "tokens_skipped": "int64",
    "bytes": "int64",
    "bytes_skipped": "int64",
    "words": "int64",
    "words_skipped": "int64",
    "loss": "float64",
    "perplexity": "float64",
    "bits_per_byte": "float64",
}


def note_non_finite(known: dict | None, scored: Scored, finite: np.ndarray) -> dict | None:
    """Return the count of tokens whose values are not finite and the place of the first one.

    Args:
        known: what this returned for the windows before; None while every value was finite.
        scored: the values of a window.
        finite: bool [n], which of them are finite.

    Returns:
        tokens, document, position and token_id, or None while every value is finite.
    """
    if finite.all():
        return known
    place = int(scored.places[~finite][0])
    first: dict[str, Any] = {
        "tokens": 0,
        "document": scored.positions.document.id,
        "position": place - scored.positions.added,
        "token_id": int(scored.positions.ids[place]),
    }
    so_far = known or first
    return so_far | {"tokens": so_far["tokens"] + int((~finite).sum())}


def _spans(positions: Positions) -> Spans:
    """Return where a document's tokens lie in its text, which ``read_positions`` always finds."""
    if positions.spans is None:
        raise ValueError(f"spans: expected those of document {positions.document.id}, got None")
    return positions.spans


def _first_asked(positions: Positions) -> int:
    """Return the first of a document's own tokens that is to be scored, 0 of a whole document."""
    if positions.asked is None:
        return 0
    return max(0, int(positions.asked.argmax()) - positions.added)


def described(non_finite: dict) -> str:
    """Return what ``note_non_finite`` counted, as the beginning of a note."""
    return (
        f"{counted(non_finite['tokens'], 'token')} (the first: token {non_finite['position']} of "
        f"document {non_finite['document']}) {by_number(non_finite['tokens'], 'has', 'have')} a NaN "
        "or infinite loss"
    )


class Collector:
    """Sums of documents in float64, counts by reason, extremes, and rows of the two tables.

    Args:
        tokenizer: a transformers tokenizer.
        vocabulary: rows of the model's head.
        per_token: the table of tokens, if it is wanted.
        per_document: the table of documents, likewise.
        calibration: the bins that tokens are counted in, likewise.
    """

    def __init__(
        self,
        tokenizer,
        vocabulary: int,
        *,
        per_token: ParquetTable | None = None,
        per_document: ParquetTable | None = None,
        calibration: CalibrationBins | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.per_token = per_token
        self.per_document = per_document
        self.calibration = calibration
        self.scores: list[DocumentScore] = []
        self.first_tokens: list[list[float | None]] = []
        self.skipped: Counter = Counter()
        self.bytes_skipped = self.words_skipped = 0
        self.characters = self.deleted = self.changed = 0  # of the texts
        self.estimated = 0  # documents whose scored bytes are an estimate
        self.by_position = PositionSums()
        self.counts = np.zeros(vocabulary, dtype=np.int64)  # of scored tokens, by id
        self.squares = 0.0
        self.tokens_read = self.tokens = 0
        self.nll = self.unknown_nll = 0.0
        self.unknown = unknown_id(tokenizer)
        self.non_finite: dict | None = None
        self.surprising: list[tuple] = []
        # Sums of nll and of tokens of the only document with scored tokens.
        self.blocks: tuple[np.ndarray, np.ndarray] | None = None
        self._with_tokens = 0  # documents
        self._texts: dict[int, str] = {}
        self._start()

    def _start(self) -> None:
        self._sums: list[float] = []
        self._tokens = 0
        self._scored = np.zeros(0, dtype=bool)  # of a document's positions
        self._first: dict[int, float] = {}  # losses of its first tokens, by place
        self._block_nll, self._block_tokens = np.zeros(0), np.zeros(0)

    def text(self, token: int) -> str:
        """Return what a token id decodes to."""
        if token not in self._texts:
            self._texts[token] = text_of(self.tokenizer, [token])
        return self._texts[token]

    def add(self, scored: Scored) -> None:
        """Add the values of a window; windows of a document come together and in order."""
        positions, places, nll = (
            scored.positions,
            scored.places,
            scored.values[0].astype(np.float64),
        )
        finite = np.isfinite(nll)
        if not finite.all():
            self.non_finite = note_non_finite(self.non_finite, scored, finite)
            positions.skipped[NON_FINITE] += int((~finite).sum())
            places, nll = places[finite], nll[finite]
        if not len(self._scored):
            self._scored = np.zeros(len(positions.ids), dtype=bool)
        self._scored[places] = True
        ids = positions.ids[places]
        if self.per_token is not None and len(scored.places):
            self._add_tokens(self.per_token, scored)
        if self.calibration is not None:
            self.calibration.add(scored.positions.ids[scored.places], scored.values)
        if len(nll):
            total = float(nll.sum())
            self._sums.append(total)
            self._tokens += len(nll)
            self.nll, self.tokens = self.nll + total, self.tokens + len(nll)
            self.squares += float(np.dot(nll, nll))
            np.add.at(self.counts, ids, 1)
            if self.unknown is not None:
                self.unknown_nll += float(nll[ids == self.unknown].sum())
            if self._with_tokens == 0:
                self._add_blocks(places, nll)
            self.by_position.add(places, nll, added=positions.added, begin=scored.begin)
            self._note_surprising(scored, places, nll)
            first = places < positions.added + _first_asked(positions) + FIRST_TOKENS
            self._first.update(zip(places[first].tolist(), nll[first].tolist(), strict=True))
        if scored.last:
            self._finish(scored)

    def _add_blocks(self, places: np.ndarray, nll: np.ndarray) -> None:
        """Add tokens to the sums over ``BLOCK`` positions of this document."""
        number = places // BLOCK
        need = int(number[-1]) + 1
        if need > len(self._block_nll):
            grown = max(need, 2 * len(self._block_nll))
            self._block_nll, self._block_tokens = (
                np.concatenate([array, np.zeros(grown - len(array))])
                for array in (self._block_nll, self._block_tokens)
            )
        self._block_nll[:need] += np.bincount(number, nll, minlength=need)
        self._block_tokens[:need] += np.bincount(number, minlength=need)

    def _add_tokens(self, table: ParquetTable, scored: Scored) -> None:
        ids = scored.positions.ids[scored.places].tolist()
        nll, entropy, rank, predicted, confidence = scored.values
        table.add(
            len(ids),
            document=[scored.positions.document.id] * len(ids),
            position=(scored.places - scored.positions.added).tolist(),
            token_id=ids,
            text=[self.text(token) for token in ids],
            nll=nll.tolist(),
            entropy=entropy.tolist(),
            rank=rank.astype(np.int64).tolist(),
            predicted=predicted.astype(np.int64).tolist(),
            confidence=confidence.tolist(),
        )

    def _note_surprising(self, scored: Scored, places: np.ndarray, nll: np.ndarray) -> None:
        """Keep those tokens that are among the ``KEPT`` with the largest losses so far."""
        top = np.argpartition(nll, -min(KEPT, len(nll)))[-KEPT:]
        floor = self.surprising[0][0] if len(self.surprising) == KEPT else -math.inf
        for place, value in sorted(zip(places[top].tolist(), nll[top].tolist(), strict=True)):
            if value > floor:
                positions = scored.positions
                shown = (
                    positions.document.id,
                    place - positions.added,
                    int(positions.ids[place]),
                    positions.ids[max(positions.added, place - CONTEXT_SHOWN) : place].tolist(),
                )
                # A larger key is a larger loss, then an earlier place: of equal losses the first
                # is kept.
                entry = (value, -scored.index, -place, shown)
                push = heapq.heappush if len(self.surprising) < KEPT else heapq.heappushpop
                push(self.surprising, entry)

    def _finish(self, scored: Scored) -> None:
        """Add the document whose last window has come."""
        positions, document = scored.positions, scored.positions.document
        skipped = +positions.skipped
        unscored = positions.tokens_read - self._tokens - sum(skipped.values())
        if unscored:
            skipped[SPECIAL] += unscored
        self.skipped.update(skipped)
        self.tokens_read += positions.tokens_read
        (bytes_, bytes_skipped), (words, words_skipped) = self._text_scored(positions)
        self.bytes_skipped += bytes_skipped
        self.words_skipped += words_skipped
        nll = math.fsum(self._sums)
        score = DocumentScore(
            document.id,
            document.domain,
            nll,
            self._tokens,
            bytes_,
            words,
            skipped=sum(skipped.values()),
            bytes_skipped=bytes_skipped,
            words_skipped=words_skipped,
            non_finite=skipped[NON_FINITE],
        )
        self.scores.append(score)
        self.first_tokens.append(self._first_tokens(positions))
        if self.per_document is not None:
            ratios = measures(nll, self._tokens, None if score.non_finite else bytes_)
            self.per_document.add(
                1,
                id=[document.id],
                domain=[document.domain],
                nll=[nll],
                tokens=[self._tokens],
                tokens_skipped=[score.skipped],
                bytes=[bytes_],
                bytes_skipped=[bytes_skipped],
                words=[words],
                words_skipped=[words_skipped],
                **{name: [ratios[name]] for name in ("loss", "perplexity", "bits_per_byte")},
            )
        self.by_position.end_document()
        if self._tokens:
            kept = self._block_tokens > 0
            self.blocks = (
                None if self._with_tokens else (self._block_nll[kept], self._block_tokens[kept])
            )
            self._with_tokens += 1
        self._start()

    def _text_scored(self, positions: Positions) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return a document's bytes that were scored and the others, and likewise its words."""
        document, spans = positions.document, _spans(positions)
        self.characters += len(document.text)
        self.deleted += spans.deleted
        self.changed += spans.changed
        scored = self._scored[positions.added :]
        if scored.all():
            return (document.bytes, 0), (document.words, 0)
        self.estimated += not spans.exact
        bytes_ = spans.bytes(scored)
        words = spans.words(document.text, scored, document.spans or ())
        assert sum(bytes_) == document.bytes
        assert document.spans is not None or sum(words) == document.words
        return bytes_, words

    def _first_tokens(self, positions: Positions) -> list[float | None]:
        """Return the ends in bytes and the losses of a document's first tokens, in turn."""
        spans = _spans(positions)
        first_tokens: list[float | None] = []
        if not spans.exact:
            return first_tokens
        # A context counts as one token without a loss.
        start = _first_asked(positions)
        begin = int(spans.ends[start - 1]) if start else 0
        if begin:
            first_tokens += [begin, None]
        # Up to the first token that ends FIRST_BYTES later, or beyond.
        count = int(np.searchsorted(spans.ends, begin + FIRST_BYTES)) + 1
        kept = spans.ends[start : min(count, start + FIRST_TOKENS)]
        for place, end in enumerate(kept.tolist(), start):
            loss = self._first.get(positions.added + place)
            if spans.groups[place] >= 0:
                first_tokens += [end, None if loss is None else round(loss, LOSS_DIGITS)]
            elif loss is not None:  # a scored token that is no text
                return []
        return first_tokens

    def text_notes(self) -> list[str]:
        """Return what to know before the measures by byte and by word are believed."""
        notes = []
        if self.deleted:
            notes.append(
                f"the tokenizer deletes text: {self.deleted:,} of "
                f"{counted(self.characters, 'character')} {by_number(self.deleted, 'is', 'are')} in "
                "no token; measures by byte and by word look better than they are"
            )
        if self.changed:
            notes.append(
                f"the tokenizer changes text: {self.changed:,} of "
                f"{counted(self.characters, 'character')} "
                f"{by_number(self.changed, 'becomes another', 'become others')} "
                "(case, accents, normal form); measures by byte and by word look "
                "better than they are"
            )
        if self.estimated:
            notes.append(
                f"bytes and words of {counted(self.estimated, 'document')} with skipped tokens are "
                "an estimate: the tokenizer does not say which characters its tokens stand for"
            )
        return notes

    @property
    def unknown_tokens(self) -> int:
        """Return the number of scored tokens that the tokenizer does not know."""
        return 0 if self.unknown is None else int(self.counts[self.unknown])

    def loss_without_unknown(self) -> float | None:
        """Return nats a token over those that the tokenizer knows, as KenLM's "excluding OOVs".

        Returns:
            The loss, or None where no known token was scored.
        """
        known = self.tokens - self.unknown_tokens
        return (self.nll - self.unknown_nll) / known if known else None

    def surprising_tokens(self) -> list[dict]:
        """Return the tokens with the largest losses, the largest first."""
        return [
            {
                "document": document,
                "position": position,
                "token_id": token,
                "text": self.text(token),
                "before": text_of(self.tokenizer, before),
                "nll": value,
            }
            for value, _, _, (document, position, token, before) in sorted(
                self.surprising, reverse=True
            )
        ]

    def extreme_documents(self) -> tuple[list[dict], list[dict]]:
        """Return the longest documents, and those with the largest mean losses."""

        def described(score: DocumentScore) -> dict:
            return {
                "id": score.id,
                "domain": score.domain,
                "tokens": score.tokens,
                "loss": score.nll / score.tokens,
            }

        with_tokens = [score for score in self.scores if score.tokens]
        longest = heapq.nlargest(KEPT, with_tokens, key=lambda score: score.tokens)
        worst = heapq.nlargest(KEPT, with_tokens, key=lambda score: score.nll / score.tokens)
        return [described(score) for score in longest], [described(score) for score in worst]
