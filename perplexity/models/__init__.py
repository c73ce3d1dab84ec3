"""Models: a checkpoint to hidden states and a head, whatever its class, checked by its own
logits.
"""

from .heads import Head, head_of, no_rounding
from .language_model import (
    VERIFIED_POSITIONS,
    HuggingFaceModel,
    LanguageModel,
    as_language_model,
    context_limit,
    context_notes,
    described,
    evaluation_mode,
    fingerprint,
    last_hidden_state,
    load,
    load_tokenizer,
    loading_notes,
    mode,
    same_body_in_training,
    seeded,
    source,
    verify,
)

__all__ = [
    "VERIFIED_POSITIONS",
    "Head",
    "HuggingFaceModel",
    "LanguageModel",
    "as_language_model",
    "context_limit",
    "context_notes",
    "described",
    "evaluation_mode",
    "fingerprint",
    "head_of",
    "last_hidden_state",
    "load",
    "load_tokenizer",
    "loading_notes",
    "mode",
    "no_rounding",
    "same_body_in_training",
    "seeded",
    "source",
    "verify",
]
