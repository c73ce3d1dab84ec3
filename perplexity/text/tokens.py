"""Text to token ids and back; errors of a user's tokenizer name the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import theirs

# Cuneiform, a hieroglyph, a rare ideograph: only a vocabulary with bytes has all of them.
UNKNOWN_TEXT = "\U00012000 \U00013000 \U0002a6a5"


def encoded(tokenizer, texts: Sequence[str], **options) -> list[tuple[np.ndarray, Any]]:
    """Return the int64 ids of each text, without BOS and padding, and its encoding.

    The encoding is the tokenizers library's.

    Args:
        tokenizer: A transformers tokenizer. Only a fast one knows which characters its tokens
            cover; the encoding of another is None.
        texts: Any texts.
        options: Further keywords of the tokenizer's call.

    Raises:
        InputError: The tokenizer fails, as a word-level one without an entry for unknown words.
    """
    if not texts:
        return []
    with theirs("tokenizer: expected one that takes every Unicode text, got one that fails"):
        encoding = tokenizer(list(texts), add_special_tokens=False, verbose=False, **options)
        ids = [np.array(ids, dtype=np.int64) for ids in encoding["input_ids"]]
    return list(zip(ids, getattr(encoding, "encodings", None) or [None] * len(ids), strict=True))


def token_ids(tokenizer, texts: Sequence[str], **options) -> list[np.ndarray]:
    """Return the int64 ids of each text alone, as ``encoded`` does."""
    return [ids for ids, _ in encoded(tokenizer, texts, **options)]


def text_of(tokenizer, ids: Sequence[int] | np.ndarray, **options) -> str:
    """Return the text that ``ids`` decode to, with ``options`` of the tokenizer's ``decode``."""
    with theirs("tokenizer: expected one that decodes the model's tokens, got one that fails"):
        return tokenizer.decode([int(token) for token in ids], **options)


def special_ids(tokenizer) -> set[int]:
    """Return the ids of special tokens, without the unknown token, which stands for text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {index for index, token in added.items() if getattr(token, "special", False)}
    ids.update(getattr(tokenizer, "all_special_ids", []))
    return ids - {unknown_id(tokenizer)}


def unknown_id(tokenizer) -> int | None:
    """Return the id that stands for text outside the vocabulary; None where no text becomes it.

    A token that is BOS, EOS or padding as well stands for text only where unknown text becomes it.
    Padding saved as the unknown token does; GPT-2's <|endoftext|> does not.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    others = [
        getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    ]
    if unknown is not None and unknown not in others:
        return unknown
    if unknown is None:
        unknown = _unknown_of_backend(tokenizer)
    if unknown is None or not callable(tokenizer):
        return None
    encoded = tokenizer(UNKNOWN_TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    return unknown if unknown in encoded else None


def _unknown_of_backend(tokenizer) -> int | None:
    """Return the unknown id of a fast tokenizer's own model, named in transformers or not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    if type(backend.model).__name__ == "Unigram":  # has no attribute for its unknown id
        return json.loads(backend.to_str())["model"].get("unk_id")
    name = getattr(backend.model, "unk_token", None)
    return None if name is None else backend.token_to_id(name)
