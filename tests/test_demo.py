"""Command ``ppl demo`` in a few steps, its evaluation compared with full logits."""

import json
import math
import re

import pytest
import torch
from test_cli import ppl

from perplexity.cli import demo_model, demo_run
from perplexity.errors import InputError


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = ppl("demo", "--out", folder, "--steps", 6)
    assert done.returncode == 0, done.stderr
    assert "overlap that remains: none" in done.stdout
    assert "as if choosing among about" in done.stdout
    return folder


def test_it_leaves_everything(out):
    for name in (
        "model/model.safetensors",
        "model/tokenizer.json",
        "history.jsonl",
        "history.csv",
        "evaluation.json",
        "diagnosis.json",
        "curves.png",
        "report.html",
    ):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "tensorboard").glob("events.out.*"))
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == list(range(1, 7))
    measured = [row for row in history if "val_loss" in row]
    assert measured and all(
        row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"])) for row in measured
    )
    assert history[-1]["val_loss"] < history[0]["val_loss"] < 1.1 * math.log(demo_model.VOCABULARY)


def test_tensorboard_holds_loss_and_perplexity(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/perplexity", "eval/loss", "eval/perplexity"} <= set(
        events.Tags()["scalars"]
    )


def test_ppl_eval_of_its_model_equals_full_logits(out, tmp_path, ppl_here):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = ppl_here(
        "eval",
        out / "model",
        out / "validation.jsonl",
        "--context-length",
        200,
        "--stride",
        150,
        "--json",
        tmp_path / "r",
    )
    assert done.returncode == 0, done.stderr
    got = json.loads((tmp_path / "r").read_text())
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    total, count = 0.0, 0
    for line in (out / "validation.jsonl").read_text().splitlines():
        ids = torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"])
        ids = torch.cat([torch.tensor([tokenizer.bos_token_id]), ids])
        done_until, begin = 1, 0
        while done_until < len(ids):
            end = min(len(ids), begin + 200)
            window = ids[begin:end]
            with torch.no_grad():
                logits = model(window[None]).logits[0].double()
            nll = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
            total += nll[-(end - done_until) :].sum().item()
            count += end - done_until
            done_until, begin = end, begin + 150
    assert got["tokens"] == count
    assert got["loss"] == pytest.approx(total / count, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def test_no_13_gram_of_validation_is_left_in_training():
    training, validation, dropped, overlap = demo_model.split(demo_model.corpus())
    seen = set().union(*(ngrams(text.text) for text in validation))
    assert dropped > 0  # topics do quote each other: a split by document alone leaks
    assert overlap == 0
    assert not any(ngrams(text.text) & seen for text in training)
    assert not {text.id for text in training} & {text.id for text in validation}


def test_steps_must_be_positive(tmp_path):
    with pytest.raises(InputError, match="--steps: expected at least 1, got 0"):
        demo_run.run(tmp_path, steps=0)
