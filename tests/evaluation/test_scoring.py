"""evaluate against an independent computation with full logits, one window at a time."""

import math

import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity import evaluate
from perplexity.errors import InputError
from perplexity.evaluation import Document

DOCUMENTS = [Document(f"d{i}", text * (3 * i + 1), "ab"[i % 2]) for i, text in enumerate(TEXTS)]


def full_logits_nll(
    model, tokenizer, text: str, context_length: int, stride: int
) -> tuple[float, int]:
    """Σ NLL and count in float64 from the model's own logits: each token from the window that is
    the first to hold it.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    total, scored, begin = 0.0, 1, 0
    while scored < len(ids):
        end = min(begin + context_length, len(ids))
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:end]])).logits[0].double()
        log_probability = logits.log_softmax(-1)
        for position in range(scored, end):
            total -= log_probability[position - begin - 1, ids[position]].item()
        scored, begin = end, begin + stride
    return total, len(ids) - 1


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("context_length", "stride"), [(64, 32), (16, 15), (16, 1), (7, 3)])
def test_equals_full_logits(context_length, stride, bos):
    tokenizer = build_tokenizer(bos)
    model = build_model(len(tokenizer))
    expected = [
        full_logits_nll(model, tokenizer, d.text, context_length, stride) for d in DOCUMENTS
    ]
    got = evaluate(model, tokenizer, DOCUMENTS, context_length=context_length, stride=stride)
    assert got.tokens == sum(count for _, count in expected)
    assert got.tokens_skipped == (0 if bos else len(DOCUMENTS))
    # float32 hidden states and products on both sides: 1e-5 relative.
    assert got.loss == pytest.approx(sum(nll for nll, _ in expected) / got.tokens, rel=1e-5)
    for score, (nll, count) in zip(got.per_document, expected, strict=True):
        assert (score.nll, score.tokens) == (pytest.approx(nll, rel=1e-5), count)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_the_batch_size_changes_nothing(model, tokenizer, batch_size):
    one = evaluate(model, tokenizer, DOCUMENTS, context_length=16, stride=5, batch_size=1)
    got = evaluate(model, tokenizer, DOCUMENTS, context_length=16, stride=5, batch_size=batch_size)
    assert got.tokens == one.tokens
    # Products of other shapes round differently in float32.
    assert got.loss == pytest.approx(one.loss, rel=1e-6)


def test_no_logits_by_any_road(model, tokenizer, monkeypatch):
    """The head may run for two calls, on a few positions each: one shows its rule, one verifies
    it.
    """
    calls = []
    forward = model.lm_head.forward
    monkeypatch.setattr(
        model.lm_head, "forward", lambda hidden: calls.append(hidden.shape) or forward(hidden)
    )
    evaluate(model, tokenizer, DOCUMENTS, context_length=16)
    assert len(calls) == 2 and all(shape[:-1].numel() <= 16 for shape in calls)


def test_every_number_follows_from_the_sums(model, tokenizer):
    got = evaluate(model, tokenizer, DOCUMENTS, context_length=16)
    nll = sum(score.nll for score in got.per_document)
    assert got.bytes == sum(len(d.text.encode()) for d in DOCUMENTS)
    assert got.words == sum(len(d.text.split()) for d in DOCUMENTS)
    assert got.perplexity == pytest.approx(math.exp(nll / got.tokens), rel=1e-12)
    assert got.bits_per_byte == pytest.approx(nll / got.bytes / math.log(2), rel=1e-12)
    assert got.byte_perplexity == pytest.approx(2**got.bits_per_byte, rel=1e-12)
    assert got.word_perplexity == pytest.approx(math.exp(nll / got.words), rel=1e-12)
    low, high = got.perplexity_interval
    assert low < got.perplexity < high
    assert set(got.domains) == {"a", "b"}
    assert sum(domain["tokens"] for domain in got.domains.values()) == got.tokens


def test_bos_is_never_doubled(model, tokenizer):
    plain = evaluate(model, tokenizer, [TEXTS[0]])
    spelled = evaluate(model, tokenizer, ["<s>" + TEXTS[0]])
    assert spelled.tokens == plain.tokens
    assert spelled.loss == pytest.approx(plain.loss, rel=1e-9)


def test_empty_documents_are_counted_and_nothing_else(model, tokenizer):
    got = evaluate(model, tokenizer, [TEXTS[0], "", TEXTS[1]])
    assert got.documents == 3 and got.per_document[1].tokens == 0
    assert got.loss == pytest.approx(evaluate(model, tokenizer, TEXTS[:2]).loss, rel=1e-6)


def test_training_mode_is_put_back(model, tokenizer):
    model.train()
    evaluate(model, tokenizer, [TEXTS[0]])
    assert model.training
    model.eval()


def test_a_head_with_a_rule_unknown_here_stops_the_run(tokenizer):
    model = build_model(len(tokenizer))
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.1 * forward(hidden)
    with pytest.raises(InputError, match="logits differ"):
        evaluate(model, tokenizer, TEXTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(protocol="guess"),
            r"protocol: expected one of sliding, lm-eval, llama.cpp, got 'guess'",
        ),
        (dict(stride=64, context_length=64), r"stride: expected 1 to .* 63, got 64"),
        (dict(context_length=65), r"context_length: expected 2 to 64.*got 65"),
        (dict(batch_size=0), r"batch_size: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(model, tokenizer, arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(model, tokenizer, TEXTS, **arguments)


def test_nothing_to_score(model, tokenizer):
    with pytest.raises(InputError, match="documents: expected at least one token to score"):
        evaluate(model, tokenizer, [""])


def test_an_id_that_the_head_cannot_score(tokenizer):
    words = (
        r"document 0: token id 2\d\d \('.+'\) at position \d+, "
        r"expected below 270, .* has \d+ entries"
    )
    with pytest.raises(InputError, match=words):
        evaluate(build_model(270), tokenizer, TEXTS)


def test_entries_that_no_text_uses(tokenizer):
    """A padding token was added and the model not resized: the loss is the same as without it."""
    import copy

    longer = copy.deepcopy(tokenizer)
    longer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<image>"]})
    model = build_model(len(tokenizer))
    assert len(longer) == len(tokenizer) + 2
    assert evaluate(model, longer, TEXTS).loss == evaluate(model, tokenizer, TEXTS).loss
    words = rf"document 1: token id {len(tokenizer) + 1} \('<image>'\) at position 1"
    with pytest.raises(InputError, match=words):
        evaluate(model, longer, ["a", "a<image> b"])
    longer.add_special_tokens({"bos_token": "<begin>"})
    with pytest.raises(InputError, match=r"bos: token id \d+ \('<begin>'\).*bos='never'"):
        evaluate(model, longer, TEXTS)
