"""Parquet tables and JSON: rows are the numbers, files are whole or absent."""

import json
import math
import os
import re

import numpy as np
import pyarrow.parquet
import pytest
import torch
from tiny_models import TEXTS, build_model

from perplexity import evaluate
from perplexity.errors import InputError
from perplexity.evaluation import Document, collect

DOCUMENTS = [Document(f"d{i}", text * (2 * i + 1), "ab"[i % 2]) for i, text in enumerate(TEXTS)]


def test_per_token_rows_against_full_logits(model, tokenizer, tmp_path):
    path = tmp_path / "tokens.parquet"
    got = evaluate(model, tokenizer, DOCUMENTS, per_token=path)
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert len(rows) == got.tokens
    assert math.fsum(row["nll"] for row in rows) / len(rows) == pytest.approx(got.loss, rel=1e-12)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(DOCUMENTS[0].text)["input_ids"]]])
    with torch.no_grad():
        log_p = model(ids).logits[0].double().log_softmax(-1)
    for place, row in enumerate(rows[: ids.shape[1] - 1]):
        token = ids[0, place + 1].item()
        assert (row["document"], row["position"], row["token_id"]) == ("d0", place, token)
        assert row["text"] == tokenizer.decode([token])
        assert row["nll"] == pytest.approx(-log_p[place, token].item(), rel=1e-4, abs=1e-5)
        assert row["entropy"] == pytest.approx(
            -(log_p[place].exp() * log_p[place]).sum().item(), rel=1e-4
        )
        assert row["rank"] == (log_p[place] > log_p[place, token]).sum().item()


def test_per_document_rows(model, tokenizer, tmp_path):
    path = tmp_path / "documents.parquet"
    got = evaluate(model, tokenizer, DOCUMENTS, per_document=path)
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [row["id"] for row in rows] == ["d0", "d1", "d2"]
    for row, score in zip(rows, got.per_document, strict=True):
        assert (row["nll"], row["tokens"], row["bytes"], row["words"]) == (
            score.nll,
            score.tokens,
            score.bytes,
            score.words,
        )
        assert row["perplexity"] == pytest.approx(math.exp(score.nll / score.tokens))


def test_many_row_groups(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "ROWS", 10)
    got = evaluate(model, tokenizer, DOCUMENTS, per_token=tmp_path / "t", batch_size=1)
    file = pyarrow.parquet.ParquetFile(tmp_path / "t")
    assert file.metadata.num_row_groups > 2 and file.metadata.num_rows == got.tokens


def test_a_run_that_fails_leaves_no_file(model, tokenizer, tmp_path):
    bad = Document("x", "", ids=np.array([10**6]))
    with pytest.raises(InputError):
        evaluate(
            model,
            tokenizer,
            [*DOCUMENTS, bad],
            per_token=tmp_path / "t",
            per_document=tmp_path / "d",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="per_token: expected a file in an existing folder"):
        evaluate(model, tokenizer, DOCUMENTS, per_token=tmp_path / "no" / "such")


def test_the_most_surprising_tokens_and_the_extreme_documents(model, tokenizer, tmp_path):
    got = evaluate(model, tokenizer, DOCUMENTS, per_token=tmp_path / "t", context_length=16)
    rows = pyarrow.parquet.read_table(tmp_path / "t").to_pylist()
    rows.sort(key=lambda row: -row["nll"])
    assert [t["nll"] for t in got.surprising_tokens] == [row["nll"] for row in rows[:10]]
    first = got.surprising_tokens[0]
    assert (first["document"], first["position"], first["text"]) == tuple(
        rows[0][k] for k in ("document", "position", "text")
    )
    text = next(d.text for d in DOCUMENTS if d.id == first["document"])
    assert first["before"] + first["text"] in text
    assert [d["tokens"] for d in got.longest_documents] == sorted(
        (d.tokens for d in got.per_document), reverse=True
    )
    means = sorted((d.nll / d.tokens for d in got.per_document), reverse=True)
    assert [d["loss"] for d in got.worst_documents] == means


def test_progress_ends_with_each_document_and_the_whole_text(model, tokenizer):
    told = []
    got = evaluate(
        model, tokenizer, DOCUMENTS, context_length=16, batch_size=1, progress=told.append
    )
    done = [now.done for now in told]
    sizes = np.cumsum([len(document.text.encode()) for document in DOCUMENTS])
    assert done == sorted(done) and done[-1] == sizes[-1] and set(sizes) <= set(done)
    # Windows of one document: its bytes in proportion to its tokens, BOS among them.
    within = [now.done for now in told if sizes[1] < now.done < sizes[2]]
    tokens = 1 + len(tokenizer(DOCUMENTS[2].text)["input_ids"])
    places = [(value - sizes[1]) / (sizes[2] - sizes[1]) * tokens for value in within]
    assert len(places) > 3 and places == pytest.approx([round(place) for place in places])
    assert (told[-1].documents, told[-1].tokens, told[-1].loss) == (
        3,
        got.tokens,
        pytest.approx(got.loss),
    )


def test_baselines(model, tokenizer):
    got = evaluate(model, tokenizer, DOCUMENTS)
    ids = np.concatenate([tokenizer(d.text)["input_ids"] for d in DOCUMENTS])
    shares = np.unique(ids, return_counts=True)[1] / len(ids)
    assert got.baselines["unigram"]["loss"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert got.baselines["uniform"]["perplexity"] == pytest.approx(model.config.vocab_size)


@pytest.mark.parametrize(("scale", "worse"), [(0.0, False), (8.0, True)])
def test_a_model_worse_than_the_uniform_guess_is_noted(tokenizer, scale, worse):
    """A head of zeros is exactly as good, whichever way its sums are rounded."""
    changed = build_model(len(tokenizer))
    changed.lm_head.weight.data *= scale
    notes = " ".join(evaluate(changed, tokenizer, DOCUMENTS).notes)
    assert ("above the uniform guess's" in notes) == worse


@pytest.mark.parametrize(("text", "warned"), [("the cat", False), (" ".join(TEXTS), True)])
def test_worse_than_the_unigram_baseline_is_a_warning(tokenizer, text, warned):
    """The baseline is fitted to its own tokens: on a few of them a good model is above it, too. The
    oracle learns each token's probability from the other tokens, a half added to each count.
    """
    guess = build_model(len(tokenizer))
    guess.lm_head.weight.data *= 0
    got = evaluate(guess, tokenizer, [text])
    ids = tokenizer(text)["input_ids"]
    learned = 0.0
    for place, token in enumerate(ids):
        others = [*ids[:place], *ids[place + 1 :]]
        learned -= math.log((others.count(token) + 0.5) / (len(others) + len(tokenizer) / 2))
    unigram = got.baselines["unigram"]["loss"]
    assert unigram < got.loss and (learned / len(ids) < got.loss) == warned
    (note,) = [note for note in got.notes if "unigram baseline" in note]
    assert f"{got.loss:.4f} and {unigram:.4f} nats" in note
    assert (
        note.startswith("warning: ") == warned == note.endswith("Check for a mismatched tokenizer")
    )
    assert warned or f"fitted to these {len(ids)} tokens" in note


def test_no_warning_where_the_model_beats_the_unigram_baseline(tokenizer):
    """A bigram model fitted to the text: its embedding is one-hot, its head the counts' logarithm."""
    ids = tokenizer(TEXTS[0])["input_ids"]
    learned = build_model(len(tokenizer))
    with torch.no_grad():
        for layer in learned.model.layers:  # the embedding passes as it is
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        directions = torch.nn.functional.normalize(learned.model.embed_tokens.weight, dim=1)
        learned.lm_head.weight.zero_()
        for before, token in zip([tokenizer.bos_token_id, *ids], ids, strict=False):
            learned.lm_head.weight[token] += directions[before]
        learned.lm_head.weight *= 3
    got = evaluate(learned, tokenizer, [TEXTS[0]])
    assert got.loss < got.baselines["unigram"]["loss"]
    assert not any("unigram" in note for note in got.notes)


def test_an_evaluation_is_printed_as_its_table(model, tokenizer):
    """Not as a dump of its fields, which has a line for every document and token."""
    got = evaluate(model, tokenizer, DOCUMENTS)
    shown = str(got)
    lines = shown.splitlines()
    assert lines[0] == f"{got.tokens} tokens scored of 3 documents"
    assert lines[1].split() == ["measure", "value", "meaning"]
    for name, value in (
        ("loss", f"{got.loss:.4f}"),
        ("perplexity", f"{got.perplexity:,.3f}"),
        ("bits per byte", f"{got.bits_per_byte:.4f}"),
    ):
        assert any(re.match(rf"{name} +{re.escape(value)}  \S", line) for line in lines), name
    assert "Evaluation(" not in shown and max(map(len, lines)) <= 80 and len(lines) < 40
    joined = " ".join(shown.split())
    assert all(" ".join(note.split()) in joined for note in got.notes)


def test_few_documents_are_noted(model, tokenizer):
    """Three error bars would be taken for those of thirty."""
    few = evaluate(model, tokenizer, DOCUMENTS)
    assert "3 documents with scored tokens are too few" in " ".join(few.notes)
    many = [Document(str(place), DOCUMENTS[place % 3].text) for place in range(24)]
    assert "too few" not in " ".join(evaluate(model, tokenizer, many).notes)


def test_json_is_json(model, tokenizer):
    record = json.loads(evaluate(model, tokenizer, DOCUMENTS).to_json())
    assert set(record["per_document"][0]) == {"id", "domain", "nll", "tokens", "bytes"}


def test_one_document_is_cut_into_32_blocks(model, tokenizer):
    """By ``evaluate`` itself: blocks of 128 tokens each gave an error bar several times too
    small.
    """
    text = " ".join(TEXTS * 90)
    got = evaluate(model, tokenizer, [text])
    assert got.tokens > 40 * 128
    assert got.clusters == {"unit": "block", "count": 32, "trusted": True}
    # Beside documents without a scored token it is still the only one.
    beside = evaluate(model, tokenizer, ["", text, "<s>"])
    assert (beside.stderr, beside.clusters) == (got.stderr, got.clusters)


def test_float32_logits_under_autocast(model, tokenizer):
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        plain = evaluate(model, tokenizer, DOCUMENTS)
    from perplexity.models.language_model import HuggingFaceModel

    class Inside(HuggingFaceModel):
        def hidden_states(self, input_ids):
            with torch.autocast("cpu", enabled=False):
                return super().hidden_states(input_ids)

        def logits(self, input_ids):
            with torch.autocast("cpu", enabled=False):
                return super().logits(input_ids)

    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(Inside(model), tokenizer, DOCUMENTS)
    assert got.loss == plain.loss


def test_the_domains_table_is_capped(model, tokenizer):
    from rich.console import Console

    from perplexity.cli import eval as command

    documents = [Document(f"[bold]{i}", "the cat", f"[/d]{i}") for i in range(30)]
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    command.show(evaluate(model, tokenizer, documents), console)
    shown = console.export_text()
    assert "10 more in the JSON" in shown and "[/d]1" in shown and "[bold]0" in shown
