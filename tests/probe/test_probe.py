"""Numbers of the probe against full logits and slow counts; findings and health by rule."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity.errors import InputError
from perplexity.probe import GenerationSettings, Part, Prompt, Questioner, health, probe
from perplexity.probe.findings import SIGNALS, Asking, find
from perplexity.probe.measures import Source, measure
from perplexity.probe.repetition import ngrams
from perplexity.probe.scores import in_words
from perplexity.text.words import words

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
    """Return Σ NLL, Σ entropy and the count of ``continuation``, from full logits in float64."""
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
    assert (
        p["reference_loss"] == pytest.approx(total[0] / total[2], rel=1e-4)
        and p["reference_tokens"] == total[2]
    )
    assert p["reference_perplexity"] == pytest.approx(math.exp(p["reference_loss"]))
    every = np.concatenate([a.reference for a in asked])
    shares = np.unique(every, return_counts=True)[1] / len(every)
    assert p["unigram_loss"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert found.calibration["tokens"] == len(every)


def source(text, prompt="", references=(), id="a", sample=0):
    return Source(
        id, sample, prompt, text, np.arange(40), False, np.ones((5, 40), np.float32), references
    )


HALVES = (
    "one two three four five six seven eight",
    "nine ten eleven twelve thirteen fourteen fifteen sixteen",
)
SAID = " ".join(HALVES)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("something else", 1.0),
        (f"Quote: {SAID}", None),
        # A summary of the prompt's own sentences has n-grams of its own only at the seams.
        (" ".join(HALVES[::-1]), None),
    ],
)
def test_what_the_prompt_says_is_nobodys_copy(prompt, expected):
    (got,) = measure([source(SAID, prompt, (SAID,))])
    assert got.copied == expected
    first, second, other = measure(
        [source(SAID, prompt), source(SAID, prompt, sample=1), source(SAID, "else", id="b")]
    )
    assert first.same_prompt == second.same_prompt == expected
    assert other.same_prompt is None and first.other_prompts == expected


def test_what_samples_share_by_a_slow_count(found):
    """The prompts are short: nothing of a text's is in them but what these few bigrams say."""
    said = {"a": "the cat sat", "b": "a loss of three"}

    def novel(text, n):
        known = {tuple(words(said[text.id])[k : k + 2]) for k in range(3)}
        w = words(text.text)
        grams = [w[k : k + n] for k in range(len(w) - n + 1)]
        return [
            tuple(g)
            for g in grams
            if sum(tuple(g[k : k + 2]) in known for k in range(n - 1)) < n - 2
        ]

    texts = [text for text in found.texts if text.id in said]
    for text in texts:
        own = novel(text, 4)
        other = {
            g for t in texts if t.id == text.id and t.sample != text.sample for g in novel(t, 4)
        }
        expected = sum(g in other for g in own) / len(own) if len(own) >= 8 else None
        assert text.same_prompt == (None if expected is None else pytest.approx(expected))
    for sample in range(3):
        (a, b) = (text for text in texts if text.sample == sample)
        shared = set(novel(a, 4)) & set(novel(b, 4))
        if not any(
            t.text
            for t in found.texts
            if t.id == "c" and set(novel(a, 4)) & set(ngrams(words(t.text), 4))
        ):
            expected = (
                sum(g in shared for g in novel(a, 4)) / len(novel(a, 4))
                if len(novel(a, 4)) >= 8
                else None
            )
            assert a.other_prompts == (None if expected is None else pytest.approx(expected))


def test_references_are_scored_for_prompts_that_ask_for_them(found):
    """Of documents there is none: what happens to follow is one of many continuations."""
    assert found.references["texts"] == 6
    assert found.health["parts"]["references"] == {
        "weight": 10,
        "score": None,
        "evidence": "6 texts have references, 8 are needed",
    }
    assert found.coherence is None and found.ask is None


def test_json(found, tmp_path):
    found.save(tmp_path / "p.json")
    record = json.loads((tmp_path / "p.json").read_text())
    assert list(record) == ["schema_version", *(field.name for field in dataclasses.fields(found))]
    assert (record["model"]["name"], record["step"], len(record["texts"])) == ("tiny", 5, 9)


def test_few_texts_are_not_judged(model, tokenizer):
    got = probe(model, tokenizer, ["the cat"], settings=GenerationSettings(max_new_tokens=8))
    assert (
        got.verdict == "insufficient-data"
        and got.health_score is None
        and got.health["coverage"] == 0
    )
    assert all(part["score"] is None and part["evidence"] for part in got.health["parts"].values())
    assert "0 of 4 texts are long enough to judge repetition by; 8 are the least" in got.notes
    assert any("low-perplexity trap" in note for note in got.notes)


def test_an_evaluation_stands_in_for_references(model, tokenizer):
    from perplexity import evaluate

    evaluation = json.loads(evaluate(model, tokenizer, TEXTS * 4).to_json())
    got = probe(model, tokenizer, ["the cat", "a"], settings=SETTINGS, evaluation=evaluation)
    assert got.perplexity["judged_by"] == {
        "loss": evaluation["loss"],
        "unigram_loss": evaluation["baselines"]["unigram"]["loss"],
        "guess_loss": evaluation["baselines"]["unigram"]["loss"],
        "tokens": evaluation["tokens"],
        "of": "the evaluation's text",
    }
    assert got.perplexity["reference_loss"] is None
    assert got.health["parts"]["perplexity"]["score"] is not None
    with pytest.raises(
        InputError, match="evaluation: expected one of this model, got one with another tokenizer"
    ):
        probe(model, tokenizer, ["a"], evaluation=evaluation | {"tokenizer_fingerprint": "x"})
    other = evaluation | {"model": {"name": "runs/other", "fingerprint": "f", "dtype": "float32"}}
    words = r"evaluation: expected one of the probed model, mine \(fingerprint \w+, float32\), "
    words += r"got one of runs/other \(fing"
    with pytest.raises(InputError, match=words):
        probe(model, tokenizer, ["a"], evaluation=other, name="mine")
    with pytest.raises(InputError, match="evaluation: expected schema_version 2 at most, got 9"):
        probe(model, tokenizer, ["a"], evaluation=evaluation | {"schema_version": 9})


def test_a_judge_is_asked_about_each_text(model, tokenizer):
    judge = Questioner(model, tokenizer, template="{text} ok?")
    got = probe(model, tokenizer, ["the cat", "a dog"], settings=SETTINGS, judge=judge)
    assert got.ask["texts"] == sum(bool(text.text.strip()) for text in got.texts)
    asked = [text for text in got.texts if text.text.strip()]
    answers = list(judge.ask(text.text for text in asked))
    assert [text.p_yes for text in asked] == pytest.approx([answer.p_yes for answer in answers])
    assert got.ask["answers"] == list(judge.words)
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
    got = probe(
        model, tokenizer, PROMPTS, settings=SETTINGS, scorers=[Arithmetic(), Silent()], name="tiny"
    )
    parts = got.health["parts"]
    assert parts["Arithmetic"] == {"weight": 40, "score": 0.25, "evidence": "a scorer of your own"}
    assert parts["silent benchmark"] == {"weight": 10, "score": None, "evidence": "it has no score"}
    known = {name: part for name, part in parts.items() if part["score"] is not None}
    assert list(known) == ["generation", "Arithmetic"]
    # Texts that repeat nothing raise no score: the part is a factor.
    whole = known["generation"]["score"] * 0.25
    assert got.health_score == pytest.approx(min(100 * whole, got.health["ceiling"]))
    assert got.health["quality"] and parts["generation"]["weight"] == 0
    again = probe(
        model,
        tokenizer,
        PROMPTS,
        settings=SETTINGS,
        scorers=[Arithmetic()],
        weights={"Arithmetic": 0},
        name="tiny",
    )
    assert again.health["parts"]["Arithmetic"]["weight"] == 0
    assert again.health_score is None and not again.health["quality"]


class Scores:
    def __init__(self, value):
        self.value = value

    def score(self, checkpoint):
        return self.value() if callable(self.value) else self.value


def leave():
    raise SystemExit(0)


@pytest.mark.parametrize("value", [2, -0.1, float("nan"), "good", True, leave, lambda: 1 / 0])
def test_a_scorer_that_fails_does_not_take_the_probe_with_it(model, tokenizer, value):
    got = probe(
        model,
        tokenizer,
        ["a"],
        settings=GenerationSettings(max_new_tokens=2),
        scorers=[Scores(value)],
    )
    part = got.health["parts"]["Scores"]
    assert part["score"] is None and part["evidence"].startswith("it failed: ")
    assert [(f.signal, f.severity) for f in got.findings] == [("scorer-failed", "warning")]


def test_numpys_numbers_are_scores(model, tokenizer):
    got = probe(
        model,
        tokenizer,
        ["a"],
        settings=GenerationSettings(max_new_tokens=2),
        scorers=[Scores(np.float32(0.5))],
    )
    assert got.health["parts"]["Scores"]["score"] == 0.5


def named(name, weight=1):
    return type(
        "Named", (), {"name": name, "weight": weight, "score": lambda self, checkpoint: 1.0}
    )()


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
        probe(
            model, tokenizer, ["a"], settings=GenerationSettings(max_new_tokens=2), scorers=scorers
        )
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
        probe(
            model, tokenizer, ["a"], settings=GenerationSettings(max_new_tokens=2), evaluation=given
        )


def test_a_model_with_a_broken_row_is_not_healthier_for_it(tokenizer):
    """Only references hold the broken token: a NaN loss left a part out, which raised the score."""
    model = build_model(len(tokenizer))
    token = tokenizer(" by")["input_ids"][0]  # late in the references
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    prompts = [
        Prompt(str(k), "the cat sat", (" on the mat and the dog lay by the door",))
        for k in range(4)
    ]
    got = probe(model, tokenizer, prompts, settings=SETTINGS)
    assert got.findings[0].signal == "non-finite" and got.findings[0].severity == "danger"
    assert got.verdict == "unhealthy" and got.health["parts"]["perplexity"]["score"] == 0
    # A masked key that is NaN makes every query's softmax NaN: nothing is left of the references.
    assert got.perplexity["non_finite"] == 4 * 16 and got.perplexity["reference_loss"] is None
    assert "self-perplexity" not in [
        finding.signal for finding in got.findings if "nan" in finding.evidence
    ]
    assert '"nan"' not in got.to_json()


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
        (
            [Prompt("d", "short", document=True)],
            "prompts: expected at least one, got 1 document too short to cut",
        ),
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
    same_prompt=0.05,
    other_prompts=0.02,
)
GENERATION |= dict(copied=0.0, empty=0.0, ended=0.5, mean_tokens=100.0, entropy_per_byte=0.6)
GENERATION |= dict(early_entropy=2.5, late_entropy=2.4)
REFERENCES = dict(mean_tokens=90.0, ended=0.5, repetition=0.02, looping=0.0, other_prompts=0.02)
JUDGED_BY = dict(loss=2.5, unigram_loss=6.0, guess_loss=7.0, tokens=4000, of="the references")
LOSSES = dict(
    self_loss=2.4, reference_loss=2.5, reference_tokens=4000, non_finite=0, judged_by=JUDGED_BY
)
CALIBRATION = dict(tokens=4000, ece=0.02, confidence=0.5, accuracy=0.5)
ASKED = dict(answered=0.9, answers=[" yes", " no"], first_choices={"x": 3})
SAMPLED, GREEDY = (
    GenerationSettings().of(None),
    GenerationSettings(temperature=0, samples=1).of(None),
)
DOCUMENTS = dict(documents=True, answers=False, can_end=True, settings=SAMPLED)
QUESTIONS = DOCUMENTS | dict(documents=False, answers=True)  # with references of their own
OPEN = DOCUMENTS | dict(documents=False)  # without
GREEDILY = DOCUMENTS | dict(settings=GREEDY)
CHAT = QUESTIONS | dict(settings=GenerationSettings(chat=True).of(None))


def signals(
    asking=DOCUMENTS,
    *,
    losses=None,
    judged_by=None,
    references=None,
    calibration=None,
    ask=None,
    **generation,
):
    measured = {
        "generation": GENERATION | generation,
        "perplexity": LOSSES
        | (losses or {})
        | {"judged_by": judged_by and JUDGED_BY | judged_by if judged_by != {} else None},
        "calibration": CALIBRATION | (calibration or {}),
        "ask": ask and ASKED | ask,
        "reference_texts": None if references == {} else REFERENCES | (references or {}),
    }
    if judged_by is None:
        measured["perplexity"]["judged_by"] = JUDGED_BY
    return {finding.signal: finding for finding in find(measured, Asking(**asking))}


TRAP = "low-perplexity-trap"


@pytest.mark.parametrize(
    ("asking", "change", "expected"),
    [
        (DOCUMENTS, {}, []),
        (DOCUMENTS, dict(repetition=0.3), [TRAP, "repetition"]),
        (DOCUMENTS, dict(looping=0.3), [TRAP, "repetition"]),
        # Code repeats itself: its references say so; half of a text is too much anywhere.
        (DOCUMENTS, dict(repetition=0.3, references=dict(repetition=0.25)), []),
        (DOCUMENTS, dict(repetition=0.6, references=dict(repetition=0.6)), [TRAP, "repetition"]),
        (DOCUMENTS, dict(looping=0.3, references=dict(looping=0.25)), []),
        (DOCUMENTS, dict(same_prompt=0.4), []),
        (DOCUMENTS, dict(same_prompt=0.6), [TRAP, "same-texts"]),
        # Agreement on a question that has an answer is right; on one that has none it is told, and
        # convicts nobody.
        (QUESTIONS, dict(same_prompt=0.9), []),
        (OPEN, dict(same_prompt=0.6), ["same-texts"]),
        (DOCUMENTS, dict(other_prompts=0.3), [TRAP, "same-texts"]),
        (QUESTIONS, dict(other_prompts=0.3), [TRAP, "same-texts"]),
        # Templates: the references share as much; and without references only what no template
        # explains.
        (DOCUMENTS, dict(other_prompts=0.35, references=dict(other_prompts=0.32)), []),
        (OPEN, dict(other_prompts=0.4, references={}), []),
        (OPEN, dict(other_prompts=0.95, references={}), [TRAP, "same-texts"]),
        (DOCUMENTS, dict(copied=0.15), []),
        # licences and the like are in every text
        (DOCUMENTS, dict(copied=0.4, references=dict(copied=0.3)), []),
        (DOCUMENTS, dict(copied=0.3), [TRAP, "copied-reference"]),
        (QUESTIONS, dict(copied=0.3), [TRAP, "copied-reference"]),
        (DOCUMENTS, dict(entropy_per_byte=0.01), [TRAP, "entropy-collapse"]),
        (QUESTIONS, dict(entropy_per_byte=0.01), []),
        (DOCUMENTS, dict(late_entropy=1.0), ["entropy-collapse"]),
        # Greedy decoding loops and agrees in sound models as well: only a copy convicts.
        (
            GREEDILY,
            dict(repetition=0.6, other_prompts=0.5, entropy_per_byte=0.01, late_entropy=0.1),
            ["repetition", "same-texts"],
        ),
        (GREEDILY, dict(repetition=0.6, copied=0.5), [TRAP, "repetition", "copied-reference"]),
        # Repetition with a perplexity that is bad, or not known, is no trap.
        (DOCUMENTS, dict(repetition=0.3, judged_by=dict(loss=6.5)), ["repetition"]),
        (DOCUMENTS, dict(repetition=0.3, judged_by={}), ["repetition"]),
        (DOCUMENTS, dict(repetition=0.3, judged_by=dict(tokens=100)), ["repetition"]),
        # Noise is varied, and no merit.
        (DOCUMENTS, dict(judged_by=dict(loss=7.5)), ["no-better-than-chance"]),
        (DOCUMENTS, dict(judged_by=dict(loss=7.5, tokens=100)), []),
        (DOCUMENTS, dict(losses=dict(non_finite=3)), ["non-finite"]),
        (DOCUMENTS, dict(losses=dict(self_loss=1.0)), ["self-perplexity"]),
        (DOCUMENTS, dict(losses=dict(self_loss=5.5)), ["self-perplexity"]),
        (DOCUMENTS, dict(losses=dict(self_loss=1.0, reference_tokens=100)), []),
        (
            DOCUMENTS | dict(settings=GenerationSettings(temperature=0.5).of(None)),
            dict(losses=dict(self_loss=1.0)),
            [],
        ),
        # A short answer is easier than the ramble that follows it.
        (QUESTIONS, dict(losses=dict(self_loss=5.5)), []),
        (DOCUMENTS, dict(empty=0.2), ["early-stopping"]),
        (DOCUMENTS, dict(ended=0.9, mean_tokens=5.0), ["early-stopping"]),
        (QUESTIONS, dict(ended=0.0, references=dict(ended=1.0)), ["no-end"]),
        (QUESTIONS | dict(can_end=False), dict(ended=0.0, references=dict(ended=1.0)), []),
        (DOCUMENTS, dict(calibration=dict(ece=0.2, confidence=0.7)), ["overconfidence"]),
        (DOCUMENTS, dict(calibration=dict(ece=0.2, confidence=0.3)), ["underconfidence"]),
        (DOCUMENTS, dict(calibration=dict(ece=0.2, confidence=0.7, tokens=500)), []),
        (DOCUMENTS, dict(ask=dict(answered=0.2)), ["unanswered"]),
        (DOCUMENTS, dict(ask=dict(answered=0.9)), []),
        # Means over too few texts are None.
        (
            DOCUMENTS,
            dict(repetition=None, looping=None, same_prompt=None, other_prompts=None, copied=None),
            [],
        ),
    ],
)
def test_findings(asking, change, expected):
    found = signals(asking, **change)
    assert list(found) == expected and set(found) <= set(SIGNALS)
    if TRAP in found:
        assert found[TRAP].severity == "danger" and set(found[TRAP].numbers["because"]) <= set(
            expected[1:]
        )


def test_severities_and_advice_by_how_it_was_asked():
    assert "temperature 1" in signals(GREEDILY, repetition=0.6)["repetition"].advice
    assert (
        "text it is measured on"
        in signals(repetition=0.6, references=dict(repetition=0.6))["repetition"].advice
    )
    assert signals(GREEDILY, repetition=0.6, copied=0.5)[TRAP].numbers["because"] == [
        "copied-reference"
    ]
    ended = dict(ended=0.0, references=dict(ended=1.0))
    assert (
        signals(CHAT, **ended)["no-end"].severity,
        signals(QUESTIONS, **ended)["no-end"].severity,
    ) == (
        "warning",
        "info",
    )
    assert signals(losses=dict(self_loss=1.0))["self-perplexity"].severity == "info"
    assert signals(losses=dict(self_loss=5.5))["self-perplexity"].severity == "warning"


def test_a_model_that_knows_nothing_is_not_healthy(model, tokenizer):
    """Random weights write the most varied texts there are: "healthy, 100 of 100", it was."""
    bare = probe(model, tokenizer, ["the cat", "a loss", "bytes"], settings=SETTINGS)
    assert bare.generation["judged"] >= 8 and bare.health["parts"]["generation"]["score"] > 0.5
    assert bare.verdict == "insufficient-data" and bare.health_score is None
    documents = [Prompt(str(k), text * 2, document=True) for k, text in enumerate(TEXTS * 4)]
    known = probe(
        model, tokenizer, documents, settings=dataclasses.replace(SETTINGS, prompt_tokens=8)
    )
    assert [f.signal for f in known.findings if f.severity == "warning"][:1] == [
        "no-better-than-chance"
    ]
    assert (
        known.verdict == "watch"
        and known.health["parts"]["perplexity"]["score"] == 0
        and known.health_score <= 70
    )


def test_a_bad_run_is_a_bad_model(model, tokenizer):
    """One list of findings for verdict, score and --fail-on."""
    diagnosis = {
        "health_score": 20.0,
        "verdict": "unhealthy",
        "findings": [{"signal": "divergence", "severity": "danger"}],
    }
    got = probe(
        model, tokenizer, PROMPTS, settings=SETTINGS, diagnosis=diagnosis, scorers=[Scores(1.0)]
    )
    assert got.verdict == "unhealthy" and got.fails("danger") and got.health_score <= 30
    assert got.findings[0].signal == "training-run" and "divergence" in got.findings[0].evidence


def test_health_is_a_weighted_mean_of_what_there_is():
    assert health({"a": Part(None, "why"), "b": Part(None, "why")}, {}).score is None
    got = health(
        {"a": Part(0.5, ""), "b": Part(1.0, ""), "c": Part(None, "why")}, {"a": 3, "b": 1, "c": 4}
    )
    assert (
        got.score == pytest.approx(62.5)
        and got.coverage == 0.5
        and got.parts["c"]["evidence"] == "why"
    )
    assert health({"a": Part(1.0, "")}, {"a": 0}).score is None  # no weight is left


def test_no_repetition_lowers_a_score_and_never_raises_it():
    """A model that writes varied noise got a hundred points of that part."""
    bad = {"perplexity": Part(0.1, ""), "monitor": Part(0.3, "")}
    alone = health(bad, {})
    assert health(bad | {"generation": Part(1.0, "")}, {}).score == alone.score
    assert health(bad | {"generation": Part(0.2, "")}, {}).score == pytest.approx(0.2 * alone.score)
    assert health({"generation": Part(1.0, "")}, {}).score is None
    assert not alone.quality and "quality of the texts not measured" in in_words(alone.to_dict())
    judged = health(bad | {"ask": Part(0.5, "")}, {})
    assert judged.quality and "quality" not in in_words(judged.to_dict())


@pytest.mark.parametrize(
    ("severities", "most"),
    [([], 100), (["info"], 100), (["warning"], 70), (["info", "danger"], 30)],
)
def test_health_is_capped_by_the_worst_finding(severities, most):
    assert health({"a": Part(1.0, "")}, {}, severities).score == most
    assert health({"a": Part(0.1, "")}, {}, severities).score == pytest.approx(10)


@pytest.mark.parametrize(
    "weights", [{"x": 1}, {"a": -1}, {"a": float("nan")}, {"a": float("inf")}, {"a": "1"}]
)
def test_weights_that_cannot_be(weights):
    with pytest.raises(InputError, match="weights: expected"):
        health({"a": Part(1.0, "")}, weights)
