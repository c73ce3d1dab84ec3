"""Text to token ids and back; what a tokenizer of the user's raises names the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import checks
from ..errors import InputTypeError, theirs


def check_tokenizer(tokenizer) -> None:
    """Raise InputError unless ``tokenizer`` has what this package asks of a transformers tokenizer."""
    asked = ("bos_token_id", "eos_token_id", "decode", "__len__", "__call__")
    if not all(hasattr(tokenizer, name) for name in asked):
        raise checks.wrong("tokenizer", "a transformers tokenizer", type(tokenizer).__name__, InputTypeError)


def encoded(tokenizer, texts: Sequence[str], **options) -> list[tuple[np.ndarray, object | None]]:
    """Return the int64 ids of each text, no BOS and no padding, with the tokenizers library's encoding.

    Args:
        tokenizer: A transformers tokenizer. Only a fast one knows which characters its tokens cover:
            the encoding of another is None.
        texts: Any texts.
        options: Further keywords of the tokenizer's call.

    Raises:
        InputError: The tokenizer cannot, as a word-level one without an entry for unknown words.
    """
    if not texts:
        return []
    with theirs("tokenizer: expected one that takes every Unicode text, got one that fails"):
        found = tokenizer(list(texts), add_special_tokens=False, verbose=False, **options)
        ids = [np.array(ids, dtype=np.int64) for ids in found["input_ids"]]
    return list(zip(ids, getattr(found, "encodings", None) or [None] * len(ids), strict=True))


def token_ids(tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the int64 ids of each text alone, as ``encoded`` does."""
    return [ids for ids, _ in encoded(tokenizer, texts)]


def text_of(tokenizer, ids: Sequence[int] | np.ndarray, **options) -> str:
    """Return what ``ids`` decode to; ``options`` are those of the tokenizer's ``decode``."""
    with theirs("tokenizer: expected one that decodes the model's tokens, got one that fails"):
        return tokenizer.decode([int(token) for token in ids], **options)
