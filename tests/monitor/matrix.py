"""``python tests/monitor/matrix.py``: the confusion matrix of the recorded faults, into
docs/monitor.md.
"""

import re
import statistics
from pathlib import Path

from faults import FAULTS, SIGNALS, first_told, right, runs, told

BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
COLUMNS = [signal for signal in SIGNALS if signal not in ("restart", "healthy-decline")]


def matrix() -> str:
    """Of each fault's ten seeds: how many end with a signal above info (single outlying batches
    aside), and the delay.
    """
    lines = [
        "| fault | " + " | ".join(COLUMNS) + " | right in | told after |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 2),
    ]
    for name, fault in FAULTS.items():
        found = [told(name, rows) for rows in runs(name)]
        cells = []
        for signal in COLUMNS:
            count = sum(signals.get(signal, "info") != "info" for signals in found)
            cells.append(f"**{count}**" if signal in fault.signals else str(count or ""))
        if fault.silent:
            hits = sum(
                all(severity == "info" for severity in signals.values()) for signals in found
            )
            delay = ""
        else:
            hits = sum(any(right(fault, *pair) for pair in signals.items()) for signals in found)
            delays = [delay for rows in runs(name) if (delay := first_told(name, rows)) is not None]
            delay = f"{statistics.median(delays):.0f} ({min(delays)} to {max(delays)})"
        lines.append(
            f"| {fault.words} | " + " | ".join(cells) + f" | {hits} of {len(found)} | {delay} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "monitor.md"
    text = path.read_text()
    path.write_text(
        re.sub(f"{BEGIN}\n.*?{END}", lambda _: f"{BEGIN}\n{matrix()}{END}", text, flags=re.S)
    )
