"""Commands ``ppl probe`` and ``ppl ask``: files in, numbers out, bad input in one line."""

import io
import json
import sys

import pyarrow.parquet
import pytest
from processes import run as runs
from tiny_models import TEXTS, save_small_model

from perplexity.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("probe")
    save_small_model(out / "checkpoint-40")
    rows = [
        {"id": f"p{k}", "prompt": text[: 8 + k], "reference": text[8 + k :]}
        for k, text in enumerate(TEXTS * 3)
    ]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "texts.jsonl").write_text(
        "".join(json.dumps({"id": f"t{k}", "text": t}) + "\n" for k, t in enumerate(TEXTS))
    )
    (out / "long.jsonl").write_text(
        "".join(json.dumps({"text": text * 3}) + "\n" for text in TEXTS * 4)
    )
    (out / "question.txt").write_text("{text} good?")
    (out / "mine.py").write_text(
        "class Half:\n    def score(self, checkpoint):\n        return 0.5\n"
    )
    history = "step,train_loss,val_loss\n" + "".join(
        f"{k},{4 - 0.004 * k},{4.1 - 0.004 * k if k % 50 == 0 else ''}\n" for k in range(1, 501)
    )
    (out / "history.csv").write_text(history)
    return out


def run(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    return main([*map(str, arguments)])


SHORT = ("--max-new-tokens", 16, "--samples", 2)


def test_everything_at_once(folder, monkeypatch, capsys):
    arguments = [
        "probe",
        "checkpoint-40",
        "prompts.jsonl",
        *SHORT,
        "--judge",
        "checkpoint-40",
        "--template",
        "question.txt",
    ]
    arguments += [
        "--history",
        "history.csv",
        "--scorer",
        "mine:Half",
        "--weight",
        "Half=30",
        "--json",
        "out.json",
    ]
    assert run(monkeypatch, folder, *arguments) == 0
    record = json.loads((folder / "out.json").read_text())
    assert (record["model"]["name"], record["step"], record["prompts"]) == ("checkpoint-40", 40, 9)
    assert record["settings"]["samples"] == 2 and len(record["texts"]) == 18
    parts = record["health"]["parts"]
    assert list(parts) == ["monitor", "perplexity", "generation", "references", "ask", "Half"]
    assert parts["Half"] == {"weight": 30, "score": 0.5, "evidence": "a scorer of your own"}
    assert parts["monitor"]["score"] is not None and record["references"]["bleu"] >= 0
    said = capsys.readouterr().out
    for words in (
        "repeated 4-grams",
        "BLEU, chrF",
        "ROUGE-1, 2, L",
        "says yes",
        "missing",
        "Half",
        "temperature 1",
    ):
        assert words in said


def test_limit_greedy_and_status(folder, monkeypatch, capsys):
    options = ["--limit", 3, "--temperature", 0, "--max-new-tokens", 40, "--fail-on", "warning"]
    status = run(monkeypatch, folder, "probe", "checkpoint-40", "prompts.jsonl", *options)
    said = " ".join(capsys.readouterr().out.split())
    assert "3 of 9 prompts, evenly over the file" in said and "3 texts to 3 prompts: greedy" in said
    assert status == 0 and "judge repetition by" in said
    # A random model knows nothing of the documents: a warning, and no danger.
    options = ["--max-new-tokens", 24, "--samples", 1, "--prompt-tokens", 8]
    for severity, expected in (("warning", 1), ("danger", 0)):
        got = run(
            monkeypatch,
            folder,
            "probe",
            "checkpoint-40",
            "long.jsonl",
            *options,
            "--fail-on",
            severity,
        )
        assert got == expected and "no-better-than-chance" in capsys.readouterr().out


def test_standard_input(folder, ppl_here):
    done = ppl_here("probe", "checkpoint-40", "-", *SHORT, input="the cat\na dog\n", cwd=folder)
    assert done.returncode == 0 and "4 texts to 2 prompts" in done.stdout, done.stderr


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_ask(folder, monkeypatch, capsys, suffix):
    out, journal = f"answers.{suffix}", f"journal-{suffix}"
    arguments = [
        "ask",
        "checkpoint-40",
        "texts.jsonl",
        "--template",
        "question.txt",
        "--out",
        out,
        "--journal",
        journal,
    ]
    assert run(monkeypatch, folder, *arguments, "--json", "means.json") == 0
    if suffix == "jsonl":
        rows = [json.loads(line) for line in (folder / out).read_text().splitlines()]
    else:
        rows = pyarrow.parquet.read_table(folder / out).to_pylist()
    assert [row["id"] for row in rows] == ["t0", "t1", "t2"]
    means = json.loads((folder / "means.json").read_text())
    assert means["p_yes"] == pytest.approx(sum(row["p_yes"] for row in rows) / 3)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "3 texts asked about" in said
        and "it would rather say" in said
        and "2 texts are too long" not in said
    )
    (folder / out).unlink()
    assert run(monkeypatch, folder, *arguments) == 0  # again, from the journal
    assert (folder / out).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("probe", "checkpoint-40", "none.txt"),
            "none.txt: expected a file of prompts, got no such file",
        ),
        (
            ("probe", "nowhere/at/all", "prompts.jsonl"),
            "nowhere/at/all: expected a local model folder",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--limit", "0"),
            "--limit: expected at least 1",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--samples", "0"),
            "samples: expected a whole number, at least 1",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--samples", "-3"),
            "samples: expected a whole number, at least 1",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--top-p", "2"),
            "top_p: expected above 0 and at most 1",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--max-new-tokens", "64"),
            "max_new_tokens: expected at most 63",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--chat"),
            "chat: expected a tokenizer with a chat template",
        ),
        (("probe", "checkpoint-40", "prompts.jsonl", "--weight", "x"), "--weight: expected PART=W"),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--weight", "ask=-1"),
            "--weight: expected PART=W",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--weight", "nobody=1"),
            "weights: expected names among",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--scorer", "nowhere:X"),
            "--scorer: expected MODULE:CLASS",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--scorer", "mine:Nobody"),
            "--scorer: expected MODULE:CLASS",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--eval", "texts.jsonl"),
            "texts.jsonl: expected a result file of ppl",
        ),
        (("probe", "checkpoint-40", "prompts.jsonl", "--history", "no.csv"), "no.csv"),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--template", "no.txt", "--judge", "x"),
            "--template: expected a text",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--json", "no/such/x.json"),
            "--json: expected a file in an existing",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--embeddings", "nowhere"),
            "embeddings: expected a sentence-transf",
        ),
        (
            ("ask", "checkpoint-40", "none.jsonl"),
            "none.jsonl: expected a text file, got no such file",
        ),
        (
            ("ask", "checkpoint-40", "texts.jsonl", "--out", "a.csv"),
            "--out: expected a name that ends in .jsonl or .parquet",
        ),
        (
            ("ask", "checkpoint-40", "texts.jsonl", "--out", "texts.jsonl"),
            "--out: expected a file of its own, got an input",
        ),
        (
            ("ask", "checkpoint-40", "texts.jsonl", "--out", "o.jsonl", "--json", "o.jsonl"),
            "got another output, o.jsonl",
        ),
        (
            ("probe", "checkpoint-40", "prompts.jsonl", "--json", "prompts.jsonl"),
            "--json: expected a file of its own, got an i",
        ),
        (
            ("ask", "checkpoint-40", "texts.jsonl", "--yes", "no"),
            "yes, no: expected answers that differ",
        ),
        (("ask", "checkpoint-40", "-", "--journal", "j"), "-: expected a file with --journal"),
        (
            ("ask", "checkpoint-40", "texts.jsonl", "--batch-size", "0"),
            "batch_size: expected at least 1",
        ),
        (
            ("ask", "checkpoint-40", "texts.jsonl", "--template", "mine.py"),
            "--template mine.py: expected {text} in it once",
        ),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, capsys, arguments, words):
    assert run(monkeypatch, folder, *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"ppl {arguments[0]}: ") and words in said


def test_a_run_that_fails_leaves_the_earlier_file(folder, monkeypatch):
    (folder / "kept.jsonl").write_text("earlier\n")
    (folder / "both.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    from perplexity.probe import Questioner

    def fail(self, ids, target):
        raise ValueError("on the way")

    monkeypatch.setattr(Questioner, "_score", fail)
    assert (
        run(
            monkeypatch,
            folder,
            "ask",
            "checkpoint-40",
            "both.jsonl",
            "--template",
            "question.txt",
            "--out",
            "kept.jsonl",
        )
        == 3  # a bug, of which the file knows as little as of bad input
    )
    assert (folder / "kept.jsonl").read_text() == "earlier\n" and not list(folder.glob("*.part"))


def test_a_first_choice_in_brackets_is_no_markup():
    from rich.console import Console

    from perplexity.cli.ask import answers
    from perplexity.probe.ask import Answer, Tally

    tally = Tally(type("Judge", (), {"words": ("[yes]", "[no]")})())
    tally.add(Answer("a", 0.1, 0.2, "[/INST]", False))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(answers(tally.summary()))
    assert "[/INST]" in console.export_text()


@pytest.mark.parametrize(
    "command",
    [
        ("probe", "checkpoint-40", "-"),
        ("ask", "checkpoint-40", "-"),
        ("eval", "checkpoint-40", "-"),
    ],
)
def test_standard_input_that_is_closed(folder, monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "stdin", None)
    assert run(monkeypatch, folder, *command) == 2
    assert "-: expected standard input, got it closed" in capsys.readouterr().err


HIDE = """
import importlib.util, sys
HIDDEN = {"xxhash", "sacrebleu", "rouge_score", "sentence_transformers"}
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in HIDDEN else find(name, package)
)
from perplexity.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (
            ("probe", "checkpoint-40", "prompts.jsonl"),
            2,
            "needs xxhash, sacrebleu, rouge_score; install fused-perplexity[probe]",
        ),
        (("ask", "checkpoint-40", "texts.jsonl", "--template", "question.txt"), 0, ""),
        (("report", "history.csv", "-o", "page.html", "--probe", "least.json"), 0, ""),
    ],
)
def test_what_needs_which_extra(folder, ppl_here, arguments, status, words):
    """Asking needs none of the measures' libraries, and a page of probes neither."""
    if "least.json" in arguments and not (folder / "least.json").exists():
        done = ppl_here(
            "probe", "checkpoint-40", "prompts.jsonl", *SHORT, "--json", "least.json", cwd=folder
        )
        assert done.returncode == 0, done.stderr
    done = runs(sys.executable, "-c", HIDE, *arguments, cwd=folder)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert words in done.stderr
