"""Time and memory of an evaluation against the model's own loss: ``python bench/evaluation.py``.

The providers run in turn on the same windows on this CPU, each in a process of its own
(support/evaluation_cost.py). Measured are tokens a second, and the memory beyond the model. The
results go to bench/results/cpu-<name>-evaluation.json. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

from environment import RESULTS, SUPPORT, commit, cpu_name, now, numbers_of, slug, version, write

sys.path.insert(0, str(SUPPORT))
from evaluation_cost import CONTEXT, LAYERS, PROVIDERS, VOCABULARY, WIDTH

SCRIPT = SUPPORT / "evaluation_cost.py"  # prints bytes, seconds and loss
NAMES = {"ours": "perplexity.evaluate", "plain": "model(input_ids, labels=input_ids)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"cpu-{slug(cpu_name())}-evaluation.json"
    )
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runs = {provider: [] for provider in PROVIDERS}
    for _ in range(options.rounds):
        for provider, measured in runs.items():
            measured.append(numbers_of(SCRIPT, provider, str(options.windows)))
    rows = [
        dict(
            provider=provider,
            seconds=statistics.median(seconds for _, seconds, _ in measured),
            peak_bytes=int(statistics.median(peak for peak, _, _ in measured)),
            loss=measured[0][2],
            tokens=options.windows * (CONTEXT - 1),
        )
        for provider, measured in runs.items()
    ]
    write(
        dict(
            device=cpu_name(),
            cores=os.cpu_count(),
            torch=version("torch"),
            transformers=version("transformers"),
            date=now(),
            commit=commit(),
            vocabulary=VOCABULARY,
            hidden_size=WIDTH,
            layers=LAYERS,
            context_length=CONTEXT,
            rows=rows,
        ),
        options.out,
    )
    plain = next(row for row in rows if row["provider"] == "plain")
    for row in rows:
        seconds, peak = row["seconds"], row["peak_bytes"]
        print(
            f"{NAMES[row['provider']]:36} {seconds:7.2f} s  "
            f"{seconds / plain['seconds']:5.2f} of plain  "
            f"{row['tokens'] / seconds:8,.0f} tokens/s  {peak / 2**20:7,.0f} MiB "
            f"({plain['peak_bytes'] / max(1, peak):.1f} times less)  loss {row['loss']:.6f}"
        )
    print(options.out)


if __name__ == "__main__":
    main()
