"""``ppl report``: a run's history, diagnosed and drawn."""

from __future__ import annotations

import argparse

from ..errors import InputError, visible
from ..evaluation.results import read_result, read_written
from ..files import check_outputs
from ..monitor.commands import parse_tags
from ..monitor.health import diagnose
from ..monitor.readers import history_files, read_history


def _read(path: str, command: str) -> dict:
    """Return what ``ppl COMMAND --json`` wrote, with the file's name as its ``source``."""
    return read_written(path, command) | {"source": str(path)}


def run_report(arguments: argparse.Namespace) -> int:
    names = ("eval", "data", "probe")
    inputs = [path for name in names for path in getattr(arguments, name) or []]
    outputs = {"--output": arguments.output, "--png": arguments.png, "--svg": arguments.svg}
    check_outputs(outputs, [*inputs, *history_files(arguments.history)])
    if not (arguments.output or arguments.png or arguments.svg):
        raise InputError("report: expected -o, --png or --svg, got none")
    history = read_history(arguments.history, tags=parse_tags(arguments.tag), unit=arguments.unit)
    digest = history.digest()
    diagnosis = diagnose(
        digest, vocabulary_size=arguments.vocabulary_size, total_steps=arguments.total_steps, notes=history.notes
    )
    if arguments.output:
        from .html import write_report

        evaluations = [read_result(path) | {"source": str(path)} for path in arguments.eval or []]
        beside = [
            e["data_check"] | {"source": e["source"]} for e in evaluations if isinstance(e.get("data_check"), dict)
        ]
        write_report(
            arguments.output,
            history,
            digest,
            diagnosis,
            vocabulary_size=arguments.vocabulary_size,
            evaluations=evaluations,
            data_checks=[_read(path, "check-data") for path in arguments.data or []] + beside,
            probes=[_read(path, "probe") for path in arguments.probe or []],
            title=arguments.title,
        )
        print(f"{visible(arguments.output)}: {diagnosis.verdict}")
    for form in ("png", "svg"):
        path = getattr(arguments, form)
        if path:
            from .plots import run_curves

            run_curves(
                history,
                digest,
                diagnosis,
                path,
                vocabulary_size=arguments.vocabulary_size,
                title=arguments.title,
                form=form,
            )
            print(visible(path))
    return 0
