"""What ``ppl check-data`` shows in a terminal: every number in its place."""

import dataclasses
import os
import re
from types import SimpleNamespace

import pytest

from perplexity.cli import check_data, progress
from perplexity.data_checks.checks import DataCheck
from perplexity.data_checks.leakage import Leak
from perplexity.findings import Finding

CHECK = DataCheck(
    documents={"train": 123_456, "valid": 1234},
    valid_fraction=0.0123,
    leaked_fraction=0.25,
    leaked_token_fraction=0.375,
    exact_duplicates=1001,
    near_duplicates=2002,
    ngram_overlap=0.0625,
    unknown_token_rate=0.00125,
    tokenizer_fingerprint="t",
    findings=[Finding("leakage", "danger", "a third leaked", "remove them")],
    words={},
    bytes={},
    token_unit="tokens",
    tokens=None,
    settings={"ngram": 13},
    notes=["two are short"],
    leaked=[],
)


def leak(number, kind="exact", passage="the same words"):
    names = {field.name for field in dataclasses.fields(Leak)}
    given = dict(document=number, id=f"valid:{number}", train_id=f"train:{number}", kind=kind)
    given |= dict(similarity=0.755, overlap=0.625, passage=passage)
    return Leak(**{name: given.get(name, 0) for name in names})


def text_of(check):
    from rich.console import Console

    console = Console(record=True, width=400, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(check_data.view(check))
    return console.export_text()


def test_the_numbers():
    assert [re.findall(r"\d[\d,.]*%?", value) for _, value in check_data.summary(CHECK)] == [
        ["123,456", "1,234"],
        ["1.23%"],
        ["25.00%"],
        ["37.50%"],
        ["1,001,", "2,002"],
        ["6.25%"],
        ["0.125%"],
    ]
    bare = dataclasses.replace(
        CHECK, valid_fraction=None, ngram_overlap=None, unknown_token_rate=None
    )
    values = [value for _, value in check_data.summary(bare)]
    assert len(values) == 5 and values[1] == ""
    text = text_of(CHECK)
    for words in (
        "123,456",
        "13-grams",
        "leaked tokens",
        "a third leaked",
        "remove them",
        "danger",
        "two are short",
    ):
        assert words in text
    assert "valid:" not in text and "more" not in text


def test_what_leaked():
    leaks = [
        leak(0),
        leak(1, "near"),
        leak(2, "contained", "x" * 159 + "yz"),
        *map(leak, range(3, 12)),
    ]
    text = text_of(dataclasses.replace(CHECK, leaked=leaks))
    rows = [line for line in text.splitlines() if "valid:" in line]
    assert [re.findall(r"valid:(\d+).*train:(\d+)", row)[0] for row in rows] == [
        (f"{i}", f"{i}") for i in range(8)
    ]
    assert "exact" in rows[0] and "the same words" in rows[0]
    assert "near 0.7" in rows[1] or "near 0.8" in rows[1]
    assert "contained 62%" in rows[2] and "x" * 159 + "y" in rows[2] and "z" not in rows[2]
    assert "and 4 more" in text
    assert "more, all" not in text_of(dataclasses.replace(CHECK, leaked=leaks[:8]))
    assert "no finding" not in text and "nothing found" in text_of(
        dataclasses.replace(CHECK, findings=[])
    )


def test_progress_in_a_log(monkeypatch, capsys):
    """A line every ten seconds, with the speed since the start."""
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    tell = check_data._log()
    for seconds in (0.0, 9.0, 10.0, 15.0, 20.5):
        clock[0] = 1000.0 + seconds
        tell(SimpleNamespace(bytes=int(4e6 * seconds), documents=1500, exact=range(1200)))
    lines = capsys.readouterr().err.splitlines()
    assert [re.findall(r"\d[\d,]*", line) for line in lines] == [
        ["1,500", "40", "4", "1,200"],
        ["1,500", "82", "4", "1,200"],
    ]


@pytest.mark.parametrize("leaked", [0.0, 1.0])
def test_shares_are_percentages(leaked):
    values = dict(check_data.summary(dataclasses.replace(CHECK, leaked_fraction=leaked)))
    assert values["leaked documents"] == f"{100 * leaked:.2f}%"
