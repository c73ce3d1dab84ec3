"""Windows to per-token values, in order: batched by length, shared over ranks, journalled.

A batch that does not fit in memory is halved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .batching import Batching
from .journal import ScoringJournal
from .protocols import Positions, Protocol
from .windows import Window

IGNORED = -100
# Batches that are formed together: windows of one length share a batch, so that little is padded.
BATCHES_AHEAD = 16

# input_ids [B, T] and targets [B, T] (IGNORED where nothing is scored) -> values [fields, scored
# tokens], row by row.
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scored:
    """Values of a window: float32 [fields, n] at ``places`` [n] among the document's ids."""

    index: int  # the document's
    positions: Positions
    places: np.ndarray
    values: np.ndarray
    last: bool  # the document's last window
    begin: int = 0  # the window's first position


@dataclass(frozen=True)
class Task:
    """A window to score at ``places``, positions among the document's ids."""

    index: int
    positions: Positions
    window: Window | None  # None: nothing of the document is scored
    places: np.ndarray  # positions to score
    last: bool


def tasks(documents: Iterable[Positions], protocol: Protocol) -> Iterator[Task]:
    """Yield every window of every document, each with the positions it scores."""
    nothing = np.empty(0, dtype=np.int64)
    for index, positions in enumerate(documents):
        previous: tuple[Window | None, np.ndarray] = None, nothing
        for window in protocol.windows_of(positions):
            if previous[0] is not None:
                yield Task(index, positions, *previous, last=False)
            places = np.arange(window.first_scored, window.end)
            if positions.asked is not None:
                places = places[positions.asked[places]]
            places = places[~np.isin(positions.ids[places], protocol.unscored)]
            previous = window, places
        yield Task(index, positions, *previous, last=True)


def continuations(sequences: Iterable[tuple[Positions, int]]) -> Iterator[Task]:
    """Yield each sequence as one window that scores from a position on: what follows a prompt."""
    for index, (positions, first) in enumerate(sequences):
        length = len(positions.ids)
        yield Task(index, positions, Window(0, length, first), np.arange(first, length), last=True)


def stream(
    windows: Iterator[Task],
    score: Score,
    *,
    first_of_window: int | None = None,
    device: torch.device,
    batching: Batching,
    fields: int,
    journal: ScoringJournal | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Scored]:
    """Yield ``Scored`` for every window, in order; a batch is as large as ``batching`` allows.

    ``first_of_window`` replaces the first token of every window.

    Which windows share a batch depends only on the windows, the model and the options, and a rank
    takes every ``ranks``-th batch. So any number of ranks, and a resumed run, give the same bits
    (with the same number of threads in a process).
    """
    scorer = _Scorer(first_of_window, score, device, fields, journal)
    while group := _ahead(windows, batching):
        batches = _batches(group, batching)
        if batching.check_before(batches):
            if ranks > 1:
                batching.agree()
            batches = _batches(group, batching)
        with raise_together(ranks):
            own = {
                number: scorer([group[place] for place in batch])
                for number, batch in enumerate(batches)
                if number % ranks == rank
            }
        if ranks > 1:
            gathered: list[dict] = [{}] * ranks
            torch.distributed.all_gather_object(gathered, own)
            own = {number: values for part in gathered for number, values in part.items()}
        values: list[np.ndarray] = [np.empty((fields, 0), np.float32)] * len(group)
        for number, batch in enumerate(batches):
            ends = np.cumsum([len(group[place].places) for place in batch])[:-1]
            for place, part in zip(batch, np.split(own[number], ends, axis=1), strict=True):
                values[place] = part
        for task, part in zip(group, values, strict=True):
            begin = 0 if task.window is None else task.window.begin
            yield Scored(task.index, task.positions, task.places, part, task.last, begin)


@contextmanager
def raise_together(ranks: int) -> Iterator[None]:
    """Raise one rank's error on all ranks, which would otherwise wait for it."""
    if ranks == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    messages: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(
        messages, None if error is None else f"{type(error).__name__}: {error}"
    )
    if error is not None:
        raise error
    if other := next((message for message in messages if message is not None), None):
        raise InputError(f"distributed: another rank stopped ({other})")


def _ahead(windows: Iterator[Task], batching: Batching) -> list[Task]:
    """Return the next windows, for about ``BATCHES_AHEAD`` batches."""
    if batching.batch_size is not None:
        return list(islice(windows, min(BATCHES_AHEAD * batching.batch_size, sys.maxsize)))
    group, positions = [], 0
    while (
        positions < BATCHES_AHEAD * batching.positions and (task := next(windows, None)) is not None
    ):
        group.append(task)
        positions += _length(task) + 1
    return group


def _batches(group: list[Task], batching: Batching) -> list[list[int]]:
    """Return the places in ``group`` of the windows that share a batch, the longest first."""
    to_score = [place for place, task in enumerate(group) if len(task.places)]
    to_score.sort(key=lambda place: -_length(group[place]))
    kinds: dict[Hashable, list[int]] = {}
    for place in to_score:
        kinds.setdefault(batching.group(_length(group[place])), []).append(place)
    batches = []
    for places in kinds.values():
        while places:
            rows = batching.rows(_length(group[places[0]]))
            batches.append(places[:rows])
            places = places[rows:]
    return batches


def _length(task: Task) -> int:
    """Return the number of positions the model reads."""
    return 0 if task.window is None else task.window.end - 1 - task.window.begin


class _Scorer:
    """A scorer of batches, by the journal or the model."""

    def __init__(
        self,
        first_of_window: int | None,
        score: Score,
        device: torch.device,
        fields: int,
        journal: ScoringJournal | None,
    ) -> None:
        self.first_of_window, self.score, self.device = first_of_window, score, device
        self.fields, self.journal = fields, journal
        # Most windows that fitted into memory at once, after a batch did not.
        self.fits: int | None = None

    def __call__(self, batch: list[Task]) -> np.ndarray:
        """Return the values [fields, n] of a batch."""
        longest = max(map(_length, batch))
        ids = np.zeros((len(batch), longest), dtype=np.int64)
        target = np.full((len(batch), longest), IGNORED, dtype=np.int64)
        for row, task in enumerate(batch):
            window: Any = task.window  # not None: only windows are batched
            begin, end = window.begin, window.end
            read = task.positions.ids[begin : end - 1]
            ids[row, : len(read)] = read
            ids[row, len(read) :] = read[-1]  # padding, which causal attention does not see
            if self.first_of_window is not None:
                ids[row, 0] = self.first_of_window
            # The hidden state at a position predicts the next one.
            target[row, task.places - begin - 1] = task.positions.ids[task.places]
        if self.journal is None:
            return self._values(ids, target)
        key = self.journal.batch_key(ids, target)
        known = self.journal.values(key, self.fields * int((target != IGNORED).sum()))
        if known is None:
            known = self._values(ids, target)
            self.journal.keep(key, known)
        return known.reshape(self.fields, -1)

    def _values(self, ids: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Return the model's values [fields, n]; a batch that does not fit is halved."""
        if self.fits is not None and len(ids) > self.fits:
            return self._halves(ids, target)
        try:
            return (
                self.score(
                    torch.from_numpy(ids).to(self.device), torch.from_numpy(target).to(self.device)
                )
                .cpu()
                .numpy()
            )
        except torch.OutOfMemoryError:
            if len(ids) == 1:
                raise InputError(
                    f"context_length: one window of {ids.shape[1]} tokens does not fit in the "
                    f"memory of {self.device}: lower the context length, or load the model in "
                    "bfloat16 or with device_map 'auto'"
                )
        # Outside the handler: the exception holds the frames, and the frames hold the tensors.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.fits = len(ids) // 2
        return self._halves(ids, target)

    def _halves(self, ids: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Return the values of both halves of a batch."""
        half = len(ids) // 2
        return np.concatenate(
            [self._values(ids[:half], target[:half]), self._values(ids[half:], target[half:])],
            axis=1,
        )
