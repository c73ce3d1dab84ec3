"""Small real runs with one fault each (record_faults.py): the right signals in at least 9 of 10
seeds, and no others' silence.
"""

import re
from pathlib import Path

import pytest
from faults import FAULTS, diagnosis, right, runs, told
from matrix import BEGIN, END, matrix


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.silent])
def test_the_right_signal_is_found(name):
    found = [told(name, rows) for rows in runs(name)]
    assert len(found) == 10
    hits = sum(any(right(FAULTS[name], *pair) for pair in signals.items()) for signals in found)
    assert hits >= 9, found


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.silent])
def test_silence_where_curves_show_nothing(name):
    for rows in runs(name):
        found = diagnosis(rows)
        assert found.verdict == "healthy" and found.worst() == "info", found.findings


def test_the_verdict_is_the_worst_severity():
    for name, verdict in (
        ("nan", "unhealthy"),
        ("overfitting", "unhealthy"),
        ("frozen-rate", "watch"),
        ("healthy", "healthy"),
    ):
        for rows in runs(name):
            found = diagnosis(rows)
            assert found.verdict == verdict, name
            assert found.health_score <= {"unhealthy": 30, "watch": 70, "healthy": 100}[verdict]


def test_overfitting_names_the_best_step():
    for rows in runs("overfitting"):
        best = min((value, step) for step, _, value in rows if value is not None)[1]
        finding = next(f for f in diagnosis(rows).findings if f.signal == "overfitting")
        assert finding.numbers["best_step"] == finding.first_step == best
        assert f"go back to step {best:,}" in finding.advice


def test_the_documents_matrix_is_this_one():
    """docs/monitor.md, written by ``python tests/monitor/matrix.py``."""
    text = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text()
    assert re.search(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", text, re.S)[1] == matrix()
