"""The probe's numbers against what full logits and a slow count say; findings and health by rule."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity.data_checks.words import words
from perplexity.errors import InputError
from perplexity.probe import GenerationSettings, Part, Prompt, Questioner, health, probe
from perplexity.probe.findings import SIGNALS, find
from perplexity.probe.scores import WEIGHTS

SETTINGS = GenerationSettings(max_new_tokens=24, samples=3)
PROMPTS = [
    Prompt("a", "the cat sat", (" on the mat and the dog lay by the door",)),
    Prompt("b", "a loss of three", (" nats is a choice among twenty", "other")),
    Prompt("c", TEXTS[2] * 2, document=True),
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(bos=True)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(len(tokenizer))


@pytest.fixture(scope="module")
def found(model, tokenizer):
    return probe(model, tokenizer, PROMPTS, settings=SETTINGS, name="tiny", step=5)


def losses(model, tokenizer, prompt, continuation):
    """Sum of NLL and of entropy, and the count, of ``continuation`` after ``prompt``, from full logits in float64."""
    ids = torch.tensor([[*prompt, *continuation]])
    with torch.no_grad():
        log_p = model(ids).logits[0].double().log_softmax(-1)
    rows = log_p[len(prompt) - 1 : -1]
    nll = -rows.gather(1, ids[0, len(prompt) :, None]).sum()
    return nll.item(), -(rows.exp() * rows).sum().item(), len(continuation)


def test_every_text_against_full_logits(found, model, tokenizer):
    from perplexity.probe.prompts import tokenize

    asked, _ = tokenize(tokenizer, PROMPTS, SETTINGS, 64)
    of = {prompt.prompt.id: prompt for prompt in asked}
    assert [(t.id, t.sample) for t in found.texts] == [(p, s) for p in "abc" for s in range(3)]
    from perplexity.probe.generation import generate

    total = np.zeros(3)
    for text, made in zip(found.texts, generate(model, tokenizer, asked, SETTINGS), strict=True):
        assert text.text == made.text
        expected = losses(model, tokenizer, of[text.id].ids, made.ids)
        assert (text.nll, text.entropy, text.tokens) == (
            pytest.approx(expected[0], rel=1e-4),
            pytest.approx(expected[1], rel=1e-4),
            expected[2],
        )
        total += expected
    p = found.perplexity
    assert p["self_loss"] == pytest.approx(total[0] / total[2], rel=1e-4)
    assert found.generation["entropy"] == pytest.approx(total[1] / total[2], rel=1e-4)
    total = sum(np.array(losses(model, tokenizer, a.ids, a.reference)) for a in asked)
    assert p["reference_loss"] == pytest.approx(total[0] / total[2], rel=1e-4) and p["reference_tokens"] == total[2]
    assert p["reference_perplexity"] == pytest.approx(math.exp(p["reference_loss"]))
    every = np.concatenate([a.reference for a in asked])
    shares = np.unique(every, return_counts=True)[1] / len(every)
    assert p["unigram_loss"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert found.calibration["tokens"] == len(every)


def test_what_the_prompt_says_is_not_copied_from_the_reference():
    from perplexity.probe.generation import Generated
    from perplexity.probe.measures import measure
    from perplexity.probe.prompts import Asked

    said = "one two three four five six seven eight nine ten"
    for prompt, expected in (
        ("something else", 1.0),
        (f"Quote: {said}", None),
        ("zero one two three four five six seven eight", 2 / 3),
    ):
        asked = Asked(Prompt("p", prompt, (said,)), prompt, np.arange(3), np.arange(4), (said,), False, False)
        text = Generated(0, 0, np.arange(10), said, False)
        (got,) = measure([asked], [text], [np.ones((5, 10), np.float32)])
        assert got.copied == (None if expected is None else pytest.approx(expected))


def test_what_samples_share_by_a_slow_count(found):
    grams = lambda text, n: [tuple(w[k : k + n]) for w in [words(text)] for k in range(len(w) - n + 1)]  # noqa: E731
    for text in found.texts:
        own = grams(text.text, 4)
        other = {g for t in found.texts if t.id == text.id and t.sample != text.sample for g in grams(t.text, 4)}
        elsewhere = {g for t in found.texts if t.id != text.id for g in grams(t.text, 4)}
        for value, known in ((text.same_prompt, other), (text.other_prompts, elsewhere)):
            expected = sum(g in known for g in own) / len(own) if own else None
            assert value == (None if expected is None else pytest.approx(expected))


def test_references_are_scored_for_prompts_that_ask_for_them(found):
    """Of documents there is none: what happens to follow is one of many continuations."""
    assert found.references["texts"] == 6
    only = [p for p in PROMPTS if p.document]
    assert found.health["parts"]["references"]["score"] == pytest.approx(found.references["chrf"] / 100)
    assert only and found.coherence is None and found.ask is None


def test_json(found, tmp_path):
    found.save(tmp_path / "p.json")
    record = json.loads((tmp_path / "p.json").read_text())
    assert list(record) == [field.name for field in dataclasses.fields(found)]
    assert (record["model"], record["step"], len(record["texts"])) == ("tiny", 5, 9)


def test_few_texts_are_not_judged(model, tokenizer):
    got = probe(model, tokenizer, ["the cat"], settings=GenerationSettings(max_new_tokens=8))
    assert got.verdict == "insufficient-data" and got.health_score is None and got.health["coverage"] == 0
    assert all(part["score"] is None and part["evidence"] for part in got.health["parts"].values())
    assert any("4 of 4" not in note and "judge repetition" in note for note in got.notes)
    assert any("low-perplexity trap" in note for note in got.notes)


def test_an_evaluation_stands_in_for_references(model, tokenizer):
    from perplexity import evaluate

    evaluation = json.loads(evaluate(model, tokenizer, TEXTS * 4).to_json())
    got = probe(model, tokenizer, ["the cat", "a"], settings=SETTINGS, evaluation=evaluation)
    assert got.perplexity["known_loss"] == evaluation["loss"] and got.perplexity["reference_loss"] is None
    assert got.health["parts"]["perplexity"]["score"] is not None
    with pytest.raises(InputError, match="evaluation: expected one of this model, got one with another tokenizer"):
        probe(model, tokenizer, ["a"], evaluation=evaluation | {"tokenizer_fingerprint": "x"})


def test_a_judge_is_asked_about_each_text(model, tokenizer):
    judge = Questioner(model, tokenizer, template="{text} ok?")
    got = probe(model, tokenizer, ["the cat", "a dog"], settings=SETTINGS, judge=judge)
    assert got.ask["texts"] == sum(bool(text.text.strip()) for text in got.texts)
    answers = list(judge.ask(text.text for text in got.texts if text.text.strip()))
    assert got.ask["p_yes"] == pytest.approx(np.mean([a.p_yes for a in answers]))
    assert got.health["parts"]["ask"]["score"] is None  # a tiny random model does not answer
    assert [f.severity for f in got.findings if f.signal == "unanswered"] == ["info"]


class Arithmetic:
    weight = 40

    def score(self, checkpoint):
        assert checkpoint.texts and checkpoint.name == "tiny"
        return 0.25


class Silent:
    name = "silent benchmark"

    def score(self, checkpoint):
        return None


def test_a_scorer_of_ones_own(model, tokenizer):
    got = probe(model, tokenizer, PROMPTS, settings=SETTINGS, scorers=[Arithmetic(), Silent()], name="tiny")
    parts = got.health["parts"]
    assert parts["Arithmetic"] == {"weight": 40, "score": 0.25, "evidence": "a scorer of your own"}
    assert parts["silent benchmark"] == {"weight": 10, "score": None, "evidence": "it has no score"}
    known = {name: part for name, part in parts.items() if part["score"] is not None}
    whole = sum(part["weight"] * part["score"] for part in known.values()) / sum(p["weight"] for p in known.values())
    assert got.health_score == pytest.approx(min(100 * whole, got.health["ceiling"]))
    again = probe(
        model, tokenizer, PROMPTS, settings=SETTINGS, scorers=[Arithmetic()], weights={"Arithmetic": 0}, name="tiny"
    )
    assert again.health["parts"]["Arithmetic"]["weight"] == 0 and again.health_score != got.health_score


class Scores:
    def __init__(self, value):
        self.value = value

    def score(self, checkpoint):
        return self.value() if callable(self.value) else self.value


def leave():
    raise SystemExit(0)


@pytest.mark.parametrize("value", [2, -0.1, float("nan"), "good", True, leave, lambda: 1 / 0])
def test_a_scorer_that_fails_does_not_take_the_probe_with_it(model, tokenizer, value):
    got = probe(model, tokenizer, ["a"], settings=GenerationSettings(max_new_tokens=2), scorers=[Scores(value)])
    part = got.health["parts"]["Scores"]
    assert part["score"] is None and part["evidence"].startswith("it failed: ")


def test_numpys_numbers_are_scores(model, tokenizer):
    got = probe(
        model, tokenizer, ["a"], settings=GenerationSettings(max_new_tokens=2), scorers=[Scores(np.float32(0.5))]
    )
    assert got.health["parts"]["Scores"]["score"] == 0.5


def named(name, weight=1):
    return type("Named", (), {"name": name, "weight": weight, "score": lambda self, checkpoint: 1.0})()


@pytest.mark.parametrize(
    ("scorers", "words_"),
    [
        ([3], "scorers: expected objects with a method score, got int"),
        ([type("A", (), {"score": 0.5})()], "scorers: expected objects with a method score, got A"),
        ([named("generation")], "scorers: expected a name of its own, got 'generation' twice"),
        ([named("x"), named("x")], "scorers: expected a name of its own, got 'x' twice"),
        ([named("x", None)], "scorer x: expected a weight of 0 or more, got None"),
        ([named("x", "abc")], "scorer x: expected a weight of 0 or more, got 'abc'"),
        ([named("x", -1)], "scorer x: expected a weight of 0 or more, got -1"),
    ],
)
def test_scorers_that_are_none(model, tokenizer, scorers, words_):
    with pytest.raises(InputError) as error:
        probe(model, tokenizer, ["a"], settings=GenerationSettings(max_new_tokens=2), scorers=scorers)
    assert words_ in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"baselines": [1]},
        {"baselines": {"unigram": None}},
        {"baselines": {"unigram": {"loss": "nan"}}},
        {"tokens": "abc"},
        {"tokens": None},
        {"loss": float("nan")},
    ],
)
def test_an_evaluation_that_is_none(model, tokenizer, change):
    given = {"loss": 3.0, "tokens": 500, "baselines": {"unigram": {"loss": 5.0}}} | change
    with pytest.raises(InputError, match="evaluation: expected a number for"):
        probe(model, tokenizer, ["a"], settings=GenerationSettings(max_new_tokens=2), evaluation=given)


def test_a_model_with_a_broken_row_is_not_healthier_for_it(tokenizer):
    """Only references hold the token: their loss was NaN, the part missing, and the mean of the others higher."""
    model = build_model(len(tokenizer))
    token = tokenizer("lay")["input_ids"][-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    prompts = [Prompt(str(k), "the cat sat", (" on the mat and the dog lay by the door",)) for k in range(4)]
    got = probe(model, tokenizer, prompts, settings=SETTINGS)
    assert got.findings[0].signal == "non-finite" and got.findings[0].severity == "danger"
    assert got.verdict == "unhealthy" and got.health["parts"]["perplexity"]["score"] == 0
    assert got.perplexity["non_finite"] > 0 and math.isfinite(got.perplexity["reference_loss"])
    assert "self-perplexity" not in [finding.signal for finding in got.findings if "nan" in finding.evidence]
    assert "nan" not in got.to_json().lower().replace("non_finite", "").replace("nan or infinite", "")


@pytest.mark.parametrize(
    ("prompts", "words_"),
    [
        ("one", "prompts: expected a sequence of them, got one str"),
        ([3], "prompts: expected strings or Prompts, got int at 0"),
        ([], "prompts: expected at least one, got none"),
        (["\ud800"], "prompt 0: expected Unicode text, got a lone surrogate at character 0"),
        ([Prompt("d", 5)], "prompt d: expected text, got int"),
        ([Prompt("d", "a", ("\udfff",))], "prompt d: expected Unicode text"),
        ([Prompt("d", "a", (5,))], "prompt d: expected text, got int"),
        ([Prompt("d", "a", "a reference")], "prompt d: expected references as a tuple, got str"),
        ([Prompt("d", "short", document=True)], "prompts: expected at least one, got 1 documents too short to cut"),
    ],
)
def test_prompts_that_are_none(model, tokenizer, prompts, words_):
    with pytest.raises(InputError) as error:
        probe(model, tokenizer, prompts, settings=SETTINGS)
    assert words_ in str(error.value)


# What each finding needs; a sound model's measures, and one change.
GENERATION = dict(
    texts=40,
    judged=40,
    repetition=0.02,
    looping=0.0,
    longest_loop=None,
    same_prompt=0.01,
    other_prompts=0.02,
    copied=0.0,
)
GENERATION |= dict(empty=0.0, ended=0.5, mean_tokens=100.0, entropy_per_byte=0.6, early_entropy=2.5, late_entropy=2.4)
GENERATION |= dict(can_end=True)
LOSSES = dict(
    self_loss=2.4, reference_loss=2.5, reference_tokens=4000, known_loss=2.5, known_unigram=6.0, known_tokens=4000
)
LOSSES |= dict(known_of="the references", uniform_loss=10.0, non_finite=0)
CALIBRATION = dict(tokens=4000, ece=0.02, confidence=0.5, accuracy=0.5)


def signals(generation=None, losses=None, calibration=None, ask=None, settings=None, ended=0.5, repeats=0.02):
    measured = {
        "generation": GENERATION | (generation or {}),
        "perplexity": LOSSES | (losses or {}),
        "calibration": CALIBRATION | (calibration or {}),
        "ask": ask,
        "reference_texts": {"mean_tokens": 90.0, "ended": ended, "repetition": repeats},
    }
    return {finding.signal: finding for finding in find(measured, (settings or GenerationSettings()).of(None))}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        (dict(generation=dict(repetition=0.3)), ["low-perplexity-trap", "repetition"]),
        # Code repeats itself: its references say so; half of a text is too much anywhere.
        (dict(generation=dict(repetition=0.3), repeats=0.25), []),
        (dict(generation=dict(repetition=0.6), repeats=0.6), ["low-perplexity-trap", "repetition"]),
        (dict(generation=dict(looping=0.3)), ["low-perplexity-trap", "repetition"]),
        (dict(generation=dict(same_prompt=0.4)), []),
        (dict(generation=dict(same_prompt=0.6)), ["low-perplexity-trap", "same-texts"]),
        (dict(generation=dict(other_prompts=0.3)), ["low-perplexity-trap", "same-texts"]),
        (dict(generation=dict(copied=0.2)), ["low-perplexity-trap", "copied-reference"]),
        (dict(generation=dict(entropy_per_byte=0.01)), ["low-perplexity-trap", "entropy-collapse"]),
        (dict(generation=dict(late_entropy=1.0)), ["entropy-collapse"]),
        # Repetition with a perplexity that is bad, or not known, is no trap.
        (dict(generation=dict(repetition=0.3), losses=dict(known_loss=6.5)), ["repetition"]),
        (dict(generation=dict(repetition=0.3), losses=dict(known_loss=None)), ["repetition"]),
        (dict(generation=dict(repetition=0.3), losses=dict(known_tokens=100)), ["repetition"]),
        (dict(losses=dict(non_finite=3)), ["non-finite"]),
        (dict(losses=dict(self_loss=1.0)), ["self-perplexity"]),
        (dict(losses=dict(self_loss=5.5)), ["self-perplexity"]),
        (dict(losses=dict(self_loss=1.0), settings=GenerationSettings(temperature=0.5)), []),
        (dict(losses=dict(self_loss=1.0, reference_tokens=100)), []),
        (dict(generation=dict(empty=0.2)), ["early-stopping"]),
        (dict(generation=dict(ended=0.9, mean_tokens=5.0)), ["early-stopping"]),
        (dict(generation=dict(ended=0.0), ended=1.0), ["no-end"]),
        (dict(generation=dict(ended=0.0, can_end=False), ended=1.0), []),
        (dict(calibration=dict(ece=0.2, confidence=0.7)), ["overconfidence"]),
        (dict(calibration=dict(ece=0.2, confidence=0.3)), ["underconfidence"]),
        (dict(calibration=dict(ece=0.2, confidence=0.7, tokens=500)), []),
        (dict(ask=dict(answered=0.2, first_choices={"x": 3})), ["unanswered"]),
        (dict(ask=dict(answered=0.9, first_choices={"x": 3})), []),
        (dict(generation=dict(repetition=0.9, judged=3, texts=3)), []),
    ],
)
def test_findings(change, expected):
    found = signals(**change)
    assert list(found) == expected and set(found) <= set(SIGNALS)
    if "low-perplexity-trap" in found:
        assert found["low-perplexity-trap"].severity == "danger"
        assert found["low-perplexity-trap"].numbers["because"] == expected[1:]


def test_greedy_repetition_is_told_as_such():
    found = signals(dict(repetition=0.5), settings=GenerationSettings(temperature=0, samples=1))
    assert "temperature 1" in found["repetition"].advice and found["low-perplexity-trap"].severity == "warning"
    # What greedy decoding cannot cause convicts the model however it was asked.
    found = signals(dict(repetition=0.5, copied=0.5), settings=GenerationSettings(temperature=0, samples=1))
    assert found["low-perplexity-trap"].severity == "danger"


def test_health_is_a_weighted_mean_of_what_there_is():
    assert health({"a": Part(None, "why"), "b": Part(None, "why")}, {}).score is None
    got = health({"a": Part(0.5, ""), "b": Part(1.0, ""), "c": Part(None, "why")}, {"a": 3, "b": 1, "c": 4})
    assert got.score == pytest.approx(62.5) and got.coverage == 0.5 and got.parts["c"]["evidence"] == "why"
    assert health({"a": Part(1.0, "")}, {"a": 0}).score is None  # no weight is left
    assert sum(WEIGHTS.values()) == 100


@pytest.mark.parametrize(
    ("severities", "most"), [([], 100), (["info"], 100), (["warning"], 70), (["info", "danger"], 30)]
)
def test_health_is_capped_by_the_worst_finding(severities, most):
    assert health({"a": Part(1.0, "")}, {}, severities).score == most
    assert health({"a": Part(0.1, "")}, {}, severities).score == pytest.approx(10)


@pytest.mark.parametrize("weights", [{"x": 1}, {"a": -1}, {"a": float("nan")}, {"a": float("inf")}, {"a": "1"}])
def test_weights_that_cannot_be(weights):
    with pytest.raises(InputError, match="weights: expected"):
        health({"a": Part(1.0, "")}, weights)
