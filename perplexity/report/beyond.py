"""The page's part on generated text: results of ``ppl probe --json``, a checkpoint each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..json_files import model_name, read_as
from ..monitor.health import Diagnosis
from ..probe.scores import FACTOR, SHOWN, Part, health, in_words, monitor_part
from ..probe.summary import examples, rows
from .html import figure_of, trace_of
from .shapes import ProbeShape

LINES = {
    "monitor": "#7a6fa8",
    "perplexity": "#c1440e",
    "generation": "#2b6ca3",
    "references": "#3d8b5f",
    "ask": "#b8860b",
}
OWN_LINE = "#888888"
EXAMPLE = 1200  # characters of a text that are shown


def beyond_section(records: Sequence[dict], diagnosis: Diagnosis) -> dict | None:
    """Return what the page shows of probes: the last checkpoint in detail, and all by step.

    Args:
        records: results of ``ppl probe --json``, with the ``source`` of each.
        diagnosis: of the run's curves, the monitor's part of the overall score.

    Returns:
        The values that the page reads, or None without a record.

    Raises:
        InputError: a record is no result of ``ppl probe --json``; its file is named.
    """
    probes = [_checked(record) for record in records]
    if not probes:
        return None
    probes.sort(key=lambda record: math.inf if record["step"] is None else record["step"])
    last = probes[-1]
    comparable = _comparable(probes)
    curves = diagnosis.to_dict()
    parts = {
        name: Part(part["score"], str(part["evidence"]))
        for name, part in last["health"]["parts"].items()
    }
    weights = {
        name: part["weight"] for name, part in last["health"]["parts"].items() if name != FACTOR
    }
    severities = [finding["severity"] for finding in (*last["findings"], *curves["findings"])]
    overall = health(parts | {"monitor": monitor_part(curves)}, weights, severities)
    return {
        "overall": overall.to_dict(),
        "overall_in_words": in_words(overall.to_dict()),
        "shown": SHOWN,
        "last": last,
        "model": model_name(last["model"]),
        "rows": rows(last),
        "examples": [(title, text[:EXAMPLE]) for title, text in examples(last)],
        "checkpoints": [
            {
                "name": model_name(record["model"]),
                "step": record["step"],
                "verdict": record["verdict"],
                "health": score,
                "perplexity": record["perplexity"]["reference_perplexity"],
                "own": record["perplexity"]["self_perplexity"],
                "repetition": record["generation"]["repetition"],
                "findings": ", ".join(
                    f["signal"] for f in record["findings"] if f["severity"] != "info"
                ),
            }
            for record, score in zip(probes, comparable["scores"], strict=True)
        ],
        "compared": [SHOWN.get(name, name) for name in comparable["parts"]],
        "figures": _figures(probes, comparable["scores"]),
    }


def _comparable(probes: list[dict]) -> dict:
    """Return the health of each checkpoint over the parts that all of them have.

    A part that only some checkpoints have would look like progress.
    """
    parts = [record["health"]["parts"] for record in probes]
    names = [
        name for name in parts[-1] if all(of.get(name, {}).get("score") is not None for of in parts)
    ]
    weights = {name: parts[-1][name]["weight"] for name in names if name != FACTOR}
    scores = [
        health(
            {name: Part(of[name]["score"], "") for name in names},
            weights,
            [finding["severity"] for finding in record["findings"]],
        ).score
        for record, of in zip(probes, parts, strict=True)
    ]
    return {"parts": names, "scores": scores}


def _checked(record: dict) -> dict:
    """Return ``record``, which has all that the page reads, with numbers for "inf"."""
    if isinstance(name := record.get("model"), str):  # of schema version 1
        record = record | {"model": {"name": name}}
    source = record.get("source", "")
    return read_as(ProbeShape, record, f"{source}: expected a result file of ppl probe --json")


def _figures(probes: list[dict], scores: list[float | None]) -> dict[str, dict]:
    """Return Plotly figures by element: the trend over steps, and reliability of the last probe."""
    drawn = {}
    stepped = [record for record in probes if record["step"] is not None]
    if len({record["step"] for record in stepped}) > 1:
        steps = [record["step"] for record in stepped]
        of_stepped = [
            score
            for record, score in zip(probes, scores, strict=True)
            if record["step"] is not None
        ]
        traces = [_line("health", steps, of_stepped, "#1a7f37", 3)]
        for name in stepped[-1]["health"]["parts"]:
            scores = [record["health"]["parts"].get(name, {}).get("score") for record in stepped]
            if any(score is not None for score in scores):
                scaled = [None if score is None else 100 * score for score in scores]
                shown = SHOWN.get(name, name)
                traces.append(_line(shown, steps, scaled, LINES.get(name, OWN_LINE), 1.5))
        drawn["health-trend"] = _figure(traces, "step", "score (of 100)", [0, 105])
        traces = [
            _line(
                f"perplexity of {what}",
                steps,
                [record["perplexity"][key] for record in stepped],
                colour,
                2,
            )
            for what, key, colour in (
                ("the references", "reference_perplexity", LINES["perplexity"]),
                ("its own texts", "self_perplexity", LINES["generation"]),
            )
        ]
        drawn["perplexity-trend"] = _figure(traces, "step", "perplexity", None, log=True)
    if calibration := probes[-1]["calibration"]:
        # A bin with an infinite loss has no place on a plane.
        drawable = {
            name: [row for row in calibration[name] if all(map(math.isfinite, row.values()))]
            for name in ("bins", "entropy_bins")
        }
        top = (
            max([0.1, *(max(row["entropy"], row["loss"]) for row in drawable["entropy_bins"])])
            * 1.05
        )
        for name, bins, x, y, limit, labels in (
            (
                "reliability",
                "bins",
                "confidence",
                "accuracy",
                1,
                ("probability of the first choice", "share right"),
            ),
            (
                "surprise",
                "entropy_bins",
                "entropy",
                "loss",
                top,
                ("entropy (nats)", "loss (nats a token)"),
            ),
        ):
            most = max((row["tokens"] for row in drawable[bins]), default=1)
            trace = _line(
                "a bin; its size: tokens",
                [r[x] for r in drawable[bins]],
                [r[y] for r in drawable[bins]],
                "#2b6ca3",
                1.5,
            )
            trace |= {"mode": "markers", "cliponaxis": False}
            trace["marker"] = {
                "size": [6 + 14 * math.sqrt(row["tokens"] / most) for row in drawable[bins]]
            }
            diagonal = _line("calibrated", [0, limit], [0, limit], "#888888", 1)
            diagonal |= {"mode": "lines", "line": {"color": "#888888", "width": 1, "dash": "dash"}}
            drawn[name] = _figure([diagonal, trace], *labels, [0, limit])
            drawn[name]["layout"]["xaxis"]["range"] = [0, limit]
    return drawn


def _line(name: str, x: list, y: list, colour: str, width: float) -> dict:
    """Return a trace with markers, without a point where ``y`` is None."""
    y = [math.nan if value is None else value for value in y]
    trace = trace_of(name, x, y, colour, width=width, markers=True)
    return trace | {"hovertemplate": "%{x:,.4~g}: %{y:,.4~g}"}


def _figure(traces: list[dict], x: str, y: str, limits: list | None, *, log: bool = False) -> dict:
    """Return a figure with labels ``x`` and ``y``, and limits of its y axis."""
    figure = figure_of(traces, y, [], [], log=log, x=x)
    if limits:
        figure["layout"]["yaxis"]["range"] = limits
    return figure
