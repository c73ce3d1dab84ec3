"""A run that is killed at any moment goes on to the same bits; a journal of another run is
refused.
"""

import json
import os
import sqlite3
import sys
from pathlib import Path

import pytest
from processes import linux_only, run
from tiny_models import TEXTS, build_model

from perplexity import evaluate
from perplexity.errors import InputError

DOCUMENTS = [" ".join([TEXTS[i % 3]] * (1 + i % 7)) for i in range(30)]
KILLS = 50


def numbers(evaluation) -> dict:
    """Everything but the time it took."""
    record = json.loads(evaluation.to_json())
    del record["seconds"]
    return record


def test_a_second_run_scores_nothing_again(model, tokenizer, tmp_path, monkeypatch):
    arguments = dict(context_length=16, batch_size=4)
    plain = evaluate(model, tokenizer, DOCUMENTS, **arguments)
    first = evaluate(model, tokenizer, DOCUMENTS, journal=tmp_path, **arguments)
    calls = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    second = evaluate(model, tokenizer, DOCUMENTS, journal=tmp_path, **arguments)
    assert numbers(plain) == numbers(first) == numbers(second)
    # What the head multiplies is seen in three passes over 8 positions. Its verification asks for
    # the logits once and for hidden states twice; a short window alone and beside a long one are
    # two more, and nothing is scored.
    assert len(calls) == 8


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_run_that_raises_goes_on(model, tokenizer, tmp_path, monkeypatch, stop):
    arguments = dict(context_length=16, batch_size=4)
    plain = evaluate(model, tokenizer, DOCUMENTS, **arguments)
    forward, calls = model.model.forward, []

    def fails(*positional, **keywords):
        calls.append(1)
        if len(calls) == 5 + stop:  # the first five check the head and the batches
            raise RuntimeError("the power went")
        return forward(*positional, **keywords)

    monkeypatch.setattr(model.model, "forward", fails)
    with pytest.raises(InputError, match="the power went"):
        evaluate(model, tokenizer, DOCUMENTS, journal=tmp_path, **arguments)
    monkeypatch.setattr(model.model, "forward", forward)
    assert numbers(evaluate(model, tokenizer, DOCUMENTS, journal=tmp_path, **arguments)) == numbers(
        plain
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(stride=3), r"journal: .* is of another run, with stride 8 \(now 3\)"),
        (dict(batch_size=5), r"with batch_size 4 \(now 5\)"),
        (dict(protocol="lm-eval"), r"with protocol 'sliding' \(now 'lm-eval'\), stride"),
        (dict(bos="never"), r"with bos 'auto' \(now 'never'\)"),
    ],
)
def test_a_journal_of_another_run(model, tokenizer, tmp_path, change, message):
    arguments = dict(context_length=16, batch_size=4)
    evaluate(model, tokenizer, DOCUMENTS[:2], journal=tmp_path, **arguments)
    with pytest.raises(InputError, match=message):
        evaluate(model, tokenizer, DOCUMENTS[:2], journal=tmp_path, **arguments | change)


def test_a_journal_of_another_model_or_text(model, tokenizer, tmp_path):
    evaluate(model, tokenizer, DOCUMENTS[:2], journal=tmp_path)
    other = build_model(model.config.vocab_size)
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(InputError, match=r"is of another run, with model '\w+'"):
        evaluate(other, tokenizer, DOCUMENTS[:2], journal=tmp_path)
    with pytest.raises(InputError, match="is of another run, with another text in document 1"):
        evaluate(model, tokenizer, [DOCUMENTS[0], "another"], journal=tmp_path)
    # More of the same text is the same run with more to do.
    assert evaluate(model, tokenizer, DOCUMENTS[:3], journal=tmp_path).documents == 3


def test_a_file_that_is_no_journal(model, tokenizer, tmp_path):
    (tmp_path / "rank0.sqlite").write_bytes(
        b"this is text, and long enough not to be taken for an empty file" * 20
    )
    with pytest.raises(InputError, match="journal: expected a journal's own file"):
        evaluate(model, tokenizer, DOCUMENTS, journal=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="journal: expected a folder that can be written"):
        evaluate(model, tokenizer, DOCUMENTS, journal=tmp_path / "file")


def test_a_full_disk_is_said_and_what_is_scored_is_kept(model, tokenizer, tmp_path, monkeypatch):
    from perplexity.journal import Journal

    arguments = dict(context_length=16, batch_size=4)
    plain = evaluate(model, tokenizer, DOCUMENTS, **arguments)
    opened = Journal._open

    def small(self, path):
        connection = opened(self, path)
        connection.execute("PRAGMA max_page_count = 7")  # SQLite's own "database or disk is full"
        return connection

    monkeypatch.setattr(Journal, "_open", small)
    with pytest.raises(
        InputError, match="journal: .* cannot be written .*full.*what it holds is kept"
    ):
        evaluate(model, tokenizer, DOCUMENTS, journal=tmp_path, **arguments)
    monkeypatch.setattr(Journal, "_open", opened)
    (kept,) = (
        sqlite3.connect(tmp_path / "rank0.sqlite")
        .execute("SELECT count(*) FROM batches")
        .fetchone()
    )
    assert kept > 0
    assert numbers(evaluate(model, tokenizer, DOCUMENTS, journal=tmp_path, **arguments)) == numbers(
        plain
    )


@linux_only
def test_killed_at_fifty_drawn_places(tmp_path):
    """A run that was killed ten times, in forward passes, writes and outputs, ends with the bits of
    a run never killed.

    Each life kills itself where it was drawn to (killed_runs.py): sleeps that were scaled by a
    measured run fell elsewhere on a busy machine, and the loop around them had no bound.
    """
    import pyarrow.parquet

    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here.parent), *filter(None, sys.path)]),
    }
    done = run(sys.executable, here / "killed_runs.py", tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    killed = [life for life in lives if life["place"] is not None]
    ends = {life["name"]: life["ended"] for life in lives if life["place"] is None}
    assert len(killed) == KILLS and len({life["place"] for life in killed}) == 9
    # A write that the system cuts off ends the process as SIGKILL would, under another name.
    assert all(
        life["ended"] == ("SIGXFSZ" if "torn" in life["place"] else "SIGKILL") for life in killed
    ), killed
    assert set(ends.values()) == {"0"} and len(ends) == 1 + KILLS // 10
    # kills fell at different points of the work
    assert len({life["batches"] for life in killed}) > KILLS // 5
    results = {}
    for name in ends:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        del record["seconds"]
        results[name] = record, pyarrow.parquet.read_table(tmp_path / f"{name}.parquet")
    for name, result in results.items():
        assert result == results["whole"], name


def test_another_ranks_journal_of_another_run_is_refused(tmp_path):
    """A second rank that had not looked at the first one's file wrote another model's values beside
    them.
    """
    from perplexity.scoring.journal import ScoringJournal

    ScoringJournal(tmp_path, {"model": "a"}, rank=0).close()
    with pytest.raises(InputError, match="is of another run, with model 'a' \\(now 'b'\\)"):
        ScoringJournal(tmp_path, {"model": "b"}, rank=1)
    assert [path.name for path in tmp_path.glob("*.sqlite")] == ["rank0.sqlite"]


@pytest.mark.parametrize(
    "table", ["agreed (name TEXT PRIMARY KEY, value TEXT)", "batches (key BLOB, scored BLOB)"]
)
def test_a_journal_without_checksums_is_refused(tmp_path, table):
    from perplexity.scoring.journal import ScoringJournal

    with sqlite3.connect(tmp_path / "rank0.sqlite") as old:
        old.execute(f"CREATE TABLE {table}")
    with pytest.raises(
        InputError, match=r"journal: expected format 2, got format 1 in .*; give it an empty folder"
    ):
        ScoringJournal(tmp_path, {})


# What becomes of the rows -> batches that must be scored again, of those there are
DAMAGES = {
    "values cut short": (
        "UPDATE batches SET scored = substr(scored, 1, length(scored) - 3)",
        "all",
    ),
    "another row's values": (
        "UPDATE batches SET scored = (SELECT scored FROM batches LIMIT 1)",
        "all but one",
    ),
    "no checksum": ("UPDATE batches SET checksum = NULL", "all"),
    "another run's identity": ("UPDATE agreed SET value = '{}' WHERE name = 'identity'", "none"),
    "a document's hash": ("UPDATE agreed SET value = 'f' WHERE name = 'document 3'", "none"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_rows_are_scored_again(model, tokenizer, tmp_path, damage):
    statement, again = DAMAGES[damage]
    arguments = dict(context_length=16, batch_size=4)
    plain = evaluate(model, tokenizer, DOCUMENTS, journal=tmp_path, **arguments)
    with sqlite3.connect(tmp_path / "rank0.sqlite") as journal:
        journal.execute(statement)
        count = journal.execute("SELECT count(*) FROM batches").fetchone()[0]
    scored = []
    with pytest.MonkeyPatch.context() as patch:
        from perplexity.scoring.stream import _Scorer

        values = _Scorer._values
        patch.setattr(_Scorer, "_values", lambda *given: scored.append(1) or values(*given))
        assert numbers(
            evaluate(model, tokenizer, DOCUMENTS, journal=tmp_path, **arguments)
        ) == numbers(plain)
    assert len(scored) == {"all": count, "all but one": count - 1, "none": 0}[again]


def test_every_flipped_bit_is_noticed(tmp_path):
    """One bit of a stored loss, flipped in the file: nine of thirteen gave another perplexity and
    no word.
    """
    import numpy as np

    from perplexity.scoring.journal import ScoringJournal

    values = np.array([2.5, 0.1], dtype=np.float32)
    journal = ScoringJournal(tmp_path, {})
    key = journal.batch_key(values)
    for bit in range(64):
        journal.keep(key, values)
        assert np.array_equal(journal.values(key, 2), values)
        raw = bytearray(values.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        journal.own.execute("UPDATE batches SET scored = ?", (bytes(raw),))
        assert journal.values(key, 2) is None
    journal.close()


def test_another_body_or_rule_is_another_model():
    from perplexity.models.language_model import Head, HuggingFaceModel, fingerprint

    class Adapter:
        def __init__(self, model, **head):
            self.net = model
            self.head = Head(model.lm_head.weight, **head)

    def built(scale=1.0, **config):
        model = build_model(300)
        model.model.layers[0].mlp.up_proj.weight.data *= scale
        model.config.update(config)
        return model

    known = [
        fingerprint(network)
        for network in (
            HuggingFaceModel(built()),
            HuggingFaceModel(built(1.3)),
            HuggingFaceModel(built(rms_norm_eps=1e-3)),
            Adapter(built()),
            Adapter(built(1.3)),
            Adapter(built(), softcap=5.0),
            Adapter(built(), logit_scale=2.0),
        )
    ]
    assert len(set(known)) == len(known)
    assert fingerprint(Adapter(built())) == known[3]


def ablate_head(model):
    model.model.layers[1].self_attn.o_proj.weight.data[:, 8:16] = 0


def flip_bit(model):
    import torch

    model.model.layers[0].mlp.up_proj.weight.data.view(torch.int32)[3, 5] ^= 1


def other_frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(1.5)


@pytest.mark.parametrize("change", [ablate_head, flip_bit, other_frequencies])
def test_the_fingerprint_is_of_whole_tensors(change):
    """A sample of them took an ablated head's model for the intact one, and its journal with it."""
    from perplexity.models.language_model import HuggingFaceModel, fingerprint

    model = build_model(300)
    before = fingerprint(HuggingFaceModel(model))
    assert fingerprint(HuggingFaceModel(build_model(300))) == before
    change(model)
    assert fingerprint(HuggingFaceModel(model)) != before
