"""Tables for a terminal.

The functions import rich, since the help of a command works without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from ..monitor.run_comparison import RunComparison
    from ..terminal import Console


def console(*, errors: bool = False) -> Console:
    """Return a console on stdout, or on stderr for ``errors``, that escapes control characters."""
    from ..terminal import Console

    return Console(stderr=errors)


def plain(text: str, style: str = "") -> Text:
    """Return text that rich shows literally, without reading markup in it."""
    from rich.text import Text

    return Text(text, style=style)


def stacked(*parts: RenderableType) -> Group:
    """Return a group of parts, to be printed one below the other."""
    from rich.console import Group

    return Group(*parts)


def table(
    title: str | None, *columns: str, right: Iterable[str] | None = None, boxed: bool = True
) -> Table:
    """Return a table without rows.

    Args:
        title: Heading; None for none.
        columns: Names of the columns.
        right: The columns that are aligned to the right; None: all but the first and the last.
        boxed: Whether the table has lines around its cells.
    """
    from rich.table import Table

    right = set(columns[1:-1] if right is None else right)
    options: dict[str, Any] = (
        {} if boxed else {"box": None, "padding": (0, 2, 0, 0), "show_header": any(columns)}
    )
    table = Table(title=title, title_justify="left", title_style="bold", **options)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def verdict(of: str, health_score: float | None) -> Text:
    """Return a verdict in its colour, with the health score (0 to 100) where there is one."""
    from ..findings import VERDICT_COLOURS

    head = plain(of, f"bold {VERDICT_COLOURS[of]}")
    if health_score is not None:
        head.append(f"  health {health_score:.0f} of 100", style="default")
    return head


def findings(of: list, *, with_steps: bool = False) -> Table | Text:
    """Return a table of findings with their evidence and advice, or a line where there is none.

    Args:
        of: The findings.
        with_steps: Whether a column shows the first and last step of each finding.
    """
    from ..findings import COLOURS

    if not of:
        return plain("nothing found", "green")
    steps = ("steps",) if with_steps else ()
    rows = table("findings", "signal", *steps, "evidence and advice", right=steps)
    for finding in of:
        words = plain(finding.evidence)
        words.append(f"\n{finding.advice}", style="italic")
        seen = (f"{finding.first_step:,.0f} – {finding.last_step:,.0f}",) if with_steps else ()
        of_set = getattr(finding, "set", None)  # the monitor's, of several validation sets
        what = f"{finding.signal}\n{finding.severity}" + (f"\n{of_set}" if of_set else "")
        rows.add_row(plain(what, COLOURS[finding.severity]), *seen, words)
    return rows


def run_comparison(first: str, second: str, comparison: RunComparison) -> Group:
    """Return how far two runs lie apart, with a line for each loss that one reached earlier."""
    if not comparison.differences:
        return stacked(*notes(comparison.notes))
    end = f"{comparison.end:,.0f}"
    upto = f"{end} tokens" if comparison.by == "tokens" else f"step {end}"
    rows = table(
        f"{second} − {first}, at {upto}",
        "loss",
        "first",
        "second",
        "difference (95 %)",
        "",
        right=("first", "second", "difference (95 %)"),
    )
    for found in comparison.differences:
        half = (found.high - found.low) / 2
        rows.add_row(
            plain(found.curve),
            f"{found.first:.4f}",
            f"{found.second:.4f}",
            f"{found.difference:+.4f} ± {half:.4f}",
            "larger than their noise" if found.larger_than_noise else "within their noise",
        )
    lines = [plain(line) for line in comparison.in_words(first, second)]
    noise = "noise within these runs; runs that differ in their seed alone may lie further apart"
    return stacked(rows, *lines, *notes([*comparison.notes, noise]))


def notes(of: Iterable[str]) -> list[Text]:
    """Return a line for each note."""
    return [plain(f"note: {note}") for note in of]


def print_notes(of: Iterable[str], to: Console) -> None:
    """Print each note in one line, whatever the width of the terminal."""
    from ..evaluation.text_tables import noted

    for note in of:
        to.print(noted(note), highlight=False, soft_wrap=True)
