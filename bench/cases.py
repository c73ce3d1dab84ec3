"""Cases of the benchmarks: inputs, least work, and one function a provider (this library, a peer).

The results of this library are checked here against plain PyTorch in float64.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from perplexity import (
    cross_entropy,
    linear_cross_entropy,
    linear_kl_divergence,
    token_nll,
    token_statistics,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PRODUCT_BYTES = 1 << 30  # of logits that the bare products hold at a time: N × V may not fit
PACKAGES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}


def ours(function: Callable) -> dict[str, Callable]:
    return {"ours": function, "ours_fused": partial(function, memory_limit=8 << 20)}


def wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def plain_logits_nll(logits: Tensor, t: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(wide(logits), t, reduction=reduction)


def plain_nll(x: Tensor, w: Tensor, t: Tensor, reduction: str) -> Tensor:
    return plain_logits_nll(F.linear(x, w), t, reduction)


def plain_statistics(x: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    z = wide(F.linear(x, w))
    logsumexp, at_target = z.logsumexp(-1), z.gather(1, t[:, None])
    entropy = logsumexp - (z.softmax(-1) * z).sum(-1)
    return logsumexp - at_target[:, 0], logsumexp, entropy, (z > at_target).sum(-1), z.argmax(-1)


def plain_kl(x_p: Tensor, w_p: Tensor, x_q: Tensor, w_q: Tensor) -> Tensor:
    p, q = (wide(F.linear(x, w)).log_softmax(-1) for x, w in ((x_p, w_p), (x_q, w_q)))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@cache
def compiled(function: Callable) -> Callable:
    # Compiled for each shape by itself, as in training.
    return torch.compile(function, dynamic=False)


def plain(function: Callable, *options) -> dict[str, Callable]:
    return {
        "torch": lambda *inputs: function(*inputs, *options),
        "torch_compile": lambda *inputs: compiled(function)(*inputs, *options),
    }


@cache
def liger(loss: str, reduction: str) -> Callable:
    return getattr(importlib.import_module("liger_kernel.transformers"), loss)(reduction=reduction)


def cce(x: Tensor, w: Tensor, t: Tensor, reduction: str) -> Tensor:
    # The default implementation skips blocks with small gradients: nearly all of random logits.
    implementation = "cce" if x.is_cuda else "torch_compile"
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return function(x, w, t, reduction=reduction, impl=implementation)


def torch_linear(x: Tensor, w: Tensor, t: Tensor, reduction: str) -> Tensor:
    """Return PyTorch's chunked loss; without options PyTorch would take its plain path."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, w, t, reduction=reduction, options=options)


def linear_peers(reduction: str) -> dict[str, Callable]:
    return plain(plain_nll, reduction) | {
        "liger": lambda x, w, t: liger("LigerFusedLinearCrossEntropyLoss", reduction)(w, x, t),
        "cce": partial(cce, reduction=reduction),
        "torch_linear": partial(torch_linear, reduction=reduction),
    }


def logits_peers(reduction: str) -> dict[str, Callable]:
    # Liger overwrites the logits with their gradient: every provider gets inputs of its own.
    peer = {"liger": lambda logits, t: liger("LigerCrossEntropyLoss", reduction)(logits, t)}
    return plain(plain_logits_nll, reduction) | peer


def product_chunks(x: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of tokens with their rows of x @ w.T, all in one buffer."""
    tokens = max(PRODUCT_BYTES // (w.shape[0] * x.element_size()), 1)
    tokens = min(1 << (tokens.bit_length() - 1), x.shape[0])  # a power of 2 suits every tile
    buffer = x.new_empty(tokens, w.shape[0])
    for start in range(0, x.shape[0], tokens):
        part = x[start : start + tokens]
        yield slice(start, start + tokens), torch.mm(part, w.T, out=buffer[: len(part)])


@torch.no_grad()
def products(*inputs: Tensor) -> None:
    for x, w in zip(inputs[0::2], inputs[1::2], strict=False):
        for _ in product_chunks(x, w):
            pass


@torch.no_grad()
def three_products(x: Tensor, w: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_w = torch.empty_like(x), torch.zeros_like(w)
    for rows, z in product_chunks(x, w):
        torch.mm(z, w, out=grad_x[rows])
        grad_w.addmm_(z.T, x[rows])
    return grad_x, grad_w


def gradients(losses: dict[str, Callable]) -> dict[str, Callable]:
    def call(loss: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            loss(*inputs), [tensor for tensor in inputs if tensor.requires_grad]
        )

    return {provider: partial(call, loss) for provider, loss in losses.items()}


@dataclass(frozen=True)
class Case:
    """Operation that is measured, with its providers, inputs and least work.

    Attributes:
        providers: Functions of the inputs, by the name of the provider.
        operations: The least number of floating-point operations over N·V·D.
        logit_moves: Reads and writes of N × V logits, where the inputs are logits.
        heads: Pairs of hidden states and weight among the inputs; 0 for logits.
        trains: The inputs need gradients.
        nll: The output, or its first part, is the NLL of every token.
    """

    providers: dict[str, Callable]
    operations: int = 0
    logit_moves: int = 0
    heads: int = 1
    trains: bool = False
    nll: bool = False

    def work(self, n: int, d: int | None, v: int, dtype: torch.dtype) -> int:
        """Return the least number of operations, or of bytes moved where the inputs are logits."""
        return (
            self.operations * n * v * d if self.heads else self.logit_moves * n * v * dtype.itemsize
        )

    def inputs(
        self, n: int, d: int | None, v: int, dtype: torch.dtype, device: str
    ) -> list[Tensor]:
        """Draw inputs with logits of standard deviation 1, the same numbers in each call."""
        options = dict(generator=torch.Generator(device).manual_seed(0), device=device)
        shapes = [(n, d), (v, d)] * self.heads or [(n, v)]
        tensors = [torch.randn(shape, dtype=dtype, **options) for shape in shapes]
        for weight in tensors[1::2]:
            weight.mul_(d**-0.5)
        for tensor in tensors:
            tensor.requires_grad_(self.trains)
        return tensors if self.heads == 2 else [*tensors, torch.randint(v, (n,), **options)]


def per_token_cross_entropy(logits: Tensor, t: Tensor) -> Tensor:
    return cross_entropy(logits, t, reduction="none")


bare, bare_train = {"cublas": products}, {"cublas": three_products}
CASES = {
    "linear_nll_forward": Case(
        ours(token_nll) | bare | linear_peers("none"), operations=2, nll=True
    ),
    "linear_nll_train": Case(
        gradients(ours(linear_cross_entropy)) | bare_train | gradients(linear_peers("mean")),
        operations=6,
        trains=True,
    ),
    "token_statistics": Case(
        ours(token_statistics) | bare | plain(plain_statistics), operations=2, nll=True
    ),
    "linear_kl": Case(ours(linear_kl_divergence) | bare | plain(plain_kl), operations=4, heads=2),
    "nll_logits": Case(
        {"ours": per_token_cross_entropy} | logits_peers("none"), logit_moves=1, heads=0, nll=True
    ),
    # The forward reads the logits, the backward reads them again and writes the gradient.
    "nll_logits_train": Case(
        gradients({"ours": cross_entropy} | logits_peers("mean")),
        logit_moves=3,
        heads=0,
        trains=True,
    ),
}
PROVIDERS = tuple(CASES["linear_nll_forward"].providers)


def failed_check(device: str, dtype: torch.dtype) -> str | None:
    """Compare all results of this library with plain PyTorch in float64, on small shapes.

    Returns:
        A line on the first result that is off; None where there is none.
    """
    for size, (name, case) in itertools.product(
        ((300, 123, 5003), (512, 256, 8192)), CASES.items()
    ):
        # Relative to the largest value. Float32 arithmetic is off by less than 1e-4; gradients in
        # 16 bits are rounded before the product and after.
        tolerance = 1e-4 if not case.trains else 1e-3 if dtype == torch.float32 else 2e-2
        inputs = case.inputs(*size, dtype, device)
        doubled = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
        exact = case.providers["torch"](*doubled)
        for provider in ("ours", "ours_fused"):
            if provider in case.providers:
                pairs = [(case.providers[provider](*inputs), exact)]
                if isinstance(exact, tuple):
                    pairs = [
                        pair for pair in zip(*pairs[0], strict=True) if pair[0].is_floating_point()
                    ]
                for index, (got, expected) in enumerate(pairs):
                    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
                    if not error <= tolerance:
                        where = f"{name} {provider}, output {index}, (n, d, v) = {size}, {dtype}"
                        return (
                            f"{where}: expected a relative error of at most {tolerance:.0e}, "
                            f"got {error:.1e}"
                        )
    return None


@torch.no_grad()
def max_abs_error(nll: Tensor, inputs: list[Tensor]) -> float:
    """Return the largest error of NLL [N] against float64, over at most 256 tokens."""
    tokens = torch.linspace(0, len(nll) - 1, min(len(nll), 256)).long().to(nll.device)
    first, target = inputs[0][tokens].double(), inputs[-1][tokens]
    if len(inputs) == 2:
        exact = first.logsumexp(-1) - first.gather(1, target[:, None])[:, 0]
    else:
        blocks = [(first @ block.double().T).logsumexp(-1) for block in inputs[1].split(8192)]
        exact = torch.stack(blocks).logsumexp(0) - (first * inputs[1][target].double()).sum(-1)
    return (nll[tokens].double() - exact).abs().max().item()
