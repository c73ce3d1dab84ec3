"""Torch operators of the kernels on either backend, with shapes for tracing and with derivatives.

One file an operator: its schema, its shapes, its derivative. ``linear_nll`` and ``nll`` return the
five per-token sums [5, N] of ``sums.py``: losses are arithmetic on those vectors, left to autograd.
``linear_kl`` returns the divergence and its rows. An operator takes tensors, then the scalars of a
``Rule`` and a ``Plan`` (``dispatch.py``), in their order:

    sums, _ = operators.linear_nll(hidden, weight, bias, target, class_weight, *rule, *plan)

Only ``checked_target`` waits for a device: its callers decide whether the check is worth that.
"""

from ._derivatives import only_backward, refuse_forward_mode, refuse_second_derivative
from ._linear_kl import linear_kl, linear_kl_grad
from ._linear_nll import linear_nll, linear_nll_grad, linear_nll_grad_kept
from ._merge import merge
from ._nll import nll, nll_grad
from ._schema import implementation
from ._statistics import linear_statistics, target_logit
from ._target import checked_target

__all__ = [
    "checked_target",
    "implementation",
    "linear_kl",
    "linear_kl_grad",
    "linear_nll",
    "linear_nll_grad",
    "linear_nll_grad_kept",
    "linear_statistics",
    "merge",
    "nll",
    "nll_grad",
    "only_backward",
    "refuse_forward_mode",
    "refuse_second_derivative",
    "target_logit",
]
