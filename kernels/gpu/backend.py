"""The operations of the triton backend, by the names that the operators call."""

from .linear_kl import linear_kl, linear_kl_grad
from .linear_nll import merge
from .linear_nll_chunked import linear_nll_by_policy as linear_nll
from .linear_nll_grad import linear_nll_grad
from .linear_statistics import linear_statistics, target_logit
from .nll import nll, nll_grad

__all__ = [
    "linear_kl",
    "linear_kl_grad",
    "linear_nll",
    "linear_nll_grad",
    "linear_statistics",
    "merge",
    "nll",
    "nll_grad",
    "target_logit",
]
