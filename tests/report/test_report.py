"""The report: everything in one file, every string escaped, drawn by a real browser without an
error.
"""

import dataclasses
import json
import re
import shutil

import pytest
from faults import VOCABULARY, history, runs
from processes import run

from perplexity.data_checks import DataCheck, Finding
from perplexity.data_checks.leakage import Leak
from perplexity.errors import InputError
from perplexity.evaluation import Evaluation, read_result
from perplexity.monitor import diagnose
from perplexity.probe import Probe
from perplexity.probe.measures import Measured
from perplexity.report.html import data_section, evaluation_section, thinned, write_report
from perplexity.report.plots import run_curves
from perplexity.report.shapes import (
    DataCheckShape,
    EvaluationShape,
    FindingShape,
    LeakShape,
    ProbeShape,
    TextShape,
)

HOSTILE = '<b>run</b> & </script><script>document.title="taken"</script>'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    made = history(runs("overfitting")[0])
    made.source = HOSTILE
    for step in range(1, 1101):
        made.events.append((step, step, "lr", 1e-3 * (1 - step / 1200)))
    made.events.sort(key=lambda event: event[0])
    digest = made.digest()
    evaluation = {
        "source": HOSTILE,
        "loss": 4.9,
        "stderr": 0.07,
        "perplexity": 134.3,
        "perplexity_interval": [113.0, 158.0],
        "bits_per_byte": 2.08,
        "tokens": 7035,
        "documents": 9,
        "protocol": "sliding",
        "context_length": 256,
        "worst_documents": [{"id": HOSTILE, "tokens": 100, "loss": 5.0}],
        "surprising_tokens": [
            {"document": "d", "position": 3, "before": HOSTILE, "text": HOSTILE, "nll": 12.0}
        ],
        "notes": [HOSTILE],
    }
    found = diagnose(digest, vocabulary_size=VOCABULARY, notes=[HOSTILE])
    write_report(path, made, digest, found, vocabulary_size=VOCABULARY, evaluations=[evaluation])
    return path


def test_every_string_of_a_run_is_escaped(page):
    text = page.read_text()
    assert HOSTILE not in text and 'document.title="taken"' not in text
    assert text.count("&lt;b&gt;run&lt;/b&gt;") >= 6


def test_it_needs_no_network(page):
    text = page.read_text()
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.S)  # the library names its home page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", own)
    assert "default-src 'none'" in own


def test_the_curves_are_in_it(page):
    data = json.loads(
        re.search(
            r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.S
        )[1]
    )
    assert list(data) == ["loss", "perplexity", "gap", "lr"]
    assert data["perplexity"]["layout"]["yaxis"]["type"] == "log"
    names = [trace["name"] for trace in data["loss"]["data"]]
    assert names == ["one batch", "training", "validation"]
    assert any(note["text"] == "overfitting" for note in data["loss"]["layout"]["annotations"])


def test_thinning_keeps_what_stands_out():
    import numpy as np

    values = np.zeros(100_000)
    values[[777, 50_001]] = 9.0, -9.0
    steps, kept = thinned(np.arange(100_000), values, 1000)
    assert len(kept) <= 1000 and 9.0 in kept and -9.0 in kept
    assert steps == sorted(steps)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots_for_papers(tmp_path, suffix):
    made = history(runs("overfitting")[0])
    digest = made.digest()
    run_curves(
        made,
        digest,
        diagnose(digest),
        tmp_path / f"a.{suffix}",
        vocabulary_size=VOCABULARY,
        form=suffix,
    )
    assert (tmp_path / f"a.{suffix}").read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("by", ["address", "clicks"])
@pytest.mark.parametrize(
    ("toggled", "expected"),
    [
        ("", dict(theme="light", pressed=["marks"], log_loss=False)),
        (
            "theme,log-x,log-y,marks",
            dict(theme="dark", pressed=["log-x", "log-y", "theme"], log_loss=True),
        ),
    ],
)
def test_a_real_browser_draws_it(page, tmp_path, toggled, expected, by):
    if by == "clicks":
        clicks = "".join(
            f"document.getElementById({name!r}).click();"
            for name in filter(None, toggled.split(","))
        )
        clicked = tmp_path / "clicked.html"
        clicked.write_text(page.read_text().replace("</body>", f"<script>{clicks}</script></body>"))
        page, toggled = clicked, ""
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=1200,1400",
    ]
    options += ["--virtual-time-budget=8000", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = run(CHROMIUM, *options, f"file://{page}#{toggled}")
    assert "CONSOLE" not in done.stderr, [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]
    dom = done.stdout
    assert re.search(r"<title>Training run &lt;b&gt;", dom)  # nobody's script ran
    assert f'data-theme="{expected["theme"]}"' in dom
    pressed = re.findall(r'<button id="([\w-]+)" aria-pressed="true"', dom)
    assert sorted(pressed) == sorted(expected["pressed"])
    for name in ("loss", "perplexity", "gap", "lr"):
        drawn = dom.split(f'id="{name}"')[1].split("js-plotly-plot")[0]
        assert 'class="main-svg"' in drawn and "scatterlayer" in drawn and "<path" in drawn, name
    # Ticks of the steps: thousands on the linear axis, powers on the other.
    ticks = re.findall(r'class="xtick"><text[^>]*data-unformatted="([\d.k]+)"', dom)
    assert ("10" in ticks) == expected["log_loss"]


def test_a_result_with_the_least_keys_is_shown(tmp_path):
    made = history(runs("healthy")[0])
    digest = made.digest()
    path = tmp_path / "least.html"
    write_report(
        path, made, digest, diagnose(digest), evaluations=[{"loss": 3.0}], title="a \udcff b"
    )
    assert "3.0000 nats a token" in path.read_text()


def test_a_result_of_several_contexts_shows_them_all(tmp_path):
    """The page showed the longest context's loss alone."""
    made = history(runs("healthy")[0])
    digest = made.digest()
    path = tmp_path / "contexts.html"
    contexts = [
        {"context_length": 512, "loss": 3.25, "difference": -0.25, "p_holm": 0.0123},
        {"context_length": 2048, "loss": 3.0, "stderr": 0.0625, "difference": None},
    ]
    record = {"loss": 3.0, "contexts": contexts}
    write_report(path, made, digest, diagnose(digest), evaluations=[record])
    page = path.read_text()
    assert "the longest of 2 context lengths" in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page.split("gain of the longest")[1])
    assert cells[:7] == ["512", "3.2500", "", "–", "0.2500", "", "0.012"]
    assert cells[7:14] == ["2,048", "3.0000", "0.0625", "–", "", "", ""]


def test_a_comparison_is_no_evaluation(tmp_path):
    record = {"schema_version": 2, "models": [], "columns": []}
    (tmp_path / "many.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="of ppl compare A B C --json.*the results that it comp"):
        read_result(tmp_path / "many.json")


@pytest.mark.parametrize(
    "record",
    [
        {"contexts": [{"loss": "x"}]},
        {"perplexity": "x"},
        {"perplexity_interval": [1]},
        {"worst_documents": {}},
        {"worst_documents": [3]},
        {"tokens": 10**400},
        {"protocol": 3},
    ],
)
def test_a_result_of_the_wrong_kinds_is_named(record):
    with pytest.raises(InputError, match=f"a.json: expected .* {next(iter(record))}"):
        evaluation_section({"loss": 3.0} | record, "a.json")


def test_the_page_reads_fields_that_are_written():
    """A field that is renamed where it is written would be absent from every page."""
    for shape, written in (
        (EvaluationShape, Evaluation),
        (DataCheckShape, DataCheck),
        (LeakShape, Leak),
        (FindingShape, Finding),
        (ProbeShape, Probe),
        (TextShape, Measured),
    ):
        names = {field.name for field in dataclasses.fields(written)}
        assert set(shape.__annotations__) <= names, shape


CHECK = {
    "documents": {"train": 10, "valid": 4},
    "leaked_fraction": 0.25,
    "leaked_token_fraction": 0.125,
    "findings": [
        {"signal": "leakage", "severity": "danger", "evidence": "<b>one</b> of 4", "advice": "look"}
    ],
    "leaked": [
        {
            "id": "v<i>1",
            "train_id": "t1",
            "kind": "near",
            "similarity": 0.5,
            "passage": "the same words",
        }
    ],
}


def test_a_data_check_is_shown(tmp_path):
    made = history(runs("healthy")[0])
    digest = made.digest()
    for name, record in (("whole", CHECK), ("least", {"leaked_fraction": 0.0})):
        path = tmp_path / f"{name}.html"
        write_report(path, made, digest, diagnose(digest), data_checks=[record])
        text = path.read_text()
        assert ("25.00 %" in text and "12.50 %" in text and "near 0.50" in text) == (
            name == "whole"
        )
        assert "<b>one" not in text and "<i>1" not in text


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"leaked_fraction": "x"},
        {"documents": []},
        {"findings": {}},
        {"leaked": [3]},
        {"unknown_token_rate": "0"},
    ],
)
def test_a_data_check_of_the_wrong_kinds_is_named(record):
    given = ({"leaked_fraction": 0.1} | record) if record else {}
    with pytest.raises(
        InputError, match=f"a.json: expected .* {next(iter(record), 'leaked_fraction')}"
    ):
        data_section(given, "a.json")


def probe_record(step, repetition=0.01, **more):
    """A result of ``ppl probe --json``, as small as one can be made by hand."""
    parts = {
        "monitor": None,
        "perplexity": 0.5,
        "generation": 1 - repetition,
        "references": None,
        "ask": None,
    }
    text = {
        "id": "p<i>1",
        "sample": 0,
        "text": HOSTILE,
        "tokens": 20,
        "repeated": repetition,
        "loop": 0.0,
    }
    own = dict(
        texts=9,
        repeated=repetition,
        repetition=repetition,
        looping=0.0,
        distinct_2=0.9,
        compression=1.5,
    )
    own |= dict(
        entropy=2.0, mean_tokens=20.0, ended=0.1, same_prompt=0.0, other_prompts=None, copied=0.0
    )
    danger = {
        "signal": "low-perplexity-trap",
        "severity": "danger",
        "evidence": "<b>it loops</b>",
        "advice": "look",
    }
    bins = [
        {"tokens": 10, "confidence": 0.2, "accuracy": 0.1},
        {"tokens": 90, "confidence": 0.8, "accuracy": 0.7},
    ]
    return {
        "source": "probe.json",
        "model": HOSTILE,
        "step": step,
        "verdict": "unhealthy" if repetition > 0.5 else "healthy",
        "health_score": 70.0,
        "health": {
            "score": 70.0,
            "coverage": 0.5,
            "parts": {
                name: {"weight": 20.0, "score": value, "evidence": "why"}
                for name, value in parts.items()
            },
        },
        "prompts": 3,
        "settings": {"in_words": "temperature 1"},
        "generation": own,
        "reference_texts": None,
        "perplexity": dict(
            self_perplexity=9.0, reference_perplexity="inf", unigram_perplexity=200.0
        ),
        "references": dict(bleu=5.0, chrf=20.0, rouge1=0.2, rouge2=0.1, rougeL=0.15),
        "coherence": None,
        "ask": None,
        "calibration": {
            **dict(
                tokens=100,
                accuracy=0.64,
                confidence=0.74,
                ece=0.1,
                entropy=1.0,
                loss=1.5,
                bins=bins,
            ),
            "entropy_bins": [{"tokens": 100, "entropy": 1.0, "loss": 1.5}],
        },
        "findings": [danger] if repetition > 0.5 else [],
        "notes": [HOSTILE],
        "texts": [text, text | {"repeated": 0.9}],
    } | more


@pytest.fixture(scope="module")
def beyond(tmp_path_factory):
    path = tmp_path_factory.mktemp("beyond") / "report.html"
    made = history(runs("healthy")[0])
    digest = made.digest()
    probes = [probe_record(200, 0.9), probe_record(100)]
    write_report(path, made, digest, diagnose(digest), probes=probes)
    return path


def test_what_the_model_writes_is_shown(beyond):
    text = beyond.read_text()
    assert HOSTILE not in text and "<b>it loops" not in text and "<i>1" not in text
    data = json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1]
    )
    assert {"health-trend", "perplexity-trend", "reliability", "surprise"} <= data.keys()
    trend = {trace["name"]: trace for trace in data["health-trend"]["data"]}
    assert trend["health"]["x"] == [100, 200]  # in order of step
    # Over the parts that both have: perplexity, times generation; at most 30 by the danger.
    assert trend["health"]["y"] == [pytest.approx(100 * 0.5 * 0.99), pytest.approx(5)]
    sound = trend["no repetition found"]
    assert sound["y"] == [pytest.approx(99), pytest.approx(10)] and "ask" not in trend
    assert data["perplexity-trend"]["data"][0]["y"] == [None, None]  # "inf" cannot be drawn
    assert "low-perplexity-trap" in text and "BLEU, chrF" in text and "missing" in text
    # (20 · 0.5 of perplexity + 20 · 1.0 of the curves) / 40, times 0.1.
    assert re.search(
        r"Unhealthy: action needed\s+<span class=\"quiet\">health 7 of 100</span>", text
    )
    assert "of the curves and of what the model writes" in text
    assert "quality of the texts not measured" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_real_browser_draws_what_the_model_writes(beyond, tmp_path):
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=1200,3000",
    ]
    options += ["--virtual-time-budget=8000", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = run(CHROMIUM, *options, f"file://{beyond}#log-x")
    assert "CONSOLE" not in done.stderr, [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]
    for name in ("health-trend", "perplexity-trend", "reliability", "surprise"):
        drawn = done.stdout.split(f'id="{name}"')[1].split("js-plotly-plot")[0]
        assert 'class="main-svg"' in drawn and "scatterlayer" in drawn and "<path" in drawn, name


def test_one_probe_without_a_step_or_references(tmp_path):
    made = history(runs("healthy")[0])
    digest = made.digest()
    path = tmp_path / "one.html"
    write_report(
        path,
        made,
        digest,
        diagnose(digest),
        probes=[probe_record(None, calibration=None, references=None)],
    )
    text = path.read_text()
    assert (
        'id="health-trend"' not in text
        and 'id="reliability"' not in text
        and "Beyond perplexity" in text
    )


@pytest.mark.parametrize(
    "change",
    [
        {"health": None},
        {"health": {"parts": {"a": {"weight": -1, "score": 0.5, "evidence": ""}}}},
        {"health": {"parts": {"a": {"weight": 1, "score": 5, "evidence": ""}}}},
        {"generation": {}},
        {"perplexity": []},
        {"findings": [{"severity": "grave"}]},
        {"findings": [3]},
        {"texts": "x"},
        {"texts": [{"tokens": 3, "repeated": 0.1, "loop": 0.0, "text": 5, "id": "a", "sample": 0}]},
        {"step": "soon"},
        {"step": "10"},
        {"step": float("nan")},
        {"generation": {"texts": 3}},
        {"calibration": {"bins": []}},
        {"settings": None},
        {"notes": 3},
    ],
)
def test_a_probe_of_the_wrong_kinds_is_named(tmp_path, change):
    made = history(runs("healthy")[0])
    digest = made.digest()
    with pytest.raises(InputError, match="probe.json: expected a result file of ppl probe --json"):
        write_report(
            tmp_path / "x.html", made, digest, diagnose(digest), probes=[probe_record(1) | change]
        )
