"""Tables for a terminal. rich and torch are imported where one is drawn: a command's help needs
neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from ..terminal import Console


def console(*, errors: bool = False) -> Console:
    """Return a console that shows text of anyone's as it is."""
    from ..terminal import Console

    return Console(stderr=errors)


def plain(text: str, style: str = "") -> Text:
    """Return text that is no markup."""
    from rich.text import Text

    return Text(text, style=style)


def stacked(*parts: RenderableType) -> Group:
    """Return parts to print one below the other."""
    from rich.console import Group

    return Group(*parts)


def table(
    title: str | None, *columns: str, right: Iterable[str] | None = None, boxed: bool = True
) -> Table:
    """Return a table without rows; the columns ``right`` hold numbers, by default all but the first
    and the last.
    """
    from rich.table import Table

    right = set(columns[1:-1] if right is None else right)
    options: dict[str, Any] = (
        {} if boxed else {"box": None, "padding": (0, 2, 0, 0), "show_header": any(columns)}
    )
    made = Table(title=title, title_justify="left", title_style="bold", **options)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def verdict(of: str, health_score: float | None) -> Text:
    """Return a verdict in its colour, and the health score."""
    from ..findings import VERDICT_COLOURS

    head = plain(of, f"bold {VERDICT_COLOURS[of]}")
    if health_score is not None:
        head.append(f"  health {health_score:.0f} of 100", style="default")
    return head


def findings(of: list, *, with_steps: bool = False) -> Table | Text:
    """Return each finding, its evidence and its advice; ``with_steps`` also where in the run it was
    seen.
    """
    from ..findings import COLOURS

    if not of:
        return plain("nothing found", "green")
    steps = ("steps",) if with_steps else ()
    made = table("findings", "signal", *steps, "evidence and advice", right=steps)
    for finding in of:
        words = plain(finding.evidence)
        words.append(f"\n{finding.advice}", style="italic")
        seen = (f"{finding.first_step:,.0f} – {finding.last_step:,.0f}",) if with_steps else ()
        made.add_row(
            plain(f"{finding.signal}\n{finding.severity}", COLOURS[finding.severity]), *seen, words
        )
    return made


def notes(of: Iterable[str]) -> list[Text]:
    """Return notes as lines."""
    return [plain(f"note: {note}") for note in of]


def print_notes(of: Iterable[str], to: Console) -> None:
    """Print notes, each in one line however wide the terminal is."""
    for note in of:
        to.print(f"note: {note}", highlight=False, soft_wrap=True)
