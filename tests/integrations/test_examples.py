"""Every file under examples/ runs, and says what it should."""

import os
import re
import sys
from pathlib import Path

import pytest
from processes import run

EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCHED = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# file -> (how it is started, its options, what it says, the most that the number in it may be)
RUNS = {
    "trainer.py": ((), ("--steps", "40"), r"perplexity ([\d.]+) of all tokens; \S+", 40.0),
    "plain_loop.py": ((), ("--steps", "60"), r"validation loss ([\d.]+) nats a byte; \S+", 4.0),
    "nanogpt.py": ((), ("--steps", "40"), r"perplexity ([\d.]+) a character", 25.0),
    "policy_gradient.py": ((), ("--steps", "2"), r"step 2: reward ([\d.]+)", 1.0),
    "distillation.py": (
        (),
        ("--steps", "30"),
        r"step 30: KL divergence from the teacher ([\d.]+)",
        1.0,
    ),
    "data_parallel.py": (
        LAUNCHED,
        ("--steps", "30", "--fsdp"),
        r"perplexity ([\d.]+) a byte over 2 ranks",
        60.0,
    ),
    "accelerate_loop.py": (
        (),
        ("--steps", "30"),
        r"perplexity ([\d.]+) a byte over 1 processes",
        60.0,
    ),
}


def test_no_example_is_left_out():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*RUNS, "common.py"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if RUNS[name][0] else []) for name in RUNS]
)
def test_it_runs(name):
    start, options, said, most = RUNS[name]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = run(sys.executable, *start, EXAMPLES / name, *options, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(said, done.stdout)
    assert found and float(found[1]) <= most, done.stdout[-2000:]
