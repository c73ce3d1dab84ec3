"""Hashes that say whether two evaluations speak of the same tokenizer and the same text."""

from __future__ import annotations

import hashlib
import json


def tokenizer_fingerprint(tokenizer) -> str:
    """Hash of everything that decides the tokens: vocabulary, merges, normaliser, special tokens.

    Padding, truncation and what is put around a text are settings of a call and left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state = json.dumps({k: v for k, v in state.items() if k not in ("padding", "truncation", "post_processor")})
    else:
        merges = sorted(getattr(tokenizer, "bpe_ranks", {}).items())
        settings = {
            k: v
            for k, v in getattr(tokenizer, "init_kwargs", {}).items()
            if isinstance(v, bool) and k not in ("is_local", "local_files_only", "trust_remote_code", "use_fast")
        }
        state = repr(
            (type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), merges, sorted(settings.items()))
        )
    special = sorted(pair for pair in dict(tokenizer.special_tokens_map).items() if pair[0] != "pad_token")
    return hashlib.sha256((state + repr(special)).encode()).hexdigest()[:16]


class TextFingerprint:
    """Hash of a sequence of documents' texts."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def add(self, text: str) -> str:
        """Take a document in; returns the hash of it alone."""
        alone = hashlib.sha256(text.encode())
        self.digest.update(alone.digest())
        return alone.hexdigest()[:16]

    def value(self) -> str:
        return self.digest.hexdigest()[:16]
