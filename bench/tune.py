"""Time of the forward kernel over its tile configurations, on one GPU: ``python bench/tune.py``.

Configurations are searched nowhere else: the fastest is written into ``kernels/gpu/logit_tile.py``
by hand, so that a user's first call searches nothing. The sums of each configuration are checked
against those of the default before it is timed. The bfloat16 product alone is timed for comparison.
bench/results/tune-<device>.json is rewritten after every row. ``--device cpu`` with
TRITON_INTERPRET=1 tries the code path.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from environment import RESULTS, commit, now, one_line, slug, version, write
from gpu import SHAPES, milliseconds

from perplexity.kernels.fingerprint import kernels_hash
from perplexity.kernels.gpu import linear_nll, logit_tile
from perplexity.kernels.gpu.linear_nll_chunked import linear_nll_chunked

CONFIGURATIONS = [
    dict(
        BLOCK_N=n,
        BLOCK_V=v,
        BLOCK_D=64,
        num_warps=warps,
        num_stages=stages,
        FLATTEN=flatten,
        PARTS=parts,
        SPAN=span,
        GROUP=group,
    )
    for (n, v, warps, stages, flatten, parts), (span, group) in itertools.product(
        (
            (128, 256, 8, 3, True, 4),
            (128, 256, 8, 4, True, 4),
            (128, 256, 8, 3, False, 4),
            (128, 256, 8, 3, True, 1),
            (128, 128, 4, 4, True, 1),
            (128, 128, 8, 4, True, 1),
            (256, 128, 8, 3, True, 4),
            (64, 256, 4, 4, True, 4),
        ),
        ((2048, 16), (2048, 8), (4096, 16), (1024, 16), (2048, 1 << 20)),
    )
]
TINY = [
    dict(
        BLOCK_N=32,
        BLOCK_V=64,
        BLOCK_D=32,
        num_warps=4,
        num_stages=1,
        FLATTEN=False,
        PARTS=parts,
        SPAN=128,
        GROUP=group,
    )
    for parts, group in ((1, 1), (4, 2))
]


@contextmanager
def configured(configuration: dict):
    """Launch the forward kernel with a configuration within the ``with`` block."""
    tiles = {name: configuration[name] for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D")}
    options = {name: configuration[name] for name in ("num_warps", "num_stages")}
    shape = {name: configuration[name] for name in ("FLATTEN", "PARTS")}
    shape["LOOKS"] = 4 // configuration["PARTS"]
    changes = {
        (logit_tile, "tile_configuration"): lambda *_: (tiles, options),
        (linear_nll, "loop_shape"): lambda *_: shape,
        (linear_nll, "SPAN"): configuration["SPAN"],
        (linear_nll, "GROUP"): configuration["GROUP"],
    }
    kept = {key: getattr(*key) for key in changes}
    try:
        for key, value in changes.items():
            setattr(*key, value)
        yield
    finally:
        for key, value in kept.items():
            setattr(*key, value)


def sums_to_nll(sums: torch.Tensor) -> torch.Tensor:
    return sums[0] - sums[2] + sums[1].log()


def timed(call, device: str, repeats: int) -> dict:
    call()
    times = milliseconds(call, device, repeats)
    return dict(median_ms=statistics.median(times), min_ms=min(times), max_ms=max(times))


def tune_shape(
    n: int, d: int, v: int, options: argparse.Namespace, began: float, results: dict, path: Path
) -> None:
    """Add the rows of a shape: product, default, chunks, and the configurations in budget."""
    generator = torch.Generator(options.device).manual_seed(0)
    hidden, weight = (
        torch.randn(rows, d, device=options.device, generator=generator).to(torch.bfloat16)
        for rows in (n, v)
    )
    weight *= d**-0.5
    target = torch.randint(v, (n,), device=options.device, generator=generator)

    def fused() -> torch.Tensor:
        return linear_nll.linear_nll(hidden, weight, None, target)

    expected = sums_to_nll(fused())

    def add(what: str, call, fields: dict) -> None:
        try:
            sums = call()
            if what != "product":
                torch.testing.assert_close(sums_to_nll(sums), expected, rtol=1e-4, atol=1e-3)
            row = timed(call, options.device, options.repeats) | dict(error=None)
        except Exception as error:  # a configuration may ask for more than the device has
            row = dict(median_ms=None, min_ms=None, max_ms=None, error=one_line(error))
        results["rows"].append(dict(n=n, d=d, v=v, what=what) | fields | row)
        write(results, path)
        print(n, d, v, what, fields, row["error"] or f"{row['median_ms']:.4g} ms", flush=True)

    at_once = max(1, (1 << 30) // (2 * v))
    add("product", lambda: [rows @ weight.T for rows in hidden.split(at_once)], {})
    add("default", fused, {})
    add("chunked", lambda: linear_nll_chunked(hidden, weight, target), {})
    for configuration in CONFIGURATIONS if options.device == "cuda" else TINY:
        if time.perf_counter() - began > options.budget:
            print("left out for the budget", n, d, v, configuration)
            continue
        with configured(configuration):
            add("fused", fused, configuration)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--n", type=int, nargs="+", default=[8192])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--budget", type=float, default=420.0, help="seconds for everything (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        print(
            "tune: expected a CUDA device, torch finds none; --device cpu tries the code path",
            file=sys.stderr,
        )
        return 2
    began = time.perf_counter()
    name = torch.cuda.get_device_name() if gpu else "cpu"
    results = dict(
        device=name,
        torch=torch.__version__,
        triton=version("triton"),
        date=now(),
        commit=commit(),
        kernels_hash=kernels_hash(),
        rows=[],
    )
    path = options.out / f"tune-{slug(name)}.json"
    for n, (d, v) in itertools.product(options.n if gpu else [64], SHAPES if gpu else [(64, 256)]):
        tune_shape(n, d, v, options, began, results, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
