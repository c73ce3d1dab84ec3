"""No false alarm at any moment of eight real healthy runs, with every point or a part of them."""

import numpy as np
import pytest

from perplexity.monitor import diagnose, read_history
from perplexity.monitor.digest import Digest
from perplexity.monitor.history import History

VOCABULARY = 50_257


def thinned(history: History, keep: int) -> History:
    """Every ``keep``-th training loss, every validation loss."""
    made = History()
    events = iter(history.events)
    event = next(events, None)
    for place, (step, loss) in enumerate(zip(history.train_step, history.train_loss, strict=True)):
        while event is not None and event[0] <= place:
            made.add(event[1], {event[2]: event[3]})
            event = next(events, None)
        if place % keep == 0:
            made.add(step, {"train_loss": loss})
    while event is not None:
        made.add(event[1], {event[2]: event[3]})
        event = next(events, None)
    return made


MANY, FEW = 200, 40  # moments of a run, beside those behind each validation loss


@pytest.mark.parametrize(
    ("keep", "sampled"),
    [*((keep, FEW) for keep in (1, 10, 50))]
    + [pytest.param(keep, MANY, marks=pytest.mark.slow) for keep in (1, 4, 10, 50)],
)
def test_nothing_is_found_at_any_moment(training_curves, keep, sampled):
    alarms, moments, judged = [], 0, 0
    for file in training_curves:
        history = thinned(read_history(file), keep)
        count = len(history.train_step)
        generator = np.random.default_rng(len(file.name))
        # behind each validation loss
        ends = {(event[0], place + 1) for place, event in enumerate(history.events)}
        drawn = generator.integers(count // 5, count, min(sampled, count // 2))
        behind = np.array([event[0] for event in history.events])
        ends |= {(int(at), int(np.searchsorted(behind, at, side="right"))) for at in drawn}
        digest, done = Digest(), (0, 0)
        for train, events in sorted(ends):
            part = History()
            part.train_step, part.train_loss = (
                history.train_step[:train],
                history.train_loss[:train],
            )
            part.events = history.events[:events]
            done = digest.feed(part, *done)
            found = diagnose(digest, vocabulary_size=VOCABULARY)
            moments += 1
            judged += found.verdict == "healthy"
            if found.verdict not in ("healthy", "insufficient-data") or found.worst() != "info":
                alarms.append(
                    (
                        file.name,
                        train,
                        [(f.signal, f.evidence) for f in found.findings if f.severity != "info"],
                    )
                )
            if found.verdict == "insufficient-data":
                assert found.evaluations < 5 or found.points < 100
                assert found.health_score is None
    assert alarms == []
    assert judged > (0.8 if keep < 10 else 0.3) * moments


def test_a_whole_run_is_healthy(training_curves):
    for file in training_curves:
        found = diagnose(read_history(file).digest(), vocabulary_size=VOCABULARY)
        assert found.verdict == "healthy" and found.health_score == 100, file.name
        decline = next(f for f in found.findings if f.signal == "healthy-decline")
        assert (
            0 < decline.numbers["exponent"] < 2
            and decline.numbers["projected"] < found.train_loss + 0.05
        )
