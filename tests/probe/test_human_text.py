"""Human text in place of a model's: no finding convicts people, whatever they write."""

import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from perplexity.cli import demo_model as demo
from perplexity.probe import GenerationSettings
from perplexity.probe.findings import LEAST_TEXTS, Asking, find
from perplexity.probe.measures import Source, measure, totals

PROMPT, LENGTH, PROMPTS, SAMPLES = 24, 96, 48, 4  # pieces between white space
ASKING = dict(documents=True, answers=False, can_end=False, settings=GenerationSettings().of(None))


def python():
    return [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]


def templated():
    """Files made from one template, as configurations and generated code are."""
    drawn = random.Random(0)
    names = [path.stem for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    text = "class {name}Settings : def __init__ ( self , {a} = {n} , {b} = {m} ) : "
    text += "self . {a} = {a} ; self . {b} = {b} "
    text += "# the {a} of a {name} , {n} at most , is taken from the file of settings where it is "
    text += "not given here . Licensed under the terms of the project , without any warranty "
    return [
        " ".join(
            text.format(name=name, a=a, b=b, n=drawn.randrange(999), m=drawn.randrange(999))
            for a, b in (drawn.sample(names, 2) for _ in range(8))
        )
        for name in names
    ]


def objects():
    drawn = random.Random(1)
    words = [word for text in demo.corpus().values() for word in text.split() if word.isalpha()]
    row = lambda: {  # noqa: E731
        "id": drawn.randrange(10**6),
        "kind": drawn.choice("abc"),
        "name": " ".join(drawn.sample(words, 4)),
    }
    return [json.dumps([row() for _ in range(40)], indent=1) for _ in range(120)]


KINDS = {
    "prose": lambda: list(demo.corpus().values()),
    "python": python,
    "templated": templated,
    "json": objects,
}


@pytest.mark.parametrize("kind", KINDS)
def test_people_are_not_convicted(kind):
    """References are a document's own next words; the "model" writes those of other documents."""
    drawn = random.Random(2)
    texts = [pieces for text in KINDS[kind]() if len(pieces := text.split()) >= PROMPT + LENGTH]
    numbers: dict[str, int] = {}

    def piece(pieces, length):
        begin = drawn.randrange(len(pieces) - length + 1)
        return pieces[begin : begin + length]

    def source(place, prompt, pieces, sample, reference=""):
        ids = np.array([numbers.setdefault(word, len(numbers)) for word in pieces])
        return Source(
            str(place),
            sample,
            prompt,
            " ".join(pieces),
            ids,
            False,
            np.full((5, LENGTH), 2.0, np.float32),
            (reference,),
        )

    own, references = [], []
    for place, document in enumerate(drawn.sample(texts, min(PROMPTS, len(texts) // 2))):
        whole = piece(document, PROMPT + LENGTH)
        prompt, reference = " ".join(whole[:PROMPT]), " ".join(whole[PROMPT:])
        last = references[-1].text if references else ""
        references.append(source(place, prompt, whole[PROMPT:], 0, last))
        others = [other for other in texts if other is not document]
        own += [
            source(place, prompt, piece(drawn.choice(others), LENGTH), sample, reference)
            for sample in range(SAMPLES)
        ]
    measured = {
        "generation": totals(measure(own), LEAST_TEXTS),
        "reference_texts": totals(measure(references), LEAST_TEXTS),
        "perplexity": {
            **dict(self_loss=2.0, reference_loss=2.0, reference_tokens=5000, non_finite=0),
            "judged_by": dict(
                loss=2.0, unigram_loss=6.0, guess_loss=7.0, tokens=5000, of="the references"
            ),
        },
        "calibration": None,
        "ask": None,
    }
    assert measured["generation"]["judged"] >= 100
    assert [finding.evidence for finding in find(measured, Asking(**ASKING))] == []
    if kind == "templated":  # they would be, were the references not looked at
        assert measured["generation"]["other_prompts"] > 0.25
