"""Per-token statistics in plain PyTorch without N × V: the five sums, ranks and predictions.

A rank counts the logits above the target's, which ``target_logit`` computes first. Cost: that of
``blockwise.linear_nll``, one more copy of a block, and sweeps over it for the comparison and the
maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..blocks import multiplies_16_bits
from ..dispatch import DEFAULT, FORWARD_LIMIT, PLAIN, Plan, Rule
from ..sums import MAX, finished
from .blockwise import RunningSums, forward_logits, sweep
from .logit_blocks import apply_rule


@dataclass
class _Choices:
    """Counts of logits above the target's, and columns of the largest logits, so far."""

    target: torch.Tensor
    target_logit: torch.Tensor
    above: torch.Tensor
    best: torch.Tensor

    def add(
        self,
        z: torch.Tensor,
        first_column: int,
        tokens: slice,
        maximum: torch.Tensor,
        scratch: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add the logits z [tokens, columns]; return their maxima [tokens].

        ``maximum`` [tokens] are the maxima of the columns before. ``scratch`` is overwritten.
        """
        # Floats of 0 and 1: their sum takes a fifth of the time of bools, and is exact for blocks
        # narrower than 2²⁴.
        larger = torch.gt(z, self.target_logit[tokens, None], out=scratch)
        local = self.target[tokens] - first_column
        # The target's own column never counts, whatever its rounding.
        inside = (local >= 0) & (local < z.shape[1])
        column = local.clamp(0, z.shape[1] - 1)[:, None]
        larger.scatter_(1, column, larger.gather(1, column).masked_fill_(inside[:, None], 0.0))
        self.above[tokens] += larger.sum(1).long()
        column = z.argmax(1)
        largest = z.gather(1, column[:, None])[:, 0]
        self.best[tokens] = torch.where(largest > maximum, first_column + column, self.best[tokens])
        return largest


def target_logit(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
) -> torch.Tensor:
    """Return the logit of every token's target, [N], 0 where it is no row of ``weight``.

    A plan that rounds products to 16 bits rounds these, too.
    The logits are the diagonal of a product of tokens with rows, not a dot product per token. The
    library then usually sums in the order of the sweep's blocks, and equal logits tie. Its edge
    tiles and vectors may take other routines.
    """
    tokens, dimension = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rounded = plan.rounded and multiplies_16_bits(hidden.dtype, hidden.device)
    operand = hidden.dtype if rounded else wide
    out = hidden.new_zeros(tokens, dtype=wide)
    inside = (target >= 0) & (target < weight.shape[0])
    rows = torch.where(inside, target, 0)
    # The gathered rows, and both operands again where they are widened.
    per_token = dimension * (
        hidden.element_size() + (2 * wide.itemsize if operand != hidden.dtype else 0)
    )
    side = max(
        16, min(256, (plan.memory_limit or FORWARD_LIMIT) // (per_token + 256 * wide.itemsize))
    )
    buffer = hidden.new_empty(side * side, dtype=operand)
    for start in range(0, tokens if weight.shape[0] else 0, side):
        start = max(0, min(start, tokens - side))
        chunk = slice(start, min(tokens, start + side))
        count = chunk.stop - start
        columns = rows[chunk].repeat(-(-side // count))[:side]
        # Into a buffer, since autocast would round the operands of `@` to 16 bits.
        z = torch.mm(
            hidden[chunk].to(operand),
            weight[columns].to(operand).T,
            out=buffer[: count * side].view(count, side),
        ).to(wide)
        apply_rule(z, None if bias is None else bias[columns], rule.softcap, rule.logit_scale)
        out[chunk] = z.diagonal()
    return out.masked_fill_(~inside, 0.0)


def linear_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    target_logit: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the five sums [5, N], the number of logits above ``target_logit``, and the prediction.

    The number and the prediction, the column of the largest logit, are int64 [N] and 0 for ignored
    tokens. Of equal largest logits the first column is taken. ``kept`` is as in
    ``blockwise.linear_nll``.
    """
    rule = rule._replace(with_exp_shift=True)
    logits, block = forward_logits(hidden, weight, bias, rule, plan, kept, copies=2)
    logits.reserve(block, scratch=True)
    running = RunningSums.start(target, class_weight, rule, block[1], logits.wide)
    above, best = (
        torch.zeros(target.shape, dtype=torch.int64, device=target.device) for _ in range(2)
    )
    choices = _Choices(target, target_logit, above, best)
    for tokens, columns, z in sweep(logits, block):
        scratch = logits.scratch(z)
        largest = choices.add(z, columns.start, tokens, running.rows[MAX, tokens], scratch)
        running.add(z, columns.start, tokens, largest=largest, scratch=scratch)
    ignored = target == rule.ignore_index
    sums = finished(running.rows, target, weight.shape[0], rule.ignore_index)
    return sums, above.masked_fill_(ignored, 0), best.masked_fill_(ignored, 0)
