"""Code path of the GPU benchmark on small CPU tensors: rows, file, exit status, and no times."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess

import processes
import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
KEYS = {
    "device",
    "torch",
    "triton",
    "date",
    "commit",
    "command",
    "ceilings",
    "rows",
    "kernels_hash",
}
ROW = {
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
}
LINEAR = {"ours", "ours_fused", "cublas", "torch", "torch_compile", "torch_linear", "liger", "cce"}
PROVIDERS = {
    "linear_nll_forward": LINEAR,
    "linear_nll_train": LINEAR,
    "token_statistics": LINEAR - {"liger", "cce", "torch_linear"},
    "linear_kl": LINEAR - {"liger", "cce", "torch_linear"},
    "nll_logits": {"ours", "torch", "torch_compile", "liger"},
    "nll_logits_train": {"ours", "torch", "torch_compile", "liger"},
}
TINY = ("--device", "cpu", "--n", "32", "--shapes", "16x97", "--repeats", "2")


def run(*arguments):
    """Run the benchmark in a process of its own, since kernels are interpreted in this one.

    torch.compile is off: it would take a minute.
    """
    base = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment = base | {"TORCHDYNAMO_DISABLE": "1"}
    return processes.run(sys.executable, BENCH / "gpu.py", *arguments, env=environment)


def script(name):
    """Return a script of ``bench/`` as a module."""
    specification = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(BENCH)
    yield script("gpu")
    sys.modules.pop("cases", None)


@pytest.fixture
def here(monkeypatch, capsys):
    """Return a function that calls a module's ``main`` in this process, which imported everything.

    The function takes the module and the command's words, and returns what ``run`` returns.
    """

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        capsys.readouterr()
        return CompletedProcess(arguments, module.main(), *capsys.readouterr())

    return call


def test_every_case_and_provider(tmp_path):
    done = run(*TINY, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert set(results) == KEYS and set(results["ceilings"]) == {"matmul_tflops", "copy_tb_s"}
    assert results["device"] == "cpu" and "--shapes 16x97" in results["command"]
    assert min(results["ceilings"].values()) > 0
    rows = results["rows"]
    assert all(set(row) == ROW for row in rows)
    for case, providers in PROVIDERS.items():
        assert sorted(row["provider"] for row in rows if row["case"] == case) == sorted(providers)
    for row in rows:
        package = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}.get(row["provider"])
        if package:
            missing = importlib.util.find_spec(package) is None
            assert not missing or (row["error"], row["median_ms"]) == ("not installed", None)
            continue
        logits = row["case"].startswith("nll_logits")
        assert row["error"] is None and row["peak_temporary_bytes"] is None and row["repeats"] <= 2
        assert (row["n"], row["d"], row["v"]) == (32, None if logits else 16, 97)
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert (
            row["tb_s" if logits else "tflops"] > 0 and row["tflops" if logits else "tb_s"] is None
        )
        scored = (
            row["case"] in ("linear_nll_forward", "token_statistics", "nll_logits")
            and row["provider"] != "cublas"
        )
        # Plain PyTorch rounds the logits to bfloat16; ours are float32.
        bound = 1e-4 if row["provider"].startswith("ours") else 5e-2
        assert (row["max_abs_error"] < bound) if scored else row["max_abs_error"] is None
        assert row["case"] in done.stdout and row["provider"] in done.stdout


def test_what_passes_the_budget_says_so(gpu, here, tmp_path):
    done = here(
        gpu,
        *TINY,
        "--out",
        str(tmp_path),
        "--budget",
        "0",
        "--cases",
        "linear_kl",
        "--providers",
        "ours",
        "torch",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [(row["provider"], row["error"]) for row in rows] == [
        ("ours", "left out for the budget"),
        ("torch", "left out for the budget"),
    ]
    assert "2 rows, 2 left out" in done.stdout


def test_without_a_gpu_it_refuses(gpu, here, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = here(gpu, "--out", tmp_path)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("bench-gpu: expected a CUDA device")
        and "--device cpu" in done.stderr
    )


def test_a_wrong_result_stops_it(gpu, tmp_path, monkeypatch, capsys):
    right = gpu.CASES["linear_kl"].providers["ours"]
    monkeypatch.setitem(
        gpu.CASES["linear_kl"].providers, "ours", lambda *inputs: right(*inputs) + 0.01
    )
    monkeypatch.setattr(sys, "argv", ["gpu.py", *TINY, "--out", str(tmp_path)])
    assert gpu.main() == 1 and not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "linear_kl ours" in said


@pytest.mark.parametrize(
    ("failure", "row"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "out of memory"),
        (ValueError("first line\nsecond"), "ValueError: first line"),
        (RuntimeError("Triton Error [CUDA]: [/x]"), "RuntimeError: Triton Error [CUDA]: [/x]"),
    ],
)
def test_a_provider_that_fails_is_a_row(gpu, failure, row, capsys):
    def fails(*inputs):
        raise failure

    case = gpu.Case({"torch": fails}, operations=2)
    found = gpu.measure_or_error(case, "torch", (4, 3, 5), torch.float32, "cpu", 1)
    assert found == {"error": row}
    shown = (
        dict.fromkeys(gpu.FIELDS)
        | {"case": "linear_kl", "n": 4, "d": 3, "v": 5, "provider": "torch"}
        | found
    )
    results = {
        "device": "cpu",
        "ceilings": {"matmul_tflops": 1.0, "copy_tb_s": 1.0},
        "rows": [shown],
    }
    gpu.Console(width=160, markup=False).print(gpu.table(results))
    assert row in capsys.readouterr().out  # brackets are no markup


def test_the_first_size_and_the_quick_providers_come_first(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    options = gpu.parse()
    order = gpu.plan(options)
    assert len(order) == len(set(order)) and order[0] == (
        "linear_nll_forward",
        (8192, 4096, 128256),
        "ours",
    )
    last = [row for row in order if row[2] == "torch_compile" and row[1][0] != 8192]
    assert order[-len(last) :] == last
    assert {size for case, size, _ in order if case == "nll_logits" and size[0] == 1024} == {
        (1024, None, v) for v in (32768, 128256, 256000)
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled in this process")
def test_the_tuner_checks_what_it_times(here, tmp_path, monkeypatch):
    """Every tiny configuration gives the default's sums; a file as the others'."""
    monkeypatch.syspath_prepend(BENCH)
    done = here(script("tune"), "--device", "cpu", "--repeats", "1", "--out", tmp_path)
    sys.modules.pop("cases", None)
    sys.modules.pop("gpu", None)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "tune-cpu.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["product", "default", "chunked", "fused", "fused"]
    assert [row["error"] for row in rows] == [None] * 5 and all(
        row["median_ms"] > 0 for row in rows
    )


def test_the_roofline_is_of_this_device_code(monkeypatch):
    """docs/performance.md shows the committed file, computed for the present device code."""
    from perplexity.kernels.fingerprint import kernels_hash

    results = json.loads((BENCH / "results" / "roofline-h200.json").read_text())
    assert results["kernels_hash"] == kernels_hash(), "python bench/roofline.py"
    monkeypatch.syspath_prepend(BENCH)
    specification = importlib.util.spec_from_file_location("roofline", BENCH / "roofline.py")
    roofline = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(roofline)
    text = (BENCH.parent / "docs" / "performance.md").read_text()
    assert roofline.placed(text, results) == text
    for name, kernel in results["kernels"].items():
        assert kernel["spilled_bytes"] == 0 and kernel["tma_loads"] > 0 and kernel["wgmma"] > 0
        for row in results[name]:
            assert roofline.predicted(kernel, row["n"], row["d"], row["v"]) == row
    for row in results["training"]:
        assert (
            roofline.trained(results["kernels"]["token_nll"], row["n"], row["d"], row["v"]) == row
        )
    for kernel in results["row_kernels"].values():
        assert (
            kernel["instructions_a_logit"] < kernel["instructions_the_memory_allows"]
            and not kernel["spilled_bytes"]
        )


def test_the_document_shows_what_was_measured_and_whether_it_still_holds(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCH)
    specification = importlib.util.spec_from_file_location("gpu_report", BENCH / "gpu_report.py")
    report = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(report)
    document = (BENCH.parent / "docs" / "performance.md").read_text()
    assert report.placed(document) == document, "python bench/gpu_report.py"
    assert report.section(tmp_path) == report.NOTHING

    size = dict(n=8192, d=4096, v=128256, error=None, tb_s=None, peak_temporary_bytes=3 << 20)
    forward = size | dict(case="linear_nll_forward")
    logits = size | dict(case="nll_logits", d=None)
    results = dict(
        device="NVIDIA H200",
        torch="2.11.0",
        triton="3.6.0",
        commit="abc",
        kernels_hash=report.kernels_hash(),
        ceilings=dict(matmul_tflops=790.0, copy_tb_s=4.0),
        rows=[
            forward | dict(provider="cublas", median_ms=10.0),
            forward | dict(provider="ours", median_ms=11.0),
            forward | dict(provider="cce", median_ms=None, error="not installed"),
            logits | dict(provider="ours", median_ms=2.0, tb_s=3.6),
            logits | dict(provider="torch", median_ms=3.6, tb_s=2.0),
        ],
    )
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(results))
    (tmp_path / "roofline.json").write_text("{}")
    shown = report.section(tmp_path)
    assert (
        "| NLL | 8,192 | 4,096 | 128,256 | 10.000 | 1.10 (3) |  |  |  |  |  | not installed |"
        in shown
    )
    assert "| NLL of logits | 8,192 |  | 128,256 | 1.800 | 1.11 (3) |  | 2.00 (3) |" in shown
    assert "has changed" not in shown
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(results | dict(kernels_hash="another")))
    assert "The device code has changed since this was measured** (another)" in report.section(
        tmp_path
    )
