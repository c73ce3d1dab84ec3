"""The score falls with every finding, severity and validation loss that is added; ``Monitor`` in a
loop.
"""

import json
import math

import numpy as np
import pytest
from faults import history, runs
from hypothesis import given, settings
from hypothesis import strategies as st

from perplexity import Monitor
from perplexity.errors import InputError
from perplexity.findings import SEVERITIES
from perplexity.monitor import Finding, diagnose
from perplexity.monitor.digest import Digest
from perplexity.monitor.health import PARTS, score

SIGNALS = [signal for _, signals in PARTS.values() for signal in signals]
FINDINGS = st.builds(
    lambda signal, severity: Finding(signal, severity, "", ""),
    st.sampled_from(SIGNALS),
    st.sampled_from(SEVERITIES),
)
GAPS = st.none() | st.floats(-5, 20)


@given(st.lists(FINDINGS, max_size=8), FINDINGS, GAPS)
def test_one_more_finding_never_raises_the_score(findings, more, gap):
    before, _ = score(findings, gap)
    after, components = score([*findings, more], gap)
    assert 0 <= after <= before <= 100
    assert sum(part["share"] for part in components.values()) == 100


@given(st.lists(FINDINGS, min_size=1, max_size=8), st.data(), GAPS)
def test_a_higher_severity_never_raises_the_score(findings, data, gap):
    place = data.draw(st.integers(0, len(findings) - 1))
    old = findings[place]
    severity = data.draw(st.sampled_from(SEVERITIES[SEVERITIES.index(old.severity) :]))
    raised = [
        *findings[:place],
        Finding(old.signal, severity, "", ""),
        *findings[place + 1 :],
    ]
    assert score(raised, gap)[0] <= score(findings, gap)[0]


def run(losses: list[float], gaps: list[float]) -> Digest:
    digest = Digest()
    for place, (loss, gap) in enumerate(zip(losses, gaps, strict=True)):
        for step in range(40):
            digest.train(40 * place + step + 1, loss + 0.02 * math.sin(7.1 * step))
        digest.validation(40 * place + 40, loss + gap)
    return digest


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.floats(-0.4, 0.2), st.floats(0.02, 0.8)), min_size=6, max_size=24),
    st.lists(st.floats(0, 2), min_size=1, max_size=3),
)
def test_higher_last_validation_losses_never_raise_the_score(shape, rises):
    """Where validation is above training; a rise of each of the last one to three evaluations."""
    losses = (6 + np.cumsum([change for change, _ in shape])).clip(1).tolist()
    gaps = [gap for _, gap in shape]
    before = diagnose(run(losses, gaps))
    last = len(rises)
    after = diagnose(
        run(
            losses,
            gaps[:-last] + [gap + rise for gap, rise in zip(gaps[-last:], rises, strict=True)],
        )
    )
    if before.health_score is not None and after.health_score is not None:
        assert after.health_score <= before.health_score + 1e-9


def test_a_monitor_says_what_a_history_says():
    for name in ("overfitting", "nan", "frozen-rate", "healthy"):
        rows = runs(name)[0]
        monitor = Monitor(vocabulary_size=512)
        for step, train, value in rows:
            monitor.log(step, train_loss=train, val_loss=value)
        expected = diagnose(history(rows).digest(), vocabulary_size=512)
        assert monitor.diagnose().to_json() == expected.to_json()


def test_it_stops_a_run_by_the_users_rule():
    told = []
    monitor = Monitor(stop_on="danger", on_finding=told.append)
    for step, train, value in runs("overfitting")[0]:
        monitor.log(step, train_loss=train, val_loss=value)
        if monitor.should_stop:
            break
    assert step < 400 and monitor.stopped_by.signal == "overfitting"
    assert [f.signal for f in told].count("overfitting") == 1
    quiet = Monitor(stop_on=("spike",))
    for step, train, value in runs("overfitting")[0]:
        quiet.log(step, train_loss=train, val_loss=value)
    assert not quiet.should_stop


def test_evaluations_at_a_cadence_and_what_they_cost():
    monitor = Monitor(total_steps=100)
    calls = []
    evaluate = monitor.evaluate_every(10, lambda: calls.append(1) or 3.0)
    found = []
    for step in range(1, 101):
        monitor.log(step, train_loss=3.1)
        found.append(evaluate(step))
    assert len(calls) == 10 and found[9] == 3.0 and found[10] is None
    assert len(monitor.digest.evaluations) == 10
    assert 0 < monitor.evaluation_share < 1
    assert monitor.digest.evaluation_seconds == pytest.approx(monitor._evaluation_seconds)


def test_its_file_survives_a_restart(tmp_path):
    rows = runs("healthy")[0]
    whole = Monitor()
    for step, train, value in rows:
        whole.log(step, train_loss=train, val_loss=value)
    for part in (rows[:250], rows[250:]):
        monitor = Monitor(path=tmp_path / "history.jsonl")
        for step, train, value in part:
            monitor.log(step, train_loss=train, val_loss=value)
        monitor.close()
    assert monitor.diagnose().to_json() == whole.diagnose().to_json()
    assert (
        Monitor(path=tmp_path / "history.jsonl").diagnose().to_json() == whole.diagnose().to_json()
    )


def test_losses_in_other_units_and_as_tensors():
    import torch

    plain, bits = Monitor(), Monitor(unit="bits")
    for step in range(300):
        plain.log(step, train_loss=torch.tensor(3.0 - step / 1000))
        bits.log(step, train_loss=(3.0 - step / 1000) / math.log(2))
    assert bits.diagnose().train_loss == pytest.approx(plain.diagnose().train_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(vocabulary_size=1), "vocabulary_size: expected at least 2, got 1"),
        (dict(unit="bans"), "unit: expected one of nats"),
        (dict(check_every=0), "check_every: expected at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Monitor(**arguments)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        Monitor().evaluate_every(0, float)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="path: expected a file that can be written"):
        Monitor(path=tmp_path / "no" / "such.jsonl")
    with pytest.raises(InputError, match=r"path: expected a name that ends in .jsonl, got run.log"):
        Monitor(path="run.log")


def test_a_file_cut_off_in_a_line_is_gone_on_with(tmp_path):
    path = tmp_path / "h.jsonl"
    for _ in range(3):
        monitor = Monitor(path=path)
        at = int(monitor.digest.points)
        for step in range(at, at + 5):
            monitor.log(step, train_loss=3.0)
        monitor.close()
        with path.open("a") as file:
            file.write('{"step": 5.0, "train_l')
    assert Monitor(path=path).digest.points == 15


@pytest.mark.parametrize(("stride", "expected"), [(1, 40), (16, 40), (2, 39), (700, 28)])
def test_every_multiple_is_evaluated_once_whatever_the_steps(stride, expected):
    monitor = Monitor()
    calls = []
    evaluate = monitor.evaluate_every(500, lambda: calls.append(1) or 3.0)
    for step in range(0 if stride != 2 else 1, 20_001, stride):
        for _ in range(2):  # gradient accumulation calls twice a step
            evaluate(step)
    assert len(calls) == expected


def test_steps_that_are_run_again_are_evaluated_again():
    """A run that went back to its checkpoint trains on: its old evaluations are of another run."""
    calls = []
    monitor = Monitor()
    evaluate = monitor.evaluate_every(500, lambda: calls.append(step) or 3.0)
    for step in (500, 700, 1000, 400, 499, 500, 999, 1000, 1001):
        evaluate(step)
    assert calls == [500, 1000, 500, 1000]


def test_nan_stops_at_once():
    monitor = Monitor(stop_on="non-finite")
    for step in range(10):
        monitor.log(step, train_loss=3.0 if step < 7 else math.nan)
        assert monitor.should_stop == (step >= 7)


def test_a_rule_that_is_none():
    with pytest.raises(
        ValueError, match="stop_on: expected info, warning, danger, .* got 'Danger'"
    ):
        Monitor(stop_on="Danger")
    with pytest.raises(ValueError, match="step: expected a finite number, got nan"):
        Monitor().log(math.nan, train_loss=3.0)
    with pytest.raises(
        ValueError, match="train_eval_loss, eval_seconds: expected beside a val_loss"
    ):
        Monitor().log(1, train_loss=3.0, train_eval_loss=3.0)


def test_what_a_restart_replaced_is_not_judged():
    monitor = Monitor()
    for step in range(1, 340):
        monitor.log(
            step,
            train_loss=math.nan if step > 300 else 3.0 + 1 / step,
            val_loss=3.0 if step % 50 == 0 else None,
        )
    assert monitor.diagnose().verdict == "unhealthy"
    for step in range(251, 1000):
        monitor.log(step, train_loss=3.0 + 1 / step, val_loss=3.0 if step % 50 == 0 else None)
    assert not [f for f in monitor.diagnose().findings if f.signal == "non-finite"]


@pytest.mark.parametrize("at", [150, 300, 1000])
def test_a_restart_of_a_falling_run_is_no_leak(at):
    generator = np.random.default_rng(at)
    loss = lambda step: 3 + 8 * step**-0.4 + 0.05 * generator.normal()  # noqa: E731
    monitor = Monitor()
    for step in [*range(1, at + 100), *range(at, at + 1000)]:
        monitor.log(step, train_loss=loss(step))
    assert [f.signal for f in monitor.diagnose().findings if f.severity != "info"] == []


def test_leakage_is_told_as_long_as_it_lasts():
    monitor = Monitor()
    for step in range(1, 10_001):
        loss = 3 + 5 * step**-0.4
        monitor.log(
            step,
            train_loss=loss + 0.02 * math.sin(step),
            val_loss=loss - 0.3 * min(1, step / 2000) if step % 100 == 0 else None,
        )
    assert "leakage-suspected" in [f.signal for f in monitor.diagnose().findings]


@pytest.mark.parametrize("points", [0, 1, 3, 49])
def test_too_few_points_are_no_verdict(points):
    monitor = Monitor()
    for step in range(points):
        monitor.log(step, train_loss=3.0, val_loss=3.0 if step < 3 else None)
    found = monitor.diagnose()
    assert found.verdict == "insufficient-data" and found.health_score is None
    record = json.loads(found.to_json())
    assert record["verdict"] == "insufficient-data" and record["health_score"] is None


def test_the_keys_of_the_json():
    record = json.loads(diagnose(history(runs("overfitting")[0]).digest()).to_json())
    assert {"verdict", "health_score", "components", "findings"} <= set(record)
    assert {"signal", "severity", "first_step", "last_step", "evidence", "advice"} <= set(
        record["findings"][0]
    )


def test_a_plateau_stays_one_when_the_last_validation_loss_rises():
    """Before, its slope was blurred by the rise, and the score went from 70 to 97."""
    for seed in range(10):
        generator = np.random.default_rng(seed)
        levels = [
            2 + 2 * (1 + min(place, 10) / 1.5) ** -0.5 + 0.01 * generator.normal()
            for place in range(20)
        ]
        before, after = (diagnose(run(levels, [0.1] * 19 + [last])) for last in (0.1, 0.15))
        assert after.health_score <= before.health_score


def test_going_back_from_a_divergence_is_no_leak():
    """The advice that the monitor itself gives; what it went back from was the measure of what came
    after.
    """
    generator = np.random.default_rng(0)
    loss = lambda step: 3 + 8 * step**-0.4 + 0.05 * generator.normal()  # noqa: E731
    monitor = Monitor()
    for step in range(1, 3001):
        monitor.log(step, train_loss=loss(step) + (3.0 if step > 2900 else 0.0))
    for step in range(2000, 5000):
        monitor.log(step, train_loss=loss(step))
    assert "leakage-suspected" not in {f.signal for f in monitor.diagnose().findings}
    assert monitor.digest.points >= 4900  # of the block that holds step 2,000 the first half stays


def test_few_training_losses_tell_divergence_from_overfitting():
    monitor = Monitor()
    for step in range(100, 4001, 100):
        both = max(0.0, step - 2000) / 1000
        monitor.log(
            step, train_loss=3 + 8 * step**-0.4 + both, val_loss=3.1 + 8 * step**-0.4 + both
        )
    assert monitor.diagnose().findings[0].signal == "divergence"
    alone = Monitor()
    for step in range(100, 4001, 100):
        alone.log(step, val_loss=3.1 + 8 * step**-0.4 + max(0.0, step - 2000) / 1000)
    (finding,) = [f for f in alone.diagnose().findings if f.severity == "danger"]
    assert "may be a divergence as well" in finding.evidence


def test_hard_batches_in_a_row_are_chance_where_they_are_common():
    generator = np.random.default_rng(1)
    monitor = Monitor()
    for step in range(1, 20_001):
        monitor.log(
            step,
            train_loss=3
            + 5 * step**-0.3
            + 0.05 * generator.normal()
            + 1.5 * (generator.random() < 0.1),
        )
    longest = max(spike.points for spike in monitor.digest.spikes)
    assert longest >= 4
    assert not [
        f for f in monitor.diagnose().findings if f.signal == "spike" and f.severity != "info"
    ]


@pytest.mark.parametrize(
    ("outliers", "counted"), [(1, 1), (4, 4), (5, 5), (16, 16), (17, 0), (40, 0)]
)
def test_up_to_sixteen_outliers_in_a_row_may_be_chance(outliers, counted):
    digest = Digest()
    for step in range(300 + outliers):
        odd = 200 <= step < 200 + outliers
        digest.train(step, 3.0 + 0.01 * (step % 7) + 6.0 * odd)
    (spike,) = digest.spikes
    assert (spike.points, spike.first, spike.ended) == (outliers, 200, True)
    assert digest.single_outliers == counted


def test_the_share_of_evaluations_over_several_sessions():
    """Each session's clock begins at 0; before, five sessions of 100 s with 10 s of evaluation were
    half of the time.
    """
    digest = Digest()
    for session in range(5):
        for part in range(10):
            digest.other(100 * session + part, "seconds", 10.0 * (part + 1))
        digest.validation(100 * session + 50, 3.0, None, 10.0)
    assert digest.seconds == 500 and digest.evaluation_seconds == 50


def test_a_call_that_raises_leaves_no_trace(tmp_path):
    monitor = Monitor(path=tmp_path / "h.jsonl")
    with pytest.raises(ValueError):
        monitor.log(1, train_loss=2.0, lr="x")
    with pytest.raises(ValueError, match="step: expected a finite number"):
        monitor.log(10**400, train_loss=2.0)
    with pytest.raises(
        ValueError, match="fn: expected a loss or a dict with a val_loss, got {'lr': 1}"
    ):
        monitor.evaluate_every(1, lambda: {"lr": 1})(1)
    assert monitor.digest.points == 0
    monitor.close()
    assert (tmp_path / "h.jsonl").read_text() == ""


def test_an_odd_batch_stops_nobody():
    monitor = Monitor(stop_on=("spike", "non-finite"))
    for step in range(400):
        monitor.log(
            step,
            train_loss=3.0 + 0.01 * (step % 7) + (step == 300),
            grad_norm=math.inf if step == 350 else 1.0,
        )
    told = {f.signal: f.severity for f in monitor.check().findings}
    assert told["spike"] == told["non-finite"] == "info" and not monitor.should_stop


def test_a_training_loss_of_exactly_0_has_no_perplexity():
    """A trainer logs 0 where its loss was NaN: the dead run was shown with the perplexity 1.00."""
    digest = Digest()
    for step in range(8):
        digest.train(step, 0.0)
    found = diagnose(digest)
    assert found.train_loss == 0.0 and found.train_perplexity is None


@pytest.mark.filterwarnings("error")
def test_a_loss_with_its_graph_is_logged_without_a_warning():
    import torch

    monitor = Monitor()
    monitor.log(1, train_loss=torch.ones((), requires_grad=True) * 2)
    assert monitor.diagnose().train_loss == 2
