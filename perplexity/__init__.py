"""Per-token loss and perplexity straight from hidden states, and what they mean.

``import perplexity`` needs torch alone; everything else is imported where it is used.
"""

from .errors import needing
from .losses import cross_entropy, linear_cross_entropy
from .nn import CrossEntropyLoss, LinearCrossEntropyLoss
from .parallel import VocabularyShard
from .statistics import (
    TokenStatistics,
    linear_kl_divergence,
    token_log_probabilities,
    token_nll,
    token_statistics,
)

__version__ = "0.2.0"

__all__ = [
    "Comparison",
    "CrossEntropyLoss",
    "Diagnosis",
    "Evaluation",
    "LinearCrossEntropyLoss",
    "Monitor",
    "Perplexity",
    "TokenStatistics",
    "VocabularyShard",
    "compare",
    "cross_entropy",
    "evaluate",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "token_log_probabilities",
    "token_nll",
    "token_statistics",
]


def __getattr__(name: str):
    if name in ("Comparison", "Evaluation", "compare", "evaluate"):
        with needing(f"perplexity.{name}", "eval"):
            from . import evaluation
        return getattr(evaluation, name)
    if name in ("Diagnosis", "Monitor"):
        with needing(f"perplexity.{name}", "monitor"):
            from . import monitor
        return getattr(monitor, name)
    if name == "Perplexity":
        from .metric import Perplexity

        return Perplexity
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # With the names of ``__getattr__``: Python suggests them for a misspelt one.
    return sorted({*globals(), *__all__})
