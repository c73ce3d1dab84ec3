"""Prediction of the kernels' time on an H200, from compiled code: ``python bench/roofline.py``.

Nothing is measured. The launches are compiled ahead of time for sm_90. From registers, shared
memory and instructions follows the time of each case as a multiple of the bfloat16 product alone.
The results go to bench/results/roofline-h200.json and into docs/performance.md.
"""

from __future__ import annotations

import math
import re

import torch
import triton
from environment import HERE, RESULTS, now, write
from triton.backends.compiler import GPUTarget

from perplexity.kernels.compile_check import (
    Case,
    launches,
    nvidia_resources,
    programs_a_multiprocessor,
)
from perplexity.kernels.compile_cost import cost, sass
from perplexity.kernels.dispatch import ahead_chunk
from perplexity.kernels.fingerprint import kernels_hash
from perplexity.kernels.gpu.launch import Target
from perplexity.kernels.gpu.linear_nll import SPAN

# Product and copy (read plus written) are measured through PyTorch. Multiprocessors, lanes and the
# clock under load are from the data sheet.
DEVICE = dict(
    name="H200",
    product_flops=790e12,
    copy_bytes=4.3e12,
    multiprocessors=132,
    clock=1.755e9,
    lanes=128,
)
# D, V
TOKENS, SHAPES = (
    (1024, 8192, 32768),
    ((2048, 32768), (2304, 256000), (4096, 128256), (8192, 128256)),
)
KERNELS = {
    "token_nll": "linear_nll",
    "token_statistics": "linear_statistics",
    "linear_kl_divergence": "linear_kl",
}
BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"
TRAIN_BEGIN, TRAIN_END = "<!-- training roofline: begin -->", "<!-- training roofline: end -->"
# Bytes of a bfloat16 logit that are moved: read, and for the gradient written in its place.
ROW_BYTES = {"_nll_kernel": 2, "_nll_grad_kernel": 4}


def row_kernels() -> dict[str, dict]:
    """Count a thread's instructions a logit in the kernels over logits.

    Instructions are those of the longest loop, which is over a row. The memory allows as many as
    are executed in the time that the row's bytes take.
    """
    kernels = {}
    for built, options in launches(Case("nll", "sm_90", "bfloat16", "aligned", frozenset())):
        name = built.fn.__name__
        kernel = triton.compile(built, target=GPUTarget("cuda", 90, 32), options=options)
        instructions = sass(kernel.asm["cubin"])
        jumps = [
            (address, re.search(r"BRA\S*\s+(?:\S+,\s*)?(0x[0-9a-f]+)", text))
            for address, text in instructions
        ]
        loops = [
            (int(jump[1], 16), address)
            for address, jump in jumps
            if jump and int(jump[1], 16) < address
        ]
        body = max(
            sum(first <= address <= last for address, _ in instructions) for first, last in loops
        )
        block = next(
            value
            for key, value in built.constants.items()
            if built.fn.arg_names[key[0]] == "BLOCK_V"
        )
        per_logit = body / (block // (32 * options["num_warps"]))
        lanes = DEVICE["multiprocessors"] * DEVICE["lanes"] * DEVICE["clock"]
        registers, spilled = nvidia_resources(kernel.asm["cubin"])
        bytes_a_logit = ROW_BYTES[name]
        kernels[name.strip("_")] = dict(
            registers=registers,
            spilled_bytes=spilled,
            instructions_a_logit=per_logit,
            bytes_a_logit=bytes_a_logit,
            instructions_the_memory_allows=bytes_a_logit / DEVICE["copy_bytes"] * lanes,
        )
    return kernels


def trained(kernel: dict, n: int, d: int, v: int) -> dict:
    """Predict a training step as a multiple of its three products alone.

    ``ahead``: gradients are made with the loss. ``recomputed``: the backward computes the logits
    again. Time for memory is added to that of the products, as if the two never overlapped.
    """
    hidden, weight = (torch.empty(rows, d, device="meta", dtype=torch.bfloat16) for rows in (n, v))
    chunk = ahead_chunk(Target("cuda", 90), hidden, weight.requires_grad_(), True)
    chunks = math.ceil(n / chunk)
    forward = predicted(kernel, n, d, v)
    product = forward["product_ms"] / 1e3
    # Bytes: logits are written, read for the sums, read again and overwritten by their gradient.
    logits = 8 * n * v
    # Bytes of the weight gradient's float32 sums: written, added to by further chunks, to 16 bits.
    sums = (8 * chunks + 2) * v * d if chunks > 1 else 0
    recomputed = 2 * forward["fused"] + 2 + 2 * n * v / DEVICE["copy_bytes"] / product
    return dict(
        n=n,
        d=d,
        v=v,
        products_ms=3e3 * product,
        chunk=chunk,
        logits=logits / DEVICE["copy_bytes"] / product / 3,
        weight_sums=sums / DEVICE["copy_bytes"] / product / 3,
        ahead=1 + (logits + sums) / DEVICE["copy_bytes"] / product / 3,
        recomputed=recomputed / 3,
    )


def compiled(operation: str) -> dict:
    """Compile the sweep over the vocabulary; return its tile, registers, bytes and instructions."""
    case = Case(operation, "sm_90", "bfloat16", "aligned", frozenset())
    built, options = next(
        pair
        for pair in launches(case)
        if pair[0].fn.__name__ in ("_partials_kernel", "_kl_partials_kernel")
    )
    kernel = triton.compile(built, target=GPUTarget("cuda", 90, 32), options=options)
    registers, spilled = nvidia_resources(kernel.asm["cubin"])
    constants = {built.fn.arg_names[key[0]]: value for key, value in built.constants.items()}
    n, v, d = (constants[f"BLOCK_{axis}"] for axis in "NVD")
    return dict(
        tile=[n, v, d],
        warps=options["num_warps"],
        stages=options["num_stages"],
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=kernel.metadata.shared,
        wgmma=kernel.asm["ptx"].count("wgmma.mma_async"),
        tma_loads=kernel.asm["ptx"].count("cp.async.bulk.tensor"),
        # Of a tile without the target of a token: few tiles hold one.
        instructions=cost(kernel.asm["cubin"], 1, 0).tile,
        logits_a_thread=n * v // (32 * options["num_warps"]),
        bytes_a_step=2 * (n + v) * d,
        flops_a_step=2 * n * v * d,
        products=2 if operation == "linear_kl" else 1,
        programs=programs_a_multiprocessor(
            "sm_90", registers, kernel.metadata.shared, options["num_warps"]
        ),
    )


def predicted(kernel: dict, n: int, d: int, v: int) -> dict:
    """Predict a forward as a multiple of its products alone, whose milliseconds are returned, too.

    ``fused``: the sweep over the vocabulary. ``chunked``: chunks of float32 logits through memory.
    """
    product = kernel["products"] * 2 * n * v * d / DEVICE["product_flops"]
    programs = math.ceil(n / kernel["tile"][0]) * math.ceil(v / SPAN)
    busy = programs / (math.ceil(programs / DEVICE["multiprocessors"]) * DEVICE["multiprocessors"])
    # On Hopper the sums wait for a tile's products, and the next products for the sums. Only reads
    # overlap.
    issued = n * v * kernel["instructions"] / kernel["logits_a_thread"]
    sums = issued / (DEVICE["multiprocessors"] * DEVICE["lanes"] * DEVICE["clock"])
    moved = 8 * n * v / DEVICE["copy_bytes"]
    return dict(
        n=n,
        d=d,
        v=v,
        product_ms=1e3 * product,
        busy=busy,
        sums=sums / product,
        fused=(1 + sums / product) / busy,
        chunked=1 + moved / product,
    )


def markdown(results: dict) -> str:
    lines = [
        "| kernel | tile N × V × D | registers | spilled | shared bytes | programs | wgmma "
        "| TMA loads | instructions a tile and thread |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, kernel in results["kernels"].items():
        tile = " × ".join(map(str, kernel["tile"]))
        lines.append(
            f"| `{name}` | {tile} | {kernel['registers']} | {kernel['spilled_bytes']} | "
            f"{kernel['shared_bytes']:,} | {kernel['programs']} | {kernel['wgmma']} | "
            f"{kernel['tma_loads']} | {kernel['instructions']:,} |"
        )
    lines += [
        "",
        "| D | V | N | product ms | busy | fused: sums | fused | statistics | divergence "
        "| chunked |",
        "| ---: " * 10 + "|",
    ]
    for row, statistics, divergence in zip(*(results[name] for name in KERNELS), strict=True):
        lines.append(
            f"| {row['d']:,} | {row['v']:,} | {row['n']:,} | {row['product_ms']:.3f} | "
            f"{row['busy']:.0%} | {row['sums']:.1%} | {row['fused']:.2f} | "
            f"{statistics['fused']:.2f} | "
            f"{divergence['fused']:.2f} | {row['chunked']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def training_markdown(results: dict) -> str:
    lines = [
        "| D | V | N | three products ms | chunk | logits | weight's sums | made ahead "
        "| recomputed |",
        "| ---: " * 9 + "|",
    ]
    for row in results["training"]:
        lines.append(
            f"| {row['d']:,} | {row['v']:,} | {row['n']:,} | {row['products_ms']:.3f} | "
            f"{row['chunk']:,} | {row['logits']:.1%} | {row['weight_sums']:.1%} | "
            f"{row['ahead']:.2f} | {row['recomputed']:.2f} |"
        )
    lines += [
        "",
        "| kernel | registers | spilled | instructions a logit | the memory allows |",
        "| --- |" + " ---: |" * 4,
    ]
    for name, row in results["row_kernels"].items():
        lines.append(
            f"| `{name}` | {row['registers']} | {row['spilled_bytes']} | "
            f"{row['instructions_a_logit']:.1f} | {row['instructions_the_memory_allows']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def placed(text: str, results: dict) -> str:
    """Return a document's text with both tables between their markers."""
    for begin, end, table in ((BEGIN, END, markdown), (TRAIN_BEGIN, TRAIN_END, training_markdown)):
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{table(results)}{end}{after}"
    return text


def main() -> None:
    kernels = {name: compiled(operation) for name, operation in KERNELS.items()}
    results = dict(
        predicted_for=DEVICE,
        triton=triton.__version__,
        date=now(),
        kernels_hash=kernels_hash(),
        kernels=kernels,
    )
    for name, kernel in kernels.items():
        results[name] = [predicted(kernel, n, d, v) for d, v in SHAPES for n in TOKENS]
    results["training"] = [
        trained(kernels["token_nll"], n, d, v) for d, v in SHAPES for n in TOKENS
    ]
    results["row_kernels"] = row_kernels()
    write(results, RESULTS / "roofline-h200.json")
    path = HERE.parent / "docs" / "performance.md"
    path.write_text(placed(path.read_text(), results))


if __name__ == "__main__":
    main()
