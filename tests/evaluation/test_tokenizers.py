"""Tokenizers of any library give the losses and the bytes that transformers' own would."""

import math

import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity import evaluate
from perplexity.errors import InputError
from perplexity.evaluation import Document


class Characters:
    """A character tokenizer with a BOS."""

    letters = sorted(set("".join(TEXTS)))
    vocabulary_size = len(letters) + 1
    bos_token_id = len(letters)

    def encode(self, text):
        return [self.letters.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(self.letters[i] if i < len(self.letters) else "" for i in ids)


@pytest.fixture(scope="module")
def small():
    return build_model(300)


def test_a_tokenizer_of_ones_own(small):
    """The loss is the model's own in float64; bytes and words are exact within a text."""
    tokenizer, text = Characters(), TEXTS[2]
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    with torch.no_grad():
        logits = small(input_ids=torch.tensor([ids])).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    got = evaluate(small, tokenizer, [text])
    assert got.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert (got.tokens, got.bytes) == (len(text), len(text.encode()))
    part = text[3:10]  # "é, naïv": the bytes of two accents
    got = evaluate(small, tokenizer, [Document(text, spans=[(3, 10)])])
    assert got.loss == pytest.approx(losses[3:10].mean().item(), rel=1e-6)
    assert (got.tokens, got.bytes, got.words) == (7, len(part.encode()), 2)
    assert got.bits_per_byte == pytest.approx(
        losses[3:10].sum().item() / len(part.encode()) / math.log(2), rel=1e-6
    )
    assert not [note for note in got.notes if "estimate" in note]


@pytest.mark.parametrize("protocol", ["sliding", "lm-eval", "llama.cpp"])
def test_a_tokenizers_tokenizer_is_transformers(small, protocol):
    wrapped = build_tokenizer(bos=False, eos=True)
    options = dict(protocol=protocol, context_length=16)
    if protocol == "lm-eval":  # which needs a BOS or an EOS, and these are not in tokenizer.json
        wrapped = build_tokenizer(bos=True)
        from tokenizers.processors import TemplateProcessing

        wrapped.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    mine = evaluate(small, wrapped.backend_tokenizer, TEXTS, **options)
    theirs = evaluate(small, wrapped, TEXTS, **options)
    assert mine.per_document == theirs.per_document


def test_another_alphabet_is_another_tokenizer(small):
    class Other(Characters):
        letters = tuple([*Characters.letters[1:], Characters.letters[0]])

    class Named(Characters):
        fingerprint = "mine"

    def of(tokenizer):
        return evaluate(small, tokenizer, TEXTS[:1]).tokenizer_fingerprint

    assert len({of(Characters()), of(Other()), of(Named())}) == 3
    assert of(Named()) == of(Named())


def test_tokens_that_do_not_spell_the_text_make_an_estimate(small):
    class Lower(Characters):
        def encode(self, text):
            return super().encode(text.lower())

    got = evaluate(small, Lower(), [Document("The cat", spans=[(4, 7)])])
    assert got.tokens == 3 and any("estimate" in note for note in got.notes)


@pytest.mark.parametrize(
    ("tokenizer", "text", "message"),
    [
        (7, "a", "tokenizer: expected a transformers tokenizer, .* vocabulary_size, got int"),
        (Characters(), "Q", r"tokenizer: .* got one that fails \(ValueError: 'Q' is not in list"),
        (
            type("NoSize", (), {"encode": lambda s, t: [], "decode": lambda s, i: ""})(),
            "a",
            "tokenizer.vocabulary_size: expected a number of ids, got None",
        ),
    ],
)
def test_tokenizers_that_cannot_be(small, tokenizer, text, message):
    with pytest.raises(InputError, match=message):
        evaluate(small, tokenizer, [text])


def test_tiktoken(small):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b" c": 257}
    encoding = tiktoken.Encoding(
        "tiny",
        pat_str=r"\s?\S+|\s+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 258},
    )
    got = evaluate(small, encoding, [TEXTS[2] + "<|endoftext|>"])
    assert got.skipped == {"no-context": 1, "special": 1}
    assert got.bytes == len(TEXTS[2].encode()) - 1
    part = evaluate(small, encoding, [Document(TEXTS[2], spans=[(3, 10)])])
    assert part.bytes == len(TEXTS[2][3:10].encode())


def test_sentencepiece(small):
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    got = evaluate(small, processor, TEXTS)
    assert got.tokens == sum(len(processor.encode(text)) for text in TEXTS)
    assert got.bytes == sum(len(text.encode()) for text in TEXTS)
    part = evaluate(small, processor, [Document(TEXTS[0], spans=[(7, 22)])])
    assert part.bytes == 15


def test_the_command_takes_another_folders_tokenizer(tmp_path, ppl_here, small):
    """A model without a tokenizer says which option names one; a tokenizer.json will do."""
    small.save_pretrained(tmp_path / "model")
    build_tokenizer(bos=True).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text(TEXTS[0])
    command = ["eval", tmp_path / "model", tmp_path / "a.txt"]
    done = ppl_here(*command)
    assert done.returncode == 2 and "--tokenizer DIR" in done.stderr
    for tokenizer in ("tokenizer", "tokenizer/tokenizer.json"):
        done = ppl_here(*command, "--tokenizer", tmp_path / tokenizer)
        assert done.returncode == 0, done.stderr


def test_data_checks_take_any_tokenizer():
    """They refused all but transformers' own."""
    from perplexity.data_checks import check_data

    train, valid = TEXTS[2:], TEXTS[:2]
    wrapped = build_tokenizer(bos=True)
    own, plain = (
        check_data(train, valid, tokenizer=t) for t in (wrapped, wrapped.backend_tokenizer)
    )
    assert own.tokens == plain.tokens and own.findings == plain.findings
    of_characters = check_data(train, valid, tokenizer=Characters())
    assert of_characters.tokens["valid"] == sum(map(len, valid))
    assert of_characters.unknown_token_rate == 0


def test_a_probe_takes_any_tokenizer(small):
    from perplexity.probe import GenerationSettings, Questioner, probe

    class OfTheModel(Characters):
        vocabulary_size = 300  # the model may write any of its tokens

    settings = GenerationSettings(samples=1, max_new_tokens=6)
    judge = Questioner(small, OfTheModel(), template="{text} ", yes="a", no="e", chat=False)
    got = probe(small, OfTheModel(), ["the cat", "a mat"], settings=settings, judge=judge)
    tokenizer = OfTheModel()
    assert judge.words == ("a", "e")
    assert [text.id for text in got.texts] == ["0", "1"]
    assert got.tokenizer_fingerprint == evaluate(small, tokenizer, ["cat"]).tokenizer_fingerprint
