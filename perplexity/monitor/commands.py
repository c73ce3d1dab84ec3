"""``ppl monitor``: the diagnosis of a history, once or as it grows."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import InputError, theirs
from ..files import check_outputs
from ..findings import COLOURS, VERDICT_COLOURS
from ..terminal import Console
from .digest import Digest
from .findings import Finding
from .follower import Follower, NotYet
from .health import Diagnosis, diagnose
from .history import feed
from .readers import history_files, read_history

BARS = "▁▂▃▄▅▆▇█"


def run_monitor(arguments: argparse.Namespace) -> int:
    tags = parse_tags(arguments.tag)
    check_outputs({"--json": arguments.json}, history_files(arguments.history))
    for option in ("total_steps", "polls"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')}: expected at least 1, got {value}")
    if not 0 < arguments.interval <= 86_400:
        raise InputError(f"--interval: expected more than 0 seconds and at most a day, got {arguments.interval:g}")
    if arguments.vocabulary_size is not None and arguments.vocabulary_size < 2:
        raise InputError(f"--vocabulary-size: expected at least 2, got {arguments.vocabulary_size}")
    if arguments.follow:
        diagnosis = _follow(arguments, tags)
    else:
        history = read_history(arguments.history, tags=tags, unit=arguments.unit)
        digest = history.digest()
        diagnosis = _diagnose(digest, arguments, history.notes)
        Console().print(view(digest, diagnosis, arguments.total_steps))
    if arguments.json:
        diagnosis.save(arguments.json)
    return int(diagnosis.fails(arguments.fail_on))


def parse_tags(given: list[str] | None) -> dict[str, str]:
    tags = {}
    for tag in given or []:
        measure, equals, name = tag.partition("=")
        if not equals or not name:
            raise InputError(f"--tag: expected MEASURE=NAME, got {tag!r}")
        tags[measure] = name
    return tags


def _diagnose(digest: Digest, arguments: argparse.Namespace, notes: list[str]) -> Diagnosis:
    return diagnose(digest, vocabulary_size=arguments.vocabulary_size, total_steps=arguments.total_steps, notes=notes)


def _follow(arguments: argparse.Namespace, tags: dict[str, str]) -> Diagnosis:
    """Read the file as it grows until interrupted (or for --polls times), and tell what is new."""
    told: set[tuple[str, str]] = set()
    diagnosis, polls, notes = None, 0, []
    follower, digest = Follower(arguments.history, tags=tags, unit=arguments.unit), Digest()
    with Live(console=Console(), refresh_per_second=4) as live:
        try:
            while True:
                try:
                    history, whole = follower.new()
                except NotYet as error:
                    if polls == 0 and "no such file" in str(error):
                        raise
                    live.update(Text(f"waiting: {error}"))
                else:
                    if whole:
                        digest, notes = Digest(), []
                    notes += [note for note in history.notes if note not in notes]
                    feed(digest, history)
                    diagnosis = _diagnose(digest, arguments, notes)
                    live.update(view(digest, diagnosis, arguments.total_steps))
                    _tell(diagnosis.findings, told, arguments.on_finding)
                polls += 1
                if arguments.polls and polls >= arguments.polls:
                    break
                time.sleep(arguments.interval)
        except KeyboardInterrupt:
            pass
    if diagnosis is None:
        raise InputError(f"{arguments.history}: expected a history, nothing could be read until it was interrupted")
    return diagnosis


def _tell(findings: list[Finding], told: set, command: str | None) -> None:
    """Run the command of --on-finding for each new one, with the finding in its environment."""
    for finding in findings:
        key = finding.signal, finding.severity
        if key in told:
            continue
        told.add(key)
        if command is not None:
            environment = os.environ | {
                "PPL_SIGNAL": finding.signal,
                "PPL_SEVERITY": finding.severity,
                "PPL_STEP": f"{finding.first_step:g}",
                "PPL_EVIDENCE": finding.evidence,
            }
            with theirs(f"--on-finding: expected a command that can be started, got {command!r}"):
                done = subprocess.run(command, shell=True, env=environment)
            if done.returncode:
                print(f"--on-finding: {command!r} ended with {done.returncode}", file=sys.stderr)


def view(digest: Digest, diagnosis: Diagnosis, total_steps: int | None = None) -> Group:
    """Verdict, both curves and findings for a terminal."""
    head = Text()
    head.append(diagnosis.verdict, style=f"bold {VERDICT_COLOURS[diagnosis.verdict]}")
    if diagnosis.health_score is not None:
        head.append(f"  health {diagnosis.health_score:.0f} of 100")
    if diagnosis.last_step is not None:
        head.append(f"  step {diagnosis.last_step:,.0f}" + (f" of {total_steps:,}" if total_steps else ""))
    if digest.tokens == digest.tokens:
        head.append(f"  {digest.tokens:,.0f} tokens")
    if total_steps and digest.seconds and digest.last_step and total_steps > digest.last_step:
        left = digest.seconds * (total_steps - digest.last_step) / digest.last_step
        head.append(f"  {left / 60:,.0f} minutes left")
    parts: list = [head, _curves(digest, diagnosis)]
    if diagnosis.findings:
        parts.append(_findings(diagnosis.findings))
    if diagnosis.components:
        parts.append(_score(diagnosis))
    parts += [Text(f"note: {note}") for note in diagnosis.notes]
    return Group(*parts)


def _curves(digest: Digest, diagnosis: Diagnosis) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in (
        ("", "left"),
        ("curve", "left"),
        ("loss", "right"),
        ("perplexity", "right"),
        ("best", "right"),
    ):
        table.add_column(name, justify=justify)
    blocks = [block for block in digest.all_blocks() if block.count]
    if blocks:
        means = [block.mean for block in blocks]
        table.add_row(
            "training",
            sparkline(means),
            f"{diagnosis.train_loss:.4f}",
            "n/a" if diagnosis.train_perplexity is None else f"{diagnosis.train_perplexity:,.2f}",
            f"{min(means):.4f}",
        )
    if digest.evaluations:
        table.add_row(
            "validation",
            sparkline([e.loss for e in digest.evaluations]),
            f"{diagnosis.val_loss:.4f}",
            f"{diagnosis.val_perplexity:,.2f}",
            f"{diagnosis.best_val_loss:.4f} at {diagnosis.best_val_step:,.0f}",
        )
    return table


def sparkline(values: list[float], width: int = 40) -> str:
    """Means of equal parts as bars, from the lowest to the 95th percentile."""
    import numpy as np

    parts = [part.mean() for part in np.array_split(np.array(values), min(width, len(values)))]
    low, high = min(parts), float(np.percentile(parts, 95))
    span = max(high - low, 1e-12)
    return "".join(
        BARS[min(len(BARS) - 1, int((min(part, high) - low) / span * (len(BARS) - 1) + 0.5))] for part in parts
    )


def _findings(findings: list[Finding]) -> Table:
    table = Table(title="findings", title_justify="left", title_style="bold")
    table.add_column("signal")
    table.add_column("steps", justify="right")
    table.add_column("evidence and advice")
    for finding in findings:
        colour = COLOURS[finding.severity]
        words = Text(finding.evidence)
        words.append(f"\n{finding.advice}", style="italic")
        table.add_row(
            Text(f"{finding.signal}\n{finding.severity}", style=colour),
            f"{finding.first_step:,.0f} – {finding.last_step:,.0f}",
            words,
        )
    return table


def _score(diagnosis: Diagnosis) -> Text:
    parts = [
        f"{name} {part['share'] * part['left']:.0f}/{part['share']}" for name, part in diagnosis.components.items()
    ]
    return Text(f"health score: {', '.join(parts)}")
