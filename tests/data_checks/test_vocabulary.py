"""The tokenizer beside the text: unknown tokens, ids beyond the embedding, lost text, and what it
is told by.
"""

import json

import pytest
from tiny_models import TEXTS, build_tokenizer

from perplexity.data_checks import Text, check_data
from perplexity.fingerprints import tokenizer_fingerprint

FILLER = "\n".join(f"the cat sat on the mat number {number}" for number in range(50))


def words_tokenizer(**options):
    """Whole words, and one token for all others."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("the", "cat", "sat", "on", "mat", "and", "dog", "lay", "by", "door")
    vocabulary = {"<unk>": 0} | {word: number + 1 for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if options.pop("lower", False):
        tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


def signals(check):
    return {finding.signal: finding for finding in check.findings}


def test_unknown_tokens_are_counted_by_domain_and_document():
    valid = [
        Text("a", "the cat sat on the mat", "home"),
        Text("b", "the zebra sat by the zebra", "zoo"),
        Text("c", "lion", "zoo"),
    ]
    check = check_data([FILLER], valid, tokenizer=words_tokenizer())
    assert check.unknown_token_rate == pytest.approx(3 / 13) and check.token_unit == "tokens"
    assert check.tokens["unknown_by_domain"] == {"home": 0.0, "zoo": pytest.approx(3 / 7)}
    assert [row["id"] for row in check.tokens["worst_documents"]] == ["c", "b"]
    finding = signals(check)["unknown-tokens"]
    assert (
        finding.severity == "danger"
        and "zoo" in finding.evidence
        and "c (100.0%)" in finding.evidence
    )
    assert "unknown-tokens" not in signals(
        check_data([FILLER], valid[:1], tokenizer=words_tokenizer())
    )
    assert (
        check_data([FILLER], ["zebra"], tokenizer=build_tokenizer(bos=True)).unknown_token_rate
        == 0.0
    )


def test_unknown_tokens_are_counted_where_padding_is_the_unknown_token():
    check = check_data([FILLER], ["the zebra sat"], tokenizer=words_tokenizer(pad_token="<unk>"))
    assert check.unknown_token_rate == pytest.approx(1 / 3)
    assert (
        "1 of 3 validation tokens (33.33%) is <unk>;" in signals(check)["unknown-tokens"].evidence
    )


def test_ids_beyond_the_embedding():
    tokenizer = build_tokenizer(bos=True)
    tokenizer.add_tokens(["zebra"])
    size = len(tokenizer)
    danger = signals(check_data([FILLER], ["a zebra"], tokenizer=tokenizer, embedding=size - 1))[
        "ids-beyond-embedding"
    ]
    assert danger.severity == "danger" and danger.numbers == dict(beyond=1, embedding=size - 1)
    warning = signals(check_data([FILLER], ["a cat"], tokenizer=tokenizer, embedding=size - 1))[
        "ids-beyond-embedding"
    ]
    assert warning.severity == "warning"
    assert "ids-beyond-embedding" not in signals(
        check_data([FILLER], ["a zebra"], tokenizer=tokenizer, embedding=size)
    )


def test_tokens_that_training_never_had():
    valid = ["the dog lay by the door"] * 2 + ["the cat sat on the mat"] * 10
    finding = signals(check_data([FILLER], valid, tokenizer=words_tokenizer()))["unseen-tokens"]
    assert finding.numbers == dict(unseen=8, kinds=4) and finding.severity == "warning"
    assert "unseen-tokens" not in signals(
        check_data([FILLER], valid[2:], tokenizer=words_tokenizer())
    )


def test_training_is_sampled_over_all_of_it():
    """What comes late is as likely to be met as what comes first."""
    train = [Text(str(number), "the cat" if number < 500 else "a dog") for number in range(1000)]
    check = check_data(
        train, ["the cat", "a dog"], tokenizer=build_tokenizer(bos=True), train_bytes=500
    )
    assert 100 <= check.tokens["train_sampled"]["bytes"] <= 500
    assert "unseen-tokens" not in signals(check)


def test_text_that_does_not_come_back():
    check = check_data([FILLER], ["The CAT sat"], tokenizer=words_tokenizer(lower=True))
    assert "'The CAT sat' became 'the cat sat'" in signals(check)["round-trip-loss"].evidence
    assert "round-trip-loss" not in signals(
        check_data([FILLER], ["The CAT sat"], tokenizer=build_tokenizer(bos=True))
    )


def test_bytes_a_token():
    check = check_data([TEXTS[0] * 20], ["xq zv kj wq " * 20], tokenizer=build_tokenizer(bos=True))
    finding = signals(check)["tokenizer-fit"]
    assert finding.numbers["valid"] < 0.8 * finding.numbers["train"]
    assert check.tokens["bytes_per_token"]["valid"] == finding.numbers["valid"]


def test_a_fingerprint_is_stable_and_tells_tokenizers_apart(tmp_path, monkeypatch):
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(bos=True)
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "first")
    by_path = AutoTokenizer.from_pretrained(tmp_path / "first")
    by_path.save_pretrained(tmp_path / "second")
    monkeypatch.chdir(tmp_path)
    for loaded in (
        by_path,
        AutoTokenizer.from_pretrained("second"),
        AutoTokenizer.from_pretrained("./first"),
    ):
        loaded("used", padding=False)
        loaded("and cut", truncation=True, max_length=3)
        loaded.pad_token = "<s>"
        assert tokenizer_fingerprint(loaded) == fingerprint

    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    slow.save_pretrained(tmp_path / "slow")
    assert tokenizer_fingerprint(slow) == tokenizer_fingerprint(
        ByT5Tokenizer.from_pretrained(tmp_path / "slow")
    )

    def other(change):
        copy = AutoTokenizer.from_pretrained(tmp_path / "first")
        copy = change(copy) or copy
        return tokenizer_fingerprint(copy)

    def fewer_merges(_):
        state = json.loads((tmp_path / "first" / "tokenizer.json").read_text())
        state["model"]["merges"] = state["model"]["merges"][:-1]
        (tmp_path / "second" / "tokenizer.json").write_text(json.dumps(state))
        return AutoTokenizer.from_pretrained(tmp_path / "second")

    changes = [
        lambda copy: copy.add_tokens(["zebra"]) and None,
        lambda copy: copy.add_special_tokens({"pad_token": "<pad>"}) and None,
        lambda copy: setattr(copy.backend_tokenizer, "normalizer", normalizers.Lowercase()),
        fewer_merges,
        lambda _: build_tokenizer(bos=True, eos=True),
        lambda _: words_tokenizer(),
    ]
    found = [other(change) for change in changes]
    assert len({fingerprint, *found}) == len(changes) + 1
