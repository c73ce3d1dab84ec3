"""Perplexity as a streaming metric: float64 sums and int64 counts, divided once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .errors import InputError


class Perplexity:
    """exp(Σ NLL / Σ tokens) over everything seen, never a mean of batch means; natural logarithm, NLL in nats.

    >>> metric = Perplexity()
    >>> metric.update(torch.tensor([1.0, 2.0, 3.0]), mask=torch.tensor([True, True, False]))
    >>> round(metric.compute()["loss"], 3)
    1.5
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.nll, self.tokens, self.bytes, self.words = 0.0, 0, 0, 0

    def update(self, token_nll: Tensor, *, mask: Tensor | None = None, bytes: int = 0, words: int = 0) -> None:
        """Add token NLLs of any shape; ``mask`` (same shape, bool) keeps the tokens that count.

        ``bytes`` and ``words`` are those of the text the tokens came from, for ``bits_per_byte`` and the rest.
        """
        if mask is not None:
            if mask.shape != token_nll.shape:
                raise InputError(
                    f"mask: expected the shape of token_nll, {tuple(token_nll.shape)}, got {tuple(mask.shape)}"
                )
            token_nll = token_nll[mask.bool()]
        self.nll += float(token_nll.double().sum())
        self.tokens += token_nll.numel()
        self.bytes += bytes
        self.words += words

    def merge_state(self, others: Iterable[Perplexity]) -> Perplexity:
        """Add the sums and counts of ``others``, in their order."""
        for other in others:
            self.nll += other.nll
            self.tokens += other.tokens
            self.bytes += other.bytes
            self.words += other.words
        return self

    def sync(self, group=None) -> Perplexity:
        """Sum over the ranks of ``torch.distributed``, in one collective; nothing to do without a process group."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
        # Counts are exact in float64 up to 2⁵³.
        state = torch.tensor([self.nll, self.tokens, self.bytes, self.words], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(state, group=group)
        self.nll, *counts = state.tolist()
        self.tokens, self.bytes, self.words = map(int, counts)
        return self

    def compute(self) -> dict[str, float | None]:
        """loss (nats a token), perplexity, bits_per_byte, byte_perplexity, word_perplexity; None where undefined."""

        def per(count: int) -> float | None:
            return self.nll / count if count else None

        return {
            "loss": per(self.tokens),
            "perplexity": exp(per(self.tokens)),
            "bits_per_byte": None if not self.bytes else self.nll / self.bytes / math.log(2),
            "byte_perplexity": exp(per(self.bytes)),
            "word_perplexity": exp(per(self.words)),
        }

    def state_dict(self) -> dict[str, float | int]:
        return {"nll": self.nll, "tokens": self.tokens, "bytes": self.bytes, "words": self.words}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        expected = set(self.state_dict())
        if set(state) != expected:
            raise InputError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
        self.nll = float(state["nll"])
        self.tokens, self.bytes, self.words = (int(state[key]) for key in ("tokens", "bytes", "words"))


def exp(value: float | None) -> float | None:
    """exp that gives inf where float64 overflows, and None for None."""
    if value is None:
        return None
    return math.inf if value > 709.0 else math.exp(value)
