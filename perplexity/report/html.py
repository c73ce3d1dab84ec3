"""``ppl report``: one HTML file with a run's curves, their findings and results of commands.

A browser shows the file without a network.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..findings import SEVERITIES
from ..json_files import model_name, read_as
from ..monitor.digest import Digest, Evaluated
from ..monitor.health import Diagnosis
from ..monitor.history import History
from ..nats import exp
from .page import write_page
from .shapes import DataCheckShape, EvaluationShape, PositionsShape

# On logarithmic axes: 1, 2 and 5 of each power of ten.
TICKS = [digit * 10.0**power for power in range(-2, 9) for digit in (1, 2, 5)]
DRAWN = 3000  # points of a curve, more than a screen has columns
MARKED = (
    "spike",
    "plateau",
    "overfitting",
    "divergence",
    "leakage-suspected",
    "non-finite",
    "generalisation-gap",
)
SEVERITY_COLOURS = {
    "info": "rgba(70,130,180,.10)",
    "warning": "rgba(230,160,0,.14)",
    "danger": "rgba(200,40,40,.14)",
}
COLOURS = {"batch": "#9ab7d3", "train": "#2b6ca3", "val": "#c1440e", "other": "#7a6fa8"}
# The same on a dark page: a line must be stronger than its noise.
DARK = {"#9ab7d3": "#4a6078", "#2b6ca3": "#6fb1e8", "#c1440e": "#ff8a5c", "#7a6fa8": "#b0a4e3"}
SETS = ("#d9812b", "#a3195b", "#6b8e23", "#8c564b", "#e0a100")  # further validation sets


def thinned(steps: np.ndarray, values: np.ndarray, most: int = DRAWN) -> tuple[list, list]:
    """Return a curve's lowest and highest point of each stretch, so that spikes stay.

    Args:
        steps: float64 [n].
        values: float64 [n]; those that are not finite are left out.
        most: the most points that are returned; default 3,000.

    Returns:
        Steps and values.

    Example:
        >>> thinned(np.arange(4.0), np.array([1.0, 9.0, 2.0, 3.0]), most=2)
        ([0.0, 1.0], [1.0, 9.0])
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) > most:
        edges = np.linspace(0, len(steps), most // 2 + 1).astype(int)[:-1]
        kept: set[int] = set()
        for begin, end in zip(edges, [*edges[1:], len(steps)], strict=True):
            kept |= {
                begin + int(np.argmin(values[begin:end])),
                begin + int(np.argmax(values[begin:end])),
            }
        places = sorted(kept)
        steps, values = steps[places], values[places]
    return steps.tolist(), values.tolist()


def figures(
    history: History, digest: Digest, diagnosis: Diagnosis, vocabulary_size: int | None
) -> dict[str, dict]:
    """Return Plotly figures by the id of the element they are drawn in.

    Args:
        history: the run.
        digest: its summary.
        diagnosis: its findings, which are marked.
        vocabulary_size: for the line of a uniform guess; None: no line.
    """
    steps, losses = thinned(*history.arrays())
    blocks = digest.pieces()  # finer than blocks while the run is short
    means = [(block.first + block.last) / 2 for block in blocks], [block.mean for block in blocks]
    lines = [("uniform guess, ln V", math.log(vocabulary_size))] if vocabulary_size else []
    drawn = {}
    for name, change, label in (
        ("loss", lambda x: x, "loss (nats a token)"),
        ("perplexity", exp, "perplexity"),
    ):
        traces = [
            trace_of("one batch", steps, [change(x) for x in losses], COLOURS["batch"], width=1),
            trace_of(
                "training", means[0], [change(x) for x in means[1]], COLOURS["train"], width=2
            ),
            *(
                trace_of(
                    set_name,
                    [e.step for e in of_set],
                    [change(e.loss) for e in of_set],
                    colour,
                    width=2,
                    markers=True,
                )
                for set_name, of_set, colour in validation_sets(digest)
            ),
        ]
        traces[0] |= {"opacity": 0.6}
        shapes, notes = _marks(diagnosis)
        for words, level in lines:
            shapes.append(_line(change(level)))
            notes.append(_note(words, 1.0, change(level)))
        drawn[name] = figure_of(
            [t for t in traces if t["x"]], label, shapes, notes, log=name == "perplexity"
        )
        if limits := _limits(digest):
            levels = [change(level) for level in limits]
            if all(map(math.isfinite, levels)):
                axis = drawn[name]["layout"]["yaxis"]
                axis["range"] = levels
                if axis["type"] == "log":
                    axis |= _ticks(
                        [tick for tick in TICKS if levels[0] <= tick <= levels[1]], levels
                    )
                notes += _above_the_frame(traces, levels[1])
    gaps = [(e.step, e.loss - e.near) for e in digest.evaluations if not math.isnan(e.near)]
    if gaps:
        at, above = map(list, zip(*gaps, strict=True))
        trace = trace_of("validation − training", at, above, COLOURS["val"], width=2, markers=True)
        drawn["gap"] = figure_of([trace], "gap (nats)", [_line(0.0)], [], log=False)
    for name, label in (("lr", "learning rate"), ("grad_norm", "gradient norm")):
        seen, values = history.of(name)
        if len(seen) > 1:
            trace = trace_of(label, *thinned(seen, values), COLOURS["other"], width=1.5)
            drawn[name] = figure_of([trace], label, [], [], log=False)
            # From 0: a rate that is constant stands at its value.
            drawn[name]["layout"]["yaxis"]["rangemode"] = "tozero"
    if digest.last_step > digest.first_step:
        # One range of steps, so that what stands below each other is of one step.
        room = 0.01 * (digest.last_step - digest.first_step)
        for figure in drawn.values():
            figure["first"] = max(digest.first_step, 1.0)  # where a logarithmic axis begins
            figure["layout"]["xaxis"]["range"] = [
                max(digest.first_step - room, min(digest.first_step, 0.0)),
                digest.last_step + room,
            ]
    return drawn


def _ticks(ticks: list[float], limits: list[float] | None = None) -> dict:
    """Return an axis's ticks in plain numbers; of fewer than three in ``limits``, equal steps."""
    if limits and len(ticks) < 3:
        rough = (limits[1] - limits[0]) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(digit for digit in (1, 2, 5, 10) if digit * power >= rough)
        first = math.ceil(limits[0] / step)
        ticks = [step * place for place in range(first, int(limits[1] / step) + 1)]
    return {"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:,.6g}" for tick in ticks]}


def _above_the_frame(traces: list[dict], top: float) -> list[dict]:
    """Return a note at the upper edge where points lie above it."""
    highest = max((y for trace in traces for y in trace["y"] if y is not None), default=top)
    if highest <= top:
        return []
    most = f"{highest:,.0f}" if highest >= 1000 else f"{highest:.4g}"
    words = f"↑ up to {most}; double-click shows all"
    at = {"xref": "paper", "yref": "paper", "x": 1, "y": 1, "xanchor": "right", "yanchor": "bottom"}
    return [{"text": plain(words), "showarrow": False, "font": {"size": 11}, **at}]


def validation_sets(digest: Digest) -> Iterator[tuple[str, list[Evaluated], str]]:
    """Yield (name, losses, colour) of each validation set, the main set first."""
    main = f"validation {digest.main_set}" if digest.main_set else "validation"
    yield main, digest.evaluations, COLOURS["val"]
    for place, (name, of_set) in enumerate(digest.sets.items()):
        yield f"validation {name}", of_set, SETS[place % len(SETS)]


def _limits(digest: Digest) -> tuple[float, float] | None:
    """Return limits of the y axis: the lowest and highest mean loss, and a little room.

    The first hundredth of the run is left out, since it would dwarf the rest.
    """
    late = digest.first_step + 0.01 * (digest.last_step - digest.first_step)
    levels = [block.mean for block in digest.all_blocks() if block.count and block.first >= late]
    levels += [e.loss for _, of, _ in validation_sets(digest) for e in of if e.step >= late]
    if not levels:
        return None
    low, high = min(levels), max(levels)
    room = 0.08 * max(high - low, 0.05)
    return max(low - room, 0.7 * low, 1e-3), high + 2 * room


def plain(text: str) -> str:
    """Return a text that Plotly shows as it is, its markup and its %{...} taken as characters.

    Args:
        text: any text, such as a name in a file.

    Example:
        >>> plain("<b>%{y}</b>")
        '&lt;b&gt;&#37;{y}&lt;/b&gt;'
    """
    return html.escape(text).replace("%{", "&#37;{")


def trace_of(
    name: str,
    x: list,
    y: list,
    colour: str,
    *,
    width: float,
    markers: bool = False,
    over: str = "step",
) -> dict:
    """Return a Plotly trace over steps or tokens, with gaps where ``y`` is not finite."""
    place = "step %{x:,.0f}" if over == "step" else "%{x:,.0f} tokens"
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": plain(name),
        "x": [int(value) if value == int(value) else value for value in x],
        # As a screen shows it: six digits.
        "y": [float(f"{value:.6g}") if math.isfinite(value) else None for value in y],
        "line": {"color": colour, "width": width},
        "dark": DARK.get(colour, colour),
        "marker": {"size": 5},
        "hovertemplate": place + ": %{y:.4f}<extra>" + plain(name) + "</extra>",
    }


def _line(level: float) -> dict:
    line = {"color": "#888", "width": 1, "dash": "dash"}
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": level,
        "y1": level,
        "line": line,
    }


def _note(words: str, x: float, y: float) -> dict:
    at = {"xref": "paper", "x": x, "y": y, "xanchor": "right", "yanchor": "bottom"}
    return {"text": plain(words), "showarrow": False, "font": {"size": 11}, **at}


def _marks(diagnosis: Diagnosis) -> tuple[list[dict], list[dict]]:
    """Return findings as shaded stretches and their names, which stand below each other."""
    shapes, notes = [], []
    for place, finding in enumerate(f for f in diagnosis.findings if f.signal in MARKED):
        first, last = finding.first_step, max(finding.last_step, finding.first_step + 1)
        shapes.append(
            {
                "type": "rect",
                "yref": "paper",
                "x0": first,
                "x1": last,
                "y0": 0,
                "y1": 1,
                "fillcolor": SEVERITY_COLOURS[finding.severity],
                "line": {"width": 0},
                "layer": "below",
            }
        )
        at = {
            "x": first,
            "yref": "paper",
            "y": 1 - 0.07 * (place % 6),
            "xanchor": "left",
            "yanchor": "top",
        }
        notes.append(
            {"text": plain(finding.signal), "showarrow": False, "font": {"size": 11}, **at}
        )
    return shapes, notes


def figure_of(
    traces: list[dict], label: str, shapes: list, notes: list, *, log: bool, x: str = "step"
) -> dict:
    """Return a Plotly figure with labels ``x`` and ``label`` and a linear or logarithmic y axis."""
    axis: dict[str, Any] = {"title": {"text": label}, "type": "log" if log else "linear"}
    if log:
        axis |= _ticks(TICKS)
    return {
        "data": traces,
        "steps": x in ("step", "tokens"),
        "layout": {
            "xaxis": {"title": {"text": x}},
            "yaxis": axis,
            "shapes": shapes,
            "annotations": notes,
            "margin": {"l": 60, "r": 12, "t": 12, "b": 44},
            "legend": {"orientation": "h", "y": 1.12, "x": 0},
            "hovermode": "closest",
        },
    }


def positions_figure(positions: PositionsShape) -> dict:
    """Return a Plotly figure of the loss by position on a logarithmic axis, with intervals."""
    traces = []
    for name, bins, colour in (
        ("position in the document", positions["document"], COLOURS["val"]),
        ("tokens of context in the window", positions["window"], COLOURS["train"]),
    ):
        x, y = [each["first"] for each in bins], [each["loss"] for each in bins]
        intervals = [each.get("interval") or (each["loss"], each["loss"]) for each in bins]
        halves = [(high - low) / 2 for low, high in intervals]
        trace = trace_of(name, x, y, colour, width=2, markers=True)
        error = [half if math.isfinite(half) else 0.0 for half in halves]
        traces.append(
            trace
            | {"error_y": {"type": "data", "array": error, "thickness": 1, "color": colour}}
            | {"hovertemplate": "from %{x:,.0f}: %{y:.4f}<extra>" + plain(name) + "</extra>"}
        )
    figure = figure_of(traces, "loss (nats a token)", [], [], log=False, x="from position")
    return figure | {"log_x": True}


def evaluation_section(record: dict, source: str) -> dict:
    """Return what the page shows of a result of ``ppl eval --json``; what it lacks is None.

    Args:
        record: the JSON object.
        source: name of its file.

    Raises:
        InputError: a value is of another type than its field.
    """
    expected = f"{source}: expected a result file of ppl eval --json"
    shown = read_as(EvaluationShape, record, expected)
    return vars(shown) | {"source": source, "model": model_name(shown.model)}


def data_section(record: dict, source: str) -> dict:
    """Return what the page shows of a result of ``ppl check-data --json``; what it lacks is None.

    Args:
        record: the JSON object.
        source: name of its file.

    Raises:
        InputError: ``leaked_fraction`` is missing, or a value is of another type than its field.
    """
    expected = f"{source}: expected a result file of ppl check-data --json"
    return vars(read_as(DataCheckShape, record, expected)) | {"source": source}


def write_report(
    path: str | Path,
    history: History,
    digest: Digest,
    diagnosis: Diagnosis,
    *,
    vocabulary_size: int | None = None,
    evaluations: list[dict] | None = None,
    data_checks: list[dict] | None = None,
    probes: list[dict] | None = None,
    title: str | None = None,
    command: str | None = None,
) -> None:
    """Write one HTML file that needs no network; every string of a run is escaped.

    Args:
        path: the file, which is written whole or left as it was.
        history: the run.
        digest: its summary, ``history.digest()``.
        diagnosis: its findings, ``diagnose(digest)``.
        vocabulary_size: for the line of a uniform guess; default none.
        evaluations: results of ``ppl eval --json``, each with its file as ``source``.
        data_checks: results of ``ppl check-data --json``, likewise.
        probes: results of ``ppl probe --json``, a checkpoint each, likewise.
        title: of the page; default the name of the history.
        command: what made the page, for its foot.

    Raises:
        InputError: a package is missing, a result has a value of another type, or the file cannot
            be written.

    Example:
        >>> from perplexity.monitor import diagnose
        >>> history = History("run")
        >>> for step in range(5):
        ...     history.add(step, {"train_loss": 3.0 - 0.1 * step})
        >>> digest = history.digest()
        >>> write_report("/dev/null", history, digest, diagnose(digest))
    """
    drawn = figures(history, digest, diagnosis, vocabulary_size)
    curves = list(drawn)
    beyond: dict | None = None
    sections = [
        evaluation_section(record, str(record.get("source", ""))) for record in evaluations or []
    ]
    for place, section in enumerate(sections):
        section["figure"] = None
        if section["loss_by_position"]:
            section["figure"] = f"positions-{place}"
            drawn[section["figure"]] = positions_figure(section["loss_by_position"])
    if probes:
        from .beyond import beyond_section

        beyond = beyond_section(probes, diagnosis)
        drawn |= beyond["figures"] if beyond else {}
    write_page(
        path,
        "report.html",
        drawn,
        title=title or f"Training run {history.source}",
        diagnosis=diagnosis,
        headline=_headline(diagnosis, beyond),
        figures=curves,
        beyond=beyond,
        evaluations=sections,
        data_checks=[
            data_section(record, str(record.get("source", ""))) for record in data_checks or []
        ],
        tokens=None if math.isnan(digest.tokens) else digest.tokens,
        minutes=digest.seconds / 60 if digest.seconds else None,
        command=command,
    )


IN_WORDS = {
    "healthy": "Healthy: no action needed",
    "watch": "Watch: a finding needs a look",
    "unhealthy": "Unhealthy: action needed",
    "insufficient-data": "Not enough data yet to judge the run",
}


def _headline(diagnosis: Diagnosis, beyond: dict | None) -> dict:
    """Return the verdict in words, what to do, and one score with what it is measured on."""
    findings = [(f.severity, f.evidence, f.advice) for f in diagnosis.findings]
    verdicts, score, measured = [diagnosis.verdict], diagnosis.health_score, ""
    if beyond:
        last = beyond["last"]
        findings += [(f["severity"], f["evidence"], f["advice"]) for f in last["findings"]]
        verdicts.append(last["verdict"])
        score = beyond["overall"]["score"]
        measured = f"of the curves and of what the model writes, {beyond['overall_in_words']}"
    worst_first = sorted(verdicts, key=("unhealthy", "watch", "insufficient-data", "healthy").index)
    findings.sort(key=lambda found: -SEVERITIES.index(found[0]))
    return {
        "verdict": worst_first[0],
        "words": IN_WORDS[worst_first[0]],
        "score": score,
        "measured": measured,
        "todo": [found[1:] for found in findings if found[0] != "info"],
    }
