"""``ppl monitor``: the diagnosis of a history, once or as it grows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError, theirs, visible
from ..files import check_outputs
from ..findings import SEVERITIES
from ..json_files import to_json
from . import tables
from .extras import needs
from .json_option import TO_STANDARD_OUTPUT, console_beside, json_file, write_json
from .options import argument, option, part, typed
from .parts import FAIL_ON_HELP, Curves, shortened

if TYPE_CHECKING:
    from apprise import Apprise
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ..monitor.digest import Digest
    from ..monitor.findings import Finding
    from ..monitor.health import Diagnosis

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Options:
    """what the loss curves of a training run mean"""

    history: list[str] = argument(
        "a training log: a table, JSON, console text, a TensorBoard, W&B, MLflow, trackio, DVCLive "
        "or Lightning file or folder; of several, each is compared with the first",
        nargs="+",
    )
    curves: Curves = part(Curves)
    json: str | None = option(
        f"write verdict, score and findings to this file{TO_STANDARD_OUTPUT}", metavar="OUT"
    )
    fail_on: str | None = option(FAIL_ON_HELP, choices=SEVERITIES)
    all: bool = option("judge each of several runs in the file or folder", False)
    follow: bool = option("go on reading as the file grows, until interrupted", False)
    interval: float = option("seconds between looks with --follow (%(default)g)", 5.0, metavar="S")
    polls: int | None = option("end --follow after so many looks", metavar="N")
    on_finding: str | None = option(
        "with --follow: run for each new finding (PPL_SIGNAL, ...)", metavar="COMMAND"
    )
    notify: list[str] | None = option(
        "with --follow: tell each new warning and danger to Slack, Discord, e-mail, a webhook ... "
        "(a URL of apprise)",
        metavar="URL",
        repeated=True,
    )


def run(options: Options) -> int:
    """Diagnose, print and write what is asked for; 1 on a finding as severe as ``--fail-on``."""
    needs(monitor=("rich", "pyarrow"))
    _check(options)
    if options.all or len(options.history) > 1:
        return _judge_several(options)
    if options.follow:
        diagnosis = _follow(options)
    else:
        history = options.curves.read(options.history[0])
        digest, diagnosis = options.curves.judge(history)
        console_beside(options.json).print(view(digest, diagnosis, options.curves.total_steps))
    write_json(options.json, diagnosis.to_json())
    return int(diagnosis.fails(options.fail_on))


def _judge_several(options: Options) -> int:
    """Diagnose every run, compare those of several files, and write ``{"runs": [...]}``."""
    import json
    from dataclasses import asdict

    from ..monitor.run_comparison import compare_with_first

    curves, console = options.curves, console_beside(options.json)
    named = {}
    for path in options.history:
        runs = curves.read_all(path) if options.all else {"": curves.read(path)}
        for name, history in runs.items():
            named[f"{path}: {name}" if name and len(options.history) > 1 else name or path] = (
                history
            )
    judged, failed = [], False
    for name, history in named.items():
        _, diagnosis = curves.judge(history)
        failed |= diagnosis.fails(options.fail_on)
        judged.append({"run": name, **json.loads(diagnosis.to_json())})
        line = tables.plain(f"{visible(name)}: ")
        line.append_text(tables.verdict(diagnosis.verdict, diagnosis.health_score))
        if diagnosis.last_step is not None:
            line.append(f"  step {diagnosis.last_step:,.0f}")
        parts: list = [line]
        if serious := [found for found in diagnosis.findings if found.severity != "info"]:
            parts.append(tables.findings(serious, with_steps=True))
        console.print(tables.stacked(*parts, *tables.notes(diagnosis.notes)))
    written: dict[str, list] = {"runs": judged}
    if not options.all:
        histories = dict(zip(shortened(list(named)), named.values(), strict=True))
        comparisons, notes = compare_with_first(histories, curves.by)
        console.print(*tables.notes(notes))
        written["comparisons"] = []
        for first, second, comparison in comparisons:
            console.print(tables.run_comparison(first, second, comparison))
            written["comparisons"].append({"first": first, "second": second} | asdict(comparison))
    write_json(options.json, to_json(written))
    return int(failed)


def _check(options: Options) -> None:
    from ..monitor.readers import history_files

    if options.all and options.follow:
        raise InputError("--all: expected without --follow, which follows one run (--run NAME)")
    if len(options.history) > 1 and options.follow:
        raise InputError(f"--follow: expected one history, got {len(options.history)}")
    if options.notify and not options.follow:
        raise InputError("--notify: expected with --follow")
    if options.all and options.curves.run is not None:
        raise InputError("--all: expected without --run, which chooses one")
    options.curves.how()  # a bad --tag comes before an output that is an input
    inputs = [file for path in options.history for file in history_files(path)]
    check_outputs(json_file(options.json), inputs)
    for name, value in (("total_steps", options.curves.total_steps), ("polls", options.polls)):
        if value is not None and value < 1:
            raise InputError(f"{typed(name)}: expected at least 1, got {value}")
    if not 0 < options.interval <= 86_400:
        raise InputError(
            f"--interval: expected more than 0 seconds and at most a day, got {options.interval:g}"
        )
    vocabulary = options.curves.vocabulary_size
    if vocabulary is not None and vocabulary < 2:
        raise InputError(f"--vocabulary-size: expected at least 2, got {vocabulary}")


def _follow(options: Options) -> Diagnosis:
    """Read the file as it grows until interrupted (or for --polls times), and report new
    findings.
    """
    from rich.live import Live

    from ..monitor import diagnose
    from ..monitor.digest import Digest
    from ..monitor.follower import Follower, NotYet

    notified = _notified(options.notify or [])
    reported: set[tuple[str, str, str | None]] = set()
    diagnosis: Diagnosis | None = None
    polls = 0
    notes: list[str] = []
    follower, digest = Follower(options.history[0], **options.curves.how()), Digest()
    console = console_beside(options.json)
    # A terminal's view is redrawn. Elsewhere, in a log of a job, the view is printed when the
    # diagnosis is another one.
    live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
    printed, last = None, None
    with live or nullcontext():
        try:
            while True:
                try:
                    history, whole = follower.new()
                except NotYet as error:
                    if polls == 0 and "no such file" in str(error):
                        raise
                    if live is not None:
                        live.update(tables.plain(f"waiting: {error}"))
                else:
                    if whole:
                        digest, notes, diagnosis = Digest(), [], None
                    notes += [note for note in history.notes if note not in notes]
                    digest.feed(history)
                    told = diagnosis.findings if diagnosis else ()
                    judged = options.curves.judged()
                    diagnosis = diagnose(digest, **judged, notes=notes, told=told)
                    last = view(digest, diagnosis, options.curves.total_steps)
                    found = (
                        diagnosis.verdict,
                        {(finding.signal, finding.severity) for finding in diagnosis.findings},
                    )
                    if live is not None:
                        live.update(last)
                    elif found != printed:
                        console.print(last)
                        console.file.flush()
                        printed, last = found, None
                    _report(diagnosis.findings, reported, options, notified)
                polls += 1
                if options.polls and polls >= options.polls:
                    break
                time.sleep(options.interval)
        except KeyboardInterrupt:
            pass
    if live is None and last is not None:
        console.print(last)  # what came since the diagnosis changed
    if diagnosis is None:
        raise InputError(
            f"{options.history[0]}: expected a history, nothing could be read until it was interrupted"
        )
    return diagnosis


def _notified(urls: list[str]) -> Apprise | None:
    """Return whom to tell; None without a URL, which may hold a password and is never shown."""
    if not urls:
        return None
    needs(notify=("apprise",))
    from apprise import Apprise

    notified = Apprise()
    for number, url in enumerate(urls, 1):
        with theirs("--notify: expected a URL of apprise"):
            known = notified.add(url)
        if not known:
            raise InputError(
                f"--notify: expected a URL of apprise, such as slack://..., got another as number "
                f"{number} (github.com/caronc/apprise lists them)"
            )
    return notified


def _report(
    findings: list[Finding],
    reported: set[tuple[str, str, str | None]],
    options: Options,
    notified: Apprise | None,
) -> None:
    """Tell each new finding: run the command of --on-finding, and send it to --notify."""
    for finding in findings:
        key = finding.signal, finding.severity, finding.set
        if key in reported:
            continue
        reported.add(key)
        if options.on_finding is not None:
            _run_command(options.on_finding, finding)
        if notified is not None and finding.severity != "info":
            title = f"{shortened(options.history)[0]}: {finding.signal} ({finding.severity})"
            sent = False
            with suppress(Exception):  # of a service: the watching goes on
                sent = bool(notified.notify(title=title, body=str(finding)))
            if not sent:
                print(f"--notify: {finding.signal} could not be told to all", file=sys.stderr)


def _run_command(command: str, finding: Finding) -> None:
    """Run a command with the finding in its environment."""
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
    """Return verdict, both curves and findings for a terminal."""
    head = tables.verdict(diagnosis.verdict, diagnosis.health_score)
    if diagnosis.last_step is not None:
        head.append(
            f"  step {diagnosis.last_step:,.0f}" + (f" of {total_steps:,}" if total_steps else "")
        )
    if digest.tokens == digest.tokens:
        head.append(f"  {digest.tokens:,.0f} tokens")
    if total_steps and digest.seconds and digest.last_step and total_steps > digest.last_step:
        left = digest.seconds * (total_steps - digest.last_step) / digest.last_step
        head.append(f"  {left / 60:,.0f} minutes left")
    parts: list = [head, _curves(digest, diagnosis)]
    if diagnosis.findings:
        parts.append(tables.findings(diagnosis.findings, with_steps=True))
    if diagnosis.components:
        parts.append(_score(diagnosis))
    parts += tables.notes(diagnosis.notes)
    return tables.stacked(*parts)


def _curves(digest: Digest, diagnosis: Diagnosis) -> Table:
    from ..nats import exp

    table = tables.table(
        None,
        "",
        "curve",
        "loss",
        "perplexity",
        "best",
        right=("loss", "perplexity", "best"),
        boxed=False,
    )
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
    for name, evaluations in [(digest.main_set, digest.evaluations), *digest.sets.items()]:
        if evaluations:
            last, best = evaluations[-1].loss, min(evaluations, key=lambda e: e.loss)
            table.add_row(
                tables.plain(f"validation {name}" if name else "validation"),
                sparkline([e.loss for e in evaluations]),
                f"{last:.4f}",
                f"{exp(last):,.2f}",
                f"{best.loss:.4f} at {best.step:,.0f}",
            )
    return table


def sparkline(values: list[float], width: int = 40) -> str:
    """Return means of equal parts as bars, from the lowest to the 95th percentile."""
    import numpy as np

    parts = [part.mean() for part in np.array_split(np.array(values), min(width, len(values)))]
    low, high = min(parts), float(np.percentile(parts, 95))
    span = max(high - low, 1e-12)
    return "".join(
        BARS[min(len(BARS) - 1, int((min(part, high) - low) / span * (len(BARS) - 1) + 0.5))]
        for part in parts
    )


def _score(diagnosis: Diagnosis) -> Text:
    parts = [
        f"{name} {part['share'] * part['left']:.0f}/{part['share']}"
        for name, part in diagnosis.components.items()
    ]
    return tables.plain(f"health score: {', '.join(parts)}")
