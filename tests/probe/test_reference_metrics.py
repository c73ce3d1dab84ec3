"""BLEU, chrF and ROUGE against their libraries, coherence against a real model's embeddings."""

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from tiny_models import build_model, build_tokenizer

from perplexity.errors import InputError
from perplexity.probe.references import Embeddings, overlap

TEXTS = ["The cat sat on the mat.", "Three nats make a choice among twenty", "nothing alike", ""]
REFERENCES = [
    ("The cat sat on a mat.", "A cat was sitting on the mat."),
    ("A loss of three nats is a choice among twenty",),
    ("Something else entirely", "quite another", "thing"),
    ("an empty answer is a bad one",),
]
# "One, two, three, five, peace".
RUSSIAN = (
    "\u0440\u0430\u0437 \u0434\u0432\u0430 \u0442\u0440\u0438 "
    "\u043f\u044f\u0442\u044c \u043c\u0438\u0440"
)


def test_overlap_is_the_libraries():
    got = overlap(TEXTS, REFERENCES)
    # sacrebleu wants streams: None where a text has fewer references.
    streams = [[of[k] if k < len(of) else None for of in REFERENCES] for k in range(3)]
    assert got["bleu"] == sacrebleu.corpus_bleu(TEXTS, streams).score > 5
    assert got["chrf"] == sacrebleu.corpus_chrf(TEXTS, streams).score > 20
    assert got["bleu_signature"].startswith("nrefs:") and "version:2" in got["chrf_signature"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        best = [
            max(scorer.score(reference, text)[name].fmeasure for reference in of)
            for text, of in zip(TEXTS, REFERENCES, strict=True)
        ]
        assert got[name] == pytest.approx(np.mean(best)) and 0 < got[name] < 1


def test_the_best_there_is():
    same = overlap(["one two three four five"] * 2, [("one two three four five",)] * 2)
    assert same["bleu"] == pytest.approx(100) and same["chrf"] == pytest.approx(100)
    assert same["rouge1"] == same["rouge2"] == same["rougeL"] == 1


@pytest.mark.parametrize(
    ("texts", "references", "cut"),
    [
        (
            ["\u4eca\u5929\u5929\u6c14\u5f88\u597d"],
            [("\u4eca\u5929\u5929\u6c14\u771f\u7684\u5f88\u597d",)],
            "zh",
        ),
        (
            ["\u3053\u3093\u306b\u3061\u306f\u4e16\u754c"],
            [("\u3053\u3093\u306b\u3061\u306f\u3001\u4e16\u754c",)],
            "char",
        ),
        (
            [RUSSIAN],
            [(f"{RUSSIAN}!",)],
            "13a",
        ),
    ],
)
def test_scripts_that_rouge_does_not_read(texts, references, cut):
    """Two Chinese sentences that are nearly the same had a BLEU and a ROUGE of 0."""
    got = overlap(texts, references)
    assert got["bleu_signature"].find(f"tok:{cut}") > 0 and got["rouge1"] is got["rougeL"] is None
    assert (
        got["bleu"]
        == sacrebleu.corpus_bleu(texts, [[of[0] for of in references]], tokenize=cut).score
        > 1
    )
    assert got["chrf"] > 30


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """Save a sentence-transformers model: the mean of a tiny random transformer's hidden states."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("embeddings")
    tokenizer = build_tokenizer(bos=True)
    tokenizer.pad_token = "<s>"
    build_model(len(tokenizer)).save_pretrained(folder / "body")
    tokenizer.save_pretrained(folder / "body")
    body = Transformer(str(folder / "body"))
    SentenceTransformer(modules=[body, Pooling(32)]).save(str(folder / "model"))
    return folder / "model"


def test_coherence_is_the_cosine(embeddings):
    from sentence_transformers import SentenceTransformer

    prompts = ["the cat", "three nats", "bytes are", "a loss"]
    got = Embeddings(str(embeddings)).coherence(prompts, TEXTS, REFERENCES)
    model = SentenceTransformer(str(embeddings))

    def unit(text):
        found = model.encode(text)
        return found / np.linalg.norm(found)

    expected = np.mean(
        [unit(prompt) @ unit(text) for prompt, text in zip(prompts[:3], TEXTS[:3], strict=True)]
    )
    # the last text is empty
    assert got["with_prompt"] == pytest.approx(expected, abs=1e-5) and got["texts"] == 3
    nearest = [
        max(unit(text) @ unit(one) for one in of)
        for text, of in zip(TEXTS[:3], REFERENCES[:3], strict=True)
    ]
    assert got["with_reference"] == pytest.approx(np.mean(nearest), abs=1e-5)
    assert Embeddings(str(embeddings)).coherence(["the cat"], ["the cat"], [()]) == {
        "embeddings": str(embeddings),
        "texts": 1,
        "with_prompt": pytest.approx(1.0, abs=1e-6),
        "with_reference": None,
    }


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(
        InputError, match="embeddings: expected a sentence-transformers folder, got .*no-such"
    ):
        Embeddings(str(tmp_path / "no-such"))
