"""How a model scores tokens, and what decides the bits of the values."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..statistics import token_nll, token_statistics
from .stream import IGNORED

# What a token's statistics are, in the order of ``Scored.values``.
DETAILS = ("nll", "entropy", "rank", "predicted", "confidence")


def run_identity(
    networks: list[models.LanguageModel], tokenizer: str, batch_size: int | None, backend: str
) -> dict[str, Any]:
    """Return what a journal asks of every run on its folder: all that decides the bits of a value, but the text and the model."""
    configs = [getattr(getattr(network, "model", None), "config", None) for network in networks]
    theirs = any(hasattr(config, "to_json_string") for config in configs)
    return {
        "tokenizer": tokenizer,
        "batch_size": batch_size,
        "backend": backend,
        "device": networks[0].head.weight.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": sys.modules["transformers"].__version__ if theirs and "transformers" in sys.modules else None,
        "attention": [getattr(config, "_attn_implementation", None) for config in configs],
    }


def token_scorer(network: models.LanguageModel, backend: str, details: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """input_ids, targets -> [1, n] NLL of the scored tokens, or with ``details`` [5, n], ``DETAILS``."""
    head = network.head

    # Not inference_mode: a table that a model makes on first use would be of no use in training after it.
    @torch.no_grad()
    def score(input_ids: Tensor, target: Tensor) -> Tensor:
        chosen = target != IGNORED
        arguments = (network.hidden_states(input_ids)[chosen], head.weight, target[chosen])
        with torch.autocast(input_ids.device.type, enabled=False):  # float32 logits, whatever surrounds the call
            if not details:
                return token_nll(*arguments, **head.arguments(), backend=backend)[None]
            statistics, confidence = token_statistics(
                *arguments, **head.arguments(), backend=backend, with_confidence=True
            )
        nll, _, entropy, rank, predicted = statistics
        # Ranks and columns are whole numbers below 2²⁴: exact in float32.
        return torch.stack([nll, entropy, rank.float(), predicted.float(), confidence])

    return score
