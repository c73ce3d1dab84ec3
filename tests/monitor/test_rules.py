"""Short runs of every kind that the monitor must tell apart; each is drawn here from a formula."""

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import rates

from perplexity.errors import InputError
from perplexity.monitor import Monitor, diagnose
from perplexity.monitor.digest import Digest
from perplexity.monitor.findings import SIGNALS
from perplexity.monitor.noise import about_its_curve, validation_noise
from perplexity.monitor.readers import read_history
from perplexity.monitor.settings import Settings


def judged(train=(), val=(), *, every=1, start=0, **options):
    """The signals above info of a run: ``train`` at each ``every`` steps, ``val`` as (step, loss)."""
    digest = Digest()
    rows = [((i + 1) * every + start, 0, loss) for i, loss in enumerate(train)]
    rows += [(step, 1, loss) for step, loss in val]
    for step, kind, loss in sorted(rows):
        (digest.validation if kind else digest.train)(step, loss)
    diagnosis = diagnose(digest, **options)
    return diagnosis, {f.signal: f for f in diagnosis.findings if f.severity != "info"}


def falls(count, start=6.0, floor=2.0, rate=0.5):
    """A power law in ``count`` points."""
    return floor + (start - floor) * (1 + np.arange(count) / (0.02 * count + 1)) ** -rate


def noisy(losses, share, seed=0):
    return losses * (1 + share * np.random.default_rng(seed).standard_normal(len(losses)))


def test_five_evaluations_that_rise_are_overfitting():
    """The noise was taken for 0.05 nats whatever the loss, and the bend of the curve for noise."""
    train = np.geomspace(0.5, 0.002, 200)
    losses = [0.31, 0.36, 0.42, 0.45, 0.47]
    _, found = judged(train, [(1000 * (i + 1), v) for i, v in enumerate(losses)], every=25)
    assert found["overfitting"].first_step == 1000


def test_a_turn_within_five_evaluations_is_overfitting():
    """The first rise of three was small beside a noise that the curve's own bend had raised."""
    train = noisy(np.repeat([1.2, 0.7, 0.3], 50), 0.05)
    losses = [1.12, 1.07, 1.15, 1.29, 1.45]
    _, found = judged(train, [(30 * (i + 1), v) for i, v in enumerate(losses)])
    assert found["overfitting"].first_step == 60


def test_harder_training_text_is_no_divergence_while_validation_gains():
    curve = noisy(falls(600, 6, 2.5), 0.01)
    harder = curve + np.where(np.arange(600) < 300, 0, 0.7)
    val = [(step, curve[step - 1] - 0.0002 * step) for step in range(20, 601, 20)]
    assert "divergence" not in judged(harder, val)[1]
    assert "divergence" in judged(harder)[1]


def test_a_cyclic_rate_at_its_height_is_no_divergence_where_it_is_logged():
    phase = (np.arange(1000) % 250) / 250
    rate = 0.5 * (1 + np.cos(np.pi * phase))
    losses = noisy(falls(1000, 6, 2.5) + 0.6 * rate, 0.003)
    found = {}
    for logged in (True, False):
        digest = Digest()
        for step in range(801):  # 50 steps behind the third restart
            if logged:
                digest.other(step, "lr", rate[step])
            digest.train(step, losses[step])
            if step % 10 == 9:
                digest.validation(step, losses[step])
        found[logged] = {f.signal for f in diagnose(digest).findings if f.severity == "danger"}
    assert not found[True] and found[False]


@pytest.mark.parametrize("level", [0.3, 1.0, 5.0])
def test_a_slow_rise_beyond_the_noise_is_overfitting_at_any_level(level):
    place = np.arange(25)
    val = level * (1 + 0.3 * np.exp(-place / 3) + 0.006 * np.clip(place - 12, 0, None))
    val = noisy(val, 0.001)
    train = level * (1.3 - 0.025 * place)
    _, found = judged(train, [(200 * (i + 1), v) for i, v in enumerate(val)], every=200)
    assert "overfitting" in found
    # and nothing is told of the same curve before it turns
    _, found = judged(train[:13], [(200 * (i + 1), v) for i, v in enumerate(val[:13])], every=200)
    assert "overfitting" not in found


def test_a_rise_that_single_evaluations_hide_is_seen_in_means():
    generator = np.random.default_rng(1)
    place = np.arange(150)
    val = 3.6 + 1.2 * np.exp(-place / 8) + 0.006 * np.clip(place - 40, 0, None)
    val += 0.23 * generator.standard_normal(150)
    train = 3.4 + 1.5 * np.exp(-place / 40)
    _, found = judged(train, [(1000 * (i + 1), v) for i, v in enumerate(val)], every=1000)
    assert "overfitting" in found


def test_a_gap_counts_by_its_mean():
    """The least of three evaluations hid a mean gap of 0.7 with a standard error of 0.04."""
    generator = np.random.default_rng(2)
    train = falls(313, 11, 1.6)
    val = train + 0.7 * np.clip(np.arange(313) / 100, 0, 1) + 0.2 * generator.standard_normal(313)
    _, found = judged(train, [(1000 * (i + 1), v) for i, v in enumerate(val)], every=1000)
    assert 0.6 < found["generalisation-gap"].numbers["gap"] < 0.8


def test_one_evaluation_shows_a_very_wide_gap():
    _, found = judged(falls(2000, 10, 0.2), [(1, 10.5), (2000, 2.8)])
    assert "generalisation-gap" in found
    # half a nat of five is no fault, of 0.8 it is
    _, found = judged(falls(20, 7, 4.4), [(i, 5.0) for i in range(15, 21)])
    assert "generalisation-gap" not in found


def test_a_short_run_that_diverges_without_validation():
    losses = np.concatenate([falls(150, 4, 1.9), np.linspace(2.0, 3.2, 150)])
    diagnosis, found = judged(noisy(losses, 0.02), every=10)
    assert diagnosis.verdict == "unhealthy" and "divergence" in found
    # a loss of 0.002 that grows ninefold, too
    losses = np.concatenate([np.geomspace(0.03, 0.002, 100), np.geomspace(0.002, 0.018, 230)])
    assert "divergence" in judged(noisy(losses, 0.05))[1]


def test_no_learning_at_all_is_a_plateau():
    _, found = judged(noisy(np.full(220, 7.62), 0.005), every=50)
    assert "plateau" in found


def test_a_run_that_settled_is_no_plateau():
    for seed in range(5):
        losses = noisy(0.99 + 0.6 * np.exp(-np.arange(200) / 12), 0.03, seed)
        assert judged(losses)[0].verdict == "healthy"


def test_a_run_resumed_late_is_not_extrapolated():
    diagnosis, found = judged(
        noisy(np.full(1200, 3.14), 0.03), [(19_250 + 250 * i, 3.143 - 0.001 * i) for i in range(5)],
        start=19_000,
    )  # fmt: skip
    assert not found and diagnosis.verdict == "healthy"


def test_memorised_text():
    for losses in (np.geomspace(4, 0.003, 300), np.concatenate([[19, 2, 0.2], np.full(87, 0.002)])):
        assert set(judged(losses)[1]) == {"memorised"}
    # validation as low says that the text is that easy, down to a perplexity of 1.01
    low = np.concatenate([np.geomspace(2, 0.03, 50), np.full(100, 0.03)])
    assert "memorised" in judged(low)[1]
    assert not judged(low, [(step, 0.032) for step in range(80, 150, 10)])[1]


def test_falls_at_every_epoch_are_memorisation():
    """Twice within a few logged steps, an epoch apart; one fall may be a cut of the rate."""
    levels = np.repeat([1.1, 0.73, 0.42], 400)
    _, found = judged(noisy(levels, 0.03))
    assert found["memorised"].numbers == {"falls": 2, "epoch": pytest.approx(400, abs=30)}
    assert "memorised" not in judged(noisy(levels[:800], 0.03))[1]
    assert "memorised" not in judged(noisy(np.repeat([1.1, 1.0, 0.9], 400), 0.03))[1]
    monitor = Monitor()
    for step, loss in enumerate(noisy(levels, 0.03)):
        monitor.log(step, train_loss=loss, lr=1e-3 * 0.1 ** (step // 400))
    assert all(f.signal != "memorised" for f in monitor.diagnose().findings)


def test_validation_below_training_from_the_start_is_dropout():
    train = falls(700, 5, 2.4)
    steps = range(10, 701, 10)
    val = [(s, train[s - 1] - 0.35) for s in steps]
    assert not judged(noisy(train, 0.01), val)[1]
    leaks = [(s, train[s - 1] - 0.6 * min(1, s / 300)) for s in steps]
    assert "leakage-suspected" in judged(noisy(train, 0.01), leaks)[1]


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_an_evaluation_that_measures_nothing(value):
    diagnosis, found = judged(falls(313, 4, 1.1), [(s, value) for s in range(10, 310, 10)])
    assert set(found) == {"broken-evaluation"} and diagnosis.verdict == "watch"


def test_losses_at_or_below_zero_are_not_judged():
    """TRL logs the surrogate of a policy gradient as ``loss``."""
    generator = np.random.default_rng(3)
    for losses in (1e-4 * generator.standard_normal(1000), np.zeros(200)):
        diagnosis, found = judged(losses)
        assert not found and diagnosis.verdict == "insufficient-data"
        assert [f.signal for f in diagnosis.findings] == ["not-cross-entropy"]
    # a loss that is no number is still told
    assert "non-finite" in judged([*(-1.0 for _ in range(20)), math.nan])[1]


def test_a_dead_run_is_danger_at_its_first_row():
    """transformers' Trainer logs a loss of NaN as 0.0; the gradient norm beside it is NaN."""
    monitor = Monitor(stop_on="danger")
    for step in range(1, 100):
        monitor.log(step, train_loss=3.0, grad_norm=1.0)
    assert not monitor.should_stop
    monitor.log(100, train_loss=0.0, grad_norm=math.nan)
    assert monitor.should_stop and monitor.stopped_by.signal == "non-finite"
    assert "exactly 0.0" in monitor.stopped_by.evidence


def test_a_danger_that_was_told_stays_until_it_is_over():
    """By noise alone, which raises what counts as chance, a rise is not over."""
    losses = [*(3 - 0.1 * n for n in range(8)), *(2.3 + 0.1 * n for n in range(1, 8))]
    digest = Digest()
    for step, loss in enumerate(losses, 1):
        digest.validation(100 * step, loss)
    told = diagnose(digest)
    assert "overfitting" in {f.signal for f in told.findings}
    noisy_on = [2.5, 3.6, 2.5, 3.5, 2.5, 3.6]
    for step, loss in enumerate(noisy_on, len(losses) + 1):
        digest.validation(100 * step, loss)
    assert "overfitting" not in {f.signal for f in diagnose(digest).findings}
    still = diagnose(digest, told=told.findings)
    assert still.verdict == "unhealthy" and still.findings[0] == told.findings[0]
    digest.validation(100 * 30, 2.31)  # back at the best
    assert diagnose(digest, told=still.findings).verdict != "unhealthy"
    # or steps went back to before it
    digest.validation(100 * 31, 3.4)
    digest.train(3100, 3.0)
    digest.train(700, 2.4)
    assert diagnose(digest, told=told.findings).verdict != "unhealthy"


def test_losses_of_zero_at_once_are_lost_weights():
    """Without a gradient norm beside them they were called memorised text, a warning."""
    diagnosis, found = judged([*falls(299, 5, 2), *np.zeros(300)], every=10)
    assert found["non-finite"].severity == "danger" and diagnosis.verdict == "unhealthy"
    assert found["non-finite"].first_step == 3000 and "memorised" not in found
    # A text that is learned by heart comes near 0 first; a single 0.0 is a batch without labels.
    assert "non-finite" not in judged([*np.geomspace(3, 1e-3, 200), *np.zeros(100)])[1]
    assert not judged([*falls(200, 5, 2), 0.0, 0.0, *np.full(50, 2.0)])[1]


def test_gradient_norms_of_nan_to_the_end_are_lost_weights():
    """The losses that transformers' Trainer logs then are the mean of those before."""
    monitor = Monitor(stop_on="danger", check_every=1000)
    for step in range(1, 301):
        norm = math.nan if step > 250 or step < 20 or step in (100, 101) else 1.0
        monitor.log(step, train_loss=2 + 3 / step, grad_norm=norm)
        assert monitor.should_stop == (step >= 258)
    assert monitor.stopped_by.first_step == 251 and monitor.stopped_by.severity == "danger"
    monitor.log(301, train_loss=2.0, grad_norm=1.0)
    assert monitor.diagnose().verdict != "unhealthy"


def test_signs_of_losses_are_counted_anew_after_steps_went_back():
    digest = Monitor().digest
    for step in range(1, 201):
        digest.train(step, 1.0 if step < 100 else -1.0)
    for step in range(90, 201):
        digest.train(step, 1.0)
    assert (digest.positive, digest.negative, digest.zeros) == (200, 0, 0)


def test_validation_spikes():
    val = falls(100, 8, 2.3)
    for at in (40, 57, 72):
        val[at] += 1.5
    _, found = judged(falls(200, 8, 2.3), [(2 * i, v) for i, v in enumerate(val, 1)])
    assert set(found) == {"spike"} and found["spike"].numbers["count"] == 3


def test_evaluations_alone_get_a_verdict():
    diagnosis, found = judged((), [(100 * i, v) for i, v in enumerate(falls(20, 5, 3), 1)])
    assert diagnosis.verdict == "healthy" and not found
    diagnosis, _ = judged((), [(100, 5.0), (200, 4.0)])
    assert diagnosis.verdict == "insufficient-data"
    assert "a verdict needs" in diagnosis.notes[0]


def test_each_validation_set_is_judged():
    monitor = Monitor()
    for step in range(1, 1001):
        monitor.log(step, train_loss=float(falls(1000)[step - 1]))
        if step % 100 == 0:
            rises = 2.5 + 0.08 * max(0, step / 100 - 5)
            monitor.log(step, val_loss={"wiki": 2.5 + 5 / step, "code": rises})
    findings = [f for f in monitor.diagnose().findings if f.severity != "info"]
    assert [(f.signal, f.set) for f in findings] == [("overfitting", "code")]
    assert "overfitting of code" in str(findings[0])


def test_sets_are_the_same_live_and_read_back(tmp_path):
    """The first set logged was no main set: the run seemed to have no validation loss at all."""

    def seen(diagnosis):
        findings = [(f.signal, f.severity, f.set) for f in diagnosis.findings]
        return diagnosis.verdict, diagnosis.evaluations, diagnosis.val_loss, findings

    path = tmp_path / "run.jsonl"
    monitor = Monitor(path=path)
    for step, loss in enumerate(falls(600), 1):
        monitor.log(step, train_loss=loss)
        if step % 100 == 0:
            rise = 0.5 * max(0, step / 100 - 2)
            monitor.log(step, val_loss={"wiki": loss + rise, "code": loss})
    live = monitor.diagnose()
    monitor.close()
    assert live.evaluations == 6
    assert ("generalisation-gap", "wiki") in [(f.signal, f.set) for f in live.findings]
    assert seen(live) == seen(diagnose(read_history(path).digest()))
    assert seen(live) == seen(Monitor(path=path).diagnose())


def test_evaluate_every_takes_the_last_step():
    monitor = Monitor(total_steps=250)
    at = monitor.evaluate_every(100, lambda: 2.0)
    assert [step for step in range(1, 251) if at(step) is not None] == [100, 200, 250]


def test_noise_apart_from_a_bend():
    generator = np.random.default_rng(4)
    place = np.arange(1, 61)
    curve = 2 + 4 * place**-0.5
    assert about_its_curve(curve[20:]) < 1e-4
    estimates = [about_its_curve(curve + 0.05 * generator.standard_normal(60)) for _ in range(200)]
    assert np.mean(estimates) == pytest.approx(0.05, rel=0.15)
    # of four evaluations the prior alone speaks: a hundredth of the loss
    assert validation_noise(np.array([5.0, 4.0, 4.1, 4.2]), Settings()) == pytest.approx(0.0415)


# ---- real runs, kept beside the project

RUNS = os.environ.get("PERPLEXITY_REAL_LOGS")


@pytest.mark.skipif(not RUNS, reason="PERPLEXITY_REAL_LOGS names no folder of labelled runs")
def test_labelled_runs():
    """At most 1 % of healthy runs with a warning, 85 % of faults found, 90 % with a verdict."""
    alarms, missed, silent, healthy, faulty, judgeable = [], [], [], 0, 0, 0
    for row in csv.DictReader((Path(RUNS) / "labels.csv").open(encoding="utf-8")):
        diagnosis = diagnose(read_history(Path(RUNS) / row["file"]).digest())
        found = {f.signal for f in diagnosis.findings if f.severity != "info"}
        if row["truth"] != "healthy":
            faulty += 1
            missed += [] if found & rates.RIGHT[row["truth"]] else [(row["file"], found)]
            continue
        healthy += 1
        alarms += [(row["file"], found)] if found else []
        if int(row["evaluations"]) >= 5 or int(row["train_losses"]) >= 60:
            judgeable += 1
            silent += [row["file"]] if diagnosis.verdict == "insufficient-data" else []
    assert len(alarms) <= 0.01 * healthy, alarms
    assert len(missed) <= 0.15 * faulty, missed
    assert len(silent) <= 0.10 * judgeable, silent


def test_runs_drawn_by_formula_are_healthy():
    """A tenth of those that rates.py draws."""
    alarms = {seed: found for seed in range(50) if (found := rates.ever(rates.drawn(seed), 10))}
    assert len(alarms) <= 2, alarms


def test_the_documented_rates_are_the_committed_ones():
    text = rates.DOCUMENT.read_text(encoding="utf-8")
    assert rates.documented(text, json.loads(rates.RESULTS.read_text(encoding="utf-8"))) == text


CASES = os.environ.get("PERPLEXITY_MONITOR_CASES")
# The word by which a case's right verdict names a signal that is called otherwise.
CALLED = {"unstable": "spike", "broken": "broken-evaluation"}


@pytest.mark.skipif(not CASES, reason="PERPLEXITY_MONITOR_CASES names no folder of small histories")
def test_small_histories_with_the_right_verdict():
    """Each stands for a kind met in real runs; ``right`` begins with the verdict."""
    wrong = []
    for case in json.loads((Path(CASES) / "cases.json").read_text(encoding="utf-8")):
        (file,) = Path(CASES).glob(f"case_{case['case']:02d}.*")
        right = case["right"]
        if right.startswith("an error"):
            with pytest.raises(InputError, match=r"test/nll.*--tag"):
                read_history(file)
            continue
        history = read_history(file)
        diagnosis = diagnose(history.digest())
        told = {f.signal for f in diagnosis.findings if f.severity != "info"}
        # "healthy (...)", "readable: ...", "two writers ...": nothing to warn of.
        named = {signal for signal in SIGNALS if signal in right}
        named |= {signal for word, signal in CALLED.items() if word in right}
        as_bad = right.startswith(("unhealthy", "watch")) == bool(told)
        first = right.startswith("unhealthy") == (diagnosis.verdict == "unhealthy")
        if not (len(history) and as_bad and first and named <= told):
            wrong.append((case["case"], right, diagnosis.verdict, told))
    assert not wrong, wrong
