"""Host time of calls on the triton backend, without a GPU: ``python bench/host_cost.py``.

What a call costs before the device begins: checks, plans, autograd and launches. A stand-in for the
CUDA driver lets kernels compile for Hopper and launch without a device; the tensors are on the CPU,
and so small that torch's own work on them is near nothing. Measured is the processor time of a call
in microseconds, the least of several repetitions, and the number of launches. Where Liger-Kernel is
installed, its loss runs in the same process. The results go to
bench/results/cpu-<name>-host-cost.json. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from environment import RESULTS, commit, cpu_name, now, slug, version, write
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

TARGET = GPUTarget("cuda", 90, 32)
launches = 0


class Utilities:
    """What the driver says of a device and of a loaded kernel."""

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 64, 0, 1024

    def unload_module(self, *_):
        pass

    def get_device_properties(self, device):
        return dict(
            max_shared_mem=232_448,
            multiprocessor_count=132,
            max_num_regs=65_536,
            warpSize=32,
            max_threads_per_block=1024,
        )

    def fill_tma_descriptor_tiled(self, *_):
        return 0

    fill_tma_descriptor = fill_tma_descriptor_tiled


class Launcher:
    """A launch with everything but the device: tensor descriptors are unpacked as for one."""

    def __init__(self, source, metadata) -> None:
        signature = dict(enumerate(source.signature.values()))
        descriptors = getattr(metadata, "tensordesc_meta", None)
        self.launch = nvidia.wrap_handle_tensordesc(lambda *_: None, signature, descriptors)

    def __call__(self, x, y, z, stream, function, *arguments):
        global launches
        launches += 1
        self.launch(x, y, z, stream, function, *arguments[:4], arguments[4:])


class Driver:
    """The stand-in for CUDA's driver."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = Utilities(), Launcher

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGET

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def is_active(self):
        return True

    def assemble_tensormap_to_arg(self, *arguments):
        return arguments

    def allocate_default_profile_scratch(self, *_):
        return None


def on_triton() -> None:
    """Let CPU tensors take the triton backend."""
    from perplexity import inputs, losses, statistics
    from perplexity.kernels import dispatch

    dispatch.LEAST_AHEAD = TOKENS
    triton.runtime.driver.set_active(Driver())
    for module in (inputs, losses, statistics):
        module.choose_backend = lambda backend, tensor: backend or "triton"


def measured(call: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Return the microseconds and the launches of a call."""
    global launches
    call()
    launches = 0
    call()
    count, best = launches, float("inf")
    for _ in range(repetitions):
        begin = time.process_time()
        for _ in range(100):
            call()
        best = min(best, (time.process_time() - begin) / 100)
    return dict(microseconds=best * 1e6, launches=count)


# Tokens of a chunk, vocabulary and width: small for torch's products on the CPU, and with rows of 16
# bytes, which the copy engine takes.
TOKENS, VOCABULARY, WIDTH = 8, 16, 8


def cases() -> dict[str, Callable[[], object]]:
    import perplexity

    def matrices(tokens: int):
        hidden = torch.randn(tokens, WIDTH).bfloat16()
        weight = torch.randn(VOCABULARY, WIDTH).bfloat16()
        return hidden, weight, torch.randint(VOCABULARY, (tokens,))

    def training(chunks: int) -> Callable[[], object]:
        hidden, weight, target = matrices(chunks * TOKENS)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        limit = 2 * VOCABULARY * TOKENS  # the logits of a chunk

        def step():
            perplexity.linear_cross_entropy(*leaves, target, memory_limit=limit).backward()
            leaves[0].grad = leaves[1].grad = None

        return step

    hidden, weight, target = matrices(TOKENS)
    found = {
        "token_nll": lambda: perplexity.token_nll(hidden, weight, target),
        "token_statistics": lambda: perplexity.token_statistics(hidden, weight, target),
        "linear_cross_entropy, backward, 1 chunk": training(1),
        "linear_cross_entropy, backward, 5 chunks": training(5),
    }
    if version("liger-kernel") is not None:
        found["Liger-Kernel, backward, 1 chunk"] = liger(*matrices(TOKENS))
    return found


def liger(hidden, weight, target) -> Callable[[], object]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    leaves, loss = (hidden.requires_grad_(), weight.requires_grad_()), None
    loss = LigerFusedLinearCrossEntropyLoss()

    def step():
        loss(leaves[1], leaves[0], target).backward()
        leaves[0].grad = leaves[1].grad = None

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"cpu-{slug(cpu_name())}-host-cost.json"
    )
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    on_triton()
    rows = {name: measured(call, options.repetitions) for name, call in cases().items()}
    for name, row in rows.items():
        print(f"{name:42} {row['microseconds']:8.0f} µs  {row['launches']:3.0f} launches")
    one, five = (rows[f"linear_cross_entropy, backward, {n} chunk{'s' * (n > 1)}"] for n in (1, 5))
    print(f"a further chunk {(five['microseconds'] - one['microseconds']) / 4:.0f} µs")
    results = dict(
        device=cpu_name(),
        torch=version("torch"),
        triton=version("triton"),
        liger=version("liger-kernel"),
        date=now(),
        commit=commit(),
        rows=rows,
    )
    write(results, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
