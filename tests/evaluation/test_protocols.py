"""Each protocol gives its tool's number: the real lm-eval, the Hugging Face guide's algorithm,
llama.cpp's formula.
"""

import copy
import json
import math
import os

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity import evaluate
from perplexity.errors import InputError
from perplexity.evaluation import Document
from perplexity.scoring import protocols

LONG = [" ".join([TEXTS[i % 3]] * (2 + 5 * i)) for i in range(5)]
SPELLED = "the cat<s> sat on<s> the mat<s><s> and the dog" * 4  # special tokens in a text
LM_EVAL_TEXTS = [*LONG, SPELLED]


def logits_of(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].double()


def hugging_face_guide(model, ids: list[int], max_length: int, stride: int) -> tuple[float, int]:
    """The guide's loop with its two known faults mended: sums instead of a mean of means, and no
    token skipped.

    trg_len counts the new tokens of a window; the label at a window's first position cannot be
    predicted in it, so the guide loses one token a window unless the windows overlap by one: they
    always do here.
    """
    total, count, previous_end = 0.0, 0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        target_length = end - previous_end
        window = ids[begin:end]
        log_probability = logits_of(model, window).log_softmax(-1)
        for place in range(len(window) - target_length, len(window)):
            total -= log_probability[place - 1, window[place]].item()
            count += 1
        previous_end = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize(("max_length", "stride"), [(64, 32), (32, 31), (48, 7)])
def test_sliding_is_the_guides(model, tokenizer, max_length, stride):
    for words in (1, 5, 31, 32, 33, 60, 64, 65, 200, 201):
        ids = tokenizer(" ".join((TEXTS * 20)[:60]))["input_ids"][:words]
        expected, count = hugging_face_guide(
            model, [tokenizer.bos_token_id, *ids], max_length, stride
        )
        got = evaluate(
            model,
            tokenizer,
            [Document("d", "", ids=np.array(ids))],
            context_length=max_length,
            stride=stride,
        )
        assert got.tokens == count == len(ids)
        assert got.loss == pytest.approx(expected / count, rel=1e-6)


def llama_cpp(model, ids: list[int], context: int, bos: int | None) -> tuple[float, int]:
    """perplexity.cpp: chunks of n_ctx; BOS in the first place; tokens n_ctx/2 + 1 to n_ctx − 1
    scored; the tail dropped.
    """
    total, count = 0.0, 0
    first = context // 2
    for chunk in range(len(ids) // context):
        window = list(ids[chunk * context : (chunk + 1) * context])
        if bos is not None:
            window[0] = bos
        log_probability = logits_of(model, window).log_softmax(-1)
        for place in range(first, context - 1):
            total -= log_probability[place, window[place + 1]].item()
            count += 1
    return total, count


@pytest.mark.parametrize("bos", ["always", "never"])
@pytest.mark.parametrize("context", [16, 33])
def test_llama_cpp(model, tokenizer, context, bos):
    ids = tokenizer(LONG[4])["input_ids"]
    start = tokenizer.bos_token_id if bos == "always" else None
    stream = ids if start is None else [start, *ids]
    expected, count = llama_cpp(model, stream, context, start)
    got = evaluate(
        model, tokenizer, [LONG[4]], protocol="llama.cpp", context_length=context, bos=bos
    )
    assert got.tokens == count
    assert got.loss == pytest.approx(expected / count, rel=1e-6)
    assert got.tokens_read == len(ids) == got.tokens + got.tokens_skipped
    assert got.skipped.get("tail", 0) == len(stream) % context
    assert got.skipped["first-half"] == len(ids) - count - got.skipped.get("tail", 0)
    # Bytes are those of the scored part, or bits per byte would be half of what they are.
    scored = [
        stream[begin + place]
        for begin in range(0, len(stream) - context + 1, context)
        for place in range(context // 2 + 1, context)
    ]
    assert got.bytes == len(tokenizer.decode(scored)) and got.bytes_read == len(LONG[4])


def test_llama_cpp_takes_512_and_says_when_a_text_is_too_short(model, tokenizer):
    with pytest.raises(
        InputError, match=r"context_length: expected 2 to 64, the model's limit, got 512"
    ):
        evaluate(model, tokenizer, [LONG[4]], protocol="llama.cpp")
    with pytest.raises(InputError, match="1 document with .* tail"):
        evaluate(model, tokenizer, ["the cat"], protocol="llama.cpp", context_length=64)


def test_llama_cpp_goes_by_what_the_tokenizer_does(model, tokenizer):
    """Its converter writes the add_bos flag from the tokenizer: one that adds no BOS by itself gets
    none.
    """
    auto = evaluate(model, tokenizer, [LONG[4]], protocol="llama.cpp", context_length=32)
    never = evaluate(
        model, tokenizer, [LONG[4]], protocol="llama.cpp", context_length=32, bos="never"
    )
    assert auto.loss == never.loss


@pytest.fixture(scope="module")
def lm_eval_results(tmp_path_factory):
    """The real lm-eval on a saved tiny model and a local task: its HF model, rolling
    log-likelihoods, its three metrics.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("lm_eval")
    results = {}
    for bos in (True, False):
        tokenizer = build_tokenizer(bos, eos=True)
        model = build_model(len(tokenizer))
        model.save_pretrained(folder / f"model{bos}")
        tokenizer.save_pretrained(folder / f"model{bos}")
        lines = [json.dumps({"text": text}) + "\n" for text in LM_EVAL_TEXTS]
        (folder / "texts.jsonl").write_text("".join(lines))
        (folder / "local_task.yaml").write_text(
            "task: local_text\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}\n"
            "test_split: test\n"
            "output_type: loglikelihood_rolling\n"
            'doc_to_text: ""\n'
            'doc_to_target: "{{text}}"\n'
            "metric_list:\n"
            "  - metric: word_perplexity\n"
            "  - metric: byte_perplexity\n"
            "  - metric: bits_per_byte\n"
        )
        out = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder}/model{bos},dtype=float32",
            tasks=["local_text"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            device="cpu",
            batch_size=2,
            log_samples=True,
            bootstrap_iters=0,
        )
        results[bos] = folder / f"model{bos}", out
    return results


@pytest.mark.parametrize("bos", [True, False])
def test_lm_eval(lm_eval_results, bos):
    """Its loss in nats, document by document, to 1e-6, and so word and byte perplexity and bits per
    byte.
    """
    from perplexity import models

    folder, out = lm_eval_results[bos]
    model, tokenizer = models.load(folder, dtype="float32")
    assert (tokenizer.bos_token_id is not None) == bos
    got = evaluate(model, tokenizer, LM_EVAL_TEXTS, protocol="lm-eval")
    assert got.context_length == 64 and got.tokens_skipped == 0
    samples = sorted(out["samples"]["local_text"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(LM_EVAL_TEXTS)
    for sample, score in zip(samples, got.per_document, strict=True):
        assert score.nll == pytest.approx(-sample["filtered_resps"][0], rel=1e-6)
    theirs = out["results"]["local_text"]
    assert got.word_perplexity == pytest.approx(theirs["word_perplexity,none"], rel=1e-6)
    assert got.byte_perplexity == pytest.approx(theirs["byte_perplexity,none"], rel=1e-6)
    assert got.bits_per_byte == pytest.approx(theirs["bits_per_byte,none"], rel=1e-6)


@pytest.mark.parametrize("protocol", ["sliding", "lm-eval", "llama.cpp"])
def test_tokens_scored_and_skipped_are_the_tokens_read(model, tokenizer, protocol):
    texts = [*LONG, "", "a", "<s>the cat<s> sat<s>"]
    got = evaluate(model, tokenizer, texts, protocol=protocol, context_length=16)
    assert got.tokens_read == sum(
        len(tokenizer(text, split_special_tokens=protocol == "llama.cpp")["input_ids"])
        for text in texts
    )
    assert got.tokens + sum(got.skipped.values()) == got.tokens_read
    assert got.tokens_skipped == sum(got.skipped.values())


def test_special_tokens_are_scored_only_where_asked(model, tokenizer):
    text = "the cat<s> sat on<s>"
    plain = evaluate(model, tokenizer, [text])
    asked = evaluate(model, tokenizer, [text], score_special=True)
    assert plain.skipped == {"special": 2} and asked.skipped == {}
    assert asked.tokens == plain.tokens + 2
    # lm-eval scores what the text spells.
    assert evaluate(model, tokenizer, [text], protocol="lm-eval").skipped == {}


@pytest.mark.parametrize("spelled", ["<s>", "<zebra>"])
def test_llama_cpp_reads_special_tokens_in_a_text_as_text(tokenizer, spelled):
    """llama-perplexity leaves parse_special off: control tokens are text, users' own are tokens."""
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["<zebra>"])  # no special token
    model = build_model(len(changed))
    text = SPELLED.replace("<s>", spelled)
    plain = changed(text, split_special_tokens=True)["input_ids"]
    parsed = changed(text)["input_ids"]
    assert (plain == parsed) == (spelled == "<zebra>")
    expected, count = llama_cpp(model, plain, 16, None)
    got = evaluate(model, changed, [text], protocol="llama.cpp", context_length=16)
    assert (got.tokens, got.tokens_read, got.special_text) == (count, len(plain), "text")
    assert got.loss == pytest.approx(expected / count, rel=1e-6)


@pytest.mark.parametrize("special_text", ["tokens", "text"])
def test_sliding_reads_special_tokens_in_a_text_as_asked(model, tokenizer, special_text):
    got = evaluate(model, tokenizer, [SPELLED], special_text=special_text)
    ids = tokenizer(SPELLED, split_special_tokens=special_text == "text")["input_ids"]
    assert (got.special_text, got.tokens_read) == (special_text, len(ids))
    assert got.skipped == ({"special": 16} if special_text == "tokens" else {})
    if special_text == "tokens":  # by default, and after a call that read text
        assert evaluate(model, tokenizer, [SPELLED]).loss == got.loss
    expected, count = hugging_face_guide(model, [tokenizer.bos_token_id, *ids], 64, 32)
    scored = evaluate(model, tokenizer, [SPELLED], special_text=special_text, score_special=True)
    assert scored.tokens == count and scored.loss == pytest.approx(expected / count, rel=1e-6)


def test_a_tokenizer_of_another_library_reads_special_tokens_as_tokens(tokenizer):
    """It need not know transformers' ``split_special_tokens``."""
    assert protocols._special_text("sliding", object(), None) == "tokens"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(protocol="llama.cpp", special_text="tokens"),
            "expected 'text', which is how llama.cpp",
        ),
        (dict(protocol="lm-eval", special_text="text"), "expected 'tokens', which is how lm-eval"),
        (dict(special_text="words"), "special_text: expected one of tokens, text, got 'words'"),
        (dict(protocol="lm-eval", bos="never"), "bos: lm-eval"),
        (
            dict(protocol="lm-eval", stride=5),
            "stride: expected none, lm-eval moves on by its context length, got 5",
        ),
        (dict(bos="twice"), "bos: expected one of auto, always, never, got 'twice'"),
    ],
)
def test_a_protocols_rules_cannot_be_bent(model, tokenizer, arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate(model, tokenizer, TEXTS, context_length=16, **arguments)


def test_always_needs_a_bos_token():
    tokenizer = build_tokenizer(bos=False)
    with pytest.raises(
        InputError, match="bos: 'always' was asked for, but the tokenizer has no BOS"
    ):
        evaluate(build_model(len(tokenizer)), tokenizer, TEXTS, bos="always")
    with pytest.raises(InputError, match="tokenizer: expected a BOS or EOS token"):
        evaluate(build_model(len(tokenizer)), tokenizer, TEXTS, protocol="lm-eval")


def test_never_leaves_the_first_token_without_a_context(model, tokenizer):
    got = evaluate(model, tokenizer, TEXTS, bos="never")
    assert got.skipped == {"no-context": 3}
    assert math.isfinite(got.loss)
