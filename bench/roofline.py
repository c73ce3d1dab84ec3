"""``python bench/roofline.py``: what the forward kernels should cost on an H200, from what they compile to; nothing is measured.

Compiles the launches ahead of time for sm_90, counts registers, shared memory and instructions, and predicts each case's time
beside the bfloat16 product alone. Written to bench/results/roofline-h200.json and into docs/performance.md.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from environment import HERE, RESULTS, now, write
from triton.backends.compiler import GPUTarget

from perplexity.kernels.compile_check import Case, launches, nvidia_resources
from perplexity.kernels.fingerprint import kernels_hash
from perplexity.kernels.linear_nll import SPAN

# Product and copy (read plus written) through PyTorch on one; multiprocessors, their clock under load and lanes by its sheet.
DEVICE = dict(name="H200", product_flops=790e12, copy_bytes=4.3e12, multiprocessors=132, clock=1.755e9, lanes=128)
TOKENS, SHAPES = (1024, 8192, 32768), ((2048, 32768), (2304, 256000), (4096, 128256), (8192, 128256))  # D, V
KERNELS = {"token_nll": "linear_nll", "token_statistics": "linear_statistics"}
BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"


def compiled(operation: str) -> dict:
    """What the sweep over the vocabulary takes: tile, registers, bytes, and instructions a thread executes for a tile's sums."""
    case = Case(operation, "sm_90", "bfloat16", "aligned", frozenset())
    built, options = next(pair for pair in launches(case) if pair[0].fn.__name__ == "_partials_kernel")
    found = triton.compile(built, target=GPUTarget("cuda", 90, 32), options=options)
    registers, spilled = nvidia_resources(found.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    constants = {built.fn.arg_names[key[0]]: value for key, value in built.constants.items()}
    n, v, d = (constants[f"BLOCK_{axis}"] for axis in "NVD")
    return dict(
        tile=[n, v, d],
        warps=options["num_warps"],
        stages=options["num_stages"],
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=found.metadata.shared,
        wgmma=found.asm["ptx"].count("wgmma.mma_async"),
        tma_loads=found.asm["ptx"].count("cp.async.bulk.tensor"),
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[@A-Z]", text)),  # of the whole program: an upper bound
        logits_a_thread=n * v // (32 * options["num_warps"]),
        bytes_a_step=2 * (n + v) * d,
        flops_a_step=2 * n * v * d,
    )


def predicted(kernel: dict, n: int, d: int, v: int) -> dict:
    """Milliseconds of the product alone, and times it: the fused sweep, and chunks of float32 logits through memory."""
    product = 2 * n * v * d / DEVICE["product_flops"]
    programs = math.ceil(n / kernel["tile"][0]) * math.ceil(v / SPAN)
    busy = programs / (math.ceil(programs / DEVICE["multiprocessors"]) * DEVICE["multiprocessors"])
    # Hopper's sums wait for the tile's products and the next tile's for them; only the reads run on.
    issued = n * v * kernel["instructions"] / kernel["logits_a_thread"]
    sums = issued / (DEVICE["multiprocessors"] * DEVICE["lanes"] * DEVICE["clock"])
    moved = 8 * n * v / DEVICE["copy_bytes"]
    return dict(
        n=n, d=d, v=v, product_ms=1e3 * product, busy=busy, sums=sums / product,
        fused=(1 + sums / product) / busy, chunked=1 + moved / product,
    )  # fmt: skip


def markdown(results: dict) -> str:
    lines = [
        "| kernel | tile N × V × D | registers | spilled | shared bytes | wgmma | TMA loads | instructions a tile and thread |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, kernel in results["kernels"].items():
        tile = " × ".join(map(str, kernel["tile"]))
        lines.append(
            f"| `{name}` | {tile} | {kernel['registers']} | {kernel['spilled_bytes']} | {kernel['shared_bytes']:,} | "
            f"{kernel['wgmma']} | {kernel['tma_loads']} | {kernel['instructions']:,} |"
        )
    lines += ["", "| D | V | N | product ms | busy | fused: sums | fused | statistics | chunked |", "| ---: " * 9 + "|"]
    for row, statistics in zip(results["token_nll"], results["token_statistics"], strict=True):
        lines.append(
            f"| {row['d']:,} | {row['v']:,} | {row['n']:,} | {row['product_ms']:.3f} | {row['busy']:.0%} | "
            f"{row['sums']:.1%} | {row['fused']:.2f} | {statistics['fused']:.2f} | {row['chunked']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    kernels = {name: compiled(operation) for name, operation in KERNELS.items()}
    results = dict(
        predicted_for=DEVICE, triton=triton.__version__, date=now(), kernels_hash=kernels_hash(), kernels=kernels
    )
    for name, kernel in kernels.items():
        results[name] = [predicted(kernel, n, d, v) for d, v in SHAPES for n in TOKENS]
    write(results, RESULTS / "roofline-h200.json")
    path = HERE.parent / "docs" / "performance.md"
    text = path.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{markdown(results)}{END}{after}")


if __name__ == "__main__":
    main()
