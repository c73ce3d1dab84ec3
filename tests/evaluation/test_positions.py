"""Loss by position in the document and in the window, and one model under several contexts."""

import json
import math

import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
from tiny_models import TEXTS, save_small_model

from perplexity import compare, evaluate
from perplexity.errors import InputError
from perplexity.evaluation import evaluate_contexts, read_result
from perplexity.evaluation.positions import PositionSums
from perplexity.report.html import evaluation_section, positions_figure

DOCUMENTS = [" ".join([TEXTS[i % 3]] * (1 + i % 5)) for i in range(25)]


def contexts_seen(length: int, context: int, stride: int) -> list[int]:
    """The tokens read before each position but the first, by the definition of sliding windows."""
    found = []
    for place in range(1, length):
        begin = 0
        while min(begin + context, length) <= place:
            begin += stride
        found.append(place - begin)
    return found


def by_bin(positions, nll, clusters):
    """Mean, standard error and interval by bin of doubling width, from arrays of single tokens."""
    found = {}
    for low in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        inside = (positions >= low) & (positions < 2 * low)
        if not inside.any():
            continue
        names, place = np.unique(clusters[inside], return_inverse=True)
        a, b = np.bincount(place, nll[inside]), np.bincount(place)
        loss, count = a.sum() / b.sum(), len(names)
        if count == 1:
            found[low] = (loss, None, None)
            continue
        error = math.sqrt(count / (count - 1) * ((a - loss * b) ** 2).sum()) / b.sum()
        half = scipy.stats.t.ppf(0.975, count - 1) * error
        found[low] = (loss, error, (loss - half, loss + half))
    return found


def check(bins, expected, tokens):
    assert [each["first"] for each in bins] == [*expected]
    assert sum(each["tokens"] for each in bins) == tokens
    for each in bins:
        loss, error, interval = expected[each["first"]]
        assert each["last"] == 2 * each["first"] - 1
        assert each["loss"] == pytest.approx(loss, rel=1e-9)
        if error is None:
            assert each["stderr"] is None and each["interval"] is None
            continue
        # Squares of sums cancel where documents hardly differ.
        assert each["stderr"] == pytest.approx(error, rel=1e-6, abs=1e-6)
        assert each["interval"] == pytest.approx(interval, rel=1e-6)


@pytest.mark.parametrize("bos", ["auto", "never"])
@pytest.mark.parametrize(
    ("documents", "unit"), [(DOCUMENTS, "document"), ([" ".join(TEXTS * 9)], "block")]
)
def test_every_bin_against_single_tokens(model, tokenizer, tmp_path, documents, unit, bos):
    path = tmp_path / "tokens.parquet"
    got = evaluate(
        model, tokenizer, documents, context_length=32, stride=20, bos=bos, per_token=path
    )
    rows = pyarrow.parquet.read_table(path).to_pydict()
    nll, position = np.array(rows["nll"], np.float64), np.array(rows["position"])
    document = np.array(rows["document"]).astype(int)
    added = int(bos == "auto")
    seen = np.concatenate(
        [contexts_seen(len(tokenizer(text)["input_ids"]) + added, 32, 20) for text in documents]
    )
    clusters = document if unit == "document" else (position + added) // 128
    found = got.loss_by_position
    assert found["unit"] == unit
    check(found["document"], by_bin(position + 1, nll, clusters), got.tokens)
    check(found["window"], by_bin(seen, nll, clusters), got.tokens)
    assert max(seen) == 31


def test_a_document_without_tokens_is_no_cluster():
    sums = PositionSums()
    sums.end_document()
    sums.add(np.array([1, 2]), np.array([1.0, 3.0]), added=1, begin=0)
    sums.end_document()
    sums.add(np.array([], dtype=np.int64), np.array([]), added=1, begin=0)
    sums.end_document()
    found = sums.result()
    assert found["unit"] == "block"
    assert [(b["first"], b["loss"], b["clusters"], b["stderr"]) for b in found["document"]] == [
        (1, 1.0, 1, None),
        (2, 3.0, 1, None),
    ]


def test_positions_are_read_back(model, tokenizer, tmp_path):
    got = evaluate(model, tokenizer, DOCUMENTS, context_length=32)
    got.save(tmp_path / "a.json")
    record = read_result(tmp_path / "a.json")
    assert record["loss_by_position"]["window"][0]["loss"] == pytest.approx(
        got.loss_by_position["window"][0]["loss"]
    )
    written = json.loads((tmp_path / "a.json").read_text())
    del written["loss_by_position"]  # a result of before
    (tmp_path / "b.json").write_text(json.dumps(written))
    assert compare(tmp_path / "a.json", tmp_path / "b.json").difference == 0
    written["loss_by_position"] = {"unit": "document", "document": [{"first": "x"}], "window": []}
    (tmp_path / "b.json").write_text(json.dumps(written))
    with pytest.raises(
        InputError, match=r"a whole number for loss_by_position.document\[0\].first"
    ):
        read_result(tmp_path / "b.json")


def test_the_page_draws_positions(model, tokenizer):
    got = json.loads(evaluate(model, tokenizer, DOCUMENTS, context_length=32).to_json())
    section = evaluation_section(got, "a.json")
    figure = positions_figure(section["loss_by_position"])
    assert figure["log_x"] and not figure["steps"]
    for trace, kind in zip(figure["data"], ("document", "window"), strict=True):
        bins = got["loss_by_position"][kind]
        assert trace["x"] == [each["first"] for each in bins]
        assert trace["y"] == pytest.approx([each["loss"] for each in bins], rel=1e-5)
        low, high = bins[2]["interval"]
        assert trace["error_y"]["array"][2] == pytest.approx((high - low) / 2)


def test_contexts_are_paired_on_the_same_tokens(model, tokenizer):
    got = evaluate_contexts(model, tokenizer, iter(DOCUMENTS), [64, 8, 16])
    alone = [evaluate(model, tokenizer, DOCUMENTS, context_length=n) for n in (8, 16, 64)]
    assert (got.loss, got.tokens) == (alone[2].loss, alone[2].tokens)
    p_values = []
    for context, evaluation in zip(got.contexts, alone, strict=True):
        assert context["context_length"] == evaluation.context_length
        assert context["loss"] == evaluation.loss
        assert context["loss_by_position"] == evaluation.loss_by_position
        if evaluation is alone[2]:
            assert context["difference"] is None and context["p_holm"] is None
            continue
        pair = compare(evaluation, alone[2])
        assert context["difference"] == pytest.approx(pair.difference)
        assert context["interval"] == pytest.approx(pair.interval)
        assert context["p_value"] == pytest.approx(pair.p_value)
        p_values.append(context["p_value"])
    assert all(c["p_holm"] >= c["p_value"] for c in got.contexts[:2])
    assert not any("differs" in note or "same model" in note for note in got.notes)
    # Under a short context the first tokens of a document see all that they see under a long one.
    first = [context["loss_by_position"]["document"][:3] for context in got.contexts]
    assert [b["loss"] for b in first[0]] == pytest.approx([b["loss"] for b in first[2]], rel=1e-5)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([8, 8], {}, "context_lengths: expected two or more different lengths, got 8, 8"),
        ([8], {}, "context_lengths: expected two or more"),
        ([8, 1], {}, "context_lengths: expected at least 2, got 1"),
        (8, {}, "context_lengths: expected a sequence of whole numbers, got int"),
        ([8, 16], {"protocol": "llama.cpp"}, "context_length: expected one length with llama.cpp"),
        ([8, 10**6], {}, "context_length: "),
    ],
)
def test_contexts_that_do_not_go(model, tokenizer, lengths, options, message):
    with pytest.raises(InputError, match=message):
        evaluate_contexts(model, tokenizer, DOCUMENTS[:2], lengths, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_small_model(path / "a")
    (path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:6])
    )
    return path


def test_the_command_at_80_columns(folder, ppl_here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = folder / "out.json"
    words = ("--context-length", "8,16", "--json", out, "--journal", folder / "journal")
    done = ppl_here("eval", folder / "a", folder / "texts.jsonl", *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if line[:1] in "┏┃┡│└") <= 80
    record = json.loads(out.read_text())
    assert record["context_length"] == 16 and len(record["contexts"]) == 2
    gain = record["contexts"][0]["loss"] - record["contexts"][1]["loss"]
    assert any(f"{gain:+.4f}" in line for line in lines)
    assert any("loss by position" in line for line in lines)
    assert sorted(path.name for path in (folder / "journal").iterdir()) == [
        "context-16",
        "context-8",
    ]
    done = ppl_here("eval", folder / "a", folder / "texts.jsonl", "--context-length", "8,x")
    assert done.returncode == 2 and "expected a whole number" in done.stderr


def test_two_tokenizers_are_compared_in_bits_per_byte(folder, ppl_here):
    from tiny_models import build_model, build_tokenizer

    tokenizer = build_tokenizer(bos=True, eos=True)
    build_model(len(tokenizer)).save_pretrained(folder / "b")
    tokenizer.save_pretrained(folder / "b")
    out = folder / "compared.json"
    done = ppl_here("compare", folder / "a", folder / "b", folder / "texts.jsonl", "--json", out)
    assert done.returncode == 0, done.stderr
    assert "different tokenizers: they are compared in bits per byte" in done.stdout
    record = json.loads(out.read_text())
    assert record["measure"] == "bits-per-byte"
    for name in "ab":
        one = folder / f"{name}.json"
        assert (
            ppl_here("eval", folder / name, folder / "texts.jsonl", "--json", one).returncode == 0
        )
        assert record[name] == pytest.approx(json.loads(one.read_text())["bits_per_byte"])
