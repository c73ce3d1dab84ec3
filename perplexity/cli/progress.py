"""Progress on stderr: a bar in a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..wording import counted

if TYPE_CHECKING:
    from ..evaluation.evaluator import Progress
    from .texts import Texts

LOG_EVERY = 10.0  # seconds between lines
LOG_AN_EVALUATION_EVERY = 30.0


def log_every(seconds: float, line: Callable[..., str]) -> Callable[..., None]:
    """Return a function that prints ``line`` of its arguments, at most once in ``seconds``."""
    printed = time.monotonic()

    def log(*now: object) -> None:
        nonlocal printed
        if time.monotonic() - printed >= seconds:
            printed = time.monotonic()
            print(line(*now), file=sys.stderr, flush=True)

    return log


def log_texts() -> Callable[[str, int, int], None]:
    """Return a function (activity, texts done, texts or 0) that prints the progress over texts."""
    return log_every(
        LOG_EVERY,
        lambda what, done, of: (
            f"{what}: {f'{done:,} of ' if of else ''}{counted(of or done, 'text')}"
        ),
    )


@contextmanager
def evaluation_progress(texts: Texts, visible: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Yield a function that shows an evaluation's progress; None where it is not ``visible``."""
    if not visible:
        yield None
        return
    from ..nats import exp

    started = time.monotonic()

    def described(now: Progress) -> str:
        seconds = max(time.monotonic() - started, 1e-9)
        left = seconds * (texts.size - now.done) / now.done if now.done else None
        speed = f"{now.tokens / seconds:,.0f} tokens/s"
        return (
            f"{'' if texts.count is None else f'{now.documents:,}/'}"
            f"{counted(texts.count or now.documents, 'document')}  {speed}  "
            f"perplexity {exp(now.loss):,.2f}"
            f"  {'' if left is None else f'{clock(left)} left'}"
        )

    if not sys.stderr.isatty():
        yield log_every(LOG_AN_EVALUATION_EVERY, described)
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from ..terminal import Console

    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=texts.size)
        yield lambda now: bar.update(task, completed=now.done, description=described(now))


def clock(seconds: float) -> str:
    """Return a duration in seconds as hours, minutes and seconds.

    Example:
        >>> clock(3599.6)
        '1:00:00'
    """
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
