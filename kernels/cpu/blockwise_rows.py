"""The five sums of existing logits in plain PyTorch, a few rows at a time in the caches of a CPU.

The contracts are those of ``gpu/nll.py``.
"""

from __future__ import annotations

import torch

from ..dispatch import DEFAULT, PLAIN, ROWS_LIMIT, Plan, Rule
from ..sums import finished, finite, with_positions
from .blockwise import RunningSums, sums_derivative
from .logit_blocks import apply_rule, zero_tokens


def _row_chunks(logits: torch.Tensor, wide: torch.dtype, copies: int, memory_limit: int):
    """Yield flat tokens, their place in [N, V, T], and a wide copy of their logits [tokens, V].

    A chunk has as many tokens as fit in the limit.
    """
    logits = with_positions(logits)
    N, V, T = logits.shape
    size = max(1, memory_limit // max(1, copies * V * wide.itemsize))
    if T == 0:
        return
    items, positions = (size // max(1, T), T) if size >= T else (1, size)
    for n in range(0, N, items):
        for t in range(0, T, positions):
            here = slice(n, n + items), slice(None), slice(t, t + positions)
            z = (
                logits[here]
                .movedim(1, 2)
                .to(wide, copy=True, memory_format=torch.contiguous_format)
                .view(-1, V)
            )
            yield slice(n * T + t, n * T + t + z.shape[0]), here, z


def nll(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
) -> torch.Tensor:
    """Return the five sums of every token, [5, N · T], from logits [N, V] or [N, V, T]."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    running = RunningSums.start(target, class_weight, rule, logits.shape[1], wide)
    for tokens, _, z in _row_chunks(
        logits, wide, 2 + rule.with_exp_shift, plan.memory_limit or ROWS_LIMIT
    ):
        running.add(apply_rule(z, None, rule.softcap, rule.logit_scale), 0, tokens)
    return finished(running.rows, target, logits.shape[1], rule.ignore_index)


def nll_grad(
    upstream: torch.Tensor,
    maximum: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of logits [N, V] or [N, V, T] from ``upstream`` [5, N · T].

    ``out`` may be ``logits`` itself.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    out = torch.empty_like(logits) if out is None else out
    of_tokens = class_weight if class_weight is not None and class_weight.dim() == 2 else None
    copies = 2 + rule.with_exp_shift + (rule.softcap is not None)
    for tokens, here, z in _row_chunks(logits, wide, copies, plan.memory_limit or ROWS_LIMIT):
        apply_rule(z, None, rule.softcap, rule.logit_scale)
        ignored = target[tokens] == rule.ignore_index
        slope = None if rule.softcap is None else (z / rule.softcap).square_().neg_().add_(1.0)
        gradient = sums_derivative(
            z,
            0,
            finite(maximum[tokens]),
            upstream[:, tokens],
            target[tokens],
            class_weight if of_tokens is None else of_tokens[tokens],
            rule,
        )
        if slope is not None:
            gradient *= slope
        zero_tokens(gradient, ignored)
        place = with_positions(out)[here]
        place.copy_(
            gradient.mul_(rule.logit_scale).view(place.shape[0], place.shape[2], -1).movedim(2, 1)
        )
    return out
