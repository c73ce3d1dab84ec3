"""Prompts of files and their tokens: one BOS, references after prompts, notes on what is cut."""

import gzip
import json

import numpy as np
import pytest
from tiny_models import TEXTS, build_tokenizer

from perplexity.errors import InputError
from perplexity.probe import GenerationSettings, Prompt, read_prompts
from perplexity.probe.prompts import spread, tokenize


def read(path, **options):
    return list(read_prompts(path, **options))


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_objects(tmp_path):
    path = lines(
        tmp_path / "p.jsonl",
        {"id": 7, "prompt": "a", "reference": "b"},
        {"prompt": "c", "reference": ["d", "", "e"]},
        {"prompt": "", "reference": None},
        {"text": "a whole document"},
    )
    assert read(path) == [
        Prompt("7", "a", ("b",)),
        Prompt("p.jsonl:2", "c", ("d", "e")),
        Prompt("p.jsonl:3", ""),
        Prompt("p.jsonl:4", "a whole document", document=True),
    ]
    named = lines(tmp_path / "q.jsonl", {"question": "a", "answer": "b", "text": "c"})
    assert read(named, prompt_column="question", reference_column="answer") == [
        Prompt("q.jsonl:1", "a", ("b",))
    ]


def test_lines_of_text_and_documents(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\ntwo, \n".encode())
    assert [p.text for p in read(tmp_path / "p.txt")] == ["one", "two, "]
    with gzip.open(tmp_path / "p.txt.gz", "wt") as file:
        file.write("three\n")
    assert [p.text for p in read(tmp_path / "p.txt.gz")] == ["three"]
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["x y", "z"]}), tmp_path / "d.parquet")
    assert [(p.text, p.document) for p in read(tmp_path / "d.parquet")] == [
        ("x y", True),
        ("z", True),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "expected a file of prompts, got no such file"),
        ("a.txt", "\n \n", "expected prompts, got an empty file"),
        ("a.txt", b"\xff", "line 1: expected UTF-8, got byte 0xff"),
        ("a.jsonl", "", "expected text, got an empty file"),
        ("a.jsonl", "[1]\n", "line 1: expected an object with a string 'prompt'"),
        ("a.jsonl", '{"q": 1}\n', "line 1: expected a string 'prompt', got only 'q'"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: expected a string 'prompt', got int"),
        (
            "a.jsonl",
            '{"prompt": "\\ud800"}\n',
            "line 1: expected Unicode text, got a lone surrogate at character 0",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "reference": 3}\n',
            "line 1: expected a text or a list of texts in 'reference'",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "reference": [3]}\n',
            "line 1: expected a text or a list of texts in 'reference'",
        ),
        ("a.xlsx", "prompt\n", "expected a name that ends in"),
        ("a.npy", "", "expected a whole .npy file"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        read(path)
    assert words in str(error.value) and name in str(error.value)


def test_token_files_are_no_prompts(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(50))
    with pytest.raises(InputError, match="expected text to cut prompts from, got tokens"):
        read(tmp_path / "a.npy")


def test_spread_is_even_and_whole():
    prompts = [Prompt(str(k), "x") for k in range(10)]
    assert spread(prompts, 10) == prompts == spread(prompts, 99)
    assert [p.id for p in spread(prompts, 4)] == ["0", "3", "6", "9"]
    assert [p.id for p in spread(prompts, 1)] == ["0"]


SETTINGS = GenerationSettings(max_new_tokens=20, prompt_tokens=8)


def test_a_document_is_cut_in_its_own_tokens():
    tokenizer = build_tokenizer(bos=True)
    text = TEXTS[0] * 3
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    (asked,), short = tokenize(tokenizer, [Prompt("d", text, document=True)], SETTINGS, 64)
    assert short == 0 and asked.ids.tolist() == ids[:9] and asked.reference.tolist() == ids[9:29]
    assert asked.references == (tokenizer.decode(ids[9:29]),) and asked.cut and not asked.shortened
    assert tokenize(tokenizer, [Prompt("d", text[:20], document=True)], SETTINGS, 64) == ([], 1)
    without = build_tokenizer(bos=False)
    (asked,), _ = tokenize(without, [Prompt("d", text, document=True)], SETTINGS, 64)
    assert asked.ids.tolist() == without(text)["input_ids"][:8]


def test_a_reference_follows_its_prompt():
    tokenizer = build_tokenizer(bos=True)
    whole = tokenizer("the cat sat on the mat")["input_ids"]
    for prompt, reference in (
        ("the cat", "sat on the mat"),
        ("the cat", " sat on the mat"),
        ("the cat ", "sat on the mat"),
    ):
        (asked,), _ = tokenize(
            tokenizer, [Prompt("p", prompt, (reference, "another"))], SETTINGS, 64
        )
        assert tokenizer.decode([*asked.ids[1:], *asked.reference]) == "the cat sat on the mat"
        if prompt == "the cat":
            assert [*asked.ids[1:], *asked.reference] == whole
        assert (
            asked.ids[0] == tokenizer.bos_token_id
            and list(asked.ids).count(tokenizer.bos_token_id) == 1
        )
        assert asked.references == (reference, "another") and not asked.cut


def test_a_prompt_too_long_loses_its_beginning_not_its_bos():
    tokenizer = build_tokenizer(bos=True)
    text = " ".join(TEXTS[0].split() * 9)
    (asked,), _ = tokenize(tokenizer, [Prompt("p", text)], SETTINGS, 64)
    ids = tokenizer(text)["input_ids"]
    assert asked.shortened and asked.ids.tolist() == [tokenizer.bos_token_id, *ids[-43:]]


def test_an_empty_prompt_needs_a_bos():
    (asked,), _ = tokenize(build_tokenizer(bos=True), [Prompt("p", "")], SETTINGS, 64)
    assert len(asked.ids) == 1 and len(asked.reference) == 0
    with pytest.raises(InputError, match="prompt p: expected at least one token, got none"):
        tokenize(build_tokenizer(bos=False), [Prompt("p", "")], SETTINGS, 64)


def test_a_limit_that_leaves_no_room():
    with pytest.raises(InputError, match="max_new_tokens: expected at most 19"):
        tokenize(build_tokenizer(bos=True), [Prompt("p", "a")], SETTINGS, 20)


def test_chat():
    tokenizer = build_tokenizer(bos=True)
    chat = GenerationSettings(max_new_tokens=20, chat=True)
    with pytest.raises(InputError, match="chat: expected a tokenizer with a chat template"):
        tokenize(tokenizer, [Prompt("p", "hello")], chat, 64)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}:\n{% endfor %}"
    (asked,), _ = tokenize(tokenizer, [Prompt("p", "hello", ("you",))], chat, 64)
    assert (
        tokenizer.decode(asked.ids) == "<s>hello:\n" and tokenizer.decode(asked.reference) == "you"
    )
    with pytest.raises(
        InputError, match="prompt d: expected a prompt for --chat, got a document to cut"
    ):
        tokenize(tokenizer, [Prompt("d", TEXTS[0] * 3, document=True)], chat, 64)
    (asked,), _ = tokenize(tokenizer, [Prompt("p", "the cat " * 50)], chat, 64)
    decoded = tokenizer.decode(asked.ids)
    assert (
        asked.shortened
        and len(asked.ids) <= 44
        and decoded.startswith("<s>")
        and decoded.endswith("the cat :\n")
    )
    tokenizer.chat_template = "{{ 'header ' * 99 }}{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="max_new_tokens: expected room for the chat template"):
        tokenize(tokenizer, [Prompt("p", "the cat")], chat, 64)
