"""Plots of a training history: loss and perplexity side by side."""

from __future__ import annotations

from pathlib import Path

from ..metric import exp


def loss_curves(
    history: list[dict], path: str | Path, *, title: str, baselines: dict[str, float] | None = None
) -> None:
    """Write a PNG: loss in nats (left) and perplexity on a log axis (right) over steps.

    ``history`` rows have step, train_loss and, where measured, val_loss; ``baselines`` maps a name to a loss in nats.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for panel, transform, label in zip(panels, (float, exp), ("loss (nats a token)", "perplexity"), strict=True):
        steps = [row["step"] for row in history]
        panel.plot(
            steps,
            [transform(row["train_loss"]) for row in history],
            color="#9ab7d3",
            lw=1,
            label="training (one batch)",
        )
        measured = [row for row in history if row.get("val_loss") is not None]
        panel.plot(
            [row["step"] for row in measured],
            [transform(row["val_loss"]) for row in measured],
            color="#c1440e",
            marker="o",
            ms=3.5,
            lw=1.8,
            label="validation",
        )
        for style, (name, loss) in zip(("--", ":"), (baselines or {}).items(), strict=False):
            panel.axhline(transform(loss), color="#555555", ls=style, lw=1, label=f"{name}: {transform(loss):,.4g}")
        panel.set_xlabel("step")
        panel.set_ylabel(label)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize=8)
    panels[1].set_yscale("log")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
