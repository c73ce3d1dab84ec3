"""What ``ppl monitor`` shows in a terminal: every number in its place, each part where there is
one.
"""

import dataclasses
import sys

import pytest

from perplexity.cli import monitor as command
from perplexity.monitor import Finding
from perplexity.monitor.digest import Digest
from perplexity.monitor.health import diagnose


def run_so_far(steps=320, evaluations=6, seconds=None, tokens=None):
    """Training losses that fall from 6 to 2 by step, validation losses of 4, 3.5, 3 ... and one
    rise at the end.
    """
    digest = Digest()
    for step in range(1, steps + 1):
        digest.train(step, 6.0 - 4.0 * step / steps)
        if seconds:
            digest.other(step, "seconds", seconds * step)
        if tokens:
            digest.other(step, "tokens", tokens * step)
    for place in range(evaluations):
        digest.validation(50.0 * (place + 1), 4.0 - 0.5 * place if place < 5 else 2.25)
    return digest


def shown(digest, width=150, total_steps=None, **changes):
    from rich.console import Console

    diagnosis = dataclasses.replace(diagnose(digest, total_steps=total_steps), **changes)
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(command.view(digest, diagnosis, total_steps))
    return console.export_text()


FINDINGS = [
    Finding("spike", "info", "up by 0.5", "look at the batch", first_step=1200, last_step=1300),
    Finding("overfitting", "danger", "rose by 0.25", "stop", first_step=2000, last_step=34_567),
]


def test_the_head_of_a_run_with_all_that_is_known():
    digest = run_so_far(seconds=3.0, tokens=1000.0)
    lines = shown(digest, total_steps=1280, verdict="watch", health_score=61.6).splitlines()
    # 960 s for 320 steps; 960 more take 2,880 s.
    assert lines[0] == "watch  health 62 of 100  step 320 of 1,280  320,000 tokens  48 minutes left"


@pytest.mark.parametrize(
    ("steps", "seconds", "total", "head"),
    [
        (320, None, None, "watch  step 320"),
        (320, None, 640, "watch  step 320 of 640"),
        (320, 3.0, None, "watch  step 320"),
        (320, 3.0, 320, "watch  step 320 of 320"),
        (0, None, None, "watch"),
    ],
)
def test_the_head_says_nothing_that_is_not_known(steps, seconds, total, head):
    digest = run_so_far(steps, evaluations=0, seconds=seconds)
    lines = shown(digest, total_steps=total, verdict="watch", health_score=None, notes=["a note"])
    assert lines.splitlines()[0].rstrip() == head
    assert "a note" in lines


def test_both_curves():
    digest = run_so_far()
    lines = shown(digest, findings=[], components={}).splitlines()
    (training,) = [line.split() for line in lines if line.startswith("training")]
    (validation,) = [line.split() for line in lines if line.startswith("validation")]
    last = [6.0 - 4.0 * step / 320 for step in range(289, 321)]  # blocks of 32 points
    assert training[2] == training[4] == f"{sum(last) / 32:.4f}"
    assert training[3] == "8.97"  # exp(2.19375)
    assert validation[1] == "█▇▅▃▁▂"  # of 7 steps between 2 and 3.875: 7, 5.6, 3.7, 1.9, 0, 0.9
    assert validation[2:] == ["2.2500", "9.49", "2.0000", "at", "250"]
    assert not any("findings" in line or "health score" in line for line in lines)
    alone = shown(run_so_far(evaluations=0), findings=[], components={})
    assert "training" in alone and "validation  " not in alone
    assert "training  " not in shown(run_so_far(steps=0), findings=[], components={})


def test_findings_and_the_score():
    parts = {"stability": {"share": 35, "left": 0.4}, "progress": {"share": 10, "left": 1.0}}
    text = shown(run_so_far(), findings=FINDINGS, components=parts)
    for words in (
        "evidence and advice",
        "spike",
        "info",
        "1,200 – 1,300",
        "up by 0.5",
        "look at the batch",
        "overfitting",
    ):
        assert words in text
    for words in (
        "danger",
        "2,000 – 34,567",
        "rose by 0.25",
        "stop",
        "stability 14/35",
        "progress 10/10",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0] + 32 * [7.0], 40, "▁▂▃▄▅▆▇█" + 32 * "█"),
        ([2.0, 2.0, 2.0], 40, "▁▁▁"),
        ([5.0], 40, "▁"),
        ([0.0, 2.0, 6.0, 8.0], 2, "▁█"),
        (100 * [0.0] + [1e9], 101, 100 * "▁" + "▁"),  # above the 95th percentile: as that
        ([-1.0] + 99 * [0.0], 100, "▁" + 99 * "█"),
    ],
)
def test_a_sparkline(values, width, bars):
    assert command.sparkline(values, width) == bars


def test_a_command_runs_once_for_each_finding(tmp_path, capfd):
    out = tmp_path / "out"
    code = (
        "import os; e = os.environ; "
        f"print(e['PPL_SIGNAL'], e['PPL_SEVERITY'], e['PPL_STEP'], e['PPL_EVIDENCE'], file=open({str(out)!r}, 'a'))"
    )
    reported = set()
    words = f'{sys.executable} -c "{code}"'

    def report(findings, on_finding):
        options = command.Options(history=["run.csv"], on_finding=on_finding)
        command._report(findings, reported, options, None)

    report(FINDINGS[:1], words)
    report(FINDINGS, words)
    assert out.read_text().splitlines() == [
        "spike info 1200 up by 0.5",
        "overfitting danger 2000 rose by 0.25",
    ]
    assert capfd.readouterr().err == ""
    worse = dataclasses.replace(FINDINGS[0], severity="warning")
    report([worse], "exit 7")
    assert "ended with 7" in capfd.readouterr().err
    report([dataclasses.replace(worse, severity="danger")], None)
    assert ("spike", "danger", None) in reported
