"""Hard input: each has a clear outcome, nothing is dropped silently, tokens scored + skipped =
tokens read.
"""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity import evaluate
from perplexity.errors import InputError
from perplexity.evaluation import Document


def accounts_for_every_token(got) -> bool:
    return got.tokens + sum(got.skipped.values()) == got.tokens_read and got.tokens_skipped == sum(
        got.skipped.values()
    )


class Poisoned:
    """A model whose hidden states are not finite where it reads ``token``."""

    def __init__(self, model, token: int, value: float):
        from perplexity.models.language_model import HuggingFaceModel

        self.inner, self.token, self.value = HuggingFaceModel(model), token, value
        self.head, self.context_length = self.inner.head, self.inner.context_length

    def hidden_states(self, input_ids):
        hidden = self.inner.hidden_states(input_ids)
        return torch.where(
            (input_ids == self.token)[..., None], torch.full_like(hidden, self.value), hidden
        )

    def logits(self, input_ids):
        return self.hidden_states(input_ids) @ self.head.weight.T


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_are_counted_and_the_rest_is_summed(model, tokenizer, value):
    token = tokenizer("z")["input_ids"][0]
    documents = [
        Document("first", TEXTS[0]),
        Document("second", "a z b z c"),
        Document("third", TEXTS[1]),
    ]
    got = evaluate(Poisoned(model, token, value), tokenizer, documents)
    ids = tokenizer("a z b z c")["input_ids"]
    places = [place + 1 for place, read in enumerate(ids[:-1]) if read == token]
    assert got.non_finite == {
        "tokens": len(places),
        "document": "second",
        "position": places[0],
        "token_id": ids[places[0]],
    }
    assert not got.ok and math.isfinite(got.loss)
    assert got.skipped == {"non-finite": len(places)} and accounts_for_every_token(got)
    plain = evaluate(model, tokenizer, documents)
    for place in (0, 2):
        assert got.per_document[place].nll == pytest.approx(plain.per_document[place].nll, rel=1e-6)
    assert any("NaN or infinite" in note for note in got.notes)


def test_a_model_that_gives_nothing_but_nan(tokenizer):
    model = build_model(len(tokenizer))
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    got = evaluate(model, tokenizer, TEXTS)
    assert not got.ok and got.tokens == 0 and math.isnan(got.loss)
    assert accounts_for_every_token(got)
    assert json.loads(got.to_json())["loss"] == "nan"


def test_overflow_of_exp_keeps_the_loss(tokenizer):
    model = build_model(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight *= 3000
    got = evaluate(model, tokenizer, TEXTS)
    assert got.ok and math.isfinite(got.loss) and got.loss > 710
    assert got.perplexity == math.inf and json.loads(got.to_json())["perplexity"] == "inf"
    assert any("reads inf" in note for note in got.notes)


def test_empty_and_one_token_documents(model, tokenizer):
    one = next(text for text in ("a", "b", "t") if len(tokenizer(text)["input_ids"]) == 1)
    got = evaluate(model, tokenizer, ["", one, TEXTS[0], ""])
    assert [d.tokens for d in got.per_document][:2] == [0, 1]
    assert got.documents == 4 and accounts_for_every_token(got)
    never = evaluate(model, tokenizer, ["", one, TEXTS[0], ""], bos="never")
    assert [d.tokens for d in never.per_document][:2] == [0, 0]
    assert never.skipped == {"no-context": 2} and accounts_for_every_token(never)


def test_a_document_longer_than_the_context(model, tokenizer):
    text = " ".join(TEXTS * 40)
    got = evaluate(model, tokenizer, [text])
    assert got.tokens == len(tokenizer(text)["input_ids"]) > 30 * 64
    assert got.skipped == {}


def words_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "the": 2, "cat": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")


def test_a_text_of_unknown_tokens_only():
    tokenizer = words_tokenizer()
    got = evaluate(build_model(4), tokenizer, ["nothing known here", "at all"])
    assert got.tokens == got.unknown_tokens == 5 and got.skipped == {}
    assert any("5 of 5 scored tokens are unknown" in note for note in got.notes)
    assert got.loss_without_unknown is None and got.perplexity_without_unknown is None


def test_the_loss_with_and_without_unknown_tokens(tmp_path):
    """As KenLM's two perplexities: of all tokens, and of those in the vocabulary, their contexts
    unchanged.
    """
    import pyarrow.parquet

    tokenizer = words_tokenizer()
    got = evaluate(
        build_model(4),
        tokenizer,
        ["the dog the cat", "cat cat bird"],
        per_token=tmp_path / "t.parquet",
    )
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pydict()
    rows = list(zip(table["token_id"], table["nll"], strict=True))
    assert (got.tokens, got.unknown_tokens) == (7, 2)
    assert got.loss == pytest.approx(sum(nll for _, nll in rows) / 7, rel=1e-6)
    assert got.loss_without_unknown == pytest.approx(
        sum(nll for token, nll in rows if token) / 5, rel=1e-6
    )
    assert got.perplexity_without_unknown == pytest.approx(np.exp(got.loss_without_unknown))
    known = evaluate(build_model(4), tokenizer, ["the cat"])
    assert known.loss_without_unknown == known.loss


def fast_tokenizer(kind: str, **roles):
    """A tokenizer whose model has an unknown token; the roles name tokens of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "\u2581the", "\u2581cat"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = {
        "words": lambda: models.WordLevel(
            {piece.lstrip("\u2581"): i for i, piece in enumerate(pieces)}, unk_token="<unk>"
        ),
        "unigram": lambda: models.Unigram([(piece, -1.0 * i) for i, piece in enumerate(pieces)], 0),
        "byte-fallback": lambda: models.BPE(
            {piece: i for i, piece in enumerate([*pieces, *bytes_, "\u2581"])},
            [],
            unk_token="<unk>",
            byte_fallback=True,
        ),
        # As CLIP's: the model has an unknown token, and every byte is in the vocabulary.
        "byte-level": lambda: models.BPE(
            {piece: i for i, piece in enumerate([*pieces, *alphabet])},
            [],
            unk_token="<unk>",
        ),
    }[kind]()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = {
        "words": pre_tokenizers.Whitespace,
        "byte-level": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    }.get(kind, pre_tokenizers.Metaspace)()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **roles)


@pytest.mark.parametrize("kind", ["words", "unigram", "byte-fallback", "byte-level"])
@pytest.mark.parametrize("roles", ["unk", "unk pad", "unk eos", "pad"])
def test_the_unknown_token_is_what_unknown_text_becomes(kind, roles):
    """Unknown words vanished as special where padding was saved as the unknown token."""
    from perplexity.text.tokens import special_ids, unknown_id

    tokenizer = fast_tokenizer(kind, **{f"{role}_token": "<unk>" for role in roles.split()})
    emitted = kind in ("words", "unigram")
    assert (0 in tokenizer("the \u4e16 cat", add_special_tokens=False)["input_ids"]) == emitted
    expected = 0 if emitted or roles == "unk" else None
    assert unknown_id(tokenizer) == expected
    assert special_ids(tokenizer) == ({1} if expected == 0 else {0, 1})


def test_padding_that_is_the_unknown_token():
    texts = ["the dog the cat", "cat cat bird"]
    padded = fast_tokenizer("words", unk_token="<unk>", pad_token="<unk>")
    got = evaluate(build_model(4), padded, texts)
    plain = evaluate(build_model(4), words_tokenizer(), texts)
    assert (got.tokens, got.unknown_tokens, got.skipped) == (7, 2, {})
    assert (got.loss, got.loss_without_unknown) == (plain.loss, plain.loss_without_unknown)
    assert any("2 of 7 scored tokens are unknown" in note for note in got.notes)


@pytest.mark.parametrize("bad", [10**6, -1])
def test_ids_out_of_range(model, tokenizer, bad):
    document = Document("d7", "", ids=np.array([1, 2, bad, 3], dtype=np.int64))
    expected = f"expected below {model.config.vocab_size}"
    with pytest.raises(InputError, match=f"document d7: token id {bad} at position 2, {expected}"):
        evaluate(model, tokenizer, [document])


def test_padding_is_never_scored(model):
    tokenizer = build_tokenizer(bos=True)
    tokenizer.add_special_tokens({"pad_token": "</pad>"})
    padded = np.array([*tokenizer(TEXTS[0])["input_ids"], *[tokenizer.pad_token_id] * 9])
    padded_model = build_model(len(tokenizer) + 2)
    got = evaluate(padded_model, tokenizer, [Document("d", "", ids=padded)])
    plain = evaluate(padded_model, tokenizer, [TEXTS[0]])
    assert got.tokens == plain.tokens and got.skipped == {"special": 9}
    assert got.loss == pytest.approx(plain.loss, rel=1e-6)


def test_pretokenised_and_plain_text_agree(model, tokenizer):
    documents = [
        Document(str(i), "", ids=np.array(tokenizer(text)["input_ids"], np.uint16))
        for i, text in enumerate(TEXTS)
    ]
    got, plain = evaluate(model, tokenizer, documents), evaluate(model, tokenizer, TEXTS)
    assert (got.loss, got.bytes, got.words, got.text_fingerprint) == (
        plain.loss,
        plain.bytes,
        plain.words,
        plain.text_fingerprint,
    )


def test_mixed_line_endings_are_scored_as_they_stand(model, tokenizer):
    got = evaluate(model, tokenizer, ["the cat\r\nsat\non\rthe mat"])
    assert got.tokens == len(tokenizer("the cat\r\nsat\non\rthe mat")["input_ids"])
    assert got.bytes == len("the cat\r\nsat\non\rthe mat")


def test_a_lone_surrogate(model, tokenizer):
    with pytest.raises(InputError, match="lone surrogate"):
        evaluate(model, tokenizer, ["a \ud800 b"])


class Small:
    """A model that has room for ``rows`` windows at once."""

    def __init__(self, model, rows: int):
        from perplexity.models.language_model import HuggingFaceModel

        self.inner, self.rows, self.refused = HuggingFaceModel(model), rows, []
        self.head, self.context_length = self.inner.head, self.inner.context_length
        self.logits = self.inner.logits

    def hidden_states(self, input_ids):
        if len(input_ids) > self.rows and input_ids.shape[1] > 16:
            self.refused.append(len(input_ids))
            raise torch.OutOfMemoryError("no room")
        return self.inner.hidden_states(input_ids)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_out_of_memory_halves_the_batch_and_goes_on(model, tokenizer, rows):
    small = Small(model, rows)
    got = evaluate(small, tokenizer, TEXTS * 4, context_length=32, batch_size=8)
    plain = evaluate(model, tokenizer, TEXTS * 4, context_length=32, batch_size=8)
    assert got.tokens == plain.tokens
    assert got.loss == pytest.approx(plain.loss, rel=1e-6)
    # It is learnt once: after the first batch no call is too large. Before, two windows are
    # compared.
    assert 1 <= len(small.refused) <= 3 + (rows < 2)


def test_a_window_that_never_fits(model, tokenizer):
    with pytest.raises(
        InputError, match="one window of .* does not fit .*: lower the context length, or load"
    ):
        evaluate(Small(model, 0), tokenizer, TEXTS, batch_size=2)


def test_a_special_token_that_is_the_unknown_one_too(model):
    """GPT-2, OPT and GPT-NeoX: one token is BOS, EOS and unknown."""
    tokenizer = build_tokenizer(bos=True)
    tokenizer.eos_token = tokenizer.unk_token = tokenizer.pad_token = "<s>"
    got = evaluate(model, tokenizer, ["the cat<s>the dog<s>sat"])
    assert got.skipped == {"special": 2} and got.unknown_tokens == 0


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("the cat sat", "documents: expected a sequence of them, got one str"),
        ([3], "documents: expected strings or Documents, got int at 0"),
        (
            [Document("d", "", ids=np.array([1.7]))],
            r"document d: expected integer ids \[tokens\], got float64",
        ),
        (
            [Document("d", "", ids=np.ones((2, 2), int))],
            r"document d: expected integer ids \[tokens\], got int64 \[2, 2\]",
        ),
    ],
)
def test_documents_that_are_none(model, tokenizer, documents, message):
    with pytest.raises(InputError, match=message):
        evaluate(model, tokenizer, documents)


@pytest.mark.parametrize("given", [None, object()])
def test_a_tokenizer_that_is_none(model, given):
    with pytest.raises(InputError, match="tokenizer: expected a transformers tokenizer, .* got"):
        evaluate(model, given, TEXTS)


def test_special_tokens_inside_a_token_file_are_text(model, tokenizer):
    """So that its bytes and its fingerprint are the plain text's."""
    text = "the cat<s> the dog"
    ids = np.array([tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.bos_token_id])
    got, plain = (
        evaluate(model, tokenizer, [Document("d", "", ids=ids)]),
        evaluate(model, tokenizer, [text]),
    )
    assert (got.bytes, got.text_fingerprint, got.loss) == (
        plain.bytes,
        plain.text_fingerprint,
        plain.loss,
    )
    assert got.skipped == {"special": 3}
