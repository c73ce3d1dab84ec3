"""The recorded runs of record_faults.py as histories, and what the monitor finds in them."""

from __future__ import annotations

import csv
import gzip
import io
from functools import cache

from record_faults import FAULTS, FOLDER, VOCABULARY

from perplexity.monitor import History, diagnose
from perplexity.monitor.digest import Digest

SIGNALS = (
    *(
        "overfitting",
        "divergence",
        "spike",
        "non-finite",
        "leakage-suspected",
        "generalisation-gap",
        "worse-than-uniform",
    ),
    *("plateau", "restart", "healthy-decline"),
)


@cache
def runs(name: str) -> list[list[tuple[int, float, float | None]]]:
    """Rows (step, train_loss, val_loss) of each seed."""
    text = gzip.decompress((FOLDER / f"{name}.csv.gz").read_bytes()).decode()
    found: dict[str, list] = {}
    for row in csv.DictReader(io.StringIO(text)):
        value = float(row["val_loss"]) if row["val_loss"] else None
        found.setdefault(row["seed"], []).append(
            (int(row["step"]), float(row["train_loss"]), value)
        )
    return list(found.values())


def history(rows) -> History:
    made = History()
    for step, train, value in rows:
        made.add(step, {"train_loss": train} | ({} if value is None else {"val_loss": value}))
    return made


def diagnosis(rows):
    return diagnose(history(rows).digest(), vocabulary_size=VOCABULARY)


def told(name: str, rows) -> dict[str, str]:
    """Signal to its worst severity, at the end of a run; spikes that are single batches aside."""
    order = ("info", "warning", "danger")
    found: dict[str, str] = {}
    for finding in diagnosis(rows).findings:
        if order.index(finding.severity) >= order.index(found.get(finding.signal, "info")):
            found[finding.signal] = finding.severity
    return found


def first_told(name: str, rows) -> int | None:
    """How many logged steps after its onset the fault was told, looked for at each evaluation and
    each 10 steps.
    """
    fault = FAULTS[name]
    digest = Digest()
    since = 0
    for place, (step, train, value) in enumerate(rows):
        digest.train(step, train)
        if value is not None:
            digest.validation(step, value)
        if step >= fault.onset:
            since += 1
            if value is not None or place % 10 == 0:
                findings = diagnose(digest, vocabulary_size=VOCABULARY).findings
                if any(right(fault, finding.signal, finding.severity) for finding in findings):
                    return since
    return None


def right(fault, signal: str, severity: str) -> bool:
    return signal in fault.signals and (severity != "info" or signal == "spike")
