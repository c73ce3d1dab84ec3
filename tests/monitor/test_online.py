"""The spikes that are found point by point, beside an online change detector of river's."""

import pytest
from faults import history, runs

WARMED_UP = 100  # steps: before, the loss itself changes


def first_change(losses: list[float]) -> int | None:
    """Step of Page and Hinkley's first alarm (Biometrika, 1954) for a mean that rises."""
    from river import drift

    detector = drift.PageHinkley(min_instances=30, delta=0.02, threshold=3.0, mode="up")
    for step, loss in enumerate(losses[WARMED_UP:], WARMED_UP + 1):
        detector.update(loss)
        if detector.drift_detected:
            return step
    return None


@pytest.mark.parametrize(
    "name", ["rate-x100", "corrupted-batch", "healthy", "frozen-rate", "contained"]
)
def test_both_see_the_same_jumps(name):
    for rows in runs(name):
        theirs = first_change([train for _, train, _ in rows])
        ours = [spike.first for spike in history(rows).digest().spikes if spike.points >= 5]
        if name in ("rate-x100", "corrupted-batch"):
            assert len(ours) == 1 and abs(ours[0] - theirs) <= 3
        else:
            assert ours == [] and theirs is None
