"""Options of ``make bench`` and its results file, which is rewritten after every row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cpu_cases import KEYS
from environment import RESULTS, commit, cpu_name, now, slug, version, write

from perplexity.kernels.blocks import multiplies_16_bits


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption(
        "--out", default=None, help="results file (default bench/results/cpu-<name>.json)"
    )
    group.addoption(
        "--seconds",
        type=float,
        default=4.0,
        help="a row's rounds take about so long (default %(default)s)",
    )
    group.addoption(
        "--append", action="store_true", help="keep the file's other rows; each says its commit"
    )
    group.addoption(
        "--tiny", action="store_true", help="sizes of a few dozen: to try the code path"
    )


PATH = pytest.StashKey[Path]()


@pytest.fixture(scope="session")
def results(request):
    """Return an object whose ``add(row)`` writes a row into the results file."""
    name = cpu_name()
    path = request.config.stash[PATH] = Path(
        request.config.getoption("--out") or RESULTS / f"cpu-{slug(name)}.json"
    )
    content = dict(
        device=name,
        cores=torch.get_num_threads(),
        bfloat16_products=multiplies_16_bits(torch.bfloat16, torch.device("cpu")),
        **{
            package: version(package)
            for package in ("torch", "numpy", "triton", "liger-kernel", "cut-cross-entropy")
        },
        date=now(),
        commit=commit(),
        rows=[],
    )
    if request.config.getoption("--append") and path.exists():
        before = json.loads(path.read_text())
        if (before["device"], before["torch"]) != (name, content["torch"]):
            pytest.exit(
                f"--append: {path.name} is of {before['device']}, torch {before['torch']}",
                returncode=2,
            )
        content["rows"] = before["rows"]

    class Results:
        @staticmethod
        def add(row: dict) -> None:
            size = [row[key] for key in KEYS]
            others = [other for other in content["rows"] if [other[key] for key in KEYS] != size]
            content["rows"] = [*others, row | dict(commit=content["commit"])]
            write(content, path)

    return Results


def pytest_terminal_summary(terminalreporter, config):
    path = config.stash.get(PATH, None)
    if path and path.exists():
        from report import Results, plot, show

        show(Results(path))
        plot(Results(path), path.with_suffix(".png"))
        terminalreporter.write_line(f"{path} and {path.with_suffix('.png').name}")
