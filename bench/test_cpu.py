"""Time, memory and error of every row of ``cpu_cases.table``: ``make bench``.

No time is asserted.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from cases import CASES, max_abs_error
from cpu_cases import STATISTICS, TRAIN, Row, table
from environment import numbers_of, one_line

MEASURED_MEMORY = ("shapes", "logits", "vocabulary", "float16")
_inputs: dict[tuple, list[torch.Tensor]] = {}


def inputs_of(row: Row) -> list[torch.Tensor]:
    """Return the inputs of a row, kept for rows of the same size: some take seconds to draw."""
    key = CASES[row.case].trains, CASES[row.case].heads, row.size, row.dtype
    if key not in _inputs:
        _inputs.clear()
        gc.collect()
        _inputs[key] = row.inputs()
    return _inputs[key]


def peak(row: Row) -> tuple[int, int] | None:
    """Return the bytes that a call adds to a process of its own, and those of its outputs alone."""
    if not sys.platform.startswith("linux"):
        return None
    size = [str(number) for number in (row.n, row.v, row.d) if number is not None]
    script = Path(__file__).with_name("memory.py")
    extra, kept = numbers_of(script, row.case, row.provider, row.dtype, *size, timeout=900)
    return int(extra), int(kept)


@torch.no_grad()
def gradient_error(
    gradient: torch.Tensor, x: torch.Tensor, w: torch.Tensor, t: torch.Tensor
) -> float:
    """Return the largest error of the hidden states' gradient of the mean loss against float64.

    It is relative to the largest entry, over at most 16 tokens.
    """
    tokens = torch.linspace(0, len(t) - 1, min(len(t), 16)).long()
    first = x[tokens].double()
    z = torch.cat([first @ block.double().T for block in w.split(8192)], dim=1)
    p = z.softmax(1)
    exact = -w[t[tokens]].double()
    for start in range(0, w.shape[0], 8192):
        exact += p[:, start : start + 8192] @ w[start : start + 8192].double()
    exact /= len(t)
    return ((gradient[tokens].double() - exact).abs().max() / exact.abs().max()).item()


def error_of(row: Row, result, inputs: list[torch.Tensor]) -> float | None:
    if row.provider == "product" or row.group == "growth":
        return None
    if row.case == TRAIN:
        return gradient_error(result[0], *inputs)
    nll = result[0] if row.case == STATISTICS else result
    return max_abs_error(nll, inputs) if CASES[row.case].nll else None


def tiny(row: Row) -> Row:
    return replace(row, n=min(row.n, 32), v=min(row.v, 600), d=row.d and min(row.d, 16))


def pytest_generate_tests(metafunc):
    rows = table()
    if metafunc.config.getoption("--tiny"):
        rows = list(dict.fromkeys(tiny(row) for row in rows))
    metafunc.parametrize("row", rows, ids=str)


def test_row(row, results, benchmark, request):
    fields = dict(
        median_ms=None,
        min_ms=None,
        rounds=0,
        peak_bytes=None,
        output_bytes=None,
        max_error=None,
        error=None,
    )
    try:
        inputs, function = inputs_of(row), row.function()
        result = function(*inputs)  # compiles, chooses blocks
        fields["max_error"] = error_of(row, result, inputs)
        del result
        gc.collect()
        start = time.perf_counter()
        function(*inputs)
        seconds = time.perf_counter() - start
        rounds = max(1, min(9, int(request.config.getoption("--seconds") / seconds)))
        benchmark.pedantic(function, args=inputs, rounds=rounds, iterations=1)
        stats = benchmark.stats.stats
        fields |= dict(median_ms=1e3 * stats.median, min_ms=1e3 * stats.min, rounds=rounds)
        if row.group in MEASURED_MEMORY and row.provider != "product":
            fields["peak_bytes"], fields["output_bytes"] = peak(row) or (None, None)
    except Exception as error:  # a peer may raise anything: the error is the row's result
        if row.provider.startswith("ours"):
            raise
        fields["error"] = one_line(error)
    results.add(asdict(row) | fields)
    if fields["error"]:
        pytest.skip(fields["error"])
