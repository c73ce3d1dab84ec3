"""Two runs beside each other: the difference, its interval, and what the commands say of it."""

import json
import math

import numpy as np
import pytest

from perplexity.errors import InputError
from perplexity.monitor.history import History
from perplexity.monitor.run_comparison import compare_runs


def run(seed, *, floor=2.0, count=1000, noise=0.08, wander=0.0, every=1, tokens=None, name="a"):
    """A power law over steps, with noise that may hang together from step to step."""
    generator, history, error = np.random.default_rng(seed), History(name), 0.0
    for step in range(every, count + 1, every):
        error = wander * error + math.sqrt(1 - wander**2) * noise * generator.standard_normal()
        curve = floor + 4 * (step / 50 + 1) ** -0.4
        row = {"train_loss": curve + error}
        if step % 100 == 0:
            row["val_loss"] = curve + 0.05 + 0.005 * generator.standard_normal()
        if tokens is not None:
            row["tokens"] = tokens * step
        history.add(step, row)
    return history


@pytest.mark.parametrize("wander", [0.0, 0.8])
def test_intervals_cover_the_difference(wander):
    """Of 95 % intervals at least 85 % hold it, though losses hang together; few of equal runs part."""
    covered, parted = [], []
    for seed in range(60):
        one, other = run(2 * seed, wander=wander), run(2 * seed + 1, floor=2.03, wander=wander)
        found, of_val = compare_runs(one, other).differences
        covered.append([d.low <= 0.03 <= d.high for d in (found, of_val)])
        equal = compare_runs(one, run(2 * seed + 1, wander=wander)).differences
        parted.append([d.larger_than_noise for d in equal])
    assert np.mean(covered, axis=0).min() >= 0.85 and np.mean(parted, axis=0).max() <= 0.15


def test_noise_that_both_runs_share_cancels():
    """Two runs of the same batches in the same order."""
    one, other = run(3, noise=0.3), run(3, noise=0.3, floor=2.01)
    found = compare_runs(one, other).differences[0]
    assert found.paired and found.larger_than_noise
    assert found.difference == pytest.approx(0.01, abs=1e-9)
    apart = compare_runs(one, run(4, noise=0.3, floor=2.01, every=3)).differences[0]
    assert not apart.paired and not apart.larger_than_noise


def test_by_tokens_where_both_logged_them():
    """At equal steps a run of twice the batch is ahead; at equal tokens it is behind."""
    one, other = run(1, tokens=1000, noise=0.01), run(2, tokens=2000, noise=0.01, floor=1.95)
    comparison = compare_runs(one, other)
    assert comparison.by == "tokens" and comparison.end == 1_000_000
    # The other's loss at step 1,000 of one is that of its step 500.
    expected = (1.95 + 4 * 11**-0.4) - (2 + 4 * 21**-0.4)
    assert comparison.differences[1].difference == pytest.approx(expected, abs=0.02)
    assert (
        comparison.differences[1].difference
        > 0
        > compare_runs(one, other, "step").differences[1].difference
    )
    by_step = compare_runs(one, run(2, noise=0.01))
    assert by_step.by == "step" and by_step.notes == ["compared by step: a has no tokens"]
    with pytest.raises(InputError, match="by: expected step, since b has no tokens"):
        compare_runs(one, run(2, name="b"), "tokens")


def test_where_the_better_run_had_the_others_loss():
    one, other = run(1, noise=0.0), run(1, noise=0.0, floor=1.8)
    comparison = compare_runs(one, other)
    # 1.8 + 4 x^-0.4 = 2 + 4 · 21^-0.4
    step = 50 * ((0.2 + 4 * 21**-0.4) / 4) ** (-1 / 0.4) - 50
    assert comparison.reached["training"] == pytest.approx(step, rel=0.25)
    assert comparison.in_words("a", "b")[0].startswith("b reached the last training loss of a at")


def test_what_a_restart_replaced_is_not_compared():
    one, other = run(1, noise=0.01), run(1, noise=0.01, count=800)
    for step in range(500, 1001):  # the other run diverged from step 700 on, and was restarted
        other.add(step, {"train_loss": 2.0 + 4 * (step / 50 + 1) ** -0.4})
    for step in range(600, 801):
        other.train_loss[step - 1] = 9.0
    found = compare_runs(one, other).differences[0]
    assert abs(found.difference) < 0.01


def test_runs_without_a_common_range():
    late = History("late")
    for step in range(5000, 5100):
        late.add(step, {"train_loss": 2.0})
    with pytest.raises(InputError, match="late: expected a loss over the same steps as one of a"):
        compare_runs(run(1), late)
    few = compare_runs(run(1), run(2, count=9), "step")
    assert not few.differences and few.notes == [
        "training: too few losses of both runs over the same steps to compare"
    ]


def rows(history):
    return "".join(f"{step:.0f},{loss}\n" for step, loss in zip(*history.arrays(), strict=True))


def test_the_commands(tmp_path, ppl_here, fails):
    for name, floor in (("a", 2.0), ("b", 1.9)):
        text = "step,loss\n" + rows(run(1, floor=floor, name=name))
        (tmp_path / f"{name}.csv").write_text(text)
    done = ppl_here("monitor", "a.csv", "b.csv", "--json", "out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "b.csv − a.csv, at step 1,000" in done.stdout
    assert "larger than their noise" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert [each["run"] for each in written["runs"]] == ["a.csv", "b.csv"]
    (comparison,) = written["comparisons"]
    assert comparison["differences"][0]["difference"] == pytest.approx(-0.1, abs=1e-6)
    done = ppl_here("report", "a.csv", "b.csv", "-o", "out.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "b.csv beside a.csv, at step 1,000" in page and "a.csv: training" in page
    fails(tmp_path, ["monitor", "a.csv", "b.csv", "--follow"], ["--follow: expected one history"])
    fails(tmp_path, ["monitor", "a.csv", "b.csv", "--by", "tokens"], ["has no tokens"])
    fails(
        tmp_path,
        ["report", "a.csv", "b.csv", "-o", "o.html", "--png", "o.png"],
        ["--png: expected"],
    )


def test_numbers_of_rows_do_not_compare_with_steps():
    """The same run from two logs, one without steps, once differed by 1.3 nats at equal 'steps'."""
    logged, numbered = run(1), run(2)
    numbered.numbered = True
    with pytest.raises(InputError, match="expected logged steps, as .* has, got none"):
        compare_runs(logged, numbered, "step")
    both = run(3)
    both.numbered = True
    assert compare_runs(numbered, both, "step").differences
