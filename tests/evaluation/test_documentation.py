"""Every block of docs/evaluation.md runs: Python in one namespace, console lines as ``ppl``."""

import json
import re
import shlex
from pathlib import Path

import pyarrow
import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity import evaluate

TEXT = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
CONSOLE = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}<s>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the document names."""
    folder = tmp_path_factory.mktemp("documented")
    tokenizer = build_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    for name in ("MODEL", "reference-model"):
        build_model(len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    pairs = [("the cat", " sat on the mat"), ("a dog", " lay by the door")]
    (folder / "answers.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs)
    )
    (folder / "answers.csv").write_text(
        "question,answer\n" + "".join(f"{p},{c}\n" for p, c in pairs)
    )
    turns = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in pairs
    ]
    (folder / "chats.jsonl").write_text(
        "".join(json.dumps({"text": "also a text", "messages": each}) + "\n" for each in turns)
    )
    crawl = [f"the cat {k} sat on the mat and the dog lay by the door " * 3 for k in range(12)]
    with pyarrow.CompressedOutputStream(str(folder / "crawl.jsonl.zst"), "zstd") as file:
        for number, text in enumerate(crawl):
            row = json.dumps({"id": str(number), "text": text[: 80 + 5 * number]}) + "\n"
            file.write(row.encode())
    return folder


def test_every_block_is_python_or_a_command():
    assert {kind for kind, _ in BLOCKS} == {"", "python"}
    assert len(PYTHON) >= 4 and all(line.startswith("ppl ") for line in CONSOLE)


@pytest.mark.parametrize("line", CONSOLE)
def test_commands(folder, ppl_here, line):
    done = ppl_here(*shlex.split(line, comments=True)[1:], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout


def test_python(folder, ppl_here, monkeypatch):
    tokenizer = build_tokenizer(bos=True)
    names: dict = {
        "model": build_model(len(tokenizer)),
        "tokenizer": tokenizer,
        "texts": ["Q: the cat A: sat", "Q: the dog A: lay"],
    }
    monkeypatch.chdir(folder)
    if not (folder / "scores.parquet").exists():  # the command before the recipe, run alone
        (line,) = (line for line in CONSOLE if "scores.parquet" in line)
        assert ppl_here(*shlex.split(line)[1:]).returncode == 0
    for block in PYTHON:
        exec(compile(block, "docs/evaluation.md", "exec"), names)
    # What the classes are for, and what the recipe keeps: the middle of twelve documents.
    adapted = evaluate(names["Adapter"](Small(names["model"])), tokenizer, TEXTS[:1])
    assert adapted.loss == pytest.approx(evaluate(names["model"], tokenizer, TEXTS[:1]).loss)
    characters = names["Characters"]()
    assert characters.decode(characters.encode("the cat")) == "the cat"
    own = evaluate(build_model(characters.vocabulary_size), characters, ["the cat"])
    assert own.tokens == len("the cat") - 1
    assert 0 < names["kept"].num_rows < 12


class Small(torch.nn.Module):
    """A model in nanoGPT's shape, around a tiny one."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head = model, model.lm_head
        self.config = type("Config", (), {"block_size": 64})()

    def features(self, input_ids):
        return self.model.model(input_ids=input_ids).last_hidden_state

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).logits
