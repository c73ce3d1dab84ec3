"""A window's loss is the same alone and beside any other: by length class, by equal length, or one
at a time.
"""

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, build_model

from perplexity import evaluate, models
from perplexity.evaluation import Document, Head
from perplexity.evaluation.model_comparison import compare_models
from perplexity.scoring.batching import Batching, LengthRule, length_rules

SIZE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SHORT, LONG = "a cat sat", ("the cat sat on the mat and the dog lay by the door " * 8)[:200]
DOCUMENTS = [SHORT, LONG, TEXTS[1], LONG[60:], SHORT + " on"]


def longrope(vocabulary, border=32):
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    rope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[8.0] * 4)
    config = Phi3Config(
        vocab_size=vocabulary,
        max_position_embeddings=256,
        original_max_position_embeddings=border,
        initializer_range=0.3,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=None,
        sliding_window=None,
        rope_parameters=rope | dict(rope_theta=10_000.0, original_max_position_embeddings=border),
        **SIZE,
    )
    return Phi3ForCausalLM(config).eval()


def dynamic(vocabulary):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = dict(rope_type="dynamic", factor=4.0, rope_theta=10_000.0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=48,
        initializer_range=0.3,
        rope_parameters=rope,
        **SIZE,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def own(model, tokenizer, text):
    """The model's own loss, summed, of a text in one window."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    logits = model(input_ids=ids[:, :-1]).logits[0].double()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_a_rotary_embedding_that_changes_with_the_longest_row(tokenizer, batch_size):
    """A short document beside a long one was read with the long one's frequencies: 20.54 nats
    instead of 18.87.
    """
    model = longrope(len(tokenizer))
    lengths = [len(tokenizer(text)["input_ids"]) for text in DOCUMENTS]
    assert min(lengths) <= 32 < max(lengths)
    got = evaluate(model, tokenizer, DOCUMENTS, batch_size=batch_size)
    expected = [own(model, tokenizer, text) for text in DOCUMENTS]
    # float32 sums of some fifty tokens beside float64 ones.
    assert [document.nll for document in got.per_document] == pytest.approx(expected, rel=1e-5)
    assert not any("share a batch" in note for note in got.notes)
    found = compare_models(
        model, build_model(len(tokenizer)), tokenizer, [t[:60] for t in DOCUMENTS], batch_size=2
    )
    assert found.loss_a == pytest.approx(
        evaluate(
            model, tokenizer, [t[:60] for t in DOCUMENTS], batch_size=1, context_length=64
        ).loss,
        rel=1e-5,
    )


def test_what_a_call_before_left_behind_is_forgotten(tokenizer):
    """Dynamic NTK keeps the frequencies of the longest call, and goes back for shorter ones than
    its limit only.
    """
    fresh, used = dynamic(len(tokenizer)), dynamic(len(tokenizer))
    text = Document("d", "", ids=np.arange(48) % 200)
    expected = evaluate(fresh, tokenizer, [text], bos="never").loss
    fingerprint = models.fingerprint(models.as_language_model(used))
    with torch.no_grad():
        used(input_ids=torch.arange(90)[None])
        ids = torch.from_numpy(text.ids)[None]
        assert not torch.equal(used(input_ids=ids).logits, fresh(input_ids=ids).logits)
    assert models.fingerprint(models.as_language_model(used)) == fingerprint
    assert evaluate(used, tokenizer, [text], bos="never").loss == expected


@pytest.mark.parametrize(
    ("rope", "rules"),
    [
        (dict(rope_type="default"), []),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), []),
        (
            dict(rope_type="longrope", original_max_position_embeddings=16),
            [LengthRule(16, exact=False)],
        ),
        (dict(type="su", original_max_position_embeddings=16), [LengthRule(16, exact=False)]),
        (dict(rope_type="dynamic", factor=2.0), [LengthRule(64, exact=True)]),
        (
            {
                "full_attention": dict(rope_type="longrope", original_max_position_embeddings=16),
                "sliding_attention": dict(rope_type="default"),
            },
            [LengthRule(16, exact=False)],
        ),
    ],
)
def test_rules_of_configurations(model, rope, rules):
    class Config:
        max_position_embeddings, rope_parameters = 64, rope

        def get_text_config(self):
            return self

    class Network:
        model = type("Model", (), {"config": Config()})()

    assert length_rules(Network()) == rules
    assert length_rules(models.as_language_model(model)) == []


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (dict(index_topk=8), [8]),
        (dict(keep_window_size=8), [8]),
        (dict(indexer_budget=8), [8]),
        (dict(index_topk_blocks=2, index_block_size=4), [8]),
        (dict(index_topk=None, index_topk_blocks=2), []),
    ],
)
def test_attention_to_the_best_keys_is_read_from_the_configuration(settings, most):
    """Which of equally good keys are taken depends on the row's length: padded rows had another
    loss, by 3e-4.
    """
    config = type("Config", (), settings | dict(get_text_config=lambda self: self))()
    network = type("Network", (), {"model": type("Model", (), {"config": config})()})()
    assert length_rules(network) == [LengthRule(number, exact=True) for number in most]


def test_a_window_is_equal_alone_and_beside_longer_ones_where_keys_are_chosen(tokenizer):
    import transformers

    torch.manual_seed(0)
    config = transformers.DogeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        keep_window_size=8, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    model = transformers.DogeForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.fill_(0.1)
    texts = [
        "a a a a a a a a b b b b b b c c c c a a a a a a a a a a",
        "b b b b b b b b c c a a a a a b b b b b",
    ]
    alone = [
        evaluate(model, tokenizer, [text], context_length=24, stride=12, batch_size=1)
        for text in texts
    ]
    total = sum(found.loss * found.tokens for found in alone)
    got = evaluate(model, tokenizer, texts, context_length=24, stride=12, batch_size=8)
    assert got.loss * got.tokens == pytest.approx(total, rel=1e-6)


def test_lengths_of_one_rule():
    once, exact = LengthRule(32, exact=False), LengthRule(32, exact=True)
    assert [once.group(length) for length in (1, 32, 33, 90)] == [0, 0, 1, 1]
    assert [exact.group(length) for length in (1, 32, 33, 90)] == [0, 0, 33, 90]


class Neighbourly:
    """A model whose values depend on its neighbours in a batch."""

    def __init__(self, model, change, dtype=torch.float32):
        self.net, self.change = model.to(dtype), change
        self.head, self.context_length = Head(model.lm_head.weight), 64

    def hidden_states(self, input_ids):
        return self.change(self.net.model(input_ids=input_ids, use_cache=False).last_hidden_state)

    def logits(self, input_ids):
        return self.hidden_states(input_ids) @ self.head.weight.T


def changes_with_length(hidden):
    """As a rotary embedding in a model's own code may, which no configuration tells."""
    return hidden * (1.0 if hidden.shape[1] <= 32 else 1.5)


def changes_with_padding(hidden):
    return hidden * (1 + hidden.shape[1] / 64)


def changes_with_the_batch(hidden):
    return hidden - 0.5 * hidden[:, :1].mean(0, keepdim=True)


CASES = {
    "of itself alone": (lambda hidden: hidden, "padded"),
    "length": (changes_with_length, "equal"),
    "padding": (changes_with_padding, "equal"),
    "batch": (changes_with_the_batch, "alone"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_other_dependences_are_found_by_comparing(tokenizer, case, dtype):
    change, mode = CASES[case]
    network = Neighbourly(build_model(len(tokenizer)), change, dtype)
    documents = [text[:60] for text in DOCUMENTS]
    # Behind a BOS all rows of a batch have the same first position, and its mean would be no
    # dependence.
    arguments = dict(context_length=64, bos="never")
    got = evaluate(network, tokenizer, documents, **arguments)
    alone = evaluate(network, tokenizer, documents, batch_size=1, **arguments)
    # 16 bits: products in other shapes are summed in another order, 2⁻⁸ relative each.
    rel = 1e-5 if dtype == torch.float32 else 2e-2
    assert [d.nll for d in got.per_document] == pytest.approx(
        [d.nll for d in alone.per_document], rel=rel
    )
    notes = [note for note in got.notes if "windows" in note]
    words = {"padded": [], "equal": ["depend on padding"], "alone": ["one at a time"]}[mode]
    assert len(notes) == len(words) and all(
        word in note for word, note in zip(words, notes, strict=True)
    )
    assert not [note for note in alone.notes if "windows" in note]


def test_one_window_at_a_time_needs_no_check(model, tokenizer, monkeypatch):
    network = models.as_language_model(model)
    for batch_size, context_length in ((1, 64), (None, 1)):
        batching = Batching([network], batch_size)
        monkeypatch.setattr(network, "hidden_states", None)
        batching.check(np.arange(9), context_length)
        assert batching.mode == "padded"


def test_prompts_near_the_border_are_not_padded(tokenizer):
    """A text beside a longer one was written with the longer one's frequencies."""
    from perplexity.probe.generation import generate
    from perplexity.probe.prompts import Asked, Prompt
    from perplexity.probe.settings import GenerationSettings

    model = longrope(len(tokenizer), border=16)
    settings = GenerationSettings(max_new_tokens=4, temperature=0.0, samples=1)

    def asked(length):
        ids = np.arange(10, 10 + length)
        return Asked(Prompt(str(length), ""), "", ids, ids[:0], (), False, False)

    lengths = (5, 9, 20)
    together = generate(
        model, tokenizer, [asked(n) for n in lengths], settings, first_choices=lambda *_: True
    )
    apart = [generate(model, tokenizer, [asked(n)], settings)[0] for n in lengths]
    assert [text.ids.tolist() for text in together] == [text.ids.tolist() for text in apart]


def test_batches_are_compared_before_the_first_with_several_windows(model, tokenizer, monkeypatch):
    """Of a text of one window the comparison took more positions than its scoring."""
    checked = []
    monkeypatch.setattr(Batching, "check", lambda *arguments: checked.append(arguments))
    evaluate(model, tokenizer, [SHORT], context_length=64)
    assert not checked
    evaluate(model, tokenizer, DOCUMENTS, context_length=64, batch_size=1)
    assert not checked
    evaluate(model, tokenizer, DOCUMENTS * 20, context_length=64, batch_size=2)
    assert len(checked) == 1
