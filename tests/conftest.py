"""Set the interpreter before triton is imported, and report the processor time of the tests."""

import os
import re

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU the kernels are interpreted on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

NAME_LENGTH = 48  # characters of one parameter in a test's name
SLOWEST = 15  # tests named in the summary


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_make_parametrize_id(config, val, argname) -> str | None:
    """Name a parameter readably, and from the source alone: workers must collect equal names.

    Bytes may hold a clock (gzip's header does), and a text may hold line breaks and control characters.
    """
    if isinstance(val, bytes | bytearray) or getattr(val, "__name__", None) == "<lambda>":
        return argname
    if isinstance(val, str):
        return re.sub(r"[^\w.,:=+*/-]+", "-", val)[:NAME_LENGTH].strip("-") or argname
    return None


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


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the tests that took the most processor time: wall time means little on shared cores."""
    seconds = {
        report.nodeid: value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "processor_seconds"
    }
    if len(seconds) < SLOWEST:
        return
    terminalreporter.section(f"processor time: {sum(seconds.values()):.0f} s in {len(seconds)} tests")
    for name in sorted(seconds, key=seconds.get, reverse=True)[:SLOWEST]:
        terminalreporter.write_line(f"{seconds[name]:6.1f} s  {name}")
