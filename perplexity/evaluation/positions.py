"""Mean loss by position: in the document, and by the tokens of context in the window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from typing_extensions import TypedDict

from ..json_files import Count, Number
from .uncertainty import BLOCK, half_width

BINS = 48  # the last one begins at position 2⁴⁷: more than any document has


class Bin(TypedDict):
    """The tokens from one position to another."""

    first: Count
    last: Count
    tokens: Count
    clusters: Count
    loss: Number
    stderr: Number | None
    interval: tuple[Number, Number] | None


class LossByPosition(TypedDict):
    """Bins by position, and what their errors are clustered by."""

    unit: str
    document: list[Bin]
    window: list[Bin]


@dataclass
class _Moments:
    """Sums over clusters from which each bin's mean and standard error follow."""

    clusters: np.ndarray  # with tokens in the bin
    sums: np.ndarray  # [5, BINS]: Σ a, Σ b, Σ a², Σ ab, Σ b², of nats a and tokens b

    @classmethod
    def zero(cls) -> _Moments:
        return cls(np.zeros(BINS), np.zeros((5, BINS)))

    def add(self, nll: np.ndarray, tokens: np.ndarray) -> None:
        """Add a cluster's sums, float64 [BINS] each."""
        self.clusters += tokens > 0
        self.sums += np.stack([nll, tokens, nll * nll, nll * tokens, tokens * tokens])

    def bins(self) -> list[Bin]:
        """Return the bins with tokens, in order."""
        found: list[Bin] = []
        for place in np.flatnonzero(self.clusters).tolist():
            clusters = int(self.clusters[place])
            nll, tokens, squares, products, sizes = self.sums[:, place].tolist()
            loss = nll / tokens
            stderr = interval = None
            if clusters > 1:
                # ``ratio_stderr``, its square multiplied out.
                residual = max(0.0, squares - 2 * loss * products + loss * loss * sizes)
                stderr = math.sqrt(clusters / (clusters - 1) * residual) / tokens
                width = half_width(stderr, clusters)
                interval = loss - width, loss + width
            first, last = 2**place, 2 ** (place + 1) - 1
            found.append(
                {
                    "first": first,
                    "last": last,
                    "tokens": int(tokens),
                    "clusters": clusters,
                    "loss": loss,
                    "stderr": stderr,
                    "interval": interval,
                }
            )
        return found


class PositionSums:
    """Sums of nll by position in bins of 1, 2 to 3, 4 to 7, ... with errors over documents.

    A position in the document is a token's number, from 1. A position in the window is the number
    of tokens that the model reads before it, from 1, a prefix such as BOS counted. Errors of a
    single document are over its blocks of ``BLOCK`` positions.
    """

    def __init__(self) -> None:
        self._documents = [_Moments.zero(), _Moments.zero()]
        self._blocks = [_Moments.zero(), _Moments.zero()]  # of the first document with tokens
        self._here = np.zeros((2, 2, BINS))  # kind, nll and tokens, of this document
        self._in_block = np.zeros((2, 2, BINS))
        self._block = 0
        self._with_tokens = 0  # documents that have ended

    def add(self, places: np.ndarray, nll: np.ndarray, *, added: int, begin: int) -> None:
        """Add the tokens of a window; windows of a document come together and in order.

        Args:
            places: int64 [n], positions among the document's ids, rising.
            nll: float64 [n], nats.
            added: number of positions before the text's first token.
            begin: the window's first position.
        """
        if not len(places):
            return
        bins = [np.frexp(places - added + 1)[1] - 1, np.frexp(places - begin)[1] - 1]
        if self._with_tokens:
            self._here += _sums(bins, nll)
            return
        blocks = places // BLOCK
        for block in np.unique(blocks).tolist():
            if block != self._block:
                self._end_block()
                self._block = block
            inside = blocks == block
            self._in_block += _sums([each[inside] for each in bins], nll[inside])

    def _end_block(self) -> None:
        for kind, moments in enumerate(self._blocks):
            moments.add(*self._in_block[kind])
        self._here += self._in_block
        self._in_block[:] = 0

    def end_document(self) -> None:
        """Add the document's sums as those of one cluster."""
        self._end_block()
        self._with_tokens += bool(self._here[:, 1].any())
        for kind, moments in enumerate(self._documents):
            moments.add(*self._here[kind])
        self._here[:] = 0
        self._block = 0

    def result(self) -> LossByPosition:
        """Return the bins by position in the document and in the window."""
        unit, of = "document", self._documents
        if self._with_tokens == 1:
            unit, of = "block", self._blocks
        document, window = (moments.bins() for moments in of)
        return {"unit": unit, "document": document, "window": window}


def _sums(bins: list[np.ndarray], nll: np.ndarray) -> np.ndarray:
    """Return float64 [2, 2, BINS]: of each kind of bins the sums of nll and of tokens."""
    return np.stack(
        [
            np.stack([np.bincount(each, nll, BINS), np.bincount(each, minlength=BINS)])
            for each in bins
        ]
    )


def rows(of: LossByPosition) -> list[tuple[str, ...]]:
    """Return rows of text: positions, then loss, standard error and tokens, by document and window."""
    by = [{each["first"]: each for each in of[kind]} for kind in ("document", "window")]
    table = []
    for first in sorted({*by[0], *by[1]}):
        cells: list[str] = []
        for kind in by:
            each = kind.get(first)
            if each is None:
                cells += ["", "", ""]
                continue
            stderr = "" if each["stderr"] is None else f"{each['stderr']:.4f}"
            cells += [f"{each['loss']:.4f}", stderr, f"{each['tokens']:,}"]
        table.append((span(first), *cells))
    return table


def span(first: int) -> str:
    """Return the positions of the bin that begins at ``first``.

    Example:
        >>> span(1), span(1024)
        ('1', '1,024–2,047')
    """
    return "1" if first == 1 else f"{first:,}–{2 * first - 1:,}"
