"""Parquet tables and JSON: rows are the numbers, files are whole or absent."""

import json
import math
import os

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
