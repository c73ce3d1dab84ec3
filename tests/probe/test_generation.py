"""Generation as it is stated: no other settings, the same again, ends where the model ends."""

import numpy as np
import pytest
import torch
from tiny_models import build_model, build_tokenizer

from perplexity.errors import InputError
from perplexity.probe import GenerationSettings, Prompt
from perplexity.probe.generation import generate
from perplexity.probe.prompts import tokenize

PROMPTS = [
    Prompt("a", "the cat sat on"),
    Prompt("b", "a loss"),
    Prompt("c", "na\u00efve bytes are not"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(bos=True, eos=True)


@pytest.fixture
def model(tokenizer):
    return build_model(len(tokenizer))


def asked(tokenizer, settings, prompts=PROMPTS):
    return tokenize(tokenizer, prompts, settings, 64)[0]


def test_greedy_is_the_largest_logit_whatever_the_padding(model, tokenizer):
    settings = GenerationSettings(max_new_tokens=12, temperature=0, samples=1)
    given = asked(tokenizer, settings)
    for prompt, text in zip(given, generate(model, tokenizer, given, settings), strict=True):
        ids = prompt.ids.tolist()
        for token in text.ids:
            with torch.no_grad():
                assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(int(token))
        assert text.text == tokenizer.decode(text.ids, skip_special_tokens=True)


def test_the_models_own_settings_are_not_used(model, tokenizer):
    """A repetition penalty or a top-k in a model's folder would hide repetition.

    The model has its settings back afterwards.
    """
    settings = GenerationSettings(max_new_tokens=16, samples=2)
    given = asked(tokenizer, settings)
    plain = generate(model, tokenizer, given, settings)
    own = model.generation_config
    own.repetition_penalty, own.top_k, own.no_repeat_ngram_size, own.min_new_tokens = 5.0, 1, 2, 16
    again = generate(model, tokenizer, given, settings)
    assert [text.ids.tolist() for text in again] == [text.ids.tolist() for text in plain]
    assert model.generation_config is own and own.repetition_penalty == 5.0


def test_all_tokens_are_drawn_from(tokenizer):
    """transformers' default top-k is 50: a nearly flat head must give more first tokens."""
    model = build_model(len(tokenizer))
    model.lm_head.weight.data.mul_(1e-3)
    settings = GenerationSettings(max_new_tokens=1, samples=400, batch_size=400)
    found = generate(model, tokenizer, asked(tokenizer, settings, PROMPTS[:1]), settings)
    assert len({text.ids.tolist()[0] for text in found if len(text.ids)}) > 150
    few = GenerationSettings(max_new_tokens=1, samples=400, batch_size=400, top_k=5)
    found = generate(model, tokenizer, asked(tokenizer, few, PROMPTS[:1]), few)
    assert len({tuple(text.ids.tolist()) for text in found}) <= 5


def test_seeds(model, tokenizer):
    def ids(seed):
        settings = GenerationSettings(max_new_tokens=16, samples=2, seed=seed)
        return [
            text.ids.tolist()
            for text in generate(model, tokenizer, asked(tokenizer, settings), settings)
        ]

    before = torch.get_rng_state()
    assert ids(1) == ids(1) != ids(2)
    assert torch.equal(before, torch.get_rng_state())
    first, second = ids(1)[:2]
    assert first != second


def test_texts_end_where_the_model_or_its_tokenizer_ends_them(model, tokenizer):
    settings = GenerationSettings(max_new_tokens=40, samples=40, batch_size=120)
    given = asked(tokenizer, settings)
    assert tokenizer.eos_token_id == 1
    model.generation_config.eos_token_id = [0, 70]  # 70 is a piece of text, which ends none
    found = generate(model, tokenizer, given, settings)
    ended = [text for text in found if text.ended]
    assert ended and len(ended) < len(found)
    for text in found:
        assert not {0, 1} & set(text.ids.tolist()) and text.ended == (len(text.ids) < 40)
    assert any(70 in text.ids for text in found)


def test_many_batches_in_order(model, tokenizer):
    settings = GenerationSettings(max_new_tokens=4, samples=3, batch_size=2)
    told = []
    found = generate(model, tokenizer, asked(tokenizer, settings), settings, progress=told.append)
    assert [(text.prompt, text.sample) for text in found] == [
        (p, s) for p in range(3) for s in range(3)
    ]
    assert told == [3, 6, 9]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 0}, "samples: expected a whole number, at least 1, got 0"),
        ({"max_new_tokens": True}, "max_new_tokens: expected a whole number"),
        ({"temperature": -1.0}, "temperature: expected 0 (greedy) or 0.01 and more"),
        ({"temperature": float("nan")}, "temperature: expected 0 (greedy) or 0.01 and more"),
        ({"temperature": float("inf")}, "temperature: expected 0 (greedy) or 0.01 and more"),
        ({"temperature": 1e-40}, "temperature: expected 0 (greedy) or 0.01 and more"),
        ({"seed": 1 << 64}, "seed: expected less than 2⁶³"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1"),
        ({"top_k": -1}, "top_k: expected a whole number, at least 0"),
        ({"temperature": 0}, "samples: expected 1 with temperature 0"),
        ({"batch_size": 0}, "batch_size: expected a whole number, at least 1"),
    ],
)
def test_settings_that_cannot_be(change, words):
    with pytest.raises(InputError) as error:
        GenerationSettings(**change)
    assert words in str(error.value)


def test_models_that_cannot_generate(model, tokenizer):
    settings = GenerationSettings(max_new_tokens=4)
    with pytest.raises(
        InputError, match="model: expected a transformers model that generates, got Linear"
    ):
        generate(torch.nn.Linear(2, 2), tokenizer, asked(tokenizer, settings), settings)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="model: cannot be sampled from"):
        generate(model, tokenizer, asked(tokenizer, settings), settings)


def test_numbers_are_arrays_of_whole_numbers(model, tokenizer):
    settings = GenerationSettings(max_new_tokens=4)
    assert all(
        text.ids.dtype == np.int64
        for text in generate(model, tokenizer, asked(tokenizer, settings), settings)
    )


def first_choices(model):
    """Return whether full logits of each prompt alone hold each token most probable."""

    def agrees(prompt, ids):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        return logits.argmax(-1).tolist() == ids.tolist()

    return agrees


def recurrent(name, vocabulary):
    import transformers as t

    torch.manual_seed(0)
    if name == "rwkv":
        sizes = dict(
            hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64
        )
        model = t.RwkvForCausalLM(t.RwkvConfig(vocab_size=vocabulary, **sizes))
    else:
        sizes = dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            lru_width=32,
        )
        model = t.RecurrentGemmaForCausalLM(
            t.RecurrentGemmaConfig(vocab_size=vocabulary, **sizes, attention_window_size=32)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return model.eval()


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma", "llama"])
def test_models_that_padding_or_a_batch_disturbs_write_what_they_would_alone(name, tokenizer):
    """Batches changed texts: RWKV shares its state over a batch, RecurrentGemma reads padding."""
    model = build_model(len(tokenizer)) if name == "llama" else recurrent(name, len(tokenizer))
    settings = GenerationSettings(max_new_tokens=10, temperature=0, samples=1)
    given = asked(tokenizer, settings, [*PROMPTS, Prompt("d", "the dog lay by"), Prompt("e", "b")])
    agrees = first_choices(model)
    found = generate(model, tokenizer, given, settings, first_choices=agrees)
    assert all(agrees(given[text.prompt].ids, text.ids) for text in found)
    assert [text.prompt for text in found] == [0, 1, 2, 3, 4]


def test_a_model_whose_generate_is_another_is_refused(model, tokenizer):
    settings = GenerationSettings(max_new_tokens=4)
    with pytest.raises(InputError, match="its generate and its forward pass disagree"):
        generate(
            model,
            tokenizer,
            asked(tokenizer, settings),
            settings,
            first_choices=lambda prompt, ids: False,
        )


@pytest.mark.parametrize("together", ["equal", "alone"])
def test_every_way_of_batching_gives_every_text_once(model, tokenizer, together, monkeypatch):
    from perplexity.probe import generation

    monkeypatch.setattr(generation, "_together", lambda *_: together)
    settings = GenerationSettings(max_new_tokens=4, samples=3)
    given = asked(tokenizer, settings, [*PROMPTS, Prompt("d", "the cat sat on")])
    found = generate(model, tokenizer, given, settings, first_choices=first_choices(model))
    assert [(text.prompt, text.sample) for text in found] == [
        (p, s) for p in range(4) for s in range(3)
    ]


@pytest.mark.parametrize("ends", [50256, [-1, None, "a"], 1.5])
def test_an_end_of_text_that_the_model_has_not(model, tokenizer, ends):
    """GPT-2's configuration says 50256 whatever the vocabulary."""
    model.generation_config.eos_token_id, model.config.eos_token_id = ends, None
    settings = GenerationSettings(max_new_tokens=4)
    assert len(generate(model, tokenizer, asked(tokenizer, settings), settings)) == 12
    from perplexity.probe.generation import ends_of_text

    assert ends_of_text(model, tokenizer) == [tokenizer.eos_token_id]
