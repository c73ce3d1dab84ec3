"""Bytes and words are those that were scored; two tokenizers are compared over the same bytes."""

import json
import math
import os
import re

import numpy as np
import pyarrow.parquet
import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as backends
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from perplexity import compare, evaluate
from perplexity.errors import InputError
from perplexity.evaluation import Document, read_result
from perplexity.text.spans import lost_characters, spans_of

HARD = [
    " ".join(TEXTS * 3),
    "  the cat<s> sat\n\non the\tmat <s>",
    "你好 café\u0301 \U0001f600 ",
    "<s>the dog",
    "a",
    "",
    " ",
]
NO_ACCENTS = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])


def uniform(vocabulary: int):
    """A model that knows nothing: every token costs log V."""
    model = build_model(vocabulary)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def altered(tokenizer, **parts):
    """A copy of a tokenizer with other parts."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=tokenizer.bos_token)


def bytes_and_words(text: str, tokens: list[str], scored: set[int]) -> tuple[int, int]:
    """Scored bytes and words of a byte-level tokenizer, whose tokens have a letter for each byte.

    A character counts where every token that holds a byte of it was scored, a word by its last one.
    """
    holders = [place for place, token in enumerate(tokens) for _ in token]
    begin, counts = 0, []
    for letter in text:
        size = len(letter.encode())
        counts.append(all(holder in scored for holder in holders[begin : begin + size]))
        begin += size
    assert begin == len(holders)
    words, end = 0, 0
    for piece in re.split(r"(\s+)", text)[::2] if text else []:
        end += len(piece)
        words += counts[min(max(end - 1, 0), len(text) - 1)]
        gap = re.match(r"\s+", text[end:])
        end += gap.end() if gap else 0
    return sum(len(x.encode()) for x, kept in zip(text, counts, strict=True) if kept), words


@pytest.mark.parametrize(
    ("protocol", "bos"),
    [
        (protocol, bos)
        for protocol in ("sliding", "lm-eval", "llama.cpp")
        for bos in ("auto", "never", None)  # None: a tokenizer without BOS
        if (protocol, bos) != ("lm-eval", "never")  # which lm-eval cannot
    ],
)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_scored_and_skipped_are_what_was_read(protocol, bos, trim_offsets, tmp_path):
    """Tokens, bytes and words; bytes and words against the tokens' own letters."""
    tokenizer = build_tokenizer(bos=bos is not None, eos=True)
    if trim_offsets:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    model = build_model(len(tokenizer))
    got = evaluate(
        model,
        tokenizer,
        HARD,
        protocol=protocol,
        context_length=16,
        bos=bos or "auto",
        per_token=tmp_path / "t",
    )
    rows = pyarrow.parquet.read_table(tmp_path / "t", columns=["document", "position"]).to_pylist()
    for place, (text, score) in enumerate(zip(HARD, got.per_document, strict=True)):
        encoded = tokenizer(text, split_special_tokens=protocol == "llama.cpp")
        scored = {row["position"] for row in rows if row["document"] == str(place)}
        expected = bytes_and_words(text, encoded.tokens(), scored)
        assert (score.bytes, score.words) == expected, text
        assert score.tokens + score.skipped == len(encoded["input_ids"])
        assert score.bytes + score.bytes_skipped == len(text.encode())
        assert score.words + score.words_skipped == (len(re.split(r"\s+", text)) if text else 0)
    for unit in ("tokens", "bytes", "words"):
        names = (unit, f"{unit}_skipped", f"{unit}_read")
        scored, skipped, read = (getattr(got, name) for name in names)
        assert scored + skipped == read
    if protocol == "lm-eval":
        assert got.bytes_skipped == got.words_skipped == 0
    assert got.bits_per_byte == pytest.approx(got.loss * got.tokens / got.bytes / math.log(2))


def metaspace(model, normalizer=None):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def byte_fallback():
    pieces = ["<unk>", "\u2581", "\u2581the", "c", "a"]
    pieces += [f"<0x{value:02X}>" for value in range(256)]
    scores = [(piece, -1.0 - (place > 2)) for place, piece in enumerate(pieces)]
    return backends.Unigram(scores, 0, byte_fallback=True)


@pytest.mark.parametrize(
    ("backend", "text", "sizes"),
    [
        # "▁" of the front holds no byte; "▁" elsewhere a space; é and 你 go to their last bytes.
        (metaspace(byte_fallback()), "ca é the 你", [0, 1, 1, 1, 0, 2, 4, 1, 0, 0, 3]),
        # One character that becomes two letters.
        (metaspace(byte_fallback(), normalizers.NFKC()), "a\ufb01 c", [0, 1, 0, 3, 1, 1]),
        # What a normaliser deletes goes to the token behind it, at the end to the last.
        (metaspace(byte_fallback(), normalizers.Replace("x", "")), "xaxcx", [1, 1, 3]),
    ],
)
def test_each_byte_belongs_to_one_token(backend, text, sizes):
    encoding = backend.encode(text)
    spans = spans_of(text, encoding.offsets)
    found = np.diff(spans.ends, prepend=0).tolist()
    assert sum(found) == len(text.encode())
    assert found == sizes, encoding.tokens


def test_a_first_token_without_context_has_no_bytes():
    """Without BOS the first tokens were free and their bytes counted: such a tokenizer won."""
    docs = ["the cat sat on", "a loss of three", "the dog lay by", "twenty nats on the mat"] * 8
    found = []
    for bos in ("<s>", None):
        tokenizer = build_tokenizer(bos=bos is not None)
        got = evaluate(uniform(300), tokenizer, docs)
        found.append(got)
        skipped = 0 if bos else sum(len(tokenizer(d).tokens()[0]) for d in docs)
        assert got.bytes == sum(map(len, docs)) - skipped and got.bytes_skipped == skipped
        cost = math.log2(300)  # bits a token
        assert got.bits_per_byte == pytest.approx(got.tokens * cost / got.bytes, rel=1e-6)
    # Both cut a text alike but for the BOS: over the same bytes there is no difference.
    result = compare(*found, measure="bits-per-byte")
    assert result.difference == pytest.approx(0, abs=1e-6) and result.pairs == len(docs)
    assert result.b == pytest.approx(found[1].bits_per_byte, rel=1e-6)
    assert any("the bytes that both scored" in note for note in result.notes)


def test_comparison_over_the_same_bytes_of_other_cuts(tmp_path):
    """Tokenizers of other merges: the sums over tokens behind the first boundary that both have."""
    docs = [" ".join([TEXTS[i % 3]] * (1 + i % 3)) for i in range(12)]
    words = build_tokenizer(bos=False)
    state = json.loads(words.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][:6]
    backend = Tokenizer.from_str(json.dumps(state))
    pieces = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    found, tokens = [], []
    for name, tokenizer in (("a", pieces), ("b", words)):
        path = tmp_path / name
        found.append(evaluate(build_model(300), tokenizer, docs, per_token=path))
        tokens.append(pyarrow.parquet.read_table(path).to_pylist())
    bits = [0.0, 0.0]
    size = 0
    for place, text in enumerate(docs):
        tokens_of = [tokenizer(text).tokens() for tokenizer in (pieces, words)]
        ends = [np.cumsum([len(token) for token in side]).tolist() for side in tokens_of]
        # Of ``words`` the first token is not scored.
        boundary = min(end for end in ends[1] if end in ends[0])
        size += len(text.encode()) - boundary
        for side in (0, 1):
            bits[side] += sum(
                row["nll"] / math.log(2)
                for row in tokens[side]
                if row["document"] == str(place) and ends[side][row["position"]] > boundary
            )
    for pair in (found, [json.loads(evaluation.to_json()) for evaluation in found]):
        result = compare(*pair, measure="bits-per-byte")
        assert result.a == pytest.approx(bits[0] / size, rel=1e-6)
        assert result.b == pytest.approx(bits[1] / size, rel=1e-6)


def test_bytes_that_cannot_be_aligned_are_refused_or_left_out():
    # One tokenizer has boundaries at even places of the second document, the other at odd ones;
    # the third is a single token, and not scored, of one of them.
    docs = ["the cat sat on the mat and the dog", "zq" * 20, "zqz"]
    plain, none = build_tokenizer(bos=True), build_tokenizer(bos=False)
    plain.add_tokens(["zq"])
    none.add_tokens(["zqz", "qz"])
    a, b = (evaluate(build_model(310), tokenizer, docs) for tokenizer in (plain, none))
    result = compare(a, b, measure="bits-per-byte")
    assert result.pairs == 1 and any("2 documents are left out" in note for note in result.notes)
    # Special tokens that one side skips in the middle of a text.
    docs = ["the cat sat on the mat<s> and the dog"] * 3
    a, b = (evaluate(build_model(310), plain, docs, score_special=score) for score in (True, None))
    with pytest.raises(InputError, match="bytes: expected the same part of the text"):
        compare(a, b, measure="bits-per-byte")
    record = json.loads(a.to_json()) | {"first_tokens": [[3, "x"]] * 3}
    with pytest.raises(
        InputError, match=r"a: expected .* with a number for first_tokens\[0\]\[1\], got 'x'"
    ):
        compare(record, a, measure="bits-per-byte")
    del record["first_tokens"]  # a file of another program
    assert compare(record, a, measure="bits-per-byte").difference == 0


def test_special_tokens_that_are_skipped_have_no_bytes():
    """Bits per byte of two documents joined by <s> were 1.40, apart 2.22."""
    tokenizer = build_tokenizer(bos=True)
    apart = evaluate(uniform(300), tokenizer, ["the cat sat", "the dog lay"])
    joined = evaluate(uniform(300), tokenizer, ["the cat sat<s>the dog lay"])
    assert joined.skipped == {"special": 1} and joined.bytes_skipped == len("<s>")
    assert joined.bits_per_byte == pytest.approx(apart.bits_per_byte, rel=1e-6)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A finite evaluation, and one of a model that gives NaN in one of three documents."""
    folder = tmp_path_factory.mktemp("broken")
    tokenizer = build_tokenizer(bos=True)
    documents = [Document(str(i), text, "ab"[i % 2]) for i, text in enumerate(TEXTS)]
    model = build_model(len(tokenizer))
    fine = evaluate(model, tokenizer, documents)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer(TEXTS[1])["input_ids"][5]] = math.nan
    got = evaluate(model, tokenizer, documents, per_document=folder / "d")
    return fine, got, pyarrow.parquet.read_table(folder / "d").to_pylist()


def test_a_token_that_is_not_finite_leaves_no_measure_by_byte(broken, tmp_path):
    """With 6,274 of 7,035 tokens NaN bits per byte read 0.226 instead of 2.085."""
    from rich.console import Console

    from perplexity.cli import eval as command

    _, got, rows = broken
    measures = ("bits_per_byte", "byte_perplexity", "word_perplexity")
    assert got.non_finite and math.isfinite(got.loss)
    assert [getattr(got, name) for name in measures] == [None] * 3
    bad = [place for place, score in enumerate(got.per_document) if score.non_finite]
    assert 1 in bad and len(bad) < 3
    assert [row["bits_per_byte"] is None for row in rows] == [place in bad for place in range(3)]
    for name, domain in got.domains.items():
        hit = any("ab"[place % 2] == name for place in bad)
        assert all((domain[measure] is None) == hit for measure in measures)
    assert got.bytes + got.bytes_skipped == got.bytes_read and got.bytes_skipped > 0
    got.save(tmp_path / "r.json")
    assert all(read_result(tmp_path / "r.json").get(name) is None for name in measures)
    console = Console(record=True, width=150, file=open(os.devnull, "w"))  # noqa: SIM115
    command.show(got, console)
    shown = console.export_text()
    assert "undefined" in shown and "a token's loss is NaN or infinite" in shown


@pytest.mark.parametrize("measure", ["loss", "bits-per-byte"])
def test_losses_that_are_not_finite_are_not_compared(broken, measure):
    fine, got, _ = broken
    for pair in ((fine, got), (got, fine), (got, got)):
        with pytest.raises(
            InputError, match=r"expected a finite loss of every token, got \d+ of [AB]"
        ):
            compare(*pair, measure=measure)


@pytest.mark.parametrize(
    ("normalizer", "words"),
    [
        (None, None),
        (normalizers.Replace("t", ""), "deletes text: 6 of 51 characters"),
        (normalizers.Lowercase(), "changes text: 2 of 51 characters"),
        (NO_ACCENTS, "changes text: 1 of 51 characters"),
    ],
)
def test_a_tokenizer_that_loses_text_is_noted(tokenizer, model, normalizer, words):
    text = "The cat sat on the mat, and the café's dog is by It"
    assert len(text) == 51
    changed = tokenizer if normalizer is None else altered(tokenizer, normalizer=normalizer)
    found = [note for note in evaluate(model, changed, [text]).notes if "the tokenizer" in note]
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


@pytest.mark.parametrize(
    ("text", "decoded", "lost"),
    [
        ("the cat", "the  cat ", (0, 0)),
        ("the cat", "he ca", (2, 0)),
        ("The Caf\u00e9", "the cafe", (0, 3)),
        ("\ufb01ne", "fine", (0, 1)),
        ("xTx", "t", (2, 1)),
    ],
)
def test_lost_characters(text, decoded, lost):
    assert lost_characters(text, decoded) == lost


def test_unknown_tokens_are_not_deleted_text():
    vocabulary = {"<unk>": 0, "the": 1, "cat": 2, "<s>": 3}
    words = Tokenizer(backends.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")
    got = evaluate(build_model(4), tokenizer, ["the zebra, the cat"])
    assert got.unknown_tokens == 2
    assert not any("the tokenizer deletes" in note for note in got.notes)


def test_a_slow_tokenizer_gives_an_estimate_and_says_so():
    """ByT5's tokens are bytes: the first one is one of five."""
    got = evaluate(build_model(400), ByT5Tokenizer(), ["hello", "world"], bos="never")
    assert (got.bytes, got.bytes_skipped, got.words) == (8, 2, 2)
    assert any("2 documents with skipped tokens are an estimate" in note for note in got.notes)


def test_bytes_of_token_files(model, tokenizer):
    """BOS and padding around a document are no text; a first token without context is."""
    ids = tokenizer(TEXTS[2])["input_ids"]
    bos = tokenizer.bos_token_id
    for around, policy in (([bos, *ids, bos], "auto"), (ids, "never"), ([bos, *ids], "never")):
        document = Document("d", "", ids=np.array(around))
        got = evaluate(model, tokenizer, [document], bos=policy)
        skipped = len("caf") if around is ids else 0
        assert (got.bytes_read, got.bytes_skipped) == (len(TEXTS[2].encode()), skipped)
    # Tokens that the tokenizer would not give for their text: an estimate.
    letters = np.concatenate([tokenizer(letter)["input_ids"] for letter in "the cat"])
    got = evaluate(model, tokenizer, [Document("d", "", ids=letters)], bos="never")
    assert (got.bytes, got.bytes_skipped) == (6, 1)
    assert any("an estimate" in note for note in got.notes)
