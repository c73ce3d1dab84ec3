"""Tables of a ``ManyComparison`` in the forms in which people publish them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from .many import LEGEND, Column, Estimate, ManyComparison


def to_markdown(comparison: ManyComparison) -> str:
    """Return a table with a row for each model, the best first, and the notes below it.

    Args:
        comparison: of two results or more.

    Returns:
        Markdown in GitHub's dialect. Bold marks the best of a column and its ties.
    """
    names = [_escaped(column.name) for column in comparison.columns]
    perplexity = comparison.measure == "loss"
    head = ["model", *(["perplexity"] if perplexity else []), *names]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    rows = comparison.cells(comparison.columns, _bold)
    for place, row in zip(comparison.order, rows, strict=True):
        value = comparison.perplexity(place)
        lines.append(
            _row([_escaped(row[0]), *([] if value is None else [f"{value:,.3f}"]), *row[1:]])
        )
    head = ["A", "B", "B − A", "±", "p (Holm)", "better"]
    lines += ["", _row(head), _row(["---", "---", "---:", "---:", "---:", "---"])]
    lines += [_row([_escaped(cell) for cell in test]) for test in comparison.tests()]
    notes = [f"{comparison.title}. Bold: {LEGEND}.", *comparison.notes]
    return "\n".join([*lines, "", *(f"- {_escaped(note)}" for note in notes)]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bold(estimate: Estimate) -> str:
    value = f"{estimate.value:.4f}"
    spread = ""
    if estimate.interval is not None:
        spread = f" ± {(estimate.interval[1] - estimate.interval[0]) / 2:.4f}"
    return (f"**{value}**" if estimate.best else value) + spread


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is."""
    marks = "\\`*_{}[]<>#|~"
    return "".join(f"\\{c}" if c in marks else c for c in text).replace("\n", " ")


def to_csv(comparison: ManyComparison) -> str:
    """Return a table with a row for each model, the best first.

    Args:
        comparison: of two results or more.

    Returns:
        RFC 4180 with a header: model, measure, for the loss perplexity, and of every column value,
        low and high end of the 95% interval, and 1 where no model is better beyond chance, else 0.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = comparison.columns
    perplexity = ["perplexity"] if comparison.measure == "loss" else []
    writer.writerow(
        ["model", "measure", *perplexity, *(name for column in columns for name in _names(column))]
    )
    for place in comparison.order:
        cells: list[object] = [comparison.names[place], comparison.measure]
        if perplexity:
            cells.append(comparison.perplexity(place))
        for column in columns:
            estimate = column.estimates[place]
            low, high = estimate.interval or ("", "")
            cells += [estimate.value, low, high, int(estimate.best)]
        writer.writerow(cells)
    return out.getvalue()


def _names(column: Column) -> list[str]:
    return [column.name, f"{column.name} low", f"{column.name} high", f"{column.name} best"]
