"""Per-token loss and perplexity straight from hidden states, and what they mean.

``import perplexity`` needs torch alone; everything else is imported where it is used.
"""

from .losses import cross_entropy, linear_cross_entropy, token_nll

__version__ = "0.1.0"

__all__ = [
    "Evaluation",
    "Perplexity",
    "cross_entropy",
    "evaluate",
    "linear_cross_entropy",
    "token_nll",
]


def __getattr__(name: str):
    if name in ("evaluate", "Evaluation"):
        from . import evaluation

        return getattr(evaluation, name)
    if name == "Perplexity":
        from .metric import Perplexity

        return Perplexity
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
