"""Per-token loss and perplexity straight from hidden states, and what they mean.

``import perplexity`` imports nothing else: each name, torch with it, is imported when it is first
used. What is more than a loss, a statistic or the metric needs an extra, which the error names. The
torch operators are registered by ``import perplexity.kernels``, which a program saved with them
needs before it is loaded.
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
    from .statistics import (
        TokenStatistics,
        linear_kl_divergence,
        token_log_probabilities,
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
    "TokenStatistics": "statistics",
    "VocabularyShard": "parallel",
    "compare": "evaluation",
    "cross_entropy": "losses",
    "evaluate": "evaluation",
    "linear_cross_entropy": "losses",
    "linear_kl_divergence": "statistics",
    "token_log_probabilities": "statistics",
    "token_nll": "statistics",
    "token_statistics": "statistics",
}
# Modules that are attributes without an import of their own, as ``torch.nn`` is.
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
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    # With the names of ``__getattr__``: Python suggests them for a misspelt one.
    return sorted({*globals(), *_SUBMODULES, *__all__})
