"""Per-token loss and perplexity from hidden states, evaluation, and monitoring of training.

``import perplexity`` imports nothing else: torch and the module of a name are imported when the
name is first used. Losses, statistics and the metric need torch alone; ``evaluate``, ``compare``
and the monitor need an extra, which the ImportError names. ``import perplexity.kernels`` registers
the torch operators; a program that was saved with them needs this import before it is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .errors import needing

if TYPE_CHECKING:
    from .evaluation import Comparison, Evaluation, compare, evaluate
    from .losses import cross_entropy, linear_cross_entropy
    from .metric import Perplexity
    from .monitor import Diagnosis, Monitor
    from .nn import CrossEntropyLoss, LinearCrossEntropyLoss
    from .parallel import VocabularyShard
    from .per_token import TokenStatistics
    from .statistics import (
        linear_kl_divergence,
        token_log_probabilities,
        token_log_probabilities_of_logits,
        token_nll,
        token_statistics,
    )

__version__ = "0.2.0"

# Where each name is defined.
_MODULES = {
    "Comparison": "evaluation",
    "CrossEntropyLoss": "nn",
    "Diagnosis": "monitor",
    "Evaluation": "evaluation",
    "LinearCrossEntropyLoss": "nn",
    "Monitor": "monitor",
    "Perplexity": "metric",
    "TokenStatistics": "per_token",
    "VocabularyShard": "parallel",
    "compare": "evaluation",
    "cross_entropy": "losses",
    "evaluate": "evaluation",
    "linear_cross_entropy": "losses",
    "linear_kl_divergence": "statistics",
    "token_log_probabilities": "statistics",
    "token_log_probabilities_of_logits": "statistics",
    "token_nll": "statistics",
    "token_statistics": "statistics",
}
# Modules that are attributes without an import statement, as ``torch.nn`` is.
_SUBMODULES = ("kernels", "losses", "metric", "nn", "parallel", "statistics")
_EXTRAS = {"evaluation": "eval", "monitor": "monitor"}

__all__ = [*_MODULES]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES[name]
    if module in _EXTRAS:
        with needing(f"perplexity.{name}", _EXTRAS[module]):
            home = importlib.import_module(f".{module}", __name__)
    else:
        home = importlib.import_module(f".{module}", __name__)
    value = getattr(home, name)
    globals()[name] = value  # the next look-up does not call this function
    return value


def __dir__() -> list[str]:
    # Python suggests these names for a misspelt one.
    return sorted({*globals(), *_SUBMODULES, *__all__})
