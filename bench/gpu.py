"""Time, memory and error of this library and of its peers on one GPU: ``make bench-gpu``.

Two ceilings of the GPU are measured first, through PyTorch: a bfloat16 matrix product, and a copy
within the device's memory. ``tflops`` is the least number of operations of a case over its median
time, whatever a provider computes. (A gradient that recomputes the logits takes 8·N·V·D operations,
of which 6·N·V·D count.) ``tb_s`` likewise counts the reads and writes of the logits alone. The
results file is rewritten after every row, so that a killed run keeps its rows.
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
# In the order of the run: the most telling sizes first, those that the budget may leave out last.
TOKENS = (8192, 1024, 32768)
SHAPES = ((4096, 128256), (2304, 256000), (2048, 32768), (8192, 128256))  # D, V
TINY = ((32,), ((16, 97),))  # N and (D, V) on a CPU, by default
ROW_SECONDS = 4.0  # a row is repeated less often where its repeats would take longer
OVER_BUDGET = "left out for the budget"
FIELDS = (
    *("case", "provider", "n", "d", "v", "dtype", "median_ms", "min_ms", "max_ms", "repeats"),
    *("tflops", "tb_s", "peak_temporary_bytes", "max_abs_error", "error"),
)


def milliseconds(call: Callable, device: str, repeats: int) -> list[float]:
    """Return the time of every call; on a GPU between events, with the host running ahead."""
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
    """Measure TFLOP/s of a square bfloat16 product, and TB/s (read plus written) of a copy."""
    size, copied = (8192, 2 << 30) if device == "cuda" else (256, 1 << 20)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    rates = {}
    for name, call, work in (
        ("matmul_tflops", lambda: a @ b, 2 * size**3),
        ("copy_tb_s", lambda: target.copy_(source), 2 * copied),
    ):
        milliseconds(call, device, 3)  # warm-up
        rates[name] = work / statistics.median(milliseconds(call, device, 20)) / 1e9
    return rates


def measure(
    case: Case, provider: str, size: tuple, dtype: torch.dtype, device: str, repeats: int
) -> dict:
    """Return the measured fields of a row."""
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
    # The memory allocated now is that of the inputs and of the outputs.
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
        torch.compiler.reset()  # after 8 shapes it would silently run uncompiled
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
    """Return (case, (n, d, v), provider) of each row, important ones first; logits have no D."""
    rows = {
        (name, (n, d if CASES[name].heads else None, v), provider): None
        for n in options.n
        for name in options.cases
        for d, v in options.shapes
        for provider in options.providers
        if provider in CASES[name].providers
    }
    # Rows of torch.compile take seconds to compile: those beyond the first N come last.
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
    """Fill the rows; return the reason why the run ended early, or None."""
    # The least of all rows, since a row may include the time of compiling.
    seconds_per_work: dict[tuple[str, str], float] = {}
    for name, size, provider in plan(options):
        case, dtype, began = CASES[name], DTYPES[options.dtype], time.perf_counter()
        work = case.work(*size, dtype)
        if began - STARTED + seconds_per_work.get((name, provider), 0.0) * work > options.budget:
            fields = dict(error=OVER_BUDGET)
        else:
            fields = measure_or_error(case, provider, size, dtype, options.device, options.repeats)
            if "error" not in fields:
                rate = (time.perf_counter() - began) / work
                seconds_per_work[name, provider] = min(
                    rate, seconds_per_work.get((name, provider), rate)
                )
        n, d, v = size
        row = (
            dict.fromkeys(FIELDS)
            | dict(case=name, provider=provider, n=n, d=d, v=v, dtype=options.dtype)
            | fields
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
            # After an illegal access nothing runs in this process any more.
            except Exception as error:
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
    os.environ.pop("PERPLEXITY_BACKEND", None)  # "ours" is the default of the library
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
    Console(width=width, markup=False).print(table(results))  # errors may have brackets
    left_out = sum(row["error"] == OVER_BUDGET for row in results["rows"])
    print(
        f"{path.name}: {len(results['rows'])} rows, "
        f"{left_out} left out for the budget of {options.budget:g} s"
    )
    if ended:
        print(f"bench-gpu: {ended}", file=sys.stderr)
    return 1 if ended else 0


if __name__ == "__main__":
    sys.exit(main())
