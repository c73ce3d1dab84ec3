"""``python bench/monitor.py``: what the monitor costs: a million points read and judged, a call of ``log``, an update.

Written to bench/results/cpu-<name>-monitor.json; asserts nothing.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from environment import RESULTS, commit, cpu_name, now, slug, version, write

from perplexity.monitor import Monitor, diagnose, read_history

POINTS = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / f"cpu-{slug(cpu_name())}-monitor.json")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    steps = np.arange(1, POINTS + 1)
    losses = 3 + 5 * steps**-0.3 + 0.05 * generator.normal(size=POINTS)
    rows = (
        f"{step},{loss:.5f},{loss:.5f}" if step % 1000 == 0 else f"{step},{loss:.5f},"
        for step, loss in zip(steps.tolist(), losses.tolist(), strict=True)
    )
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write("step,train_loss,val_loss\n" + "\n".join(rows) + "\n")
        file.flush()
        import pyarrow.csv  # noqa: F401 (imports aside)
        import scipy.stats  # noqa: F401

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        history = read_history(file.name)
        read = time.perf_counter()
        found = diagnose(history.digest(), vocabulary_size=50_257)
        judged = time.perf_counter()
    calls = losses[:200_000].tolist()
    monitor = Monitor()
    begin = time.perf_counter()
    for step, loss in enumerate(calls):
        monitor.log(step, train_loss=loss)
    log = (time.perf_counter() - begin) / len(calls)
    updates = []
    for _ in range(20):  # of the view that follows a file: one more point, and the diagnosis
        begin = time.perf_counter()
        monitor.log(len(calls), train_loss=3.0)
        monitor.diagnose()
        updates.append(time.perf_counter() - begin)
    results = dict(
        device=cpu_name(),
        numpy=version("numpy"),
        date=now(),
        commit=commit(),
        points=POINTS,
        verdict=found.verdict,
        read_seconds=read - start,
        judge_seconds=judged - read,
        peak_mib=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        process_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        log_microseconds=1e6 * log,
        diagnose_milliseconds=1e3 * sorted(updates)[len(updates) // 2],
    )
    write(results, options.out)
    for name, value in results.items():
        print(f"{name:24} {value if not isinstance(value, float) else f'{value:.3f}'}")


if __name__ == "__main__":
    main()
