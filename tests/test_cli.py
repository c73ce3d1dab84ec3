"""The command line, as a process and in this one: what it prints, what it writes, how it fails."""

import ast
import io
import json
import math
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from processes import linux_only, ppl, ppl_after, run
from tiny_models import build_model, build_tokenizer

import perplexity
from perplexity.cli import COMMANDS, TASKS, _parser, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and files to evaluate, good and bad."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = build_tokenizer(bos=True)
    for name, vocabulary in (("model", len(tokenizer)), ("small", len(tokenizer) - 40)):
        build_model(vocabulary).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("wordless", "truncated"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "wordless" / "tokenizer.json").unlink()
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "good.txt").write_text("the cat sat on the mat\n" * 20)
    (folder / "good.jsonl").write_text(
        '{"text": "one two", "domain": "x"}\n\n{"text": "three", "id": 7}\n'
    )
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "keyless.jsonl").write_text('{"body": "fine"}\n')
    (folder / "table.parquet").write_bytes(b"PAR1")
    (folder / "table.xlsx").write_bytes(b"text")
    (folder / "hollow").mkdir()
    return folder


def test_eval_writes_every_key(folder, tmp_path, ppl_here):
    out = tmp_path / "out.json"
    done = ppl_here(
        "eval",
        folder / "model",
        folder / "good.txt",
        folder / "good.jsonl",
        "--json",
        out,
        "--stride",
        20,
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and "bits per byte" in done.stdout
    record = json.loads(out.read_text())
    keys = (
        "loss perplexity bits_per_byte byte_perplexity word_perplexity tokens bytes words "
        "documents stderr perplexity_interval protocol context_length stride "
        "tokenizer_fingerprint text_fingerprint backend precision domains per_document"
    )
    assert set(keys.split()) <= set(record)
    assert record["documents"] == 3 and record["stride"] == 20 and record["protocol"] == "sliding"
    assert set(record["per_document"][0]) == {"id", "domain", "nll", "tokens", "bytes"}
    assert [document["id"] for document in record["per_document"]] == [
        "good.txt",
        "good.jsonl:1",
        "7",
    ]
    assert set(record["domains"]) == {"good", "x"}
    assert sum(document["tokens"] for document in record["per_document"]) == record["tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model", "empty.txt"], ["empty.txt", "empty"]),
        (["model", "latin.txt"], ["latin.txt", "UTF-8", "0xe9", "offset 3"]),
        (["model", "broken.jsonl"], ["broken.jsonl", "line 2", "JSON"]),
        (["model", "keyless.jsonl"], ["keyless.jsonl", "line 1", "'text'"]),
        (["model", "absent.txt"], ["absent.txt", "no such file"]),
        (["model", "table.parquet"], ["table.parquet", "a whole Parquet file"]),
        (["model", "table.xlsx"], ["table.xlsx", ".csv, .tsv, .parquet"]),
        (["model", "hollow"], ["hollow", "a folder"]),
        (["absent", "good.txt"], ["absent", "no such folder"]),
        (["hollow", "good.txt"], ["hollow", "config.json"]),
        (["small", "good.txt"], ["document", "token id", "expected below", "the tokenizer has"]),
        (["model", "good.txt", "--stride", "64"], ["stride", "63", "64"]),
        (["model", "good.txt", "--context-length", "65"], ["context_length", "64", "65"]),
        (["model", "good.txt", "--protocol", "guess"], ["--protocol", "'guess'"]),
        (["model"], ["text"]),
        (["wordless", "good.txt"], ["wordless", "expected a tokenizer"]),
        (["truncated", "good.txt"], ["truncated", "expected the weights"]),
        (["model", "good.txt", "--device", "toaster"], ["device", "'toaster'"]),
        (["model", "good.txt", "--json", "no/such/out.json"], ["--json", "no/such/out.json"]),
        (["model", "good.txt", "--per-token", "hollow"], ["--per-token", "hollow"]),
        (
            ["model", "good.txt", "--baseline", "good.jsonl"],
            ["good.jsonl", "expected a result file"],
        ),
        pytest.param(
            ["model", "good.txt", "--json", "/dev/full"],
            ["/dev/full", "No space left"],
            marks=linux_only,
        ),
        (["model", "good.txt", "--bos", "never", "--protocol", "lm-eval"], ["bos", "lm-eval"]),
        (["model", "good.txt", "--device", "meta"], ["device", "'meta'"]),
        (["model", "good.txt", "--separator", "99999"], ["--separator", "99999"]),
        (["model", "good.jsonl", "--per-document", "good.jsonl"], ["--per-document", "an input"]),
        (
            ["model", "good.txt", "--json", "x", "--per-document", "x"],
            ["--per-document", "another output"],
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(folder, arguments, words, fails):
    shown = fails(folder, ["eval", *arguments], words)
    # the numbers themselves are not lost
    assert ("perplexity" in shown) if "/dev/full" in arguments else shown == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model", "good.txt", "--backend", "triton"], ["backend", "TRITON_INTERPRET"]),
        (["absent", "good.txt"], ["absent", "no such folder"]),
    ],
)
def test_a_process_says_nothing_else(folder, arguments, words):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = ppl("eval", *arguments, cwd=folder, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_everything_at_once(folder, tmp_path, ppl_here, monkeypatch):
    """Protocols, tables, journal, baseline, standard input, and both comparisons in one go."""
    monkeypatch.setenv("COLUMNS", "200")  # no cell is wrapped
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    common = (
        "--context-length",
        16,
        "--journal",
        tmp_path / "j",
        "--per-document",
        tmp_path / "d.parquet",
    )
    done = ppl_here(
        "eval",
        folder / "model",
        "-",
        "--stdin",
        "jsonl",
        "--json",
        first,
        *common,
        input='{"text": "a cat"}\n' * 3,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "d.parquet").exists() and list((tmp_path / "j").iterdir())
    text = tmp_path / "same.jsonl"
    text.write_text('{"text": "a cat"}\n' * 3)
    done = ppl_here(
        *(
            "eval",
            folder / "model",
            text,
            "--protocol",
            "lm-eval",
            "--baseline",
            first,
            "--json",
            second,
        ),
        *("--per-token", tmp_path / "t.parquet"),
    )
    assert done.returncode == 0, done.stderr
    assert "nats a token from it" in done.stdout
    assert json.loads(second.read_text())["protocol"] == "lm-eval"
    done = ppl_here("compare", first, second, "--json", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    assert "no difference beyond chance" in done.stdout
    assert json.loads((tmp_path / "c.json").read_text())["pairs"] == 3
    done = ppl_here(
        "compare", folder / "model", folder / "model", text, "--json", tmp_path / "m.json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "m.json").read_text())["top_1_agreement"] == 1


def test_a_comparison_that_is_refused_exits_with_2(folder, tmp_path, ppl_here):
    from perplexity import evaluate, models

    for name, text in (("a", "one"), ("b", "two")):
        evaluate(*models.load(folder / "model", device="cpu"), [text]).save(tmp_path / name)
    done = ppl_here("compare", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "expected one text for both" in done.stderr
    done = ppl_here("compare", folder / "model", tmp_path / "a")
    assert done.returncode == 2 and "result file" in done.stderr


def test_nan_is_exit_status_1_and_the_result_is_written(folder, tmp_path, ppl_here):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    token = tokenizer("a cat sat")["input_ids"][1]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    (tmp_path / "text.jsonl").write_text(
        '{"text": "dog", "id": "fine"}\n{"text": "a cat sat", "id": "bad"}\n'
    )
    done = ppl_here(
        "eval", tmp_path / "broken", tmp_path / "text.jsonl", "--json", tmp_path / "out.json"
    )
    assert done.returncode == 1, done.stderr
    assert "NaN or infinite" in done.stdout and "document bad" in done.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["non_finite"]["document"] == "bad" and record["loss"] > 0
    assert record["tokens"] + record["tokens_skipped"] == record["tokens_read"]


def test_the_result_is_written_before_it_is_shown(folder, tmp_path, monkeypatch):
    """A reader that has gone, or a terminal without the letters, loses no number."""
    out = tmp_path / "out.json"
    command = ["eval", f"{folder}/model", f"{folder}/good.txt", "--json", str(out)]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="ascii") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(command) == 141
    assert json.loads(out.read_text())["tokens"] > 0
    out.unlink()
    shown = io.BytesIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True)
    )
    assert main(command) == 0
    assert json.loads(out.read_text())["tokens"] > 0 and b"perplexity" in shown.getvalue()


def test_standard_input_of_several_processes_is_refused(folder, ppl_here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = ppl_here("eval", folder / "model", "-", input="text")
    assert (
        done.returncode == 2 and "standard input cannot be read by several processes" in done.stderr
    )


@linux_only
def test_a_full_disk_leaves_no_broken_table(folder, tmp_path):
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    table = tmp_path / "t.parquet"
    model, text = folder / "model", folder / "good.txt"
    done = run(*ppl_after(small, "eval", model, text, "--per-token", table))
    assert done.returncode == 2, done.stderr
    assert "per_token" in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_doctor():
    done = ppl("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "self-check ok" in done.stdout and "torch" in done.stdout


def test_doctor_without_triton(tmp_path):
    """import perplexity, and every loss, work with triton absent; the doctor says so."""
    code = (
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "sys.modules['triton'] = None\n"
        "from perplexity.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout and "self-check ok" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_imports_nothing_heavy(arguments):
    """Every command's options are known without torch: help takes a tenth of a second."""
    code = (
        "import sys; from perplexity.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "heavy = {'torch', 'numpy', 'rich', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "print('loaded', sorted(heavy))"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout.splitlines()[-1] == "loaded []", done.stdout + done.stderr


def test_the_help_shows_commands_by_task_with_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for task, commands in TASKS.items():
        assert f"\n{task}:\n" in shown
        for name, example in commands.items():
            assert f"\n  {name} " in shown and f"$ {example}" in shown
            program, *words = shlex.split(example)
            assert program == "ppl" and _parser(name).parse_args(words).command == name


def test_exports():
    """Editors and ``from perplexity import *`` see every name; each is imported when it is used."""
    code = (
        "import sys, perplexity\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(perplexity.__all__) <= set(dir(perplexity))\n"
        "import perplexity.nn\n"
        "assert perplexity.LinearCrossEntropyLoss is perplexity.nn.LinearCrossEntropyLoss\n"
        "from perplexity import *\n"
        "assert all(name in globals() for name in perplexity.__all__)\n"
        "try: perplexity.linear_crossentropy\n"
        "except AttributeError as error: print(error)"
    )
    done = run(sys.executable, "-c", code)
    assert "has no attribute 'linear_crossentropy'" in done.stdout, done.stderr
    tree = ast.parse(Path(perplexity.__file__).read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    assert {alias.name for node in typed.body for alias in node.names} == set(perplexity.__all__)


def test_a_saved_program_loads_after_the_kernels_are_imported(tmp_path):
    """``import perplexity`` alone registers no operator."""
    write = (
        "import torch, perplexity\n"
        "class Loss(torch.nn.Module):\n"
        "    def forward(self, h, w, t): return perplexity.linear_cross_entropy(h, w, t)\n"
        "inputs = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])\n"
        f"torch.export.save(torch.export.export(Loss(), inputs), {str(tmp_path / 'loss.pt2')!r})"
    )
    read = (
        "import torch, perplexity.kernels\n"
        f"loss = torch.export.load({str(tmp_path / 'loss.pt2')!r}).module()\n"
        "print(loss(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])).item())"
    )
    assert run(sys.executable, "-c", write).returncode == 0
    assert float(run(sys.executable, "-c", read).stdout) == pytest.approx(math.log(4))


def test_import_needs_torch_alone():
    code = "import sys, perplexity; heavy = {'transformers', 'triton', 'matplotlib', 'rich'}; "
    code += "print(sorted(heavy & set(sys.modules)))"
    done = run(sys.executable, "-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_transformers_imports_from_the_repository_root():
    """transformers imports ``kernels/`` as the library of that name: it registers no operator."""
    root = __file__.rsplit("/tests/", 1)[0]
    code = (
        "import perplexity.kernels, torch, transformers.models.llama.modeling_llama, kernels\n"
        "perplexity.token_nll(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))\n"
        "assert kernels is not perplexity.kernels and not hasattr(kernels, 'operators')\n"
        "print('fine')"
    )
    done = run(sys.executable, "-c", code, cwd=root)
    assert done.stdout.strip() == "fine", done.stderr
