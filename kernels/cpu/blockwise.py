"""The five sums in plain PyTorch without N × V: the fallback everywhere, the fast path on a CPU.

The vocabulary is walked in blocks with a running maximum and running sums (Milakov & Gimelshein
2018, arXiv:1805.02867). The logits of a block are in one reused buffer, of a size that
``blocks.py`` derives from the caches. Exponentials are powers of 2: PyTorch computes them three
times as fast as ``exp`` on CPUs where it leaves ``exp`` to Intel's library. Formulas: ``sums.py``.
float64 inputs give float64 sums. Class weights may also be [N, V] here, each token's own:
class-probability targets are such weights.

Cost: 2·N·V·D operations forward; blocks of at most ``memory_limit`` bytes, all copies counted, and
vectors of N.

Training keeps the products of the first D tokens in the memory of the weight's gradient, [V, D].
They stay there until they turn into that gradient, and are not computed again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..blocks import block_shape, values_are_here
from ..chunks import accumulate_gradients, gradient_block, product_buffer, product_buffer_bytes
from ..dispatch import BACKWARD_LIMIT, DEFAULT, FORWARD_LIMIT, PLAIN, Plan, Rule
from ..sums import MAX, NO_POWER, SUMS, finished, finite
from .logit_blocks import Logits

LOG2E, LN2 = 1 / math.log(2), math.log(2)


@dataclass
class RunningSums:
    """The five sums of N tokens over the vocabulary so far, in blocks of ``width`` columns."""

    target: torch.Tensor
    class_weight: torch.Tensor | None
    rule: Rule
    width: int
    rows: torch.Tensor
    weight_seen: torch.Tensor  # Σ w of the columns so far, [N]
    block: torch.Tensor  # block of the target, [N]
    column: torch.Tensor  # column of the target in its block, [N, 1]

    @classmethod
    def start(cls, target, class_weight, rule, width, dtype) -> RunningSums:
        """Return the sums before the first column."""
        rows = torch.zeros((SUMS, target.shape[0]), dtype=dtype, device=target.device)
        # Not the lowest number: logits masked by it would not be above the maximum.
        rows[MAX] = -torch.inf
        target = target.long()
        block, column = target.div(width, rounding_mode="floor"), target.remainder(width)[:, None]
        seen = torch.zeros_like(rows[MAX])
        return cls(target, class_weight, rule, width, rows, seen, block, column)

    def add(
        self,
        z: torch.Tensor,
        first_column: int,
        tokens: slice,
        *,
        largest: torch.Tensor | None = None,
        scratch: torch.Tensor | None = None,
    ) -> None:
        """Add the logits z [tokens, columns]; overwrites z and ``scratch``.

        ``largest`` are the rows' maxima, where they are known.
        """
        maximum, sum_exp, at_target, logit_sum, exp_shift = self.rows[:, tokens]
        column = self.column[tokens]
        if z.shape[1] < self.width:  # the last block
            column = column.clamp(max=z.shape[1] - 1)
        own = self.block[tokens] == first_column // self.width
        if values_are_here(z):
            # Read for these tokens only: half of the rows are in the other core's cache.
            here = own.nonzero()[:, 0]
            at_target[here] = z[here, column[here, 0]]
        else:
            torch.where(own, z.gather(1, column)[:, 0], at_target, out=at_target)
        new_maximum = torch.maximum(maximum, z.amax(1) if largest is None else largest)
        reference = finite(new_maximum)
        # −inf before the first finite maximum and where float32 ends; 0 times −inf is NaN.
        moved = maximum - reference
        maximum.copy_(new_maximum)
        z -= reference[:, None]
        if self.rule.with_logit_sum:
            columns = slice(first_column, first_column + z.shape[1])
            seen = self.weight_seen[tokens]
            if first_column:
                logit_sum += seen * moved
            if self.class_weight is None:
                logit_sum += z.sum(1)
                seen += z.shape[1]
            elif self.class_weight.dim() == 2:
                logit_sum += (z * self.class_weight[tokens, columns]).sum(1)
                seen += self.class_weight[tokens, columns].sum(1)
            else:
                block_weight = self.class_weight[columns].to(z.dtype)
                # In place, since autocast would round the operands of `@` to 16 bits.
                logit_sum.addmv_(z, block_weight)
                seen += block_weight.sum()
        z *= LOG2E
        if self.rule.with_exp_shift:
            z.clamp_min_(NO_POWER)
            exponentials = torch.exp2(z, out=scratch)
            block_sum = exponentials.sum(1)
            exp_shift.addcmul_(sum_exp, moved.clamp_min(NO_POWER)).mul_(moved.exp()).add_(
                exponentials.mul_(z).sum(1), alpha=LN2
            )
        else:
            block_sum = z.exp2_().sum(1)
        sum_exp.mul_(moved.exp_()).add_(block_sum)


def sums_derivative(
    z: torch.Tensor,
    first_column: int,
    reference: torch.Tensor,
    upstream: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    rule: Rule,
) -> torch.Tensor:
    """Return ∂/∂z of the five sums weighted by ``upstream`` [5, tokens]; overwrites z.

    z are logits [tokens, columns], ``reference`` is their ``finite`` maximum. The result for
    ignored tokens is arbitrary.
    """
    _, per_sum, per_target, per_logit, per_shift = upstream
    z -= reference[:, None]
    z *= LOG2E
    if rule.with_exp_shift:
        z.clamp_min_(NO_POWER)
        exponentials = z.exp2()
        z.mul_(LN2).add_(1.0).mul_(per_shift[:, None]).add_(per_sum[:, None]).mul_(exponentials)
    else:
        z.exp2_().mul_(per_sum[:, None])
    local = target - first_column
    inside = (local >= 0) & (local < z.shape[1])
    if values_are_here(z):
        here = inside.nonzero()[:, 0]
        z[here, local[here]] += per_target[here]
    else:
        z.scatter_add_(
            1,
            local.clamp(0, z.shape[1] - 1)[:, None],
            torch.where(inside, per_target, 0.0)[:, None],
        )
    columns = slice(first_column, first_column + z.shape[1])
    if not rule.with_logit_sum:
        return z
    if class_weight is None:
        z += per_logit[:, None]
    elif class_weight.dim() == 2:
        z.addcmul_(class_weight[:, columns].to(z.dtype), per_logit[:, None])
    else:
        z.addr_(per_logit, class_weight[columns].to(z.dtype))
    return z


def sweep(logits: Logits, block: tuple[int, int]):
    """Yield every block of the logits: its tokens, its columns, and z [tokens, columns]."""
    for first in range(0, logits.weight.shape[0], block[1]):
        columns = slice(first, min(logits.weight.shape[0], first + block[1]))
        for start in range(0, logits.hidden.shape[0], block[0]):
            tokens = slice(start, min(logits.hidden.shape[0], start + block[0]))
            yield tokens, columns, logits.block(tokens, columns)


def forward_block(logits: Logits, memory_limit: int, copies: int) -> tuple[int, int]:
    """Return the block shape of a forward, with ``copies`` of a block in memory at once."""
    return block_shape(
        logits.hidden.shape[0],
        logits.weight.shape[0],
        memory_limit - logits.plan_products(memory_limit),
        per_logit=logits.per_logit(copies),
        per_token=logits.per_token,
        most_rows=logits.most_rows,
    )


def forward_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rule: Rule,
    plan: Plan,
    kept: torch.Tensor | None,
    copies: int,
) -> tuple[Logits, tuple[int, int]]:
    """Return the logits of a forward, and the shape of its blocks: the plan's if it keeps some."""
    logits = Logits(hidden, weight, bias, rule.softcap, rule.logit_scale, plan.rounded, kept)
    if kept is None:
        return logits, forward_block(logits, plan.memory_limit or FORWARD_LIMIT, copies)
    logits.plan_products(plan.memory_limit or BACKWARD_LIMIT)
    return logits, (plan.block[0], plan.block[1])


def training_block(logits: Logits, memory_limit: int, copies: int) -> tuple[int, int]:
    """Return the block shape of a step that keeps products, and of a backward."""
    return gradient_block(
        logits.hidden,
        logits.weight,
        (True, True, True),
        memory_limit,
        taken=logits.plan_products(memory_limit)
        + product_buffer_bytes(logits.hidden, memory_limit),
        per_logit=logits.per_logit(copies, gradient=True),
        per_token=logits.per_token,
        most_rows=logits.most_rows,
    )


def _dense(class_weight: torch.Tensor | None) -> bool:
    """Return whether class weights are [N, V], those of class probabilities."""
    return class_weight is not None and class_weight.dim() == 2


def _copies(rule: Rule, class_weight: torch.Tensor | None) -> int:
    """Return how many copies of a block of logits are in memory at once."""
    return 1 + rule.with_exp_shift + _dense(class_weight)


def kept_block(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    class_weight: torch.Tensor | None,
    rule: Rule,
    *,
    rounded: bool,
    memory_limit: int = 0,
) -> tuple[int, int]:
    """Return the block shape of a training step that keeps products.

    The backward must walk the forward's blocks, whose shape depends on the number of threads.
    """
    logits = Logits(hidden, weight, None, rule.softcap, 1.0, rounded)
    return training_block(logits, memory_limit or BACKWARD_LIMIT, _copies(rule, class_weight))


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the five sums of every token, [5, N], float32 (float64 for float64 inputs).

    Logits are float32 unless the plan rounds their products. ``kept`` is uninitialised memory like
    a contiguous ``weight``. It is filled with products that ``linear_nll_grad`` need not compute
    again; the plan's block is then ``kept_block``'s.
    """
    copies = _copies(rule, class_weight)
    logits, block = forward_logits(hidden, weight, bias, rule, plan, kept, copies)
    logits.reserve(block, scratch=rule.with_exp_shift)
    running = RunningSums.start(target, class_weight, rule, block[1], logits.wide)
    for tokens, columns, z in sweep(logits, block):
        running.add(z, columns.start, tokens, scratch=logits.scratch(z))
    return finished(running.rows, target, weight.shape[0], rule.ignore_index)


def linear_nll_grad(
    upstream: torch.Tensor,
    maximum: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    kept: torch.Tensor | None = None,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of hidden, weight and bias.

    They follow from ``upstream`` [5, N] and the forward's ``maximum`` [N]. With the forward's
    ``kept`` and plan, ``kept`` becomes the gradient of the weight.
    """
    memory_limit = plan.memory_limit or BACKWARD_LIMIT
    logits = Logits(
        hidden, weight, bias, rule.softcap, rule.logit_scale, plan.rounded, kept, recall=True
    )
    if kept is None:
        block = training_block(logits, memory_limit, _copies(rule, class_weight))
    else:
        block = plan.block[0], plan.block[1]
        logits.plan_products(memory_limit)
    logits.reserve(block, gradient=True)
    reference, ignored = finite(maximum), target == rule.ignore_index
    of_tokens = class_weight if _dense(class_weight) else None

    def logit_gradient(tokens: slice, columns: slice) -> torch.Tensor:
        z = logits.block(tokens, columns)
        slope = logits.slope(z)
        gradient = sums_derivative(
            z,
            columns.start,
            reference[tokens],
            upstream[:, tokens],
            target[tokens],
            class_weight if of_tokens is None else of_tokens[tokens],
            rule,
        )
        return logits.chain(gradient, slope, ignored[tokens])

    return accumulate_gradients(
        logit_gradient,
        hidden,
        weight,
        bias,
        needs=needs,
        block=block,
        buffer=product_buffer(hidden, memory_limit),
        grad_weight=kept,
        ignored=ignored,
    )
