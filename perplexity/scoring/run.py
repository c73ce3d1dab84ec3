"""A pass of models over texts: the shared state of every scoring, and the scorer of tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import models
from ..fingerprints import TextFingerprint, tokenizer_fingerprint
from ..inputs import choose_backend
from ..statistics import token_nll, token_statistics
from ..text.tokenizers import as_tokenizer
from .batching import Batching
from .journal import ScoringJournal
from .stream import IGNORED, Score, Scored, Task, stream

# Names of a token's statistics, in the order of ``Scored.values``.
DETAILS = ("nll", "entropy", "rank", "predicted", "confidence")


class ScoringRun:
    """A pass of models over texts: tokenizer, backend, batches, journal and ranks.

    Within its ``with`` block every model is in evaluation mode. The journal is closed at the end of
    the block.

    Args:
        networks: The models, which read the same positions: of one tokenizer, on one device.
        tokenizer: The models' tokenizer, of any library (``as_tokenizer``).
        backend: "torch" or "triton" for the losses. Default: None, by device.
        batch_size: Windows in a batch. Default: None, as many as hold a few thousand positions.
        rank: This process's number among ``ranks``, which share the batches. Default: 0.
        ranks: Number of processes of ``torch.distributed``. Default: 1.
    """

    def __init__(
        self,
        networks: Sequence[models.LanguageModel],
        tokenizer,
        *,
        backend: str | None = None,
        batch_size: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        weight = networks[0].head.weight
        self.networks, self.rank, self.ranks = networks, rank, ranks
        self.tokenizer = as_tokenizer(tokenizer)
        self.device = weight.device
        self.vocabulary = min(network.head.weight.shape[0] for network in networks)
        self.backend = choose_backend(backend, weight)
        self.batching = Batching(networks, batch_size)
        self.journal: ScoringJournal | None = None
        self._text, self._verified, self._open = TextFingerprint(), False, ExitStack()

    def __enter__(self) -> ScoringRun:
        for network in self.networks:
            self._open.enter_context(models.evaluation_mode(network))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def keep_in(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        """Read and write the values in a journal's ``folder``, unless it is None.

        Args:
            folder: Folder of the journal, or None.
            settings: What decides the bits of a value besides models, tokenizer, backend and
                batches.
        """
        if folder is not None:
            self.journal = ScoringJournal(folder, self.identity() | settings, self.rank)
            self._open.callback(self.journal.close)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Return the tokenizer's fingerprint."""
        return tokenizer_fingerprint(self.tokenizer)

    def identity(self) -> dict[str, Any]:
        """Return what decides the bits of a value, without text, weights and protocol."""
        configs = [
            getattr(getattr(network, "model", None), "config", None) for network in self.networks
        ]
        theirs = any(hasattr(config, "to_json_string") for config in configs)
        transformers = sys.modules.get("transformers") if theirs else None
        return {
            "tokenizer": self.tokenizer_fingerprint,
            "batch_size": self.batching.batch_size,
            "backend": self.backend,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": None if transformers is None else transformers.__version__,
            "attention": [getattr(config, "_attn_implementation", None) for config in configs],
        }

    def read(self, index: int, text: str, spans: Sequence[tuple[int, int]] | None = None) -> None:
        """Add a document's text and its scored parts to the fingerprint and the journal."""
        text_hash = self._text.add(text, spans)
        if self.journal is not None:
            self.journal.document(index, text_hash)

    @property
    def text_fingerprint(self) -> str:
        """Return the fingerprint of the texts that were read."""
        return self._text.value()

    def verify(self, ids: np.ndarray, context_length: int | None) -> None:
        """Compare heads with the models' own logits, once a run; batches before the first one.

        Args:
            ids: Token ids [n] as the models read them.
            context_length: The most positions of a window; None for any number.
        """
        if self._verified:
            return
        for network in self.networks:
            models.verify(network, ids, context_length or models.VERIFIED_POSITIONS)
        self.batching.check_later(ids, context_length)
        self._verified = True

    def stream(
        self,
        tasks: Iterator[Task],
        score: Score,
        *,
        fields: int,
        first_of_window: int | None = None,
    ) -> Iterator[Scored]:
        """Yield the values of ``score`` for each window, in order; ``fields`` values a token."""
        return stream(
            tasks,
            score,
            first_of_window=first_of_window,
            device=self.device,
            batching=self.batching,
            fields=fields,
            journal=self.journal,
            rank=self.rank,
            ranks=self.ranks,
        )


def token_scorer(
    network: models.LanguageModel, backend: str, details: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of input_ids and targets that scores a batch.

    The function returns the NLL [1, n] of the scored tokens, or with ``details`` their ``DETAILS``
    [5, n].
    """
    head = network.head

    # Not inference_mode: a model's table that is created on first use could not be used in training
    # afterwards.
    @torch.no_grad()
    def score(input_ids: Tensor, target: Tensor) -> Tensor:
        chosen = target != IGNORED
        arguments = (network.hidden_states(input_ids)[chosen], head.weight, target[chosen])
        # float32 logits, also within the caller's autocast.
        with torch.autocast(input_ids.device.type, enabled=False):
            if not details:
                return token_nll(*arguments, **head.arguments(), backend=backend)[None]
            statistics, confidence = token_statistics(
                *arguments, **head.arguments(), backend=backend, with_confidence=True
            )
        nll, _, entropy, rank, predicted = statistics
        # Ranks and columns are integers below 2²⁴, exact in float32.
        return torch.stack([nll, entropy, rank.float(), predicted.float(), confidence])

    return score
