"""Comparison of evaluations: paired, refused where it would mean nothing; comparison of models
against full logits.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity import compare, evaluate
from perplexity.errors import InputError
from perplexity.evaluation import compare_models, read_result

DOCUMENTS = [" ".join([TEXTS[i % 3]] * (1 + i % 5)) for i in range(25)]


@pytest.fixture(scope="module")
def other(model):
    """The same model with a little noise on its head."""
    changed = build_model(model.config.vocab_size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = changed.lm_head.weight
        weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return changed


@pytest.fixture(scope="module")
def evaluations(model, other, tokenizer):
    return tuple(evaluate(m, tokenizer, DOCUMENTS, context_length=32) for m in (model, other))


def test_the_difference_is_paired_by_document(evaluations):
    a, b = evaluations
    found = compare(a, b)
    assert found.difference == pytest.approx(b.loss - a.loss, abs=1e-9)
    assert found.perplexity_ratio == pytest.approx(b.perplexity / a.perplexity)
    assert (found.unit, found.pairs, found.trusted) == ("document", 25, True)
    # An oracle of its own: the jackknife of the ratio agrees with its linearisation to first order.
    nll = np.array([y.nll - x.nll for x, y in zip(a.per_document, b.per_document, strict=True)])
    tokens = np.array([x.tokens for x in a.per_document])
    left_out = (nll.sum() - nll) / (tokens.sum() - tokens)
    jackknife = math.sqrt(24 / 25 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.stderr == pytest.approx(jackknife, rel=0.1)
    assert found.p_value == pytest.approx(
        2 * scipy.stats.t.sf(abs(found.difference) / found.stderr, 24)
    )
    assert found.interval[0] < found.difference < found.interval[1]
    # The models differ little and their losses by document much: pairing is worth many times the
    # tokens.
    assert found.effective_tokens > 10 * found.tokens


def test_equal_evaluations(evaluations):
    found = compare(evaluations[0], evaluations[0])
    assert (found.difference, found.stderr, found.p_value) == (0.0, 0.0, 1.0)
    assert found.verdict == "no difference beyond chance"


def test_files_give_what_objects_give(evaluations, tmp_path):
    for name, evaluation in zip("ab", evaluations, strict=True):
        evaluation.save(tmp_path / name)
    assert compare(tmp_path / "a", str(tmp_path / "b")) == compare(*evaluations)
    assert compare(json.loads((tmp_path / "a").read_text()), evaluations[1]) == compare(
        *evaluations
    )


def test_one_document_is_paired_by_blocks(model, other, tokenizer):
    text = [" ".join(TEXTS * 60)]
    a, b = (evaluate(m, tokenizer, text) for m in (model, other))
    found = compare(a, b)
    assert found.unit == "block" and found.pairs > 20
    assert found.difference == pytest.approx(b.loss - a.loss, abs=1e-9)
    assert any("one document" in note for note in found.notes)


def test_other_tokenizers_are_refused_and_bits_per_byte_offered(evaluations, tokenizer):
    a = evaluations[0]
    theirs = build_tokenizer(bos=True, eos=True)
    b = evaluate(build_model(len(theirs)), theirs, DOCUMENTS, context_length=32)
    with pytest.raises(
        InputError, match=r"tokenizer: .* do not compare .*--measure bits-per-byte\): A \d"
    ):
        compare(a, b)
    found = compare(a, b, measure="bits-per-byte")
    assert found.difference == pytest.approx(b.bits_per_byte - a.bits_per_byte, abs=1e-9)
    assert found.perplexity_ratio is None


@pytest.mark.parametrize("change", ["normaliser", "merges", "special"])
def test_the_fingerprint_sees_what_decides_the_tokens(tokenizer, change):
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    from perplexity.fingerprints import tokenizer_fingerprint

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {"bos_token": "<s>"}
    if change == "merges":
        state["model"]["merges"] = state["model"]["merges"][:-1]
    changed = Tokenizer.from_str(json.dumps(state))
    if change == "normaliser":
        changed.normalizer = normalizers.Lowercase()
    if change == "special":
        special["eos_token"] = "<s>"
    theirs = PreTrainedTokenizerFast(tokenizer_object=changed, **special)
    same = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token="<s>"
    )
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(same) == before
    assert tokenizer_fingerprint(theirs) != before
    same(["a", "a longer one"], padding=False, truncation=True, max_length=3)  # settings of a call
    assert tokenizer_fingerprint(same) == before


@pytest.mark.parametrize("measure", ["loss", "bits-per-byte"])
def test_other_texts_are_refused(evaluations, model, tokenizer, measure):
    b = evaluate(model, tokenizer, [*DOCUMENTS[:-1], "another"], context_length=32)
    with pytest.raises(InputError, match="text: expected one text for both"):
        compare(evaluations[0], b, measure=measure)


def test_other_tokens_are_refused(evaluations, model, tokenizer):
    b = evaluate(model, tokenizer, DOCUMENTS, context_length=32, bos="never")
    with pytest.raises(
        InputError,
        match="tokens: expected the same tokens scored in both, 25 of 25 documents differ",
    ):
        compare(evaluations[0], b)


def test_other_windows_are_noted(evaluations, model, tokenizer):
    b = evaluate(model, tokenizer, DOCUMENTS, context_length=16)
    notes = compare(evaluations[0], b).notes
    assert any("context length differs (32 and 16)" in note for note in notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", "got no object"), ('{"loss": 1}', "without tokens")],
)
def test_a_file_that_is_no_result(evaluations, tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=rf"x.json: expected a result file.*{message}"):
        compare(tmp_path / "x.json", evaluations[1])
    with pytest.raises(InputError, match="no such file"):
        compare(tmp_path / "absent.json", evaluations[1])
    with pytest.raises(InputError, match="a: expected an Evaluation"):
        compare(3, evaluations[1])


def test_models_against_full_logits(model, other, tokenizer):
    """What llama.cpp prints for a quantised model, computed here from both models' logits in
    float64.
    """
    found = compare_models(model, other, tokenizer, DOCUMENTS, context_length=64)
    divergence, reverse, nll, agreed = [], [], [], []
    for text in DOCUMENTS:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
        for begin in range(0, len(ids), 32):
            window = ids[begin : begin + 64]
            with torch.no_grad():
                log_a, log_b = (
                    m(window[None]).logits[0].double().log_softmax(-1) for m in (model, other)
                )
            first = 0 if begin == 0 else 31
            for place in range(first, len(window) - 1):
                a, b = log_a[place], log_b[place]
                divergence.append((a.exp() * (a - b)).sum().item())
                reverse.append((b.exp() * (b - a)).sum().item())
                nll.append((-a[window[place + 1]].item(), -b[window[place + 1]].item()))
                agreed.append(a.argmax() == b.argmax())
            if begin + 64 >= len(ids):
                break
    nll = np.array(nll)
    change = np.exp(-nll[:, 1]) - np.exp(-nll[:, 0])
    assert found.tokens == len(divergence)
    assert found.loss_a == pytest.approx(nll[:, 0].mean(), rel=1e-6)
    assert found.loss_b == pytest.approx(nll[:, 1].mean(), rel=1e-6)
    # float32 sums over the vocabulary of differences near zero: 1e-6 absolute.
    assert found.kl_divergence == pytest.approx(np.mean(divergence), abs=1e-6)
    assert found.kl_percentiles["90"] == pytest.approx(np.percentile(divergence, 90), abs=1e-5)
    assert found.reverse_kl_divergence == pytest.approx(np.mean(reverse), abs=1e-6)
    assert found.reverse_kl_percentiles["90"] == pytest.approx(np.percentile(reverse, 90), abs=1e-5)
    assert found.top_1_agreement == pytest.approx(np.mean(agreed), abs=1e-12)
    assert found.probability_change == pytest.approx(change.mean(), abs=1e-6)
    assert found.probability_change_rms == pytest.approx(math.sqrt((change**2).mean()), abs=1e-6)
    assert found.probability_change_percentiles["0"] == pytest.approx(change.min(), abs=1e-5)
    assert found.correlation == pytest.approx(np.corrcoef(nll.T)[0, 1], abs=1e-6)
    assert 0 < found.kl_divergence_stderr < found.kl_divergence


def test_a_model_beside_itself(model, tokenizer):
    found = compare_models(model, model, tokenizer, DOCUMENTS[:3])
    assert found.kl_divergence == pytest.approx(0, abs=1e-7) and found.top_1_agreement == 1
    assert found.loss_difference == 0 == found.probability_change_rms


def test_models_that_do_not_compare(model, other, tokenizer):
    with pytest.raises(InputError, match="tokenizer: expected one for both models"):
        compare_models(model, other, tokenizer, DOCUMENTS, tokenizer_b=build_tokenizer(bos=False))
    few = build_model(len(tokenizer) - 1)
    with pytest.raises(
        InputError, match=r"both have the tokenizer's \d+ ids, got \d+ and \d+ rows"
    ):
        compare_models(model, few, tokenizer, DOCUMENTS)


@pytest.mark.parametrize("larger", ["A", "B"])
def test_a_padded_vocabulary(model, tokenizer, larger):
    """Heads of two sizes were refused. Losses are each model's own; KL is between conditional
    distributions, here from both models' logits in float64.
    """
    padded = build_model(len(tokenizer) + 60)
    pair = (padded, model) if larger == "A" else (model, padded)
    text, rows = DOCUMENTS[0], model.lm_head.weight.shape[0]
    found = compare_models(*pair, tokenizer, [text])
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    assert ids.shape[1] <= 64
    with torch.no_grad():
        logits = [m(ids).logits[0, :-1].double() for m in pair]
    losses = [torch.nn.functional.cross_entropy(one, ids[0, 1:]).item() for one in logits]
    a, b = (one[:, :rows].log_softmax(-1) for one in logits)
    outside = logits[larger == "B"].softmax(-1)[:, rows:].sum(-1).mean().item()
    assert (found.loss_a, found.loss_b) == pytest.approx(losses, rel=1e-6)
    # float32 sums over the vocabulary of differences near zero: 1e-6 absolute.
    assert found.kl_divergence == pytest.approx((a.exp() * (a - b)).sum(-1).mean().item(), abs=1e-5)
    assert found.reverse_kl_divergence == pytest.approx(
        (b.exp() * (b - a)).sum(-1).mean().item(), abs=1e-5
    )
    assert found.outside_probability == pytest.approx(outside, rel=1e-5) and outside > 0.01
    (note,) = [note for note in found.notes if "rows" in note]
    assert note.startswith(f"warning: the heads have {found.rows_a} and {found.rows_b} rows")
    assert f"{larger} is scaled" in note


def test_neither_models_head_runs_but_to_be_verified(model, other, tokenizer, monkeypatch):
    calls = []
    for m in (model, other):
        forward = m.lm_head.forward
        monkeypatch.setattr(
            m.lm_head, "forward", lambda h, f=forward: calls.append(h.shape) or f(h)
        )
    compare_models(model, other, tokenizer, DOCUMENTS)
    # Of each model, one call shows the head's rule and one verifies it.
    assert len(calls) == 4 and all(shape[:-1].numel() <= 16 for shape in calls)


def test_a_comparison_becomes_json(evaluations):
    record = compare(*evaluations).to_dict()
    assert json.loads(json.dumps(record))["verdict"] in (
        "A is better",
        "B is better",
        "no difference beyond chance",
    )
    assert {f.name for f in dataclasses.fields(compare(*evaluations))} < set(record)


def test_bits_per_byte_of_other_parts_of_a_text_are_refused(evaluations, model, tokenizer):
    """llama.cpp scores half of a text: its nats over the whole text's bytes would be half of what
    they are.
    """
    half = evaluate(model, tokenizer, DOCUMENTS, protocol="llama.cpp", context_length=16)
    with pytest.raises(
        InputError,
        match=r"bytes: expected the same part .* protocol llama.cpp, BOS auto, skipped \d+ first",
    ):
        compare(evaluations[0], half, measure="bits-per-byte")


def test_what_was_skipped_is_noted(evaluations, model, tokenizer):
    never = evaluate(model, tokenizer, DOCUMENTS, context_length=32, bos="never")
    notes = compare(evaluations[0], never, measure="bits-per-byte").notes
    assert any("bos differs (auto and never)" in note for note in notes)
    assert any("skipped differs" in note for note in notes)


def test_a_model_that_gives_nan_is_marked(model, tokenizer):
    broken = build_model(model.config.vocab_size)
    token = tokenizer(DOCUMENTS[2])["input_ids"][-2]
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = math.nan
    found = compare_models(model, broken, tokenizer, [DOCUMENTS[0], DOCUMENTS[2]])
    assert not found.ok and found.non_finite["document"] == "1" and math.isfinite(found.loss_b)
    assert any("token" in note and "NaN" in note for note in found.notes)


DOCUMENT = {"id": "a", "nll": 1.5, "tokens": 1, "bytes": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (3, "a list for per_document, got 3"),
        ([{"id": "a"}], r"per_document\[0\].nll, got none"),
        ([DOCUMENT, DOCUMENT | {"nll": "x"}], r"a number for per_document\[1\].nll, got 'x'"),
        ([DOCUMENT | {"nll": "3.5"}], r"a number for per_document\[0\].nll, got '3.5'"),
        ([DOCUMENT | {"nll": "inf"}], r"a finite number for per_document\[0\].nll, got inf"),
        ([DOCUMENT | {"bytes": -1}], r".* 0 for per_document\[0\].bytes, got -1"),
        ([DOCUMENT | {"tokens": True}], r"a whole number for per_document\[0\].tokens, got True"),
    ],
)
def test_a_result_file_with_broken_documents(evaluations, tmp_path, content, message):
    record = json.loads(evaluations[0].to_json()) | {"per_document": content}
    (tmp_path / "x.json").write_text(json.dumps(record))
    expected = f"x.json: expected a result file of ppl eval --json with {message}$"
    with pytest.raises(InputError, match=expected):
        compare(tmp_path / "x.json", evaluations[1])
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="not JSON"):
        compare(tmp_path / "deep.json", evaluations[1])


def test_a_result_of_the_first_version_is_read(evaluations, tmp_path):
    """Fewer keys, no schema_version and no model; keys of another program are kept."""
    kept = ("loss", "perplexity", "tokens", "tokenizer_fingerprint", "text_fingerprint", "bytes")
    record = json.loads(evaluations[0].to_json())
    first = {key: record[key] for key in kept} | {"bits_per_byte": None, "own": [1, "inf"]}
    first |= {"perplexity": "inf", "perplexity_interval": [3.5, "nan"]}
    documents = [DOCUMENT | row | {"id": "nan", "own": 1} for row in record["per_document"]]
    (tmp_path / "x.json").write_text(json.dumps(first | {"per_document": documents}))
    result = read_result(tmp_path / "x.json")
    assert result["perplexity"] == math.inf and "bits_per_byte" not in result
    assert result["perplexity_interval"][0] == 3.5 and math.isnan(result["perplexity_interval"][1])
    assert result["own"] == [1, "inf"] and result["per_document"] == documents
    assert compare(tmp_path / "x.json", evaluations[1]).difference == pytest.approx(
        compare(*evaluations).difference
    )
