"""Plots as PNG or SVG: loss and perplexity of a run side by side, and calibration."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

from ..errors import theirs, visible
from ..files import write_bytes
from ..nats import exp

# What a loss is drawn as, from left to right: nats, and perplexity.
CHANGES: tuple[Callable[[float], float], ...] = (float, exp)


def run_curves(
    history,
    digest,
    diagnosis,
    path: str | Path,
    *,
    vocabulary_size: int | None = None,
    title: str | None = None,
    form: str = "png",
) -> None:
    """Write a plot of a run's loss and perplexity over steps, its findings shaded.

    Args:
        history: the run.
        digest: its summary, ``history.digest()``.
        diagnosis: its findings, ``diagnose(digest)``.
        path: the file, which is written whole or left as it was.
        vocabulary_size: for the line of a uniform guess; default none.
        title: of the plot; default the verdict.
        form: "png" (default) or "svg".

    Raises:
        InputError: the file cannot be written, or matplotlib fails.

    Example:
        >>> from perplexity.monitor import diagnose
        >>> from perplexity.monitor.history import History
        >>> history = History("run")
        >>> for step in range(5):
        ...     history.add(step, {"train_loss": 3.0 - 0.1 * step})
        >>> digest = history.digest()
        >>> run_curves(history, digest, diagnose(digest), "/dev/null")
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from .html import COLOURS, MARKED, thinned, validation_sets

    shades = {"info": "#4682b4", "warning": "#e6a000", "danger": "#c82828"}
    steps, losses = thinned(*history.arrays())
    blocks = digest.pieces()  # finer than blocks while the run is short
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for panel, change, label in zip(
        panels, CHANGES, ("loss (nats a token)", "perplexity"), strict=True
    ):
        panel.plot(
            steps, [change(x) for x in losses], color=COLOURS["batch"], lw=0.7, label="one batch"
        )
        at = [(block.first + block.last) / 2 for block in blocks]
        panel.plot(
            at,
            [change(block.mean) for block in blocks],
            color=COLOURS["train"],
            lw=1.6,
            label="training",
        )
        for name, of_set, colour in validation_sets(digest):
            if of_set:
                at = [e.step for e in of_set]
                values = [change(e.loss) for e in of_set]
                panel.plot(at, values, color=colour, lw=1.6, marker="o", ms=3, label=visible(name))
        if vocabulary_size:
            panel.axhline(
                change(math.log(vocabulary_size)),
                color="#888888",
                ls="--",
                lw=1,
                label="uniform guess",
            )
        for finding in diagnosis.findings:
            if finding.signal in MARKED and finding.severity != "info":
                last = max(finding.last_step, finding.first_step + 1)
                panel.axvspan(
                    finding.first_step,
                    last,
                    color=shades[finding.severity],
                    alpha=0.12,
                    label=finding.signal,
                )
        panel.set_xlabel("step")
        panel.set_ylabel(label)
        panel.grid(alpha=0.25)
    panels[1].set_yscale("log")
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(visible(title or diagnosis.verdict), fontsize=11, parse_math=False)
    _save(figure, path, form)


def reliability(calibration: dict, path: str | Path, *, title: str | None = None) -> None:
    """Write a plot of calibration: accuracy over confidence, and loss over entropy.

    Args:
        calibration: what ``calibration.CalibrationBins.summary`` returns.
        path: the file, an SVG where its name ends in .svg, else a PNG.
        title: before the calibration error; default none.

    Raises:
        InputError: the file cannot be written, or matplotlib fails.

    Example:
        >>> bins = [{"tokens": 4, "confidence": 0.5, "accuracy": 0.5}]
        >>> entropy_bins = [{"tokens": 4, "entropy": 1.0, "loss": 1.0}]
        >>> calibration = {"ece": 0.0, "tokens": 4, "bins": bins, "entropy_bins": entropy_bins}
        >>> reliability(calibration, "/dev/null")
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for panel, bins, x, y, labels in (
        (
            panels[0],
            calibration["bins"],
            "confidence",
            "accuracy",
            ("probability of the first choice", "share that is right"),
        ),
        (
            panels[1],
            calibration["entropy_bins"],
            "entropy",
            "loss",
            ("entropy (nats)", "loss (nats a token)"),
        ),
    ):
        at, values = [row[x] for row in bins], [row[y] for row in bins]
        top = 1.0 if x == "confidence" else 1.05 * max(*at, *values, 0.1)
        panel.plot([0, top], [0, top], color="#888888", ls="--", lw=1, label="calibrated")
        most = max(row["tokens"] for row in bins)
        sizes = [12 + 160 * row["tokens"] / most for row in bins]
        panel.scatter(
            at, values, s=sizes, color="#2b6ca3", alpha=0.8, label="a bin; its size: tokens"
        )
        panel.set(xlim=(0, top), ylim=(0, top), xlabel=labels[0], ylabel=labels[1], aspect="equal")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8, loc="upper left")
    error = (
        f"expected calibration error {calibration['ece']:.4f} over {calibration['tokens']:,} tokens"
    )
    figure.suptitle(visible(f"{title}: {error}" if title else error), fontsize=11, parse_math=False)
    _save(figure, path, "svg" if str(path).endswith(".svg") else "png")


def _save(figure, path: str | Path, form: str) -> None:
    """Write a figure as ``form``, and close it."""
    import matplotlib.pyplot as plt

    drawn = io.BytesIO()
    try:
        with theirs(f"{path}: expected a plot that matplotlib can draw, got one that fails"):
            figure.savefig(drawn, dpi=150, format=form)
    finally:
        plt.close(figure)
    write_bytes(path, drawn.getvalue())
