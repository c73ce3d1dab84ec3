"""A part of each document is scored: completions, spans and turns, beside lm-eval's own
log-likelihood and sums over full logits in float64.
"""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import build_model, build_tokenizer

from perplexity import compare, evaluate
from perplexity.errors import InputError
from perplexity.evaluation import Document, ReadOptions, read_documents

LONG = "the cat sat on the mat and the dog lay by the door " * 6  # more than the model's 64 tokens
PAIRS = {
    "plain": ("the cat", " sat on the mat"),
    "space": ("the cat ", "sat on the mat"),
    "line": ("the cat\n", "sat on the mat"),
    "straddled": ("the ca", "t sat on the mat"),
    "accents": ("caf", "\u00e9, na\u00efve, \u4f60\u597d"),
    "wide": ("caf\u00e9 \u4f60", "\u597d: bytes"),
    "empty": ("", "the cat sat"),
    "long": (LONG, "a loss of three nats"),
    "spelled": ("<s>the cat", " sat"),
}


def document(prompt: str, completion: str) -> Document:
    return Document(prompt + completion, spans=[(len(prompt), len(prompt) + len(completion))])


@torch.no_grad()
def sum_of(model, ids, first: int) -> float:
    """The float64 sum of the losses of ids[first:], from the model's own logits."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits[0].double()
    return torch.nn.functional.cross_entropy(
        logits[first - 1 : -1], torch.tensor(ids[first:]), reduction="sum"
    ).item()


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "eos"])
def lm_eval_model(request):
    """A tiny model with its tokenizer, and lm-eval's own wrapper around both."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = build_tokenizer(bos=request.param, eos=True)
    model = build_model(len(tokenizer))
    return model, tokenizer, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


@pytest.mark.parametrize("pair", PAIRS)
def test_completions_under_lm_eval_are_its_loglikelihood(lm_eval_model, pair):
    from lm_eval.api.instance import Instance

    model, tokenizer, harness = lm_eval_model
    prompt, completion = PAIRS[pair]
    request = Instance("loglikelihood", {}, (prompt, completion), 0)
    (theirs, _), *_ = harness.loglikelihood([request], disable_tqdm=True)
    got = evaluate(model, tokenizer, [document(prompt, completion)], protocol="lm-eval")
    # float32 logits on both sides
    assert got.per_document[0].nll == pytest.approx(-theirs, rel=1e-5)


@pytest.mark.parametrize("pair", ["plain", "space", "line", "straddled", "accents", "wide"])
def test_completions_are_cut_at_the_number_of_context_tokens(model, tokenizer, pair):
    """The oracle is the rule as it is written: the prompt's own tokens are the text's first ones,
    or white space moves, and then their number counts.
    """
    prompt, completion = PAIRS[pair]
    ids = tokenizer(prompt + completion)["input_ids"]
    own = tokenizer(prompt)["input_ids"]
    if own != ids[: len(own)]:
        own = tokenizer(prompt.rstrip())["input_ids"]
    expected = sum_of(model, [tokenizer.bos_token_id, *ids], 1 + len(own))
    got = evaluate(model, tokenizer, [document(prompt, completion)])
    assert got.tokens == len(ids) - len(own)
    assert got.loss == pytest.approx(expected / got.tokens, rel=1e-6)
    assert got.skipped == {"context": len(own)} and got.tokens_read == len(ids)
    # A token counts with all of its bytes, on the side that it belongs to.
    scored = tokenizer.decode(ids[len(own) :])
    assert (got.bytes, got.bytes_read) == (
        len(scored.encode()),
        len((prompt + completion).encode()),
    )
    assert got.bits_per_byte == pytest.approx(expected / got.bytes / math.log(2), rel=1e-6)


def test_a_prompt_that_ends_with_a_line_keeps_it_out_of_the_score(model, tokenizer):
    """Where the line's end is a token of the prompt, nothing but the completion is scored."""
    got = evaluate(model, tokenizer, [document("the cat\n", "sat on the mat")])
    assert (got.bytes, got.words) == (14, 4)


@pytest.mark.parametrize("protocol", ["sliding", "llama.cpp"])
@pytest.mark.parametrize("bos", ["auto", "never"])
def test_a_part_has_the_losses_of_the_whole(model, tokenizer, protocol, bos, tmp_path):
    """Windows are those of the whole document: a token's loss does not depend on what else is
    scored, and the counts add up.
    """
    import pyarrow.parquet as pq

    text = "caf\u00e9, " + LONG
    spans = [(0, 4), (text.index(" sat"), text.index(" mat"))]
    spans.append((text.index(" and", 120), text.rindex(" by")))
    options = dict(protocol=protocol, bos=bos, context_length=32)
    rows = {}
    for name, each in (("whole", None), ("part", spans)):
        got = evaluate(
            model,
            tokenizer,
            [Document("a", text, spans=each)],
            per_token=tmp_path / name,
            **options,
        )
        rows[name] = pq.read_table(tmp_path / name).to_pydict()
    whole = dict(zip(rows["whole"]["position"], rows["whole"]["nll"], strict=True))
    # These spans begin and end where tokens do.
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    asked = [
        place
        for place, (begin, end) in enumerate(offsets)
        if any(first <= begin and end <= last for first, last in spans)
    ]
    assert rows["part"]["position"] == [place for place in asked if place in whole]
    expected = [whole[place] for place in rows["part"]["position"]]
    # Other windows share the batch, whose float32 products round otherwise in the last bit.
    assert rows["part"]["nll"] == pytest.approx(expected, rel=1e-6)
    assert got.skipped["context"] == len(offsets) - len(asked)
    assert got.tokens_read == len(offsets) == got.tokens + got.tokens_skipped
    assert got.bytes_read == len(text.encode()) == got.bytes + got.bytes_skipped
    scored = [offsets[place] for place in rows["part"]["position"]]
    assert got.bytes == sum(len(text[begin:end].encode()) for begin, end in scored)


def test_a_long_context_is_cut_from_the_left(model, tokenizer):
    """lm-eval's window ends with the completion and holds the model's 64 positions."""
    prompt, completion = PAIRS["long"]
    ids = tokenizer(prompt + completion)["input_ids"]
    count = len(tokenizer(completion)["input_ids"])
    got = evaluate(model, tokenizer, [document(prompt, completion)], protocol="lm-eval")
    window = ids[-65:]
    assert got.tokens == count
    assert got.loss * count == pytest.approx(sum_of(model, window, 65 - count), rel=1e-6)


def test_a_completion_longer_than_the_window_rolls_on(model, tokenizer):
    whole = evaluate(model, tokenizer, [document("a", " " + LONG)], protocol="lm-eval")
    assert whole.tokens == len(tokenizer("a " + LONG)["input_ids"]) - 1 > 64
    assert whole.tokens_skipped == 1


def test_words_are_those_of_the_part(model, tokenizer):
    """An end of a span ends a word: of "mat</s>" the word "mat" is scored."""
    text = "Q: the cat\nA: sat on the mat</s>"
    got = evaluate(model, tokenizer, [Document(text, spans=[(14, 28)])])
    assert (got.words, got.bytes) == (4, 14)


def test_all_of_a_text_is_the_text(model, tokenizer):
    """Spans that cover a text are the text itself, in the fingerprint, too; overlaps count once."""
    text = "the cat sat"
    plain = evaluate(model, tokenizer, [text])
    for spans in ([(0, 11)], [(0, 5), (5, 11)], [(3, 11), (0, 7)], np.array([[0, 11]])):
        got = evaluate(model, tokenizer, [Document("0", text, spans=spans)])
        assert got.per_document == plain.per_document
        assert got.text_fingerprint == plain.text_fingerprint
    part = evaluate(model, tokenizer, [Document(text, spans=[(4, 6), (6, 9), (8, 11), (2, 2)])])
    assert part.tokens == len(tokenizer(text)["input_ids"]) - 2 and part.bytes == 8  # " cat sat"


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 12)], r"document 0: expected spans within its 11 characters, got \[0, 12\)"),
        ([(-1, 2)], r"within its 11 characters, got \[-1, 2\)"),
        ([(5, 4)], r"within its 11 characters, got \[5, 4\)"),
        ([5, 4], r"document 0: expected spans as pairs \[begin, end\), got \[5, 4\]"),
        ([(0, 1, 2)], "expected spans as pairs"),
        ([(0.0, 2.0)], "expected spans as pairs"),
        (7, "expected spans as pairs"),
        ([], "expected at least one token to score, got 1 document with 6 context"),
        ([(3, 3)], "with 6 context"),
    ],
)
def test_spans_that_cannot_be(model, tokenizer, spans, message):
    with pytest.raises(InputError, match=message):
        evaluate(model, tokenizer, [Document("the cat sat", spans=spans)])


def test_spans_are_of_text(model, tokenizer):
    with pytest.raises(InputError, match="document a: expected spans of a text, got spans of tok"):
        evaluate(model, tokenizer, [Document("a", "", ids=np.array([1, 2]), spans=[(0, 1)])])


def test_another_part_is_another_run(model, tokenizer, tmp_path):
    """A journal and a comparison refuse another part of the same text."""
    text = "the cat sat on the mat"
    first, second = (Document("a", text, spans=[span]) for span in ((7, 22), (11, 22)))
    one = evaluate(model, tokenizer, [first], journal=tmp_path / "journal")
    again = evaluate(model, tokenizer, [first], journal=tmp_path / "journal")
    assert again.per_document == one.per_document
    for other in (second, Document("a", text)):
        with pytest.raises(InputError, match="document 0"):
            evaluate(model, tokenizer, [other], journal=tmp_path / "journal")
        with pytest.raises(InputError, match="expected one text for both"):
            compare(one, evaluate(model, tokenizer, [other]))


def test_parts_compare_across_tokenizers(model, tokenizer):
    """Two tokenizers compare by bits per byte over a part, also where a token of one straddles the
    end of the context: the alignment starts at the context's end.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE(vocab=tokenizer.get_vocab() | {"<s>": 0}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    other = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>")
    prompts = [LONG[:120] + "the mat", LONG[:80] + "the ca"]  # the second cuts "cat"
    documents = [
        document(prompts[0], " and the dog lay by the door"),
        document(prompts[1], "t sat on the mat and the dog lay"),
    ]
    one = evaluate(model, tokenizer, documents)
    two = evaluate(model, other, documents)
    assert one.bytes != two.bytes
    got = compare(one, two, measure="bits-per-byte")
    # The bytes that both scored: the second document without the rest of "cat".
    end = len(documents[1].text)
    begin = len(prompts[1]) + 1
    without = evaluate(
        model, other, [documents[0], Document(documents[1].text, spans=[(begin, end)])]
    )
    # Losses of first tokens are kept to 7 digits.
    assert (got.a, got.b) == pytest.approx((one.bits_per_byte, without.bits_per_byte), rel=1e-6)
    assert got.pairs == 2
    with pytest.raises(InputError, match="tokenizer"):
        compare(one, two)


TEMPLATES = {
    "chatml": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}",
    "stripped": "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} </s>{% endfor %}",
    "bare": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "last": "{{ messages[0].content }}{% for m in messages[1:] %}: {{ m.content }}{% endfor %}",
}
CONVERSATION = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": " sat on the mat\n"},
    {"role": "user", "content": "sat on the mat"},
    {"role": "assistant", "content": "and the dog"},
]


@pytest.mark.parametrize("score_special", [None, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_assistants_turns_are_scored(model, score_special, template):
    """The oracle cuts the rendered text by hand, with markers in the template."""
    tokenizer = build_tokenizer(bos=True, eos=True)
    tokenizer.chat_template = TEMPLATES[template]
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    # From the right: the user says the same as the assistant.
    last = text.rindex("and the dog")
    content = CONVERSATION[1]["content"]
    content = content.strip() if template == "stripped" else content
    first = text.index(content, text.index("the cat") + 7)
    spans = [(first, first + len(content)), (last, last + len("and the dog"))]
    spans = [
        (begin, text.index("</s>", end) + 4 if text[end:].lstrip(" ").startswith("</s>") else end)
        for begin, end in spans
    ]
    expected = evaluate(
        model, tokenizer, [Document("a", text, spans=spans)], score_special=score_special
    )
    got = evaluate(
        model, tokenizer, [Document("a", messages=CONVERSATION)], score_special=score_special
    )
    assert got.per_document == expected.per_document
    assert got.text_fingerprint == expected.text_fingerprint
    whole = evaluate(model, tokenizer, [text], score_special=score_special)
    assert 0 < got.tokens < whole.tokens
    everything = evaluate(
        model,
        tokenizer,
        [{"messages": CONVERSATION}],
        score="all",
        score_special=score_special,
    )
    assert everything.loss == whole.loss


def test_a_template_cannot_lose_a_turn(model):
    tokenizer = build_tokenizer(bos=True)
    messages = Document("a", messages=CONVERSATION)
    with pytest.raises(InputError, match="expected one with a chat template"):
        evaluate(model, tokenizer, [messages])
    for template, message in (
        ("{{ messages[1].content }}", "writes 1 of 2 assistant turns"),
        ("{{ raise_exception('no') }}", "one that refuses them .*no"),
        ("{{ messages[1].content[:3] }} {{ messages[3].content }}", "of 2 assistant turns"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=message):
            evaluate(model, tokenizer, [messages])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("hi", "document a, message 0: expected an object with role and content, got 'hi'"),
        ({"content": "hi"}, "expected an object with role and content"),
        ({"role": "user"}, "document a, message 0: expected a string as content, got NoneType"),
        ({"role": "user", "content": [{"type": "image"}]}, "expected a string as content"),
    ],
)
def test_messages_that_cannot_be(model, message, error):
    tokenizer = build_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATES["bare"]
    with pytest.raises(InputError, match=error):
        evaluate(model, tokenizer, [Document("a", messages=[message])])


def test_score_says_what_counts(model, tokenizer):
    prompt, completion = PAIRS["plain"]
    text = prompt + completion
    pair = document(prompt, completion)
    row = {"prompt": prompt, "completion": completion, "domain": "news", "id": 7}
    part = evaluate(model, tokenizer, [pair])
    assert part.tokens == len(tokenizer(text)["input_ids"]) - len(tokenizer(prompt)["input_ids"])
    for documents, score in (
        ([row], "auto"),
        ([row], "completion"),
        ([row | {"text": "other"}], "completion"),
        ([pair], "spans"),
        ([pair], "completion"),
        ([{"text": text, "spans": [[7, 22]]}], "spans"),
        ([text], lambda document: [(document.text.index(" sat"), len(document.text))]),
    ):
        got = evaluate(model, tokenizer, documents, score=score)
        assert (got.loss, got.text_fingerprint) == (part.loss, part.text_fingerprint)
    got = evaluate(model, tokenizer, [row])
    assert (got.per_document[0].id, got.per_document[0].domain) == ("7", "news")
    whole = evaluate(model, tokenizer, [text])
    for documents in ([row], [pair], [{"text": text, "spans": [[7, 22]]}]):
        assert evaluate(model, tokenizer, documents, score="all").loss == whole.loss


@pytest.mark.parametrize(
    ("given", "score", "message"),
    [
        (
            "the cat",
            "completion",
            "score: 'completion' needs documents with spans, got one .* at 0",
        ),
        ("the cat", "assistant", "score: 'assistant' needs documents with messages"),
        ("the cat", "half", "score: expected one of auto, all, spans, completion, assistant"),
        ({"content": "a"}, "auto", "document 0: expected a string 'text', got only 'content'"),
        ({"prompt": "a"}, "completion", "expected a string 'completion', got only 'prompt'"),
        ({"messages": "a"}, "auto", "expected a list 'messages', got str"),
        ({"text": "a"}, "spans", "expected spans in 'spans', got none"),
        (
            {"text": "a", "spans": "a"},
            "auto",
            r"expected a list of \[begin, end\) 'spans', got str",
        ),
        ({"prompt": 1, "completion": ""}, "auto", "expected a string 'prompt', got int"),
        ("the cat", lambda document: [(0, 99)], "within its 7 characters"),
        ("the cat", lambda document: 1 / 0, "score: expected spans of document 0.*division"),
    ],
)
def test_scores_that_cannot_be(model, tokenizer, given, score, message):
    with pytest.raises(InputError, match=message):
        evaluate(model, tokenizer, [given], score=score)


ROWS = [
    {
        "q": "the cat",
        "a": " sat on the mat",
        "messages": CONVERSATION,
        "text": "the cat",
        "at": [[0, 3]],
    },
    {
        "q": "the dog",
        "a": " lay by the door",
        "messages": CONVERSATION,
        "text": "a dog",
        "at": [[1, 5]],
    },
]
NAMES = dict(prompt_column="q", completion_column="a", spans_column="at")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
@pytest.mark.parametrize("score", ["auto", "all", "spans", "completion", "assistant"])
def test_columns_of_every_format(tmp_path, kind, score):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet as pq

        pq.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        import datasets

        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    got = list(read_documents([path], ReadOptions(score=score, **NAMES)))
    assert len(got) == 2
    for document, row in zip(got, ROWS, strict=True):
        if score == "assistant":
            assert document.messages == row["messages"] and document.spans is None
        elif score == "completion":
            assert document.text == row["q"] + row["a"]
            assert document.spans == [(7, len(document.text))]
        else:
            assert document.text == row["text"]
            assert document.spans == (None if score == "all" else row["at"])


def test_the_command_scores_completions(tmp_path, ppl_here, capsys):
    """What a user with prompts and completions gets, and the value of the model's own logits."""
    tokenizer = build_tokenizer(bos=True)
    model = build_model(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"q": "the cat", "a": " sat on the mat"}))
    out = tmp_path / "out.json"
    command = ["eval", str(tmp_path / "model"), str(tmp_path / "pairs.jsonl")]
    names = ["--prompt-column", "q", "--completion-column", "a"]
    assert ppl_here(*command, *names, "--json", str(out)).returncode == 0
    result = json.loads(out.read_text())
    context = tokenizer("the cat")["input_ids"]
    ids = [tokenizer.bos_token_id, *context, *tokenizer(" sat on the mat")["input_ids"]]
    first = 1 + len(context)
    assert result["loss"] == pytest.approx(sum_of(model, ids, first) / (len(ids) - first), rel=1e-6)
    assert (result["tokens"], result["bytes"], result["words"]) == (len(ids) - first, 15, 4)
    failed = ppl_here(*command)
    assert failed.returncode == 2
    assert "--text-column" in failed.stderr and "only 'q', 'a'" in failed.stderr
