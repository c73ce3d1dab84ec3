"""``ppl report A B``: several runs on one axis, and how far apart they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..monitor.digest import Digest
from ..monitor.health import Diagnosis
from ..monitor.history import History
from ..monitor.run_comparison import RunComparison, curves_of
from ..nats import exp
from .html import figure_of, thinned, trace_of
from .page import write_page

# Of the runs in turn: told apart in print and by most who see few colours (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SMOOTHED = 200  # means of a training curve


def write_runs(
    path: str | Path,
    runs: dict[str, tuple[History, Digest, Diagnosis]],
    comparisons: list[tuple[str, str, RunComparison]],
    *,
    title: str | None = None,
    command: str | None = None,
) -> None:
    """Write one HTML file with the curves of several runs on one axis, and their differences.

    Args:
        path: the file, which is written whole or left as it was.
        runs: two or more, by their names.
        comparisons: (first, second, comparison) of names of ``runs``; they share one axis.
        title: of the page; default the names.
        command: what made the page, for its foot.

    Raises:
        InputError: a package is missing, or the file cannot be written.

    Example:
        >>> from perplexity.monitor import diagnose
        >>> from perplexity.monitor.run_comparison import compare_runs
        >>> histories = History("a"), History("b")
        >>> for step in range(60):
        ...     for history, floor in zip(histories, (2.0, 1.9)):
        ...         history.add(step, {"train_loss": floor + 3 / (step + 1)})
        >>> runs = {h.source: (h, h.digest(), diagnose(h.digest())) for h in histories}
        >>> write_runs("/dev/null", runs, [("a", "b", compare_runs(*histories))])
    """
    axis = comparisons[0][2].by
    drawn: dict[str, dict] = {}
    for name, change, label in (
        ("loss", float, "loss (nats a token)"),
        ("perplexity", exp, "perplexity"),
    ):
        traces = []
        for place, (run, (history, _, _)) in enumerate(runs.items()):
            colour = COLOURS[place % len(COLOURS)]
            for curve, (places, losses) in curves_of(history, axis).items():
                training = curve == "training"
                at, values = _smooth(places, losses) if training else thinned(places, losses)
                traces.append(
                    trace_of(
                        f"{run}: {curve}",
                        at,
                        [change(value) for value in values],
                        colour,
                        width=1 if training else 2,
                        markers=not training,
                        over=axis,
                    )
                )
        drawn[name] = figure_of(traces, label, [], [], log=name == "perplexity", x=axis)
    write_page(
        path,
        "runs.html",
        drawn,
        title=title or " and ".join(runs),
        runs=[
            {"name": name, "colour": COLOURS[place % len(COLOURS)], "diagnosis": diagnosis}
            for place, (name, (_, _, diagnosis)) in enumerate(runs.items())
        ],
        command=command,
        figures=list(drawn),
        comparisons=[
            {
                "first": first,
                "second": second,
                "found": found,
                "lines": found.in_words(first, second),
            }
            for first, second, found in comparisons
        ],
    )


def _smooth(places: np.ndarray, losses: np.ndarray) -> tuple[list, list]:
    """Return means of equal parts of a curve: one batch's loss would hide the other run's."""
    parts = min(SMOOTHED, len(losses))
    at, means = (
        [float(part.mean()) for part in np.array_split(each, parts)] for each in (places, losses)
    )
    return at, means
