"""Environment, seeds and drawn examples that are the same for every test, and the tests' times."""

import io
import os
import random
import re
import sys
from collections import Counter
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Without a GPU the kernels are interpreted on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

NAME_LENGTH = 48  # characters of one parameter in a test's name
# What a terminal, a colour setting or a network would change in the output of a test or of a
# process that a test starts.
os.environ.update(COLUMNS="80", LINES="25", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
for name in (
    "FORCE_COLOR",
    "CLICOLOR_FORCE",
    "PY_COLORS",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "PYTHONIOENCODING",
):
    os.environ.pop(name, None)

# `make test` draws the same examples in every run. `make test-slow` draws other ones in each run
# and prints their seed. How long an example takes or is drawn says how busy the machine is: no
# deadline, no health check of the time.
COMMON = dict(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("test", derandomize=True, **COMMON)
settings.register_profile("slow", derandomize=False, print_blob=True, **COMMON)
settings.load_profile("test")

SLOWEST = 15  # files, and tests, named in the summary


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_make_parametrize_id(config, val, argname) -> str | None:
    """Name a parameter readably, and from the source alone: workers must collect equal names.

    Bytes may hold a clock (gzip's header does), and a text may hold line breaks and control
    characters.
    """
    if isinstance(val, bytes | bytearray) or getattr(val, "__name__", None) == "<lambda>":
        return argname
    if isinstance(val, str):
        return re.sub(r"[^\w.,:=+*/-]+", "-", val)[:NAME_LENGTH].strip("-") or argname
    return None


@pytest.fixture
def ppl_here(capsys, monkeypatch):
    """Return a function that runs ``ppl`` in this process, which has imported everything.

    The function takes the command's words, ``input`` (text of standard input) and ``cwd`` (folder),
    and returns what ``subprocess.run`` would: status, standard output and standard error.
    """
    from perplexity.cli import main

    def call(*arguments, input: str = "", cwd=None) -> CompletedProcess:
        words = [str(argument) for argument in arguments]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode())))
            if cwd is not None:
                patch.chdir(cwd)
            capsys.readouterr()
            try:
                status = main(words)
            except SystemExit as stopped:  # raised by the parser
                status = stopped.code
        return CompletedProcess(["ppl", *words], status, *capsys.readouterr())

    return call


@pytest.fixture
def fails(ppl_here):
    """Return a function that asserts exit status 2 with one line on stderr, and returns stdout."""

    def check(folder, arguments, words) -> str:
        done = ppl_here(*arguments, cwd=folder)
        # What libraries warn of on the way is no line of ours.
        lines = [line for line in done.stderr.splitlines() if line.startswith("ppl")]
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        for word in words:
            assert word in lines[0]
        return done.stdout

    return check


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config) -> None:
    if (
        config.getoption("hypothesis_profile") == "slow"
        and config.getoption("hypothesis_seed") is None
    ):
        # Set before hypothesis reads the option, and before xdist hands the options to its workers.
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(1 << 32))


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    """Seed before the fixtures: what a fixture draws must not depend on the tests before it."""
    seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item) -> None:
    """Seed again: what a test draws must not depend on which fixtures were set up already."""
    seed()


def processor_seconds() -> float:
    """Return the seconds of processor time of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "setup":
        # A fixture's time counts for the first test that asks for the fixture.
        item.stash[STARTED] = item.session.stash.get(FINISHED, None) or processor_seconds()
    elif call.when == "teardown":
        now = item.session.stash[FINISHED] = processor_seconds()
        report.user_properties.append(("processor_seconds", now - item.stash[STARTED]))
    return report


STARTED, FINISHED = pytest.StashKey[float](), pytest.StashKey[float]()


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Print hypothesis' seed, and the tests that took most processor time.

    Wall time says little on shared cores.
    """
    if config.getoption("hypothesis_profile") == "slow":
        number = config.getoption("hypothesis_seed")
        terminalreporter.section(
            f"hypothesis: --hypothesis-seed={number} draws these examples again"
        )
    seconds = {
        report.nodeid: value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "processor_seconds"
    }
    if len(seconds) < SLOWEST:
        return
    terminalreporter.section(
        f"processor time: {sum(seconds.values()):.0f} s in {len(seconds)} tests"
    )
    files = Counter()
    for name, value in seconds.items():
        files[name.split("::")[0]] += value
    for found in (files, Counter(seconds)):
        for name, value in found.most_common(SLOWEST):
            terminalreporter.write_line(f"{value:6.1f} s  {name}")
