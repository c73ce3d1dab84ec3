"""Time and memory of a training step with ``use_fused_loss``: ``python bench/training_step.py``.

A transformers model with V = 128,256 is trained with its own loss and with the fused one, each in a
process of its own (support/training_step_cost.py). The results go to
bench/results/cpu-<name>-training-step.json. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

from environment import RESULTS, SUPPORT, commit, cpu_name, now, numbers_of, slug, version, write

sys.path.insert(0, str(SUPPORT))
from training_step_cost import LAYERS, LENGTH, PROVIDERS, ROWS, VOCABULARY, WIDTH

SCRIPT = SUPPORT / "training_step_cost.py"  # prints bytes, seconds and loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"cpu-{slug(cpu_name())}-training-step.json"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runs = {provider: [] for provider in PROVIDERS}
    for _ in range(options.rounds):
        for provider, measured in runs.items():
            measured.append(numbers_of(SCRIPT, provider))
    rows = [
        dict(
            provider=provider,
            seconds=statistics.median(seconds for _, seconds, _ in measured),
            peak_bytes=int(statistics.median(peak for peak, _, _ in measured)),
            loss=measured[0][2],
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
            tokens=ROWS * LENGTH,
            rows=rows,
        ),
        options.out,
    )
    for row in rows:
        print(
            f"{row['provider']:6} {row['seconds']:6.2f} s  "
            f"{row['peak_bytes'] / 2**20:7,.0f} MiB  loss {row['loss']:.6f}"
        )


if __name__ == "__main__":
    main()
