"""What the terminal shows of an evaluation: every number in its place, each part where there is
something to show.
"""

import dataclasses
import json
import math
import os
import re
from types import SimpleNamespace

import pytest

from perplexity.cli import compare as compare_command
from perplexity.cli import eval as command
from perplexity.cli import progress
from perplexity.cli.parts import Reading
from perplexity.cli.texts import Texts
from perplexity.evaluation import Document, Evaluation
from perplexity.evaluation.comparison import Comparison
from perplexity.evaluation.evaluator import Progress
from perplexity.evaluation.model_comparison import ModelComparison
from perplexity.evaluation.results import DocumentScore

DOCUMENT = {"id": "a", "domain": "x", "tokens": 1234, "loss": 2.5}
TOKEN = {"document": "a", "position": 4321, "nll": 7.5, "before": "the\n", "text": "\x07cat"}
DOMAIN = {
    "documents": 1111,
    "tokens": 2222,
    "loss": 1.25,
    "stderr": 0.125,
    "perplexity": 3.5,
    "bits_per_byte": 0.75,
}
EVALUATION = Evaluation(
    loss=2.0,
    perplexity=1234.5678,
    bits_per_token=2.8854,
    bits_per_byte=0.5,
    byte_perplexity=1.4142,
    word_perplexity=5678.91,
    tokens=60_000,
    tokens_read=61_000,
    tokens_skipped=1000,
    skipped={"BOS": 1000},
    unknown_tokens=0,
    loss_without_unknown=None,
    perplexity_without_unknown=None,
    non_finite=None,
    bytes=240_000,
    bytes_read=244_000,
    bytes_skipped=4000,
    words=43_210,
    words_read=44_000,
    words_skipped=790,
    documents=31,
    stderr=0.03125,
    perplexity_stderr=None,
    perplexity_interval=(1100.25, 1300.75),
    perplexity_interval_bootstrap=(1101.5, 1299.5),
    clusters={"unit": "document", "count": 29, "trusted": True},
    effective_tokens=None,
    baselines={
        "unigram": {"loss": 6.0, "perplexity": 403.4},
        "uniform": {"loss": 8.0, "perplexity": 2981.0},
    },
    protocol="sliding",
    context_length=2048,
    stride=1024,
    bos="auto",
    special_text="tokens",
    tokenizer_fingerprint="t",
    text_fingerprint="x",
    vocabulary_size=2981,
    backend="torch",
    precision="float32",
    seconds=7.5,
    notes=["few documents"],
    domains={"x": DOMAIN},
    longest_documents=[DOCUMENT | {"id": f"long-{place}"} for place in range(10)],
    worst_documents=[DOCUMENT | {"id": f"worst-{place}"} for place in range(10)],
    surprising_tokens=[TOKEN],
    per_document=[
        DocumentScore("a", "x", 50 * math.log(2), 30, 80, 9),
        DocumentScore("b", "x", 100 * math.log(2), 60, 160, 19),
    ],
)
OTHER = {
    "schema_version": 2,
    "per_document": [
        {"nll": 60 * math.log(2), "tokens": 20, "bytes": 80},
        {"nll": 120 * math.log(2), "tokens": 40, "bytes": 160},
    ],
}
BASELINE = {
    "loss": 2.5,
    "perplexity": 12.18,
    "tokens": 60_000,
    "tokenizer_fingerprint": "t",
    "text_fingerprint": "x",
    "bits_per_byte": 0.625,
    "protocol": "sliding",
    "context_length": 2048,
}


def rows(table):
    """The cells of a table, row by row."""
    return list(
        zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    )


def numbers(text):
    return re.findall(r"[+−-]?\d[\d,.]*\d%?|\d", text)


def test_the_summary():
    table = command.summary(EVALUATION, BASELINE)
    assert numbers(table.title) == ["60,000", "31"]
    assert [(value, numbers(meaning)) for _, value, meaning in rows(table)] == [
        ("2.0000", ["0.0312", "29"]),
        ("2.8854", []),
        ("1,234.568", ["1,235"]),
        ("", ["1,100.250", "1,300.750"]),
        ("", ["1,101.500", "1,299.500"]),
        ("403.4", []),
        ("2,981.0", []),
        ("12.180", ["-0.5000"]),
        ("0.5000", ["240,000", "244,000"]),
        ("1.4142", ["2"]),
        ("5,678.9", ["43,210", "44,000"]),
        ("61,000", ["1,000"]),
        ("sliding", ["2,048", "1,024"]),
        ("torch", ["32", "7.5", "8,000"]),
    ]


def test_a_summary_without_error_bars():
    bare = dataclasses.replace(
        EVALUATION,
        stderr=None,
        perplexity_interval=None,
        perplexity_interval_bootstrap=None,
        clusters={"unit": "block", "count": 1, "trusted": False},
        skipped={},
    )
    table = rows(command.summary(bare))
    assert len(table) == 14 - 3
    assert table[0][1:] == ("2.0000", "nats a token")
    (skipped,) = [row[2] for row in table if row[1] == "61,000"]
    assert skipped.endswith("none")


@pytest.mark.parametrize(
    ("other", "value", "shown"),
    [
        ({}, "12.180", ["-0.5000"]),
        ({"perplexity": None}, "12.182", ["-0.5000"]),  # a file without it: exp(2.5)
        ({"text_fingerprint": "y", "tokens": 1}, "12.180", []),
        # Of another tokenizer 0.75 and 0.625 bits a byte of two documents, in version 2 and in
        # version 1.
        ({"tokenizer_fingerprint": "u", "tokens": 1} | OTHER, "", ["0.7500", "-0.1250"]),
        ({"tokenizer_fingerprint": "u"} | OTHER | {"schema_version": 1}, "", ["1", "2", "1"]),
        ({"tokens": 59_999}, "12.180", ["59,999"]),
        ({"context_length": 1024}, "12.180", ["-0.5000", "1024"]),
        ({"protocol": "lm-eval"}, "12.180", ["-0.5000", "2048"]),
    ],
)
def test_a_baseline_is_compared_only_where_it_can_be(other, value, shown):
    baseline = {key: item for key, item in (BASELINE | other).items() if item is not None}
    (row,) = [
        row for row in rows(command.summary(EVALUATION, baseline)) if "the baseline" in row[0]
    ]
    assert (row[1], numbers(row[2])) == (value, shown)


@pytest.mark.parametrize(
    ("confidence", "words"),
    [
        (0.5, "as sure as"),
        (0.504, "as sure as"),
        (0.51, "surer than"),
        (0.49, "less sure"),
        (0.496, "as sure as"),
    ],
)
def test_calibration(confidence, words):
    found = {
        "confidence": confidence,
        "accuracy": 0.5,
        "ece": 0.0625,
        "bins": [0] * 15,
        "entropy": 1.75,
        "loss": 2.0,
    }
    table = rows(command.summary(dataclasses.replace(EVALUATION, calibration=found)))
    first, error, entropy = (row for row in table if row[1] in ("50.00%", "0.0625", "1.7500"))
    assert numbers(first[2]) == [f"{confidence:.2%}"] and words in first[2]
    assert numbers(error[2])[0] == "15" and numbers(entropy[2]) == ["+0.2500"]


def test_domains_documents_and_tokens():
    several = {f"d{place}": DOMAIN | {"tokens": 1000 + place} for place in range(25)}
    table = command.domains(
        dataclasses.replace(EVALUATION, domains=several | {"y": DOMAIN | {"stderr": None}})
    )
    assert numbers(table.title) == ["6"]
    shown = rows(table)
    assert [row[0] for row in shown] == ["y", *(f"d{place}" for place in range(24, 5, -1))]
    assert shown[0][1:] == ("1,111", "2,222", "1.2500", "", "3.50", "0.7500")
    assert shown[1][1:] == ("1,111", "1,024", "1.2500", "0.1250", "3.50", "0.7500")
    justified = [column.justify for column in table.columns]
    assert justified == ["left", *["right"] * 5, "left"]
    assert rows(command.documents("", EVALUATION.worst_documents)) == [
        (f"worst-{place}", "1,234", "2.500", "12.2", "x") for place in range(5)
    ]
    token = rows(command.surprising(dataclasses.replace(EVALUATION, surprising_tokens=[TOKEN] * 7)))
    assert token == [("a", "4,321", "7.50", "1 in 1,808", "…the⏎ ⟨·cat⟩")] * 5


@pytest.mark.parametrize(
    ("documents", "domains", "parts"),
    [(1, 1, ""), (2, 1, "worst"), (5, 2, "domains worst"), (6, 2, "domains worst longest")],
)
def test_each_part_is_shown_where_there_is_something_to_show(documents, domains, parts):
    from rich.console import Console

    console = Console(record=True, width=150, file=open(os.devnull, "w"))  # noqa: SIM115
    shown = dataclasses.replace(
        EVALUATION,
        documents=documents,
        domains={f"domain-{place}": DOMAIN for place in range(domains)},
    )
    command.show(shown, console)
    text = console.export_text()
    found = {"domains": "domain-0" in text, "worst": "worst-4" in text, "longest": "long-4" in text}
    assert [name for name, there in found.items() if there] == parts.split()
    assert "1,234.568" in text and "4,321" in text and "few documents" in text


COMPARISON = Comparison(
    measure="loss",
    a=2.0,
    b=1.75,
    difference=-0.25,
    stderr=0.0625,
    interval=(-0.375, -0.125),
    p_value=0.00123,
    perplexity_ratio=0.7788,
    perplexity_ratio_interval=(0.6873, 0.8825),
    unit="document",
    pairs=1500,
    tokens=60_000,
    effective_tokens=123_456.0,
    better_in=1400,
    trusted=True,
    notes=[],
)


def test_a_comparison():
    table = compare_command.comparison(COMPARISON)
    assert "B is better" in table.title
    assert [(value, numbers(meaning)) for _, value, meaning in rows(table)] == [
        ("2.0000", []),
        ("1.7500", []),
        ("-0.2500", ["0.0625", "1,500"]),
        ("", ["-0.3750", "-0.1250"]),
        ("0.0012", []),
        ("0.7788", ["95", "0.6873", "0.8825"]),
        ("1,400 of 1,500", []),
        ("123,456", ["60,000"]),
    ]
    one = dataclasses.replace(
        COMPARISON,
        measure="bits-per-byte",
        stderr=None,
        interval=None,
        p_value=None,
        perplexity_ratio_interval=None,
        effective_tokens=None,
    )
    bare = rows(compare_command.comparison(one))
    assert [row[1] for row in bare] == ["2.0000", "1.7500", "-0.2500", "0.7788", "1,400 of 1,500"]
    assert "bits" in bare[0][2] and "nats" in rows(table)[0][2]
    assert numbers(bare[2][2]) == numbers(bare[3][2]) == []
    without = dataclasses.replace(COMPARISON, perplexity_ratio=None)
    assert "0.7788" not in [row[1] for row in rows(compare_command.comparison(without))]


@pytest.mark.parametrize(
    ("p_value", "difference", "verdict"),
    [
        (None, -1.0, "one pair"),
        (0.2, -1.0, "no difference"),
        (0.04, -1.0, "B is"),
        (0.04, 1.0, "A is"),
    ],
)
def test_the_verdict_of_a_comparison(p_value, difference, verdict):
    found = dataclasses.replace(COMPARISON, p_value=p_value, difference=difference)
    assert found.verdict.startswith(verdict) and found.to_dict()["verdict"] == found.verdict


def test_a_comparison_of_models():
    percentiles = {
        at: float(place) for place, at in enumerate(("0", "1", "10", "50", "90", "99", "100"))
    }
    table = compare_command.model_comparison(
        ModelComparison(
            tokens=60_000,
            documents=1500,
            loss_a=2.0,
            loss_b=2.25,
            perplexity_a=7.3891,
            perplexity_b=9.4877,
            loss_difference=0.25,
            loss_difference_stderr=0.015625,
            perplexity_ratio=1.284,
            correlation=0.9,
            kl_divergence=0.125,
            kl_divergence_stderr=None,
            kl_percentiles=percentiles,
            reverse_kl_divergence=0.0625,
            reverse_kl_divergence_stderr=0.03125,
            reverse_kl_percentiles=percentiles,
            top_1_agreement=0.875,
            top_1_agreement_stderr=0.0078125,
            probability_change=-0.0625,
            probability_change_stderr=0.001,
            probability_change_rms=0.1875,
            probability_change_percentiles=percentiles,
            non_finite=None,
            protocol="sliding",
            context_length=64,
            stride=63,
            special_text="tokens",
            tokenizer_fingerprint="t",
            text_fingerprint="x",
            backend="torch",
            seconds=1.0,
            model_a={},
            model_b={},
            rows_a=100,
            rows_b=100,
            outside_probability=0.0,
            model_notes=[],
        )
    )
    assert numbers(table.title) == ["60,000", "1,500"]
    assert [(value, numbers(meaning)) for _, value, meaning in rows(table)] == [
        ("7.3891", ["2.0000"]),
        ("9.4877", ["2.2500"]),
        ("+0.250000", ["0.015625"]),
        ("1.284000", []),
        ("0.9000", []),
        ("0.125000", []),
        (
            "",
            numbers(
                "0%: 0.00000, 1%: 1.00000, 10%: 2.00000, 50%: 3.00000, 90%: 4.00000, "
                "99%: 5.00000, 100%: 6.00000"
            ),
        ),
        ("0.062500", ["0.031250"]),
        (
            "",
            numbers(
                "0%: 0.00000, 1%: 1.00000, 10%: 2.00000, 50%: 3.00000, 90%: 4.00000, "
                "99%: 5.00000, 100%: 6.00000"
            ),
        ),
        ("87.500%", ["0.781%"]),
        ("-6.2500%", ["0.1000%"]),
        ("18.7500%", []),
        (
            "",
            numbers(
                "0%: +0.000%, 1%: +100.000%, 10%: +200.000%, 50%: +300.000%, 90%: +400.000%, "
                "99%: +500.000%, 100%: +600.000%"
            ),
        ),
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (36_061, "10:01:01"),
    ],
)
def test_a_clock(seconds, shown):
    assert progress.clock(seconds) == shown


def test_how_much_text_there_is(tmp_path):
    """The size that the time left is reckoned from: what the documents hold, in the units of their
    progress.
    """
    texts = ["the cat sat", "on the mat", "caf\u00e9"]
    (tmp_path / "a.txt").write_text(texts[0], encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts[1:])
    )
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    held = Texts(paths, Reading())
    assert (held.count, held.size) == (3, sum(Document("d", text).size for text in texts))


def test_progress_in_a_log(monkeypatch, capsys):
    """A line every half minute, with the speed since the start and the time that the rest will
    take.
    """
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.evaluation_progress(SimpleNamespace(count=1200, size=4000), True) as log:
        for seconds, done in (
            (0.0, 0.0),
            (29.0, 500.0),
            (31.0, 1000.0),
            (60.0, 1500.0),
            (62.0, 2000.0),
            (70.0, 4000.0),
        ):
            clock[0] = 1000.0 + seconds
            log(Progress(documents=7, tokens=int(100 * seconds), done=done, loss=math.log(12.5)))
    first, second = capsys.readouterr().err.splitlines()
    assert numbers(first)[:4] == ["7", "1,200", "100", "12.50"]
    assert first.endswith("1:33 left")
    assert second.endswith("1:02 left")
    with progress.evaluation_progress(SimpleNamespace(count=None, size=1), False) as log:
        assert log is None
