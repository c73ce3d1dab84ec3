"""Code path of ``make bench`` at sizes of a few dozen: rows, file, table, plot, and no times."""

import json
import math
import os
import sys
from pathlib import Path

import processes
import pytest

BENCH = Path(__file__).parents[2] / "bench"
KEYS = {
    *("group", "case", "provider", "n", "v", "d", "dtype", "median_ms", "min_ms", "rounds"),
    *("peak_bytes", "output_bytes", "max_error", "error", "commit"),
}


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.syspath_prepend(BENCH.parent / "tests")
    import report

    yield report
    for name in ("report", "steps", "cpu_cases", "cases"):
        sys.modules.pop(name, None)


def run(out, rows):
    """In a process of its own: kernels are interpreted in this one."""
    # Of a worker of xdist pytest-benchmark would think that it must not measure.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTEST"))
    }
    options = (
        "-p",
        "no:xdist",
        "-q",
        "--benchmark-quiet",
        "--tiny",
        "--seconds",
        "0.01",
        "--out",
        str(out),
        "-k",
        rows,
    )
    return processes.run(sys.executable, "-m", "pytest", BENCH, *options, env=environment)


@pytest.mark.slow
def test_rows_file_table_and_plot(tmp_path):
    out = tmp_path / "cpu.json"
    done = run(
        out,
        "float32 and (forward and (shapes or vocabulary) or statistics-ours) "
        "and not compile and not cce",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert content["torch"] and content["device"] and content["cores"] > 0
    rows = content["rows"]
    assert all(set(row) == KEYS for row in rows)
    shapes = [row for row in rows if row["group"] == "shapes"]
    assert {row["case"] for row in shapes} == {"linear_nll_forward", "token_statistics"}
    assert {"ours", "torch", "torch_linear", "product"} <= {row["provider"] for row in shapes}
    for row in rows:
        if row["provider"] == "liger":
            assert row["error"] and row["median_ms"] is None  # not installed, or no GPU
            continue
        assert row["error"] is None and 0 < row["min_ms"] <= row["median_ms"] and row["rounds"] > 0
        if row["provider"] == "product":
            assert row["max_error"] is None
        elif row["provider"] == "ours":
            assert row["max_error"] < 1e-4
        if sys.platform.startswith("linux") and row["provider"] != "product":
            assert 0 <= row["peak_bytes"] < 1 << 30 and row["output_bytes"] > 0
    assert "perplexity" in done.stdout and "F.linear_cross_entropy, chunked" in done.stdout
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_fitted_exponents(report, tmp_path):
    """Times that are N · V · √D, by construction."""
    rows = []
    for axis in range(3):
        for times in (1, 2, 4, 8, 16):
            size = [256, 16384, 256]
            size[axis] *= times
            n, v, d = size
            row = dict(
                group="growth",
                case="linear_nll_forward",
                provider="ours",
                n=n,
                v=v,
                d=d,
                dtype="float32",
            )
            rows.append(row | dict(median_ms=n * v * math.sqrt(d), error=None))
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(dict(device="a CPU", cores=2, torch="2", commit="0", rows=rows)))
    found = report.Results(path).exponents()
    assert {axis: round(slope, 6) for (_, axis), slope in found.items()} == {
        "N": 1.0,
        "V": 1.0,
        "D": 0.5,
    }


def test_ratios_are_of_the_same_problem(report, tmp_path):
    common = dict(
        group="shapes",
        n=4,
        v=8,
        d=2,
        error=None,
        peak_bytes=3 << 20,
        output_bytes=1 << 20,
        max_error=None,
    )
    times = {
        ("linear_nll_forward", "product", "float32"): 10.0,
        ("linear_nll_forward", "ours", "float32"): 12.5,
        ("linear_nll_forward", "torch", "float32"): 25.0,
        ("linear_nll_train", "ours", "float32"): 40.0,
        ("linear_nll_forward", "ours", "bfloat16"): 5.0,
    }
    rows = [
        common | dict(case=case, provider=provider, dtype=dtype, median_ms=ms)
        for (case, provider, dtype), ms in times.items()
    ]
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(dict(device="a CPU", cores=2, torch="2", commit="0", rows=rows)))
    results = report.Results(path)
    _, ours, _, train, alone = results.rows
    assert (results.ratio(ours), results.of_limit(ours), results.extra_mib(ours)) == (0.5, 0.8, 2.0)
    assert (results.ratio(train), results.of_limit(train)) == (None, 0.75)
    assert results.of_limit(alone) is None and results.of_limit(alone, "float32") == 2.0
    text = report.markdown(results, "cpu.json", "cpu.png")
    assert "| NLL | 4 × 8 × 2 | float32 | perplexity | 12.5 | 0.50 | 0.80 | 2 |" in text


def test_steps_of_a_block(report, monkeypatch, capsys, tmp_path):
    import steps

    for name, size in dict(T=16, R=32, D=8, BLOCKS=2).items():
        monkeypatch.setattr(steps, name, size)
    monkeypatch.setattr(sys, "argv", ["steps.py", "--out", str(tmp_path / "steps.json")])
    steps.main()
    content = json.loads((tmp_path / "steps.json").read_text())
    assert set(content["milliseconds"]) == set(steps.variants())
    for measured in content["milliseconds"].values():
        assert measured["product"] > 0 and len(measured) > 1
    assert "float32, as it is" in capsys.readouterr().out
