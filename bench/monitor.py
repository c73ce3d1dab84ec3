"""Time and memory of the monitor: ``python bench/monitor.py``.

Measured are the reading and the diagnosis of a million points, a call of ``log``, and an update of
the view that follows a file. The results go to bench/results/cpu-<name>-monitor.json. Nothing is
asserted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from environment import RESULTS, commit, cpu_name, now, slug, version, write

from perplexity.monitor import Monitor, diagnose, read_history

POINTS = 1_000_000


def cost(*arguments: str) -> tuple[float, float]:
    """Return the high-water mark of a ``ppl`` process in MiB and its processor time in seconds.

    The process reads the mark from its own status: getrusage would count the memory of this
    process before the child's start, too.
    """
    # Not by support/peak_memory.py, whose torch the command does without.
    code = """
import sys, time
from perplexity.cli import main
main(sys.argv[1:])
with open("/proc/self/status") as status:
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
print(peak, time.process_time(), file=sys.stderr)
"""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, seconds = done.stderr.split()[-2:]
    return int(peak) / 2**10, float(seconds)


def peak_mib(*arguments: str) -> float:
    """Return the high-water mark of a ``ppl`` process in MiB."""
    return cost(*arguments)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"cpu-{slug(cpu_name())}-monitor.json"
    )
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    steps = np.arange(1, POINTS + 1)
    losses = 3 + 5 * steps**-0.3 + 0.05 * generator.normal(size=POINTS)
    points = list(zip(steps.tolist(), losses.tolist(), strict=True))
    import pyarrow.csv  # imports aside
    import pyarrow.json  # noqa: F401
    import scipy.stats  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.csv"
        with path.open("w") as file:
            file.write("step,train_loss,val_loss,lr,grad_norm,tokens\n")
            rest = lambda s: f"{3e-4 * (1 - s / POINTS):.6e},{0.5 + s % 7 / 10},{8192 * s}"  # noqa: E731
            file.writelines(
                f"{s},{x:.5f},{f'{x:.5f}' if s % 1000 == 0 else ''},{rest(s)}\n" for s, x in points
            )
        few = Path(folder) / "few.csv"
        few.write_text("step,train_loss\n" + "".join(f"{s},{x:.5f}\n" for s, x in points[:1000]))
        lines = Path(folder) / "run.jsonl"
        with lines.open("w") as file:
            val = lambda s, x: f', "val_loss": {x:.5f}' if s % 1000 == 0 else ""  # noqa: E731
            file.writelines(
                f'{{"step": {s}, "train_loss": {x:.5f}{val(s, x)}, "lr": {3e-4 * (1 - s / POINTS):.6e}, '
                f'"grad_norm": {0.5 + s % 7 / 10}, "tokens": {8192 * s}}}\n'
                for s, x in points
            )
        del points
        start = time.perf_counter()
        history = read_history(path)
        read = time.perf_counter()
        diagnosis = diagnose(history.digest(), vocabulary_size=50_257)
        judged = time.perf_counter()
        begin = time.perf_counter()
        assert len(read_history(lines)) == len(history)
        read_lines = time.perf_counter() - begin
        costs = {}  # of the whole command, imports and all
        for name, history_file in (("of_few_points", few), ("", path), ("json_lines", lines)):
            mib, seconds = cost("monitor", str(history_file))
            of = f"command_{name}".rstrip("_")
            costs |= {f"{of}_mib": mib, f"{of}_processor_seconds": seconds}
    calls = losses[:200_000].tolist()
    monitor = Monitor()
    begin = time.perf_counter()
    for step, loss in enumerate(calls):
        monitor.log(step, train_loss=loss)
    log = (time.perf_counter() - begin) / len(calls)
    begin = time.perf_counter()
    for step, loss in enumerate(calls[:20_000], len(calls)):
        monitor.log(step, train_loss=loss, val_loss=loss)
    evaluation = (time.perf_counter() - begin) / 20_000
    updates = []
    for _ in range(20):  # one more point and the diagnosis, as the view that follows a file
        begin = time.perf_counter()
        monitor.log(2 * len(calls), train_loss=3.0)
        monitor.diagnose()
        updates.append(time.perf_counter() - begin)
    results = dict(
        device=cpu_name(),
        numpy=version("numpy"),
        date=now(),
        commit=commit(),
        points=POINTS,
        verdict=diagnosis.verdict,
        read_seconds=read - start,
        judge_seconds=judged - read,
        json_lines_read_seconds=read_lines,
        **costs,
        log_microseconds=1e6 * log,
        log_with_validation_microseconds=1e6 * evaluation,
        diagnose_milliseconds=1e3 * sorted(updates)[len(updates) // 2],
    )
    write(results, options.out)
    for name, value in results.items():
        print(f"{name:24} {value if not isinstance(value, float) else f'{value:.3f}'}")


if __name__ == "__main__":
    main()
