"""False alarms and misses of the monitor, into bench/results and docs/monitor.md's table.

``PERPLEXITY_REAL_LOGS=FOLDER python tests/monitor/rates.py``: runs with labels, as they are, at many
moments and thinned out; and healthy runs drawn by formula. Four minutes.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np

from perplexity.monitor import diagnose
from perplexity.monitor.digest import Digest
from perplexity.monitor.readers import read_history

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "monitor-rates.json"
DOCUMENT = ROOT / "docs" / "monitor.md"
MARKS = "<!-- rates: begin -->\n", "<!-- rates: end -->\n"
MOMENTS = 150  # of each healthy run
RIGHT = {  # a fault to the signals that are right for it
    "overfitting": {"overfitting"},
    "divergence": {"divergence", "overfitting", "spike"},
    "unstable": {"spike", "divergence"},
    "gap": {"generalisation-gap", "overfitting"},
    "no learning": {"plateau"},
    "memorised": {"leakage-suspected", "memorised"},
    "memorised by epochs": {"leakage-suspected", "memorised"},
}
Row = tuple[float, bool, float]  # step, whether it is a validation loss, loss


def rows_of(path: Path) -> list[Row]:
    history = read_history(path)
    training = [(step, False, loss) for step, loss in zip(*history.arrays(), strict=True)]
    validation = [(step, True, loss) for step, loss in zip(*history.of("val_loss"), strict=True)]
    return sorted(training + validation)


def signals(digest: Digest) -> set[str]:
    return {f.signal for f in diagnose(digest).findings if f.severity != "info"}


def digest_of(rows: list[Row]) -> Digest:
    digest = Digest()
    for step, is_validation, loss in rows:
        (digest.validation if is_validation else digest.train)(step, loss)
    return digest


def ever(rows: list[Row], moments: int = MOMENTS) -> set[str]:
    """The signals above info at any of so many moments, and at the end."""
    digest, seen = Digest(), set()
    looks = set(np.linspace(0, len(rows) - 1, min(moments, len(rows))).astype(int).tolist())
    for place, (step, is_validation, loss) in enumerate(rows):
        (digest.validation if is_validation else digest.train)(step, loss)
        if place in looks:
            seen |= signals(digest)
    return seen


def thinned(rows: list[Row], keep: int) -> list[Row]:
    """One in ``keep`` training losses, every validation loss."""
    training = [row for row in rows if not row[1]][::keep]
    return sorted(training + [row for row in rows if row[1]])


def drawn(seed: int) -> list[Row]:
    """A healthy run: a power law with noise, perhaps a cooldown, epochs or dropout's offset."""
    rng = np.random.default_rng(seed)
    points = int(np.exp(rng.uniform(np.log(20), np.log(3000))))
    evaluations = min(points, int(np.exp(rng.uniform(0, np.log(120)))))
    start = np.exp(rng.uniform(np.log(0.8), np.log(11)))
    floor, rate = start * rng.uniform(0.2, 0.9), rng.uniform(0.2, 1.0)
    place = np.arange(1, points + 1)
    curve = floor + (start - floor) * (1 + place / (rng.uniform(0.002, 0.1) * points + 1)) ** -rate
    if rng.random() < 0.4:
        curve -= curve[-1] * 0.15 * rng.random() * np.clip((place / points - 0.8) / 0.2, 0, 1)
    noise, noise_of_validation = (
        rng.choice([0.003, 0.01, 0.03, 0.1, 0.25]),
        10.0 ** -rng.integers(2, 5),
    )
    train = curve * (1 + noise * rng.standard_normal(points))
    if rng.random() < 0.2:
        epochs = int(rng.integers(2, 5))
        for epoch in range(1, epochs):
            train[epoch * points // epochs :] *= rng.uniform(0.92, 0.99)
    offset = rng.choice([0, 0, -0.05, -0.1, -0.3, 0.02]) * floor
    val = (curve + offset) * (1 + noise_of_validation * rng.standard_normal(points))
    every = max(1, points // evaluations)
    rows = [(10 * (i + 1), False, max(1e-3, loss)) for i, loss in enumerate(train)]
    return sorted(rows + [(10 * (i + 1), True, val[i]) for i in range(every - 1, points, every)])


def measured(folder: Path) -> dict:
    labels = list(csv.DictReader((folder / "labels.csv").open(encoding="utf-8")))
    runs = [(row["file"], row["truth"], rows_of(folder / row["file"])) for row in labels]
    healthy = [(name, rows) for name, truth, rows in runs if truth == "healthy"]
    faulty = [run for run in runs if run[1] != "healthy"]
    judgeable = [
        rows for _, rows in healthy
        if sum(row[1] for row in rows) >= 5 or sum(not row[1] for row in rows) >= 60
    ]  # fmt: skip
    missed = lambda keep: [  # noqa: E731
        name for name, truth, rows in faulty
        if not signals(digest_of(thinned(rows, keep))) & RIGHT[truth]
    ]  # fmt: skip
    alarms = [ever(drawn(seed), 25) for seed in range(500)]
    return {
        "command": "python tests/monitor/rates.py",
        "healthy": len(healthy),
        "faulty": len(faulty),
        "judgeable": len(judgeable),
        "alarms_at_the_end": [name for name, rows in healthy if signals(digest_of(rows))],
        "alarms_at_any_moment": [name for name, rows in healthy if ever(rows)],
        "alarms_thinned": [
            name for name, rows in healthy for keep in (2, 4) if signals(digest_of(thinned(rows, keep)))
        ],
        "without_verdict": sum(
            diagnose(digest_of(rows)).verdict == "insufficient-data" for rows in judgeable
        ),
        "missed": missed(1),
        "missed_of_every_second_point": missed(2),
        "missed_of_every_fourth_point": missed(4),
        "drawn": len(alarms),
        "alarms_of_drawn": sum(map(bool, alarms)),
        "signals_of_drawn": dict(Counter(signal for found in alarms for signal in found)),
    }  # fmt: skip


def table(found: dict) -> str:
    healthy, faulty = found["healthy"], found["faulty"]
    told = lambda missed: faulty - len(missed)  # noqa: E731
    rows = [
        ("healthy, a warning or danger at the end", healthy, len(found["alarms_at_the_end"])),
        (f"healthy, one at any of {MOMENTS} moments", healthy, len(found["alarms_at_any_moment"])),
        ("healthy, one with every second or fourth training loss", healthy,
         len(set(found["alarms_thinned"]))),
        ("healthy, no verdict (of those with 5 evaluations or 60 training losses)",
         found["judgeable"], found["without_verdict"]),
        ("with a fault, found by a right signal", faulty, told(found["missed"])),
        ("the same, of every second training loss", faulty,
         told(found["missed_of_every_second_point"])),
        ("the same, of every fourth training loss", faulty,
         told(found["missed_of_every_fourth_point"])),
        ("healthy by formula, one at any of 25 moments", found["drawn"], found["alarms_of_drawn"]),
    ]  # fmt: skip
    head = "| runs | of them | counted |\n| --- | ---: | ---: |\n"
    return head + "".join(f"| {what} | {of} | {count} |\n" for what, of, count in rows)


def documented(text: str, found: dict) -> str:
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + table(found) + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    found = measured(Path(os.environ["PERPLEXITY_REAL_LOGS"]))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(documented(DOCUMENT.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(table(found))
