"""Table and plot of a file of ``make bench``: ``python bench/report.py RESULTS.json``.

``--document docs/performance.md`` puts the table into that file.

Ratios are of medians within one run. ``of limit`` is the time of the matrix product alone, in its
fastest blocks and the inputs' dtype, over the row's time; for training, of three such products.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from pathlib import Path

import numpy
from cpu_cases import FORWARD, KEYS, STATISTICS, TRAIN

NAMES = {
    "ours": "perplexity",
    "ours_rounded": "perplexity, round_logits",
    "torch": "F.linear, F.cross_entropy",
    "torch_compile": "the same, torch.compile",
    "torch_linear": "F.linear_cross_entropy, chunked",
    "cce": "CCE, torch_compile",
    "liger": "Liger",
    "product": "matrix product alone",
}
TITLES = {
    FORWARD: "NLL",
    TRAIN: "loss and gradients",
    STATISTICS: "token_statistics",
    "nll_logits": "NLL of logits",
    "nll_logits_train": "their loss and gradient",
}
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"


class Results:
    def __init__(self, path: Path):
        self.content = json.loads(path.read_text())
        self.rows = self.content["rows"]
        self._by_key = {tuple(row[key] for key in KEYS): row for row in self.rows}

    def find(self, row: dict, **changes) -> dict | None:
        """Return the row that differs from ``row`` by ``changes``; None where it has no time."""
        other = self._by_key.get(tuple((row | changes)[key] for key in KEYS))
        return other if other and other["median_ms"] else None

    def ratio(self, row: dict) -> float | None:
        """Return a row's time over that of plain PyTorch."""
        plain = self.find(row, provider="torch")
        return row["median_ms"] / plain["median_ms"] if plain and row["median_ms"] else None

    def of_limit(self, row: dict, dtype: str | None = None) -> float | None:
        product = self.find(row, case=FORWARD, provider="product", dtype=dtype or row["dtype"])
        if not product or not row["median_ms"] or row["case"] not in (FORWARD, TRAIN):
            return None
        return (3 if row["case"] == TRAIN else 1) * product["median_ms"] / row["median_ms"]

    def extra_mib(self, row: dict) -> float | None:
        """Return a row's peak memory without the results of the call."""
        return (
            None if row["peak_bytes"] is None else (row["peak_bytes"] - row["output_bytes"]) / 2**20
        )

    def exponents(self) -> dict[tuple[str, str], float]:
        """Fit d log(time) / d log(size) over four doublings of N, V and D, for each case."""
        slopes = {}
        for case, axis in itertools.product((FORWARD, TRAIN), ("n", "v", "d")):
            rows = [
                row
                for row in self.rows
                if row["group"] == "growth" and row["case"] == case and row["median_ms"]
            ]
            others = [name for name in ("n", "v", "d") if name != axis]
            base = {name: min((row[name] for row in rows), default=0) for name in others}
            points = [
                (math.log(row[axis]), math.log(row["median_ms"]))
                for row in rows
                if all(row[name] == base[name] for name in others)
            ]
            if len(points) > 1:
                slopes[case, axis.upper()] = float(
                    numpy.polyfit(*zip(*points, strict=True), deg=1)[0]
                )
        return slopes


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def cells(results: Results, row: dict) -> list[str]:
    size = f"{row['n']} × {row['v']}" + (f" × {row['d']}" if row["d"] else "")
    return [
        TITLES[row["case"]],
        size,
        row["dtype"],
        NAMES[row["provider"]],
        _cell(row["median_ms"], ",.4g"),
        _cell(results.ratio(row), ".2f"),
        _cell(results.of_limit(row), ".2f"),
        _cell(results.extra_mib(row), ",.0f"),
        _cell(row["max_error"], ".0e"),
        (row["error"] or "")[:60],
    ]


HEADINGS = (
    "what",
    "N × V × D",
    "dtype",
    "by",
    "ms",
    "× plain",
    "of limit",
    "extra MiB",
    "error",
    "note",
)


def show(results: Results) -> None:
    from rich.console import Console
    from rich.table import Table

    content = results.content
    table = Table(title=f"{content['device']}, {content['cores']} cores, torch {content['torch']}")
    for heading in HEADINGS:
        table.add_column(
            heading, justify="left" if heading in ("what", "dtype", "by", "note") else "right"
        )
    for row in results.rows:
        if row["group"] != "growth":
            table.add_row(*cells(results, row))
    console = Console(width=None if Console().is_terminal else 170, markup=False)
    console.print(table)
    for (case, axis), slope in results.exponents().items():
        console.print(f"{TITLES[case]}: time grows as {axis} to the power {slope:.2f}")


def plot(results: Results, path: Path) -> None:
    """Plot time and memory against V, where the results have such rows."""
    rows = [row for row in results.rows if row["group"] == "vocabulary" and row["median_ms"]]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    styles = {"ours": ("C0", "o"), "torch": ("C1", "s"), "torch_linear": ("C2", "^")}
    for column, case in enumerate((FORWARD, TRAIN)):
        for provider, (color, marker) in styles.items():
            of = [row for row in rows if row["case"] == case and row["provider"] == provider]
            line = dict(color=color, marker=marker, label=NAMES[provider])
            axes[0, column].plot(
                [row["v"] for row in of], [row["median_ms"] / 1e3 for row in of], **line
            )
            axes[1, column].plot(
                [row["v"] for row in of], [max(1.0, results.extra_mib(row)) for row in of], **line
            )
        axes[0, column].set_title(TITLES[case])
        axes[1, column].set_xlabel("vocabulary V")
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("extra memory, MiB")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    n, d = rows[0]["n"], rows[0]["d"]
    figure.suptitle(
        f"{n} tokens, hidden size {d}, float32; "
        f"{results.content['device']}, {results.content['cores']} cores"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def of_commits(results: Results) -> str:
    commits = sorted({row.get("commit") or results.content["commit"] for row in results.rows})
    return ("commit " if len(commits) == 1 else "commits ") + ", ".join(commits)


def markdown(results: Results, source: str, picture: str) -> str:
    content = results.content
    lines = [
        f"{content['device']}, {content['cores']} cores, torch {content['torch']}, "
        f"{of_commits(results)}: medians of `make bench`, from [{source}]({source}). "
        "Memory is beyond what is returned.",
        "",
        "| " + " | ".join(HEADINGS[:-1]) + " |",
        "| --- | --- | --- | --- |" + " ---: |" * 5,
    ]
    chosen = [row for row in results.rows if row["group"] == "shapes" and row["case"] != STATISTICS]
    lines += [
        "| " + " | ".join(cells(results, row)[:-1]) + " |" for row in chosen if row["median_ms"]
    ]
    left_out = sorted({NAMES[row["provider"]] for row in chosen if not row["median_ms"]})
    if left_out:
        lines += ["", f"Did not run on this machine: {', '.join(left_out)}."]
    return "\n".join([*lines, "", f"![time and memory against the vocabulary]({picture})"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="report", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--document", type=Path, help="replace the text between its two markers")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    show(results)
    picture = arguments.results.with_suffix(".png")
    plot(results, picture)
    if arguments.document:
        folder, text = arguments.document.resolve().parent, arguments.document.read_text()
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        names = [
            Path(os.path.relpath(path.resolve(), folder)).as_posix()
            for path in (arguments.results, picture)
        ]
        arguments.document.write_text(f"{before}{BEGIN}\n{markdown(results, *names)}\n{END}{after}")


if __name__ == "__main__":
    main()
