"""Every file under examples/ runs, and says what it should."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from processes import run

EXAMPLES = Path(__file__).parents[2] / "examples"
# file -> (its options, what it says, the most that the number in it may be)
RUNS = {
    "trainer.py": (("--steps", "40"), r"perplexity ([\d.]+) of all tokens; \S+", 40.0),
    "plain_loop.py": (("--steps", "60"), r"validation loss ([\d.]+) nats a byte; \S+", 4.0),
    "nanogpt.py": (("--steps", "60"), r"perplexity ([\d.]+) a character", 25.0),
    "policy_gradient.py": (("--steps", "2"), r"step 2: reward ([\d.]+)", 1.0),
    "distillation.py": (
        ("--steps", "30"),
        r"step 30: KL divergence from the teacher ([\d.]+)",
        1.0,
    ),
    "accelerate_loop.py": (
        ("--steps", "30"),
        r"perplexity ([\d.]+) a byte over 1 processes",
        60.0,
    ),
}
LAUNCHED = {
    "data_parallel.py": (
        ("--steps", "30", "--fsdp"),
        r"perplexity ([\d.]+) a byte over 2 ranks",
        60.0,
    ),
}
# One process for all: each alone would import transformers first, which takes longer than it runs.
# accelerate, whose state is the process's, comes last.
ALL = """
import contextlib, io, json, os, runpy, sys, traceback
said = {}
for path, options in json.loads(sys.argv[1]):
    sys.argv = [path, *options]
    sys.path[0] = os.path.dirname(path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(path, run_name="__main__")
        except Exception:
            traceback.print_exc(file=printed)
    said[os.path.basename(path)] = printed.getvalue()
print(json.dumps(said))
"""


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What each example of ``RUNS`` prints, by its name."""
    runs = [(str(EXAMPLES / name), options) for name, (options, *_) in RUNS.items()]
    folder = tmp_path_factory.mktemp("examples")
    done = run(sys.executable, "-c", ALL, json.dumps(runs), env=environment(), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(printed: str, pattern: str, most: float) -> None:
    found = re.search(pattern, printed)
    assert found and float(found[1]) <= most, printed[-2000:]


def test_no_example_is_left_out():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*RUNS, *LAUNCHED, "common.py"}


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(said, name):
    check(said[name], *RUNS[name][1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHED)
def test_it_runs_over_ranks(name):
    options, *expected = LAUNCHED[name]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(sys.executable, *launcher, EXAMPLES / name, *options, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    check(done.stdout, *expected)
