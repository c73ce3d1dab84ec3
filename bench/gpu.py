"""``make bench-gpu``: time, memory and error of this library and of its peers on one GPU, beside
what that GPU can do.

Two ceilings come first, through PyTorch: a bfloat16 matrix product and a copy within the device's
memory. ``tflops`` is the least number of operations a case needs over its median time, whatever a
provider computes (a gradient that recomputes the logits takes 8·N·V·D operations, 6·N·V·D are
counted); ``tb_s`` likewise counts the reads and writes of logits alone. Results are rewritten after
every row: a run that is killed keeps what it had.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cases import CASES, DTYPES, PACKAGES, PROVIDERS, Case, failed_check, max_abs_error
from environment import RESULTS, commit, now, one_line, slug, version, write
from rich.console import Console
from rich.table import Table

from perplexity.kernels.fingerprint import kernels_hash

STARTED = time.perf_counter()
# In the order they are run: the most telling sizes, then the cheap ones, then what the budget may
# leave out.
TOKENS = (8192, 1024, 32768)
SHAPES = ((4096, 128256), (2304, 256000), (2048, 32768), (8192, 128256))  # D, V
TINY = ((32,), ((16, 97),))  # on a CPU, unless told otherwise
ROW_SECONDS = 4.0  # a row's repeats are fewer where they would take longer
OVER_BUDGET = "left out for the budget"
FIELDS = (
    *(
        "case",
        "provider",
        "n",
        "d",
        "v",
        "dtype",
        "median_ms",
        "min_ms",
        "max_ms",
        "repeats",
        "tflops",
        "tb_s",
    ),
    *("peak_temporary_bytes", "max_abs_error", "error"),
)


def milliseconds(call: Callable, device: str, repeats: int) -> list[float]:
    """Of every call; on a GPU between events, the host running ahead as in training."""
    if device == "cpu":
        times = [time.perf_counter()]
        for _ in range(repeats):
            call()
            times.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(times)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def ceilings(device: str) -> dict[str, float]:
    """TFLOP/s of a square bfloat16 product and TB/s of a copy, bytes read plus bytes written."""
    size, copied = (8192, 2 << 30) if device == "cuda" else (256, 1 << 20)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    found = {}
    for name, call, work in (
        ("matmul_tflops", lambda: a @ b, 2 * size**3),
        ("copy_tb_s", lambda: target.copy_(source), 2 * copied),
    ):
        milliseconds(call, device, 3)  # warm-up
        found[name] = work / statistics.median(milliseconds(call, device, 20)) / 1e9
    return found


def measure(
    case: Case, provider: str, size: tuple, dtype: torch.dtype, device: str, repeats: int
) -> dict:
    """The measured fields of a row."""
    gpu = device == "cuda"
    inputs = case.inputs(*size, dtype, device)
    call = partial(case.providers[provider], *inputs)
    call()  # compiles
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    output = call()
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    # What is allocated now is what was before and the outputs.
    peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() if gpu else None
    fields = dict(peak_temporary_bytes=peak)
    nll = output[0] if isinstance(output, tuple) else output
    if case.nll and nll is not None and nll.shape == inputs[-1].shape:
        fields["max_abs_error"] = max_abs_error(nll, inputs)
    del output, nll
    times = milliseconds(call, device, max(min(repeats, int(ROW_SECONDS / seconds)), 1))
    fields |= dict(
        median_ms=statistics.median(times), min_ms=min(times), max_ms=max(times), repeats=len(times)
    )
    fields["tflops" if case.heads else "tb_s"] = case.work(*size, dtype) / fields["median_ms"] / 1e9
    return fields


def measure_or_error(case: Case, provider: str, *arguments) -> dict:
    if importlib.util.find_spec(PACKAGES.get(provider, "torch")) is None:
        return dict(error="not installed")
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    if provider == "torch_compile":
        torch.compiler.reset()  # past 8 shapes it would run uncompiled without a word
    try:
        return measure(case, provider, *arguments)
    except torch.OutOfMemoryError:
        return dict(error="out of memory")
    except Exception as error:  # a peer may raise anything
        return dict(error=one_line(error))


def shape(text: str) -> tuple[int, int]:
    hidden, vocabulary = map(int, text.split("x"))
    return hidden, vocabulary


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--n", type=int, nargs="+", help=f"tokens, the most important first (default {TOKENS})"
    )
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="DxV", help=f"several (default {SHAPES})"
    )
    for name, known in (("cases", tuple(CASES)), ("providers", PROVIDERS)):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            choices=known,
            default=known,
            metavar="NAME",
            help=", ".join(known),
        )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--budget", type=float, default=420.0, help="seconds for everything (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default bench/results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    tokens, shapes = TINY if options.device == "cpu" else (TOKENS, SHAPES)
    options.n, options.shapes = options.n or tokens, options.shapes or shapes
    return options


def plan(options: argparse.Namespace) -> list[tuple[str, tuple, str]]:
    """(case, (n, d, v), provider), the most important first; logits that exist have no D."""
    rows = {
        (name, (n, d if CASES[name].heads else None, v), provider): None
        for n in options.n
        for name in options.cases
        for d, v in options.shapes
        for provider in options.providers
        if provider in CASES[name].providers
    }
    # Compiling takes seconds a row: at other sizes than the first it comes last.
    return sorted(rows, key=lambda row: row[2] == "torch_compile" and row[1][0] != options.n[0])


def table(results: dict) -> Table:
    limits = results["ceilings"]
    product, copy = f"{limits['matmul_tflops']:.3g} TFLOP/s", f"{limits['copy_tb_s']:.3g} TB/s"
    shown = Table(title=f"{results['device']}: matrix product {product}, copy {copy}")
    for heading in (
        "case",
        "N",
        "D",
        "V",
        "provider",
        "ms",
        "rate",
        "ceiling",
        "temporary MiB",
        "max error",
        "note",
    ):
        left = heading in ("case", "provider", "note")
        shown.add_column(heading, justify="left" if left else "right", no_wrap=heading != "note")
    order = list(CASES)
    for row in sorted(
        results["rows"],
        key=lambda row: (order.index(row["case"]), row["v"], row["d"] or 0, row["n"]),
    ):
        rate, unit, limit = row["tflops"], "TFLOP/s", limits["matmul_tflops"]
        if row["tb_s"] is not None:
            rate, unit, limit = row["tb_s"], "TB/s", limits["copy_tb_s"]
        temporary = row["peak_temporary_bytes"]
        cells = (
            *(row[name] for name in ("case", "n", "d", "v", "provider")),
            row["median_ms"] and f"{row['median_ms']:.4g}",
            rate and f"{rate:.3g} {unit}",
            rate and f"{rate / limit:.0%}",
            None if temporary is None else f"{temporary / 2**20:.1f}",
            None if row["max_abs_error"] is None else f"{row['max_abs_error']:.1e}",
            row["error"],
        )
        shown.add_row(*("" if cell is None else str(cell) for cell in cells))
    return shown


def run(results: dict, options: argparse.Namespace, path: Path) -> str | None:
    """Fill the rows; returns what ended the run early, or None."""
    # the least seen: what is compiled is compiled once
    seconds_per_work: dict[tuple[str, str], float] = {}
    for name, size, provider in plan(options):
        case, dtype, began = CASES[name], DTYPES[options.dtype], time.perf_counter()
        work = case.work(*size, dtype)
        if began - STARTED + seconds_per_work.get((name, provider), 0.0) * work > options.budget:
            found = dict(error=OVER_BUDGET)
        else:
            found = measure_or_error(case, provider, size, dtype, options.device, options.repeats)
            if "error" not in found:
                rate = (time.perf_counter() - began) / work
                seconds_per_work[name, provider] = min(
                    rate, seconds_per_work.get((name, provider), rate)
                )
        n, d, v = size
        row = (
            dict.fromkeys(FIELDS)
            | dict(case=name, provider=provider, n=n, d=d, v=v, dtype=options.dtype)
            | found
        )
        results["rows"].append(row)
        write(results, path)
        print(
            name,
            size,
            provider,
            row["error"] or f"{row['median_ms']:.4g} ms",
            file=sys.stderr,
            flush=True,
        )
        if row["error"] and options.device == "cuda":
            try:
                torch.cuda.synchronize()
            except (
                Exception
            ) as error:  # after an illegal access nothing runs any more in this process
                return f"the device is lost after {name} {size} {provider}: {one_line(error)}"
    return None


def main() -> int:
    options = parse()
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        need = f"expected a CUDA device, torch {torch.__version__} finds none"
        print(
            f"bench-gpu: {need}; use --device cpu with tiny shapes to try the code path",
            file=sys.stderr,
        )
        return 2
    os.environ.pop("PERPLEXITY_BACKEND", None)  # "ours" is what a user gets who chooses nothing
    try:
        failure = failed_check(options.device, DTYPES[options.dtype])
    except Exception as error:
        failure = one_line(error)
    if failure:
        print(f"bench-gpu: nothing was timed, the check failed: {failure}", file=sys.stderr)
        return 1
    device = torch.cuda.get_device_name() if gpu else "cpu"
    results = dict(
        device=device,
        torch=torch.__version__,
        triton=version("triton"),
        date=now(),
        commit=commit(),
        command=shlex.join(("python", "bench/gpu.py", *sys.argv[1:])),
        kernels_hash=kernels_hash(),
        ceilings=ceilings(options.device),
        rows=[],
    )
    path = options.out / f"{slug(device)}.json"
    write(results, path)
    ended = run(results, options, path)
    width = None if sys.stdout.isatty() else 160
    Console(width=width, markup=False).print(table(results))  # errors have brackets of their own
    left_out = sum(row["error"] == OVER_BUDGET for row in results["rows"])
    print(
        f"{path.name}: {len(results['rows'])} rows, {left_out} left out for the budget of {options.budget:g} s"
    )
    if ended:
        print(f"bench-gpu: {ended}", file=sys.stderr)
    return 1 if ended else 0


if __name__ == "__main__":
    sys.exit(main())
