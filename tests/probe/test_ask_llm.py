"""Ask-LLM: P(yes) against the softmax of full logits, templates, texts too long, resumption."""

import math

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity.errors import InputError
from perplexity.evaluation import Document
from perplexity.probe import Questioner
from perplexity.probe.ask import PLACE, TEMPLATE, Tally

SHORT = "{text} good?"
CHAT = "{% for m in messages %}<s>user: {{ m['content'] }}\nassistant:\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(bos=True)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(len(tokenizer) + 3)


def expected(model, tokenizer, prompt, words, bos=True):
    """Softmax of the whole logits at the prompt's end, at the first tokens of the two answers."""
    ids = tokenizer(prompt)["input_ids"]
    ids = [tokenizer.bos_token_id, *ids] if bos else ids
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    tokens = [tokenizer(word)["input_ids"][0] for word in words]
    return p[tokens[0]].item(), p[tokens[1]].item(), tokenizer.decode([int(p.argmax())])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_it_is_the_softmax_of_full_logits(model, tokenizer, backend):
    texts = [text[:30] for text in TEXTS] + ["", "x", "a{text}b {weird} {0}"]
    judge = Questioner(model, tokenizer, template=SHORT, backend=backend)
    for text, got in zip(texts, judge.ask(texts), strict=True):
        p_yes, p_no, first = expected(model, tokenizer, SHORT.replace(PLACE, text), (" yes", " no"))
        assert got.p_yes == pytest.approx(p_yes, rel=1e-4) and got.p_no == pytest.approx(
            p_no, rel=1e-4
        )
        assert got.first == first and not got.shortened
        assert got.yes_of_two == pytest.approx(p_yes / (p_yes + p_no), rel=1e-4)


def test_a_head_with_softcap_and_scale(tokenizer):
    """Gemma's softcap and Cohere's scale reach the answers, too."""
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    for made in (
        Gemma2ForCausalLM(
            Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=3.0, initializer_range=0.5)
        ),
        CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.3, initializer_range=0.5)),
    ):
        made.eval()
        (got,) = Questioner(made, tokenizer, template=SHORT).ask(["the mat"])
        p_yes, p_no, _ = expected(made, tokenizer, SHORT.replace(PLACE, "the mat"), (" yes", " no"))
        assert (got.p_yes, got.p_no) == (
            pytest.approx(p_yes, rel=1e-3),
            pytest.approx(p_no, rel=1e-3),
        )


def test_a_chat_template_is_used_where_there_is_one(model):
    tokenizer = build_tokenizer(bos=True)
    tokenizer.chat_template = CHAT
    judge = Questioner(model, tokenizer, template=SHORT)
    assert judge.prompt("a cat") == "<s>user: a cat good?\nassistant:\n"
    (got,) = judge.ask(["a cat"])
    p_yes, p_no, _ = expected(model, tokenizer, judge.prompt("a cat"), ("yes", "no"), bos=False)
    assert (got.p_yes, got.p_no) == (pytest.approx(p_yes, rel=1e-4), pytest.approx(p_no, rel=1e-4))
    (plain,) = Questioner(model, tokenizer, template=SHORT, chat=False).ask(["a cat"])
    assert plain.p_yes != got.p_yes


def test_a_text_too_long_loses_its_end_and_the_question_stays(model, tokenizer):
    judge = Questioner(model, tokenizer, template="{text} Q: good? A:")
    ids, shortened = judge.ids("the cat " * 300)
    assert shortened and 40 < len(ids) <= 64
    assert tokenizer.decode(ids).endswith(" Q: good? A:")
    (got,) = judge.ask(["the cat " * 300])
    assert got.shortened and 0 < got.p_yes < 1
    with pytest.raises(InputError, match="template: expected one that leaves room for a text"):
        Questioner(model, tokenizer, template="Q " * 100 + "{text}").ids("x")


def test_the_prompt_can_be_shown_beside_the_text(model, tokenizer):
    judge = Questioner(model, tokenizer, template="{prompt} > {text} ?")
    assert judge.prompt("a {prompt}", "b {text}") == "b {text} > a {prompt} ?"
    texts, prompts = ["the cat", "x"], ["who", "the dog lay"]
    for text, before, got in zip(texts, prompts, judge.ask(texts, prompts=prompts), strict=True):
        p_yes, p_no, _ = expected(model, tokenizer, f"{before} > {text} ?", (" yes", " no"))
        assert (got.p_yes, got.p_no) == (
            pytest.approx(p_yes, rel=1e-4),
            pytest.approx(p_no, rel=1e-4),
        )
    ids, shortened = judge.ids("the cat", "the dog " * 200)
    assert (
        shortened and tokenizer.decode(ids).endswith("dog  > the cat ?") and len(ids) <= 64
    )  # its beginning goes first
    with pytest.raises(ValueError):
        list(judge.ask(texts, prompts=["one"]))


def test_the_answers_as_they_are_scored(model, tokenizer):
    judge = Questioner(model, tokenizer, template=SHORT)
    assert judge.words == tuple(
        tokenizer.decode(tokenizer(word)["input_ids"][:1]) for word in (" yes", " no")
    )


def test_it_does_not_depend_on_the_batch(model, tokenizer):
    texts = [text[: 3 + 5 * k] for k, text in enumerate(TEXTS * 3)]
    judge = Questioner(model, tokenizer, template=SHORT)
    together, alone = list(judge.ask(texts)), list(judge.ask(texts, batch_size=1))
    assert [a.id for a in together] == [str(k) for k in range(len(texts))]
    for one, other in zip(together, alone, strict=True):
        assert one.p_yes == pytest.approx(other.p_yes, rel=1e-4)


def test_a_killed_run_goes_on(model, tokenizer, tmp_path, monkeypatch):
    texts = [Document(f"d{k}", text[: 5 + k]) for k, text in enumerate(TEXTS * 4)]
    judge = Questioner(model, tokenizer, template=SHORT)
    whole = list(judge.ask(texts, batch_size=1))
    calls = []
    plain = Questioner._score

    def counted(self, backend, ids, target):
        calls.append(len(ids))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(self, backend, ids, target)

    monkeypatch.setattr(Questioner, "_score", counted)
    with pytest.raises(KeyboardInterrupt):
        list(judge.ask(texts, batch_size=1, journal=tmp_path))
    calls.clear()
    calls.extend([0] * 10)  # no second kill
    assert list(judge.ask(texts, batch_size=1, journal=tmp_path)) == whole
    assert len(calls) - 10 == len(texts) - 4  # four were kept
    with pytest.raises(InputError, match="journal: .* is of another run, with template"):
        list(
            Questioner(model, tokenizer, template="{text} bad?").ask(
                texts, batch_size=1, journal=tmp_path
            )
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"template": "no place"}, "template: expected {text} in it once, got it 0 times"),
        ({"template": "{text}{text}"}, "template: expected {text} in it once, got it 2 times"),
        (
            {"template": "{text}{prompt}{prompt}"},
            "template: expected {prompt} in it once at most, got it 2 times",
        ),
        (
            {"yes": "maybe", "no": "maybe"},
            "yes, no: expected answers that differ in their first token",
        ),
        ({"yes": ""}, "yes: expected an answer of a token or more"),
        ({"yes": "\udcff"}, "yes: expected Unicode text, got a lone surrogate"),
        ({"chat": True}, "chat: expected a tokenizer with a chat template, got one without"),
    ],
)
def test_what_cannot_be_asked(model, tokenizer, change, words):
    with pytest.raises(InputError) as error:
        Questioner(model, tokenizer, **{"template": SHORT} | change)
    assert words in str(error.value)


def test_no_texts_and_wrong_texts(model, tokenizer):
    judge = Questioner(model, tokenizer, template=SHORT)
    assert list(judge.ask([])) == []
    for texts, words in (
        ("one text", "texts: expected a sequence"),
        (["a", 3], "got int at 1"),
        (["\ud800"], "document 0: expected Unicode text"),
        (
            [Document("d", "", ids=np.array([5, 6, -2]))],
            "document d: token id -2 at position 2, expected below",
        ),
        (
            [Document("d", "", ids=np.array([60_000]))],
            "document d: token id 60000 at position 0, expected below",
        ),
    ):
        with pytest.raises(InputError, match=words):
            list(judge.ask(texts))
    (tokens,) = judge.ask(
        [Document("d", "", ids=np.array([0, *tokenizer("the cat")["input_ids"]]))]
    )
    (text,) = judge.ask(["the cat"])
    assert tokens.p_yes == text.p_yes
    with pytest.raises(InputError, match="batch_size: expected at least 1, got 0"):
        list(judge.ask(["a"], batch_size=0))


def test_the_tally(model, tokenizer):
    answers = list(Questioner(model, tokenizer, template=SHORT).ask(TEXTS))
    tally = Tally(Questioner(model, tokenizer, template=SHORT))
    assert tally.summary() is None
    for answer in answers:
        tally.add(answer)
    got = tally.summary()
    assert got["p_yes"] == pytest.approx(np.mean([a.p_yes for a in answers]))
    assert got["answered"] == pytest.approx(np.mean([a.p_yes + a.p_no for a in answers]))
    assert got["yes_of_two"] == pytest.approx(np.mean([a.yes_of_two for a in answers]))
    assert got["percentiles"]["50"] == pytest.approx(np.median([a.p_yes for a in answers]))
    assert sum(got["first_choices"].values()) == len(answers) and math.isfinite(got["p_no"])


def test_the_default_template_has_its_place():
    assert TEMPLATE.count(PLACE) == 1


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no users') }}", "{{ 1 / 0 }}", "{% if %}", ""]
)
def test_a_chat_template_that_fails_or_says_nothing(model, template):
    tokenizer = build_tokenizer(bos=True)
    tokenizer.chat_template = template or "{{ '' }}"
    words = (
        "chat: expected a chat template that takes a user's message"
        if template
        else "template: expected a prompt of at"
    )
    with pytest.raises(InputError, match=words):
        list(Questioner(model, tokenizer, template=SHORT).ask(["a"]))


def test_an_empty_prompt_has_no_answer(model):
    tokenizer = build_tokenizer(bos=False)
    with pytest.raises(
        InputError, match="template: expected a prompt of at least one token, got none"
    ):
        list(Questioner(model, tokenizer, template="{text}").ask([""]))


def test_a_model_that_gives_no_number(model, tokenizer):
    import copy

    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(InputError, match="model: expected probabilities, got NaN for text 0"):
        list(Questioner(broken, tokenizer, template=SHORT).ask(["a"]))


def test_a_prompt_outside_the_model_is_refused(tokenizer):
    """PEFT's prompt and prefix tuning put tokens before the text, which the base model lacks."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    for config in (
        PromptTuningConfig(num_virtual_tokens=4),
        PrefixTuningConfig(num_virtual_tokens=4),
    ):
        config.task_type = "CAUSAL_LM"
        with pytest.raises(
            InputError, match="model: expected adapters inside the model, as LoRA's, got P"
        ):
            Questioner(get_peft_model(build_model(len(tokenizer)), config), tokenizer)
    inside = get_peft_model(build_model(len(tokenizer)), LoraConfig(target_modules=["q_proj"]))
    assert len(list(Questioner(inside, tokenizer, template=SHORT).ask(["a"]))) == 1
