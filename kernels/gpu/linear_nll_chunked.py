"""The sums of ``linear_nll`` by way of the logits of some tokens at a time: the vendor's matrix product, then one read of it.

Where the fused kernel's own products are slow this is faster, though every logit goes to memory and back: no copy engine that
feeds the matrix unit (NVIDIA before Hopper, AMD). From Hopper on the fused kernel is taken: docs/performance.md has the sums.

Training is another matter. While the logits of a chunk are there they become their own gradient, in place: three products, the
least there can be, where a loss that is known before its backward (a sum or a mean) says what that gradient is.

Cost: 2·N·V·D operations; 4·N·V bytes written and read; temporary memory 4·T·V bytes for T tokens at a time, at most
``memory_limit``. With gradients 6·N·V·D operations, logits in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..chunks import accumulate_gradients
from ..dispatch import DEFAULT, PLAIN, Plan, Rule
from ..sums import MAX, SUMS
from .launch import Target, current_target
from .linear_nll import MEMORY_LIMIT, equal_chunk, linear_nll
from .nll import nll, nll_grad

CHUNKED_LIMIT = 256 << 20
LEAST_TOKENS = 128  # a product of fewer reads the whole weight for little work
# Every chunk reads and writes the float32 sums of the weight's gradient, 8·V·D bytes: with fewer tokens than these that costs
# more than the product it spares.
LEAST_TRAINED = 1024


def chunks_pay(target: Target, hidden: torch.Tensor, weight: torch.Tensor, bias, memory_limit: int) -> bool:
    """Whether the vendor's product and a read of its logits are the faster way: 16-bit inputs on a GPU without a copy engine
    (float32 ones need products that the vendor's library does not promise to make exactly), and memory for enough tokens."""
    engine = target.backend == "interpreter" or (target.backend == "cuda" and target.arch >= 90)
    enough = min(memory_limit, CHUNKED_LIMIT) >= 4 * LEAST_TOKENS * weight.shape[0]
    return not engine and hidden.element_size() == 2 and bias is None and enough and weight.shape[0] > 0


def linear_nll_by_policy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    kept: None = None,
) -> torch.Tensor:
    """Return what ``linear_nll`` does, by ``linear_nll_chunked`` where ``chunks_pay``. No plan for this backend keeps products."""
    if chunks_pay(current_target(), hidden, weight, bias, plan.memory_limit or CHUNKED_LIMIT):
        return linear_nll_chunked(hidden, weight, target, class_weight, rule, plan)
    return linear_nll(hidden, weight, bias, target, class_weight, rule, plan)


def linear_nll_chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
) -> torch.Tensor:
    """Return the five sums of every token, float32 [5, N], from hidden [N, D], weight [V, D], target int [N].

    The plan's ``memory_limit`` bounds the float32 logits that are held, in bytes, but for one token's.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    most = max(1, min(plan.memory_limit or CHUNKED_LIMIT, CHUNKED_LIMIT) // (4 * vocabulary))
    size = most // LEAST_TOKENS * LEAST_TOKENS or most
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


def training_chunk(
    target: Target, hidden: torch.Tensor, weight: torch.Tensor, rounded: bool, memory_limit: int = 0
) -> int:
    """How many tokens at a time ``linear_nll_with_gradients`` should take; 0 where recomputing logits is the better way.

    bfloat16 on NVIDIA, logits that may be ``rounded`` to it (float16 would lose gradients that a loss scale, known in the
    backward only, is to save), and memory for the logits of ``LEAST_TRAINED`` tokens, or of all.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    most = (memory_limit or MEMORY_LIMIT) // (hidden.element_size() * vocabulary) if vocabulary else 0
    if target.backend != "cuda" or hidden.dtype != torch.bfloat16 or not rounded or not tokens:
        return 0
    return equal_chunk(tokens, most) if most >= min(tokens, LEAST_TRAINED) else 0


def linear_nll_with_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    rule: Rule = PLAIN,
    *,
    upstream_of: Callable[[torch.Tensor, slice], torch.Tensor],
    chunk: int,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
    """The five sums [5, N], and the gradients of hidden, weight and bias where ``needs`` says so (one at least).

    ``upstream_of(sums, tokens)`` is the derivative of the loss, float32 [5, T], from the sums [5, T] of a slice of ``chunk``
    tokens. Temporary memory: the logits of a chunk, in the inputs' dtype, which is what they are rounded to; float32 sums of
    the gradients besides.
    """
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
        return nll_grad(upstream_of(here, tokens), here[MAX], out, target[tokens], class_weight, rule, out=out)

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
