"""``ppl report``: a page and plots of a run's history and its diagnosis."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, visible
from ..files import check_outputs
from .extras import needs
from .options import argument, by_option, option, part
from .parts import Curves, expect_ending, shortened


@dataclass(frozen=True, kw_only=True)
class Options:
    """a run's curves and what they mean, as a page and as plots"""

    history: list[str] = argument(
        "as for ppl monitor; of several: their curves on one axis", nargs="+"
    )
    output: str | None = option("one file that needs no network", metavar="OUT.html", short="-o")
    png: str | None = option("loss and perplexity side by side", metavar="OUT.png")
    svg: str | None = option("the same, to scale", metavar="OUT.svg")
    eval: list[str] | None = option(
        "a result of ppl eval --json to show beside", metavar="FILE", repeated=True
    )
    data: list[str] | None = option(
        "a result of ppl check-data --json, likewise", metavar="FILE", repeated=True
    )
    probe: list[str] | None = option(
        "of ppl probe --json; of several checkpoints: a trend", metavar="FILE", repeated=True
    )
    title: str | None = option("of the page and the plots")
    curves: Curves = part(Curves)


def run(options: Options) -> int:
    """Read and diagnose the history, and write the page and the plots; return 0."""
    needs(report=("rich", "pyarrow", "matplotlib", "plotly", "pydantic"))
    from ..evaluation.results import read_result
    from ..json_files import read_written
    from ..monitor.readers import history_files

    inputs = [*(options.eval or []), *(options.data or []), *(options.probe or [])]
    outputs = {"--output": options.output, "--png": options.png, "--svg": options.svg}
    inputs += [str(file) for path in options.history for file in history_files(path)]
    check_outputs(outputs, inputs)
    if not any(outputs.values()):
        raise InputError("expected an output, -o, --png or --svg, got none")
    expect_ending("--output", options.output, ".html", ".htm")
    expect_ending("--png", options.png, ".png")
    expect_ending("--svg", options.svg, ".svg")
    if len(options.history) > 1:
        return _several(options)
    history = options.curves.read(options.history[0])
    digest, diagnosis = options.curves.judge(history)
    if options.output:
        from ..report.html import write_report

        evaluations = [read_result(path) | {"source": path} for path in options.eval or []]
        checks = [
            read_written(path, "check-data") | {"source": path} for path in options.data or []
        ]
        checks += [
            e["data_check"] | {"source": e["source"]}
            for e in evaluations
            if isinstance(e.get("data_check"), dict)
        ]
        write_report(
            options.output,
            history,
            digest,
            diagnosis,
            vocabulary_size=options.curves.vocabulary_size,
            evaluations=evaluations,
            data_checks=checks,
            probes=[read_written(path, "probe") | {"source": path} for path in options.probe or []],
            title=options.title,
            command=_command(),
        )
        print(f"{visible(options.output)}: {diagnosis.verdict}")
    for form, path in (("png", options.png), ("svg", options.svg)):
        if path:
            from ..report.plots import run_curves

            run_curves(
                history,
                digest,
                diagnosis,
                path,
                vocabulary_size=options.curves.vocabulary_size,
                title=options.title,
                form=form,
            )
            print(visible(path))
    return 0


def _command() -> str:
    """Return the command line as it may be typed again."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _several(options: Options) -> int:
    """Write a page of several runs on one axis; return 0."""
    from ..monitor.run_comparison import compare_with_first
    from ..report.runs import write_runs

    for name, value in by_option(options, "png", "svg", "eval", "data", "probe").items():
        if value:
            raise InputError(f"{name}: expected with one history, got {len(options.history)}")
    assert options.output is not None  # the only output that is left
    histories = {
        name: options.curves.read(path)
        for name, path in zip(shortened(options.history), options.history, strict=True)
    }
    runs = {name: (history, *options.curves.judge(history)) for name, history in histories.items()}
    comparisons, notes = compare_with_first(histories, options.curves.by)
    write_runs(options.output, runs, comparisons, title=options.title, command=_command())
    for note in notes:
        print(f"note: {note}")
    verdicts = ", ".join(f"{name} {judged.verdict}" for name, (_, _, judged) in runs.items())
    print(f"{visible(options.output)}: {verdicts}")
    return 0
