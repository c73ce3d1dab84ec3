"""KL divergence per token between two heads in plain PyTorch, block by block over the vocabulary.

``sums.py`` defines the five rows of a token, ``gpu/linear_kl.py`` the formulas of their gradient.

Cost: 2·N·V·(D_p + D_q) operations forward; the blocks of both sides' logits, at most
``memory_limit`` bytes.
"""

from __future__ import annotations

from functools import reduce

import torch

from ..blocks import block_shape
from ..chunks import (
    accumulate_gradients,
    gradient_block,
    pieces,
    product_buffer,
    product_buffer_bytes,
)
from ..dispatch import BACKWARD_LIMIT, DEFAULT, FORWARD_LIMIT, PLAIN, Plan, Rule
from ..sums import DIVERGENCE_ROWS, Head, divergence_vectors, finite, merge_divergence
from .blockwise import LOG2E
from .logit_blocks import Logits


def block_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the rows [5, N] of a block of logits a and b [N, columns]; overwrites both."""
    p_maximum, q_maximum = a.amax(1), b.amax(1)
    a.sub_(finite(p_maximum)[:, None])
    b.sub_(finite(q_maximum)[:, None])
    q_sum = torch.mul(b, LOG2E).exp2_().sum(1)
    # Before the scaling: where finfo.min masks Q alone, the difference is finite, but LOG2E times
    # the difference is infinite.
    torch.sub(a, b, out=b)
    exponentials = a.mul_(LOG2E).exp2_()
    p_sum = exponentials.sum(1)
    # 0 · log 0 is 0. NaN logits still show, in a sum of exponentials.
    gap = b.mul_(exponentials).nan_to_num_(0.0, torch.inf, -torch.inf).sum(1)
    return torch.stack([p_maximum, p_sum, q_maximum, q_sum, gap])


def _sides(p_head: Head, q_head: Head, p_rule: Rule, q_rule: Rule) -> list[Logits]:
    """Return the blocks of logits of P and of Q."""
    heads = (p_head, p_rule), (q_head, q_rule)
    return [Logits(*head, rule.softcap, rule.logit_scale) for head, rule in heads]


def _plan_products(sides: list[Logits], memory_limit: int) -> int:
    """Plan the products of both sides; return the bytes that they take.

    Each side gets at most a quarter of the limit.
    """
    return sum(side.plan_products(memory_limit // 2) for side in sides)


def linear_kl(
    p_head: Head,
    q_head: Head,
    p_rule: Rule = PLAIN,
    q_rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
) -> torch.Tensor:
    """Return the five rows of every token, [5, N], float32 (float64 where an input is)."""
    tokens, vocabulary = p_head[0].shape[0], p_head[1].shape[0]
    memory_limit, sides = plan.memory_limit or FORWARD_LIMIT, _sides(p_head, q_head, p_rule, q_rule)
    wide = torch.promote_types(sides[0].wide, sides[1].wide)
    block = block_shape(
        tokens,
        vocabulary,
        memory_limit - _plan_products(sides, memory_limit),
        # Both blocks and an exponential of Q's; a copy of the narrower one, if the dtypes differ.
        per_logit=(3 + (sides[0].wide != sides[1].wide)) * wide.itemsize,
        per_token=sides[0].per_token + sides[1].per_token,
        most_rows=sides[0].most_rows,
    )
    for side in sides:
        side.reserve(block)
    rows = []
    for first in range(0, tokens, block[0]):
        chunk = slice(first, min(tokens, first + block[0]))
        parts = (
            block_rows(*(side.block(chunk, columns).to(wide) for side in sides))
            for columns in pieces(vocabulary, block[1])
        )
        rows.append(
            reduce(
                lambda running, here: merge_divergence(torch.stack([running, here], dim=1)), parts
            )
        )
    return torch.cat(rows, dim=1) if rows else p_head[0].new_empty((DIVERGENCE_ROWS, 0), dtype=wide)


def linear_kl_grad(
    upstream: torch.Tensor,
    rows: torch.Tensor,
    p_head: Head,
    q_head: Head,
    p_rule: Rule = PLAIN,
    q_rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    *,
    p_needs: tuple[bool, bool, bool] = (True, True, True),
    q_needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of hidden, weight and bias of P, then of Q.

    They follow from ``upstream`` [N] and the forward's ``rows`` [5, N].
    """
    vectors = divergence_vectors(upstream, rows)
    memory_limit, sides = (
        plan.memory_limit or BACKWARD_LIMIT,
        _sides(p_head, q_head, p_rule, q_rule),
    )
    wide = torch.promote_types(sides[0].wide, sides[1].wide)
    gradients: list[torch.Tensor | None] = []
    nobody = torch.zeros_like(upstream, dtype=torch.bool)
    for for_p, head, needs in ((True, p_head, p_needs), (False, q_head, q_needs)):
        if not any(needs):
            gradients += [None] * 3
            continue
        side, other = sides if for_p else reversed(sides)
        block = gradient_block(
            *head[:2],
            needs,
            memory_limit,
            taken=_plan_products(sides, memory_limit) + product_buffer_bytes(head[0], memory_limit),
            # If the dtypes differ, the narrower logits are copied on their way in, or the gradient
            # on its way out.
            per_logit=side.per_logit(3, gradient=True)
            + (3 * wide.itemsize if side.wide != other.wide else 0),
            per_token=sides[0].per_token + sides[1].per_token,
            most_rows=sides[0].most_rows,
        )
        for one in sides:
            one.reserve(block, gradient=one is side)

        def logit_gradient(chunk: slice, columns: slice, for_p=for_p, side=side) -> torch.Tensor:
            a, b = (one.block(chunk, columns) for one in sides)
            slope = side.slope(a if for_p else b)
            a, b = a.to(wide), b.to(wide)
            p_maximum, p_log, q_maximum, q_log, divergence, g = vectors[:, chunk, None]
            log_p = a.sub_(p_maximum).sub_(p_log)
            log_q = b.sub_(q_maximum).sub_(q_log)
            if for_p:
                difference = torch.sub(log_p, log_q, out=log_q).sub_(divergence)
                p = log_p.exp_()
                gradient = difference.masked_fill_(p == 0, 0.0).mul_(p).mul_(g)
            else:
                gradient = log_q.exp_().sub_(log_p.exp_()).mul_(g)
            return side.chain(gradient.to(side.wide), slope, nobody[chunk])

        buffer = product_buffer(head[0], memory_limit)
        gradients += accumulate_gradients(
            logit_gradient, *head, needs=needs, block=block, buffer=buffer
        )
    return tuple(gradients)
