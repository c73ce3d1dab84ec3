"""Operations of the torch backend, by the names that the operators call."""

from ..sums import merge
from .blockwise import linear_nll, linear_nll_grad
from .blockwise_kl import linear_kl, linear_kl_grad
from .blockwise_rows import nll, nll_grad
from .blockwise_statistics import linear_statistics, target_logit

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
