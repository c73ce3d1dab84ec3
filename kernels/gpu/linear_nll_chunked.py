"""The five sums by way of the logits of some tokens at a time: the vendor's product, then one read.

Every logit goes to memory and back. Where the fused kernel's own products are slow, this way is
faster: ``dispatch.py`` says where, docs/performance.md has the arithmetic.

In training, the logits of a chunk become their own gradient, in place. That takes three products,
the fewest possible, for a loss whose derivative is known before its backward (a sum or a mean).

Cost: 2·N·V·D operations; 4·N·V bytes written and read; temporary memory 4·T·V bytes for T tokens at
a time, at most ``memory_limit``. With gradients 6·N·V·D operations, logits in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..chunks import accumulate_gradients
from ..dispatch import CHUNKED_LIMIT, DEFAULT, LEAST_CHUNKED, PLAIN, Plan, Rule
from ..sums import MAX, SUMS
from .launch import launch
from .nll import nll, nll_grad

# Values a program of ``_scale_kernel`` multiplies: 16 bytes a thread at least.
SCALE_BLOCK = 2048


def linear_nll_chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
) -> torch.Tensor:
    """Return the five sums of every token, float32 [5, N].

    They are of hidden [N, D], weight [V, D] and target int [N]. The plan's ``memory_limit`` bounds
    the float32 logits in memory, in bytes, but for one token's.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    most = max(1, min(plan.memory_limit or CHUNKED_LIMIT, CHUNKED_LIMIT) // (4 * vocabulary))
    size = most // LEAST_CHUNKED * LEAST_CHUNKED or most
    logits = hidden.new_empty((min(size, tokens), vocabulary), dtype=torch.float32)
    sums = []
    for start in range(0, max(tokens, 1), size):
        part = hidden[start : start + size]
        out = logits[: len(part)]
        if hidden.dtype == torch.float32 or not hidden.is_cuda:
            torch.mm(part.float(), weight.float().T, out=out)
        else:
            torch.mm(part, weight.T, out_dtype=torch.float32, out=out)
        sums.append(nll(out, target[start : start + size], class_weight, rule))
    return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)


@triton.jit
def _scale_kernel(
    values_ptr,  # [count], multiplied in place
    factor_ptr,  # one number
    count,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + offsets, mask=offsets < count, other=0.0).to(tl.float32)
        values *= factor
        tl.store(values_ptr + offsets, values.to(values_ptr.dtype.element_ty), mask=offsets < count)


def scale_(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply contiguous values in place by a factor on their device; return them.

    By a factor of 1, which a loss has that is itself differentiated, nothing is read or written,
    and the host never waits to see it.
    """
    if values.numel():
        launch(
            _scale_kernel,
            (triton.cdiv(values.numel(), SCALE_BLOCK),),
            dict(values_ptr=values, factor_ptr=factor, count=values.numel()),
            dict(BLOCK=SCALE_BLOCK),
            dict(num_warps=8),
        )
    return values


def linear_nll_with_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    *,
    upstream_of: Callable[[torch.Tensor, slice], torch.Tensor],
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
    """Return the five sums [5, N] and the needed gradients of hidden, weight and bias.

    At least one gradient is needed. Temporary memory: the logits of a chunk in the inputs' dtype,
    to which they are rounded, and float32 sums of the gradients. The plan's block is the number of
    tokens in a chunk. ``upstream_of(sums, tokens)`` returns the derivative of the loss by a chunk's
    sums, float32 [5, T].
    """
    (chunk,) = plan.block
    sums = hidden.new_empty((SUMS, hidden.shape[0]), dtype=torch.float32)
    logits = hidden.new_empty((min(chunk, hidden.shape[0]), weight.shape[0]))

    def logit_gradient(tokens: slice, _: slice) -> torch.Tensor:
        out = logits[: tokens.stop - tokens.start]
        if bias is None:
            torch.mm(hidden[tokens], weight.T, out=out)
        else:
            torch.addmm(bias.to(out.dtype), hidden[tokens], weight.T, out=out)
        here = nll(out, target[tokens], class_weight, rule)
        sums[:, tokens] = here
        return nll_grad(
            upstream_of(here, tokens), here[MAX], out, target[tokens], class_weight, rule, out=out
        )

    block = chunk, weight.shape[0]
    return sums, accumulate_gradients(
        logit_gradient,
        hidden,
        weight,
        bias,
        needs=needs,
        block=block,
        ignored=target == rule.ignore_index,
    )
