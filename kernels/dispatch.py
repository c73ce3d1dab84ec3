"""The choice of a call's way: what is computed of its logits (``Rule``), and how (``Plan``).

``plan`` chooses once a call.

**The backend**, where the caller names none (``default_backend``):

================================  =========  =====================================================
tensors                           backend    why
================================  =========  =====================================================
on a GPU with a matrix unit,      triton     its kernels hold no logits
triton installed, not float64
float64, on a CPU, without        torch      no kernel has float64; the interpreter is for tests;
triton, or on a GPU before                   without matrix instructions Triton's products are slow
compute capability 8.0
class probabilities as targets    torch      no kernel reads a weight of each logit
================================  =========  =====================================================

**The way.** The first row that fits is taken; "sum, mean" is a loss of one number from class
indices, unsharded.

=======  ===================================  =======  ==========================================
backend  the call                             way      why
=======  ===================================  =======  ==========================================
torch    the weight needs no gradient         fused    nothing to keep
torch    traced by torch.compile, or under    fused    a second backward may follow unseen
         torch.func
torch    16-bit inputs whose products are     fused    products are wider than the gradient that
         not rounded to 16 bits                        would hold them
torch    any other training step              kept     three matrix products, not four
triton   one value a token                    fused    the same bits in every batch: the vendor's
                                                       product is another for other sizes
triton   traced, under torch.func, or         open     sizes and device are known when the
         tensors without data                          operator runs: ``settled`` there
triton   training, sum or mean, bfloat16 on   ahead    three matrix products; float16 gradients
         NVIDIA, logits that may be rounded,           would need the loss scale, which only the
         memory for 1,024 tokens' logits or            backward knows
         for all
triton   16-bit inputs, no bias, a GPU        chunked  the vendor's product is faster there than
         without a copy engine (NVIDIA                 the kernel's own
         before Hopper, AMD), memory for 128
         tokens' logits
triton   any other call                       fused    no logit goes to memory
=======  ===================================  =======  ==========================================

So a bfloat16 mean on an A100 goes *ahead* while training, and *chunked* without gradients; its
NLL of every token, and a mean in float32, is *fused*. Statistics (ranks), divergences and losses of
existing logits have one way, fused.

- **fused**: logits are a block in a CPU's caches or a tile in a GPU's registers; a backward
  computes them again.
- **kept**: as fused, but the products of the first D tokens stay in the memory of the weight's
  gradient.
- **chunked**: the logits of some tokens at a time go through memory: the vendor's product, then one
  read.
- **ahead**: gradients are computed with the loss, from a chunk's logits while they are in memory.

**Blocks.** On a CPU they follow from the caches and the limit (``blocks.py``). On a GPU a tile
follows from the device, the dtype and the alignment (``gpu/logit_tile.py``), and is read through
tensor descriptors where it is ``describable``.

**Limits** of temporary memory, where the caller names none, are the constants below.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import multiplies_16_bits
from .chunks import equal_chunk
from .devices import Target, why_not

FUSED, KEPT, CHUNKED, AHEAD, OPEN = "fused", "kept", "chunked", "ahead", "open"

# Bytes of temporary memory of the torch backend: from hidden states (kept: the backward's), and
# from existing logits.
FORWARD_LIMIT, BACKWARD_LIMIT, ROWS_LIMIT = 12 << 20, 16 << 20, 4 << 20
# Of triton; the logits of a chunk take at most the second.
TRITON_LIMIT, CHUNKED_LIMIT = 512 << 20, 256 << 20
LEAST_CHUNKED = 128  # tokens: a product of fewer reads the whole weight for little work
# Tokens. Every chunk reads and writes the float32 sums of the weight's gradient, 8·V·D bytes: with
# fewer tokens that costs more than the product it saves.
LEAST_AHEAD = 1024


class Rule(NamedTuple):
    """Definition of the logits, of the scored tokens, and of the needed sums (``sums.py``).

    The logits are softcap · tanh(logit_scale · (hidden @ weightᵀ + bias) / softcap). A sum that is
    not needed may have any value.
    """

    ignore_index: int = -100
    softcap: float | None = None
    logit_scale: float = 1.0
    with_logit_sum: bool = False
    with_exp_shift: bool = False


class Plan(NamedTuple):
    """Choice of how a call is computed.

    No plan asks a backend for what it cannot do (rounding, keeping products).
    """

    backend: str = "torch"
    way: str = FUSED
    # Products of 16-bit inputs may be rounded to their dtype where that is faster.
    rounded: bool = False
    # Kept: tokens and vocabulary rows at a time; ahead: tokens at a time.
    block: tuple[int, ...] = ()
    memory_limit: int = 0  # bytes of temporary memory; 0: the default of each function


# Defaults of the backends' functions.
PLAIN, DEFAULT = Rule(), Plan()


def triton_available() -> bool:
    """Return whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def default_backend(tensor: Tensor) -> str:
    """Return the backend for hidden states or logits where the caller names none."""
    if not tensor.is_cuda or tensor.dtype == torch.float64 or not triton_available():
        return "torch"
    return "torch" if why_not(tensor.device) else "triton"


def plan(
    rule: Rule,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    *,
    backend: str,
    rounded: bool = False,
    memory_limit: int = 0,
    total: bool = False,
    per_token: bool = False,
) -> Plan:
    """Choose the way of a call; the table above says which and why.

    Args:
        rule: Logits and sums of the call.
        hidden: Hidden states [N, D].
        weight: Vocabulary matrix [V, D].
        bias: Bias [V] or None.
        class_weight: Weights of ``LOGIT_SUM``: [V], or [N, V] of class probabilities.
        backend: "torch" or "triton".
        rounded: Whether products may be rounded to 16 bits. Default: False.
        memory_limit: Temporary memory in bytes. Default: 0, the default of each function.
        total: Whether the caller needs one number, a sum or a mean from class indices and a whole
            vocabulary, and can compute its gradients with it. Default: False.
        per_token: Whether the caller returns values of tokens: with triton they have the same bits
            in every batch. Default: False.
    """
    fused = Plan(backend, FUSED, rounded, memory_limit=memory_limit)
    trains = torch.is_grad_enabled()
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if backend == "torch":
        if transformed or not (
            trains and weight.requires_grad and _keeps_products(hidden, rounded)
        ):
            return fused
        from .cpu.blockwise import kept_block

        block = kept_block(
            hidden, weight, class_weight, rule, rounded=rounded, memory_limit=memory_limit
        )
        return fused._replace(way=KEPT, block=block)
    if per_token:
        return fused
    if transformed or _without_data(hidden, weight):
        return fused._replace(way=OPEN)
    from .gpu.launch import target_of

    target = target_of(hidden)
    if (
        total
        and trains
        and any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    ):
        chunk = ahead_chunk(target, hidden, weight, rounded, memory_limit)
        if chunk:
            return fused._replace(way=AHEAD, block=(chunk,))
    return (
        fused._replace(way=CHUNKED)
        if chunks_pay(target, hidden, weight, bias, memory_limit)
        else fused
    )


def settled(
    plan: Plan, target: Target, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Plan:
    """Return an ``open`` plan with its way, now that the tensors have data."""
    return plan._replace(
        way=CHUNKED if chunks_pay(target, hidden, weight, bias, plan.memory_limit) else FUSED
    )


def _keeps_products(hidden: Tensor, rounded: bool) -> bool:
    """Return whether products have the dtype of the weight's gradient, which is to hold them."""
    narrow = hidden.dtype in (torch.float16, torch.bfloat16)
    return len(hidden) > 0 and (
        not narrow or (rounded and multiplies_16_bits(hidden.dtype, hidden.device))
    )


def _without_data(*tensors: Tensor) -> bool:
    """Return whether tensors have no data, or operations on them are being traced."""
    plain = all(
        type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta for tensor in tensors
    )
    if plain and not torch._C._len_torch_dispatch_stack():
        return False
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    fakes = torch._guards.detect_fake_mode(tensors)
    return proxies is not None or fakes is not None or any(tensor.is_meta for tensor in tensors)


def ahead_chunk(
    target: Target, hidden: Tensor, weight: Tensor, rounded: bool, memory_limit: int = 0
) -> int:
    """Return the tokens of a chunk whose gradients are computed with the loss; 0 for the backward.

    That is for bfloat16 on NVIDIA, logits that may be ``rounded`` to it, and memory for the logits
    of ``LEAST_AHEAD`` tokens, or of all. float16 would lose gradients that the loss scale saves,
    which only the backward knows.

    All tokens are one chunk wherever that takes no more memory: the several chunks add to sums of
    the weight's gradient in float32, 4·V·D bytes, which hold the logits of 2·D tokens.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    most = (
        (memory_limit or TRITON_LIMIT) // (hidden.element_size() * vocabulary) if vocabulary else 0
    )
    if target.backend != "cuda" or hidden.dtype != torch.bfloat16 or not rounded or not tokens:
        return 0
    if most < min(tokens, LEAST_AHEAD):
        return 0
    chunk = equal_chunk(tokens, most)
    spared = 2 * hidden.shape[1] if weight.requires_grad else 0
    return tokens if chunk < tokens <= chunk + spared else chunk


def chunks_pay(
    target: Target, hidden: Tensor, weight: Tensor, bias: Tensor | None, memory_limit: int = 0
) -> bool:
    """Return whether the vendor's product and a read of its logits beat the fused kernel.

    They are for 16-bit inputs on a GPU without a copy engine, with memory for enough tokens. The
    vendor's library does not promise exact products of float32 inputs.
    """
    limit = min(memory_limit or CHUNKED_LIMIT, CHUNKED_LIMIT)
    enough = limit >= 4 * LEAST_CHUNKED * weight.shape[0]
    narrow = hidden.element_size() == 2
    return not target.copy_engine and narrow and bias is None and enough and weight.shape[0] > 0


def describable(target: Target, matrix: Tensor) -> bool:
    """Return whether the copy engine can read tiles of a matrix.

    It takes 16-bit elements, in rows that start at multiples of 16 bytes.
    """
    row_bytes = matrix.stride(0) * matrix.element_size()
    return (
        target.copy_engine
        and matrix.element_size() == 2
        and matrix.numel() > 0
        and matrix.stride(1) == 1
        and row_bytes % 16 == 0
        and 0 < row_bytes < 2**40
        and matrix.data_ptr() % 16 == 0
    )
