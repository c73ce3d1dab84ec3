"""Curves drawn from a known law: noise alone raises no alarm at any moment, a rise above it
does.
"""

import numpy as np
import pytest

from perplexity import Monitor
from perplexity.monitor.digest import Digest
from perplexity.monitor.validation import leakage, overfitting


def told_at(losses: np.ndarray, training: np.ndarray) -> int | None:
    """The first evaluation after which overfitting is told; 100 steps and 32 training losses
    between two.
    """
    digest = Digest()
    for place, (loss, train) in enumerate(zip(losses.tolist(), training.tolist(), strict=True)):
        for part in range(32):
            digest.train(100 * place + 3 * part + 1, train + 0.02 * (-1) ** part)
        digest.validation(100 * place + 100, loss)
        if list(overfitting(digest)):
            return place
    return None


@pytest.mark.parametrize("noise", [0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("shape", ["power law", "flat"])
@pytest.mark.parametrize("count", [12, pytest.param(40, marks=pytest.mark.slow)])
def test_a_noisy_validation_loss_is_no_overfitting(shape, noise, count):
    """12 or 40 runs of 60 evaluations, looked at after each. Before, one in eight with noise of 0.05 was
    told to stop.
    """
    generator = np.random.default_rng(0)
    place = np.arange(1, 61)
    base = (
        3 + 5 * (100.0 * place) ** -0.35 if shape == "power law" else 3 + 0.3 * np.exp(-place / 8)
    )
    alarms = [told_at(base + noise * generator.normal(size=60), base) for _ in range(count)]
    assert [alarm for alarm in alarms if alarm is not None] == []


@pytest.mark.parametrize(
    ("noise", "slope", "delay"),
    [(0.0, 0.03, 10), (0.02, 0.03, 12), (0.05, 0.03, 20), (0.1, 0.06, 20)],
)
def test_a_rise_above_the_noise_is_told(noise, slope, delay):
    """The validation loss turns at evaluation 20 and rises by ``slope`` nats an evaluation;
    training goes on falling.
    """
    generator = np.random.default_rng(1)
    place = np.arange(60)
    base = 3 + 2 * np.exp(-place / 5)
    found = [
        told_at(
            base + slope * np.clip(place - 20, 0, None) + noise * generator.normal(size=60),
            base - 0.01 * place,
        )
        for _ in range(20)
    ]
    assert all(at is not None and at >= 20 for at in found)
    assert np.median(found) <= 20 + delay


@pytest.mark.parametrize("share", [0.05, 0.02, 0.01, 0.005])
def test_the_lag_of_a_running_average_is_no_leak(share):
    """A training loss logged as an exponential average lies above a validation loss of the same
    text while both fall.
    """
    generator = np.random.default_rng(2)
    monitor, average = Monitor(vocabulary_size=50_257), None
    for step in range(1, 6001):
        loss = 3.2 + 4.7 * np.exp(-step / 300) + 3.1 * step**-0.4
        drawn = loss + 0.08 * generator.normal()
        average = drawn if average is None else average + share * (drawn - average)
        monitor.log(step, train_loss=average, val_loss=loss if step % 100 == 0 else None)
        if step % 100 == 0:
            told = {f.signal for f in monitor.diagnose().findings if f.severity != "info"}
            assert not told & {"leakage-suspected", "worse-than-uniform"}, step


def test_a_leak_under_a_running_average_is_told_once_it_is_flat():
    generator = np.random.default_rng(3)
    digest, average = Digest(), 4.0
    for step in range(1, 20_001):
        loss = 3 + 5 * step**-0.4
        average += 0.01 * (loss + 0.08 * generator.normal() - average)
        digest.train(step, average)
        if step % 200 == 0:
            digest.validation(step, loss - 0.4 * min(1, step / 4000))
    assert list(leakage(digest))


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (None, "check that the learning rate is not zero"),
        (lambda step: 1e-3, "cosine or linear decay often gives the next gain"),
        (lambda step: 1e-3 * (1 - step / 4100), "decayed to 2% of its peak"),
        (lambda step: 0.0 if step > 1500 else 1e-3, "the learning rate is 0"),
    ],
)
def test_what_a_plateau_is_advised_follows_the_schedule(rate, words):
    generator = np.random.default_rng(4)
    monitor = Monitor()
    for step in range(1, 4001):
        monitor.log(
            step,
            train_loss=3 + np.exp(-step / 100) + 0.02 * generator.normal(),
            lr=rate and rate(step),
        )
    (finding,) = [f for f in monitor.diagnose().findings if f.signal == "plateau"]
    assert words in finding.advice
