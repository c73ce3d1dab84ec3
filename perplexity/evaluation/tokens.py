"""Text to token ids and back; what a tokenizer of the user's raises names the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import theirs


def token_ids(tokenizer, texts: Sequence[str], **options) -> list[np.ndarray]:
    """Return the int64 ids of each text and nothing else: no BOS, no padding; ``options`` are the tokenizer's.

    Raises InputError where the tokenizer cannot: a word-level one without an entry for unknown words, say.
    """
    if not texts:
        return []
    with theirs("tokenizer: expected one that takes every Unicode text, got one that fails"):
        encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False, **options)["input_ids"]
        return [np.array(ids, dtype=np.int64) for ids in encoded]


def text_of(tokenizer, ids: Sequence[int] | np.ndarray, **options) -> str:
    """Return what ``ids`` decode to; ``options`` are those of the tokenizer's ``decode``."""
    with theirs("tokenizer: expected one that decodes the model's tokens, got one that fails"):
        return tokenizer.decode([int(token) for token in ids], **options)
