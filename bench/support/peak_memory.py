"""Peak extra memory of calls: ``python peak_memory.py DTYPE NAME,N,V,D,LIMIT ...`` prints bytes.

The figure is the rise of the high-water mark of resident memory over a call, without the call's
results. A tiny call comes first, which loads libraries and starts threads. The lesser of two calls
counts: pages of code that the system dropped for another process are read again only once. Linux
only. LIMIT 0 is the default.
"""

import ctypes
import sys

import torch

import perplexity


def high_water() -> int:
    """Return the high-water mark of this process's resident memory, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def reset_high_water() -> None:
    """Set the high-water mark to the memory in use."""
    # Freed blocks that the allocator keeps would hide the memory of a call.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def forward(h, w, t, limit):
    return perplexity.token_nll(h, w, t, memory_limit=limit)


def train(h, w, t, limit, **options):
    leaves = [tensor.detach().requires_grad_() for tensor in (h, w)]
    loss = perplexity.linear_cross_entropy(*leaves, t, memory_limit=limit, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


CALLS = {
    "forward": forward,
    "statistics": lambda h, w, t, limit: perplexity.token_statistics(h, w, t, memory_limit=limit),
    "divergence": lambda h, w, t, limit: perplexity.linear_kl_divergence(
        h, w, h.roll(1, 0), w, memory_limit=limit
    ),
    "train": train,
    "train_everything": lambda h, w, t, limit: train(
        h, w, t, limit, softcap=30.0, logit_scale=0.5, label_smoothing=0.1, z_loss=0.01
    ),
    "rows": lambda h, w, t, limit: perplexity.cross_entropy(
        w.T, torch.arange(w.shape[1]), memory_limit=limit
    ),
}


def measure(name: str, dtype: torch.dtype, N: int, V: int, D: int, limit: int | None) -> int:
    def inputs(N, V, D):
        return (
            torch.randn(N, D).to(dtype),
            (torch.randn(V, D) / D**0.5).to(dtype),
            torch.randint(0, V, (N,)),
        )

    CALLS[name](*inputs(64, 600, D), limit)
    arguments = inputs(N, V, D)
    rises = []
    for _ in range(2):
        reset_high_water()
        before = high_water()
        result = CALLS[name](*arguments, limit)
        results = result if isinstance(result, tuple) else (result,)
        kept = sum(tensor.nbytes for tensor in results)
        rises.append(high_water() - before - kept)
        del result, results
    return min(rises)


def small_pages() -> None:
    """Disable huge pages, with which the system would round memory up to 2 MiB."""
    PR_SET_THP_DISABLE = 41
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


if __name__ == "__main__":
    small_pages()
    dtype, *cases = sys.argv[1:]
    for case in cases:
        name, *numbers = case.split(",")
        N, V, D, limit = map(int, numbers)
        print(measure(name, getattr(torch, dtype), N, V, D, limit or None), flush=True)
