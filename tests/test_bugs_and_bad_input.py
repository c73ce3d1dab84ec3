"""Exit statuses: bad input is one line and status 2, a bug of ours a traceback and status 3."""

import copy
import gzip
import io
import json
import os
import sqlite3
import struct
import zipfile
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from processes import linux_only
from tiny_models import save_small_model

from perplexity.cli import main
from perplexity.errors import InputError, InputTypeError, each_of_theirs, theirs

ROWS = [
    {"id": str(i), "text": f"the cat number {i} sat on the mat and lay by the door {7 * i}"}
    for i in range(10)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, a history, and a result of each command that another command reads."""
    folder = tmp_path_factory.mktemp("bad")
    save_small_model(folder / "model")
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    # Behind a space "yes" and "no" begin with the same token of so small a tokenizer: the question
    # ends in white space.
    (folder / "question.txt").write_text("{text} Yes or no?\n")
    (folder / "prompts.txt").write_text("the cat\nthe dog\n")
    (folder / "history.csv").write_text(
        "step,train_loss\n" + "".join(f"{i},{5 - i / 100}\n" for i in range(60))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arguments in (
            "eval model good.jsonl --json eval.json",
            "check-data --train prompts.txt --valid good.jsonl --json data.json",
            "probe model good.jsonl --samples 1 --max-new-tokens 4 --prompt-tokens 4 "
            "--json probe.json",
        ):
            assert main(arguments.split()) == 0
    return folder


def run(capsys, arguments):
    """Run a command in this process; return its status, its stderr, and its own lines in that."""
    capsys.readouterr()
    try:
        status = main(arguments.split())
    except SystemExit as stopped:
        status = stopped.code
    errors = capsys.readouterr().err
    return status, errors, [line for line in errors.splitlines() if line.startswith("ppl ")]


# --- bugs


@pytest.mark.parametrize(
    "error",
    [
        ValueError("math domain error"),
        KeyError("loss"),
        TypeError("unsupported operand"),
        OSError("no file's name"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("arguments", "broken"),
    [
        ("monitor history.csv", "perplexity.monitor.diagnose"),
        ("report history.csv -o page.html", "perplexity.report.html.figures"),
        ("report history.csv -o page.html --probe probe.json", "perplexity.report.beyond.rows"),
        ("eval model good.jsonl", "perplexity.evaluation.evaluator.summarise"),
        ("eval model good.jsonl", "perplexity.text.readers._row"),
        ("compare eval.json eval.json", "perplexity.evaluation.comparison.ratio_stderr"),
        (
            "check-data --train prompts.txt --valid good.jsonl",
            "perplexity.data_checks.checks.leaks",
        ),
        (
            "probe model good.jsonl --samples 1 --max-new-tokens 4",
            "perplexity.probe.prober.tokenize",
        ),
        ("ask model good.jsonl --template question.txt", "perplexity.probe.ask.continuations"),
    ],
)
def test_a_bug_is_a_traceback_and_exit_status_3(
    folder, arguments, broken, error, monkeypatch, capsys
):
    """Once every ValueError was one line and status 2: a bug in a plot looked like bad input."""
    if isinstance(error, OSError) and broken.endswith("._row"):
        pytest.skip("an OSError while a file is read is told of that file")
    monkeypatch.chdir(folder)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(broken, fail)
    status, errors, lines = run(capsys, arguments)
    command = arguments.split()[0]
    assert status == 3
    assert errors.startswith("Traceback") and type(error).__name__ in errors and "in fail" in errors
    assert lines == [
        f"ppl {command}: this is a bug in fused-perplexity, not in your input; "
        "please report it with the traceback above"
    ]
    assert errors.splitlines()[-1] == lines[0]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), ["out of memory", "--batch-size"]),
        (torch.OutOfMemoryError("CUDA out of memory"), ["out of memory", "--batch-size"]),
        (FileNotFoundError(2, "No such file or directory", "gone.txt"), ["gone.txt"]),
        (InputTypeError("input: expected a tensor, got str"), ["input: expected a tensor"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_bug(folder, error, words, monkeypatch, fails):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("perplexity.evaluation.evaluator.summarise", fail)
    fails(folder, ["eval", "model", "good.jsonl"], words)


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (BrokenPipeError(32, "Broken pipe"), 141)]
)
def test_an_interruption_and_a_reader_that_has_gone(folder, error, status, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.chdir(folder)
    monkeypatch.setattr("perplexity.cli._drop_output", lambda: None)  # of pytest's own
    monkeypatch.setattr("perplexity.monitor.diagnose", fail)
    assert run(capsys, "monitor history.csv")[::2] == (status, [])


def test_the_contract_of_errors():
    assert issubclass(InputError, ValueError)
    assert issubclass(InputTypeError, InputError) and issubclass(InputTypeError, TypeError)


def test_what_a_library_raises_is_named_and_kept():
    said = r"^x\.npy: expected an array \(KeyError: 'shape'\)$"
    with pytest.raises(InputError, match=said) as raised, theirs("x.npy: expected an array"):
        raise KeyError("shape")
    assert isinstance(raised.value.__cause__, KeyError)
    for passes in (InputError("ours"), MemoryError(), torch.OutOfMemoryError("full")):
        with pytest.raises(type(passes)) as raised, theirs("x"):
            raise passes
        assert raised.value is passes
    # What is done with an item is ours: its errors are not the library's.
    with pytest.raises(ZeroDivisionError):
        for item in each_of_theirs("x", [0]):
            1 // item
    with pytest.raises(InputError, match="ZeroDivisionError"):
        list(each_of_theirs("x", (1 // item for item in [1, 0])))


def test_a_model_that_fails_is_named(folder, monkeypatch, fails):
    """A user's own model that raises is no bug of ours, nor a ValueError without a name."""
    from transformers import LlamaForCausalLM, LlamaModel

    def fail(*_, **__):
        raise IndexError("index out of range in self\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaModel, "forward", fail)
        words = ["model: ", "LlamaForCausalLM", "IndexError: index out of range in self"]
        fails(folder, ["eval", "model", "good.jsonl"], words)
    monkeypatch.setattr(LlamaForCausalLM, "generate", fail)
    arguments = [
        "probe",
        "model",
        "good.jsonl",
        "--samples",
        "1",
        "--max-new-tokens",
        "4",
        "--prompt-tokens",
        "4",
    ]
    fails(folder, arguments, ["cannot be sampled from", "IndexError: index out of range"])


def test_a_tokenizer_that_fails_is_named(folder, tmp_path, fails):
    """A word-level tokenizer without an unknown token raises a bare Exception at a new word."""
    import shutil

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(folder / "model", tmp_path / "words")
    tokenizer = Tokenizer(models.WordLevel({"the": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "words")
    text = folder / "good.jsonl"
    for arguments in (
        ["eval", "words", text],
        ["ask", "words", text, "--template", folder / "question.txt"],
        ["probe", "words", text],
        ["check-data", "--train", text, "--valid", text, "--tokenizer", "words"],
    ):
        fails(tmp_path, arguments, ["tokenizer: expected one that takes every Unicode text"])


@pytest.mark.parametrize(
    "code", ["raise KeyError('x')", "import sys; sys.exit(0)", "import no_such_module", "x = ("]
)
def test_a_scorer_that_cannot_be_made(folder, code, tmp_path, monkeypatch, fails):
    (tmp_path / "own_scorer.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_scorer", raising=False)
    arguments = ["probe", "model", "prompts.txt", "--scorer", "own_scorer:Own"]
    fails(folder, arguments, ["--scorer", "own_scorer:Own"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "eval model good.jsonl --batch-size 1" + "0" * 400,
            "--batch-size: expected a whole number of 64 bits",
        ),
        ("eval model good.jsonl --stride x", "--stride: expected a whole number"),
        (
            "monitor history.csv --total-steps 1" + "0" * 400,
            "--total-steps: expected a whole number of 64 bits",
        ),
        (
            "monitor history.csv --vocabulary-size " + "9" * 5000,
            "--vocabulary-size: expected a whole number",
        ),
        ("monitor history.csv --interval nan", "--interval: expected a finite number"),
        ("probe model prompts.txt --temperature inf", "--temperature: expected a finite number"),
        ("probe model prompts.txt --top-p x", "--top-p: expected a finite number"),
        (
            "check-data --train good.jsonl --valid good.jsonl --near nan",
            "--near: expected a finite number",
        ),
        ("demo --steps 0", "--steps: expected at least 1"),
        ("demo --out good.jsonl", "good.jsonl"),
    ],
)
def test_numbers_that_no_option_takes(folder, arguments, words, fails):
    """An integer without bounds was an OverflowError further down."""
    fails(folder, arguments.split(), [words])


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PERPLEXITY_BACKEND"])
def test_an_environment_that_cannot_be(folder, name, monkeypatch, fails):
    monkeypatch.setenv(name, "two")
    fails(folder, ["eval", "model", "good.jsonl"], [name, "'two'"])


def test_a_title_is_no_formula(folder, tmp_path, monkeypatch, capsys):
    """matplotlib reads $...$ as mathematics and raised a ValueError for what is none."""
    monkeypatch.chdir(folder)
    assert run(capsys, f"report history.csv --png {tmp_path}/x.png --title $x_{{$")[0] == 0
    assert (tmp_path / "x.png").exists()


# --- files of every wrong kind


def _array(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def _archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(9))
    return stream.getvalue()


def _parquet(*columns, names=("text",)) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table(list(map(pyarrow.array, columns)), names=list(names)), stream
    )
    return stream.getvalue()


def _no_unicode() -> pyarrow.Array:
    """A string column whose bytes are not UTF-8."""
    ends, data = np.array([0, 2], "<i4").tobytes(), b"\xff\xfe"
    return pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(ends), pyarrow.py_buffer(data))


def _wandb(data: bytes) -> bytes:
    """A W&B log of one record."""
    checksum = zlib.crc32(data, zlib.crc32(b"\1"))
    return b":W&B\0\0\0" + struct.pack("<IHB", checksum, len(data), 1) + data


TEXT = b'{"text": "the cat sat on the mat"}\n' * 300
PACKED = gzip.compress(TEXT)
STANDARD = pyarrow.compress(TEXT, codec="zstd", asbytes=True)
TABLE = _parquet(["the cat sat on the mat"] * 300)
ARRAY = _array(np.arange(1000))
NOISE = np.random.default_rng(0).bytes(500)
# Of no use under any name.
NONSENSE = {
    "noise": b"\xff" + NOISE,
    "empty": b"",
    "utf-16": "the cat sat on the mat\n".encode("utf-16"),
    "half a table": TABLE[: len(TABLE) // 2],
    "table without its end": TABLE[:-3],
    "broken table": TABLE[:30] + b"\xff" * 40 + TABLE[70:],
    "gz": PACKED,
    "archive": _archive(),
    "half an array": ARRAY[:3000],
}
LINES = {
    "NUL": b"\0" * 64,
    "null": b"null\n",
    "number": b"3\n",
    "list": b"[]\n",
    "no column": b"{}\n",
    "deep lists": b"[" * 100_000 + b"\n",
    "deep objects": b'{"text":' * 50_000 + b"\n",
    "long integer": b'{"step": ' + b"9" * 5000 + b', "loss": 1, "prompt": 1}\n',
    "large integer": b'{"step": 1' + b"0" * 400 + b', "loss": 1, "prompt": 1}\n',
    "null, then an object": b'null\n{"text": "a", "step": 1, "loss": 1}\n',
    "list in a column": b'{"text": ["a"], "prompt": ["a"], "step": [1], "loss": [1]}\n',
    "half a pair": b'{"text": "\\ud800", "prompt": "\\ud800", "step": "\\ud800", "loss": 1}\n',
}
CSV = {
    "other columns": b"a,b\n1,2\n",
    "no names": b"1,2\n3,4\n",
    "one name twice": b"step,loss,loss\n1,2,3\n",
    "step twice": b"step,step,loss\n1,1,2\n",
    "open quote": b'"step,loss\n1,2\n',
    "NUL in a name": b"step,lo\0ss\n1,2\n",
    "long name": b"a" * 200_000 + b",step\n1,2\n",
    "blank lines": b"\n\n\n",
    "words": b"step,loss\nx,y\n",
    "infinite step": b"step,loss\ninf,1\n",
    "ragged": b"step,loss\n1\n1,2,3\n",
    "carriage returns": b"step,loss\r1,2\r",
}
ARRAYS = {
    "objects": _array(np.array([{}], dtype=object)),
    "floats": _array(np.ones(5)),
    "negative": _array(np.array([5, -1, 3])),
    "large": _array(np.array([2**62, 5])),
    "unsigned": _array(np.array([2**64 - 1, 5], dtype=np.uint64)),
    "a number": _array(np.array(5)),
    "cube": _array(np.zeros((2, 2, 2), int)),
    "none": _array(np.zeros(0, int)),
    "no header": ARRAY[:40],
    "header of brackets": b"\x93NUMPY\x01\x00v\x00" + b"(" * 118,
    "too long": ARRAY.replace(b"(1000,)", b"(9" + b"9" * 20 + b",)").replace(
        b" " * 15 + b"\n", b"\n"
    ),
}
TABLES = {
    "integers": _parquet([1, 2]),
    "null": _parquet([None, "a"]),
    "bytes": _parquet([b"\xff"]),
    "lists": _parquet([["a"]]),
    "no rows": _parquet(pyarrow.array([], pyarrow.string())),
    "not UTF-8": _parquet(_no_unicode()),
    "late date": _parquet(
        ["a"], pyarrow.array([2**62], pyarrow.timestamp("us")), names=("text", "id")
    ),
    "one name twice": _parquet(["a"], ["b"], names=("text", "text")),
}
PACKS = {
    "half": PACKED[: len(PACKED) // 2],
    "header": PACKED[:5],
    "broken": PACKED[:30] + b"\xff" * 20 + PACKED[50:],
    "no checksum": PACKED[:-4],
    "noise": b"\xff" + NOISE,
}
STANDARD_PACKS = {
    "half": STANDARD[: len(STANDARD) // 2],
    "header": STANDARD[:6],
    "broken": STANDARD[:20] + b"\xff" * 10 + STANDARD[30:],
    "noise": b"\xff" + NOISE,
}
RUNS = {
    "noise": b":W&B\0\0\0" + NOISE,
    "no protocol buffer": _wandb(b"\xff" * 5),
    "another file": NOISE,
    "empty": b"",
}
STATES = {
    "no rows": b"{}",
    "text for a loss": b'{"log_history": [{"step": 1, "loss": "x"}]}',
    "object of rows": b'{"log_history": {"a": 1}}',
    "number for a row": b'{"log_history": [3]}',
    "infinite step": b'{"log_history": [{"step": 1e999, "loss": 1}]}',
    "deep": b"[" * 100_000,
    "long integer": b'{"log_history": [{"step": ' + b"9" * 5000 + b', "loss": 1}]}',
}
TOKENS = {
    "odd": b"\1\2\3",
    "of no length": np.array([20240520, 7, -5] + [0] * 253, "<i4").tobytes(),
}
# Which contents each kind of file gets.
KINDS = {
    ".txt": {name: NONSENSE[name] for name in ("noise", "empty", "utf-16", "archive")},
    ".jsonl": NONSENSE | LINES,
    ".parquet": NONSENSE | TABLES,
    ".npy": NONSENSE | ARRAYS,
    ".bin": TOKENS,
    ".jsonl.gz": PACKS,
    ".txt.zst": STANDARD_PACKS,
    ".csv": NONSENSE | CSV,
    ".json": NONSENSE | STATES | {name: LINES[name] for name in ("null", "number", "list")},
    ".wandb": RUNS,
    "": {"noise": NOISE},
}
TEXTS = (".txt", ".jsonl", ".parquet", ".jsonl.gz", ".txt.zst", "")
READERS = [
    ("eval model {}", (*TEXTS, ".npy", ".bin")),
    ("eval model good.jsonl --baseline {}", (".json",)),
    ("eval model good.jsonl --train {}", (".npy",)),
    ("eval {} good.jsonl", (".json",)),
    ("compare {} eval.json", (".json",)),
    ("compare eval.json {}", (".json",)),
    ("compare model model {}", (".npy", ".jsonl")),
    ("check-data --train good.jsonl --valid {}", TEXTS),
    ("check-data --train {} --valid good.jsonl", TEXTS),
    ("check-data --train good.jsonl --valid {} --tokenizer model", (".npy", ".bin")),
    ("check-data --train {} --write-split split", TEXTS),
    ("check-data --tokenizer {}", (".json",)),
    ("probe model {}", (*TEXTS, ".npy", ".bin")),
    ("probe model prompts.txt --eval {}", (".json",)),
    ("probe model prompts.txt --history {}", (".csv", ".json")),
    ("probe model prompts.txt --template {} --judge model", (".txt",)),
    ("probe model prompts.txt --judge {}", (".json",)),
    ("ask model {} --template question.txt", (*TEXTS, ".npy", ".bin")),
    ("ask model good.jsonl --template {}", (".txt",)),
    ("monitor {}", (".csv", ".jsonl", ".json", ".wandb", "")),
    ("monitor {} --follow --polls 1 --interval 0.001", (".csv", ".jsonl", ".json")),
    ("report {} -o page.html", (".csv", ".jsonl", ".json", ".wandb")),
    ("report history.csv -o page.html --eval {}", (".json",)),
    ("report history.csv -o page.html --data {}", (".json",)),
    ("report history.csv -o page.html --probe {}", (".json",)),
]
# One function reads documents for all of these: the first gets every content, each other one every
# third, begun at a place of its own.
DOCUMENT_READERS = [command for command, kinds in READERS if {*TEXTS} <= {*kinds}]


@pytest.mark.parametrize(("command", "kinds"), READERS, ids=[command for command, _ in READERS])
def test_a_wrong_file_is_one_line_and_exit_status_2(
    folder, command, kinds, tmp_path, monkeypatch, capsys
):
    """Once an archive named .npy was a traceback, and null before JSON a segmentation fault."""
    monkeypatch.chdir(folder)
    bad = {}
    turn = DOCUMENT_READERS.index(command) if command in DOCUMENT_READERS else 0
    for suffix in kinds:
        for number, (name, content) in enumerate(KINDS[suffix].items()):
            if turn and (number + turn) % 3:
                continue
            path = tmp_path / f"{number}{suffix}"
            path.write_bytes(content)
            bad[f"{name} as {suffix}"] = path
        (tmp_path / f"folder{suffix}").mkdir()
        bad[f"folder as {suffix}"] = tmp_path / f"folder{suffix}"
        bad[f"no file as {suffix}"] = tmp_path / f"no{suffix}"
    wrong = {}
    for what, path in bad.items():
        status, errors, lines = run(capsys, command.replace("{}", str(path)))
        if status != 2 or len(lines) != 1 or "Traceback" in errors:
            wrong[what] = status, errors[-1000:]
    assert not wrong


def test_standard_input_that_cannot_be_read(folder, monkeypatch, capsys):
    """The system's error of a read names no file: ``ppl eval model - < folder``."""

    class Folder(io.RawIOBase):
        buffer = property(lambda self: self)

        def readinto(self, *_):
            raise IsADirectoryError(21, "Is a directory")

        def readable(self):
            return True

    monkeypatch.setattr("sys.stdin", Folder())
    monkeypatch.chdir(folder)
    for arguments in (
        ["eval", "model", "-"],
        ["probe", "model", "-"],
        ["check-data", "--train", "-", "--valid", "x.txt"],
    ):
        (folder / "x.txt").write_text("the cat")
        assert main(arguments) == 2
        assert "-: cannot be read (Is a directory)" in capsys.readouterr().err


@linux_only
def test_a_full_disk_behind_standard_output(folder):
    """The write error names no file; the interpreter's own message about it is left out, too."""
    import subprocess
    import sys

    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "perplexity", "monitor", "history.csv"]
        done = subprocess.run(
            command, cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 2
    assert (
        done.stderr == "ppl monitor: standard output cannot be written (No space left on device)\n"
    )


@pytest.mark.parametrize(
    "row", ['{"documents": 3}', "[" * 100_000, "\0", "0123456789abcdef [[0], {}]"]
)
def test_rows_of_a_journal_that_a_check_did_not_write_are_scanned_again(
    folder, row, tmp_path, ppl_here
):
    arguments = ["check-data", "--train", "prompts.txt", "--valid", "good.jsonl", "--json"]
    assert ppl_here(*arguments, tmp_path / "plain", cwd=folder).returncode == 0
    kept = [*arguments, tmp_path / "kept", "--journal", tmp_path / "j"]
    assert ppl_here(*kept, cwd=folder).returncode == 0
    with closing(sqlite3.connect(tmp_path / "j" / "scan0.sqlite")) as journal, journal:
        journal.execute("UPDATE batches SET scored = ?", (row.encode(),))
        journal.execute("INSERT INTO batches VALUES (?, ?, ?)", (b"key", row, "no checksum"))
    done = ppl_here(*kept, cwd=folder)
    assert done.returncode == 0, done.stderr
    records = [json.loads((tmp_path / name).read_text()) for name in ("plain", "kept")]
    assert records[0] == records[1]


@pytest.mark.parametrize("content", ["[" * 100_000, "3", "\0", '{"a":'])
@pytest.mark.parametrize("name", ["scan0.sqlite", "identity.json", "rank0.sqlite", "rank1.sqlite"])
def test_a_journal_of_something_else(folder, name, content, tmp_path, fails):
    (tmp_path / name).write_text(content * 300)
    arguments = ["eval", "model", "good.jsonl", "--journal", tmp_path]
    if name in ("scan0.sqlite", "identity.json"):
        arguments = [
            "check-data",
            "--train",
            "prompts.txt",
            "--valid",
            "good.jsonl",
            "--journal",
            tmp_path,
        ]
    fails(folder, arguments, ["journal", name])


# --- results that a command wrote, with a value of another kind

VALUES = [None, "x", -1, 10**400, [], {}, [[1]], {"a": None}, True, float("inf"), KeyError]


def _paths(value, path=()):
    """Where each value of a record is: of a list the first alone."""
    if path:
        yield path
    parts = (
        value.items()
        if isinstance(value, dict)
        else list(enumerate(value))[:1]
        if isinstance(value, list)
        else ()
    )
    for key, part in parts:
        yield from _paths(part, (*path, key))


def _with(record, path, value):
    changed = copy.deepcopy(record)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


RESULTS = {
    "eval": ("eval.json", "--eval"),
    "check-data": ("data.json", "--data"),
    "probe": ("probe.json", "--probe"),
    "monitor": ({"health_score": 1.0, "best_val_step": 2}, None),
    "compare": ({"model_a": {}, "model_b": {}}, None),
    "ask": ({"p_yes": 0.5, "p_no": 0.5}, None),
}


@pytest.mark.parametrize("command", RESULTS)
@pytest.mark.parametrize("option", ["--eval", "--data", "--probe", "the history"])
def test_a_report_reads_every_result_or_says_where_it_goes(
    folder, command, option, tmp_path, fails, ppl_here
):
    source, takes = RESULTS[command]
    path = tmp_path / "result.json"
    path.write_text(
        (folder / source).read_text() if isinstance(source, str) else json.dumps(source)
    )
    arguments = ["history.csv", option, path] if option != "the history" else [path]
    arguments = ["report", *arguments, "--output", tmp_path / "page.html"]
    if option == takes:
        assert ppl_here(*arguments, cwd=folder).returncode == 0
        return
    where = "no command reads" if takes is None else f"ppl report takes as {takes}"
    fails(
        folder,
        arguments,
        ["result.json: expected", f"got a result of ppl {command} --json, which {where}"],
    )


def test_a_report_of_infinite_values(folder, tmp_path, fails, ppl_here):
    """An interval with the bound "inf", which the evaluation itself had written, was refused.

    A table is told from JSON.
    """
    record = json.loads((folder / "eval.json").read_text())
    record |= {"perplexity": "inf", "perplexity_interval": [3.5, "inf"], "stderr": "nan"}
    probe = json.loads((folder / "probe.json").read_text())
    probe["perplexity"]["self_perplexity"] = "inf"
    probe["calibration"]["entropy_bins"][0]["loss"] = "inf"
    for name, of in (("eval.json", record), ("probe.json", probe)):
        (tmp_path / name).write_text("\ufeff" + json.dumps(of), encoding="utf-8")
    files = ["--eval", tmp_path / "eval.json", "--probe", tmp_path / "probe.json"]
    done = ppl_here("report", "history.csv", "-o", tmp_path / "page.html", *files, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "95 %: 3.50 to inf" in (tmp_path / "page.html").read_text()
    (tmp_path / "t.parquet").write_bytes(TABLE)
    arguments = [
        "report",
        "history.csv",
        "-o",
        tmp_path / "page.html",
        "--eval",
        tmp_path / "t.parquet",
    ]
    fails(
        folder,
        arguments,
        ["t.parquet: expected a result file of ppl eval --json, got a Parquet table"],
    )


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("eval.json", "compare {} eval.json"),
        ("eval.json", "compare {} {} --measure bits-per-byte"),
        ("eval.json", "report history.csv -o page.html --eval {}"),
        ("data.json", "report history.csv -o page.html --data {}"),
        ("probe.json", "report history.csv -o page.html --probe {} --probe probe.json"),
    ],
)
def test_a_result_with_a_value_of_another_kind(
    folder, source, command, tmp_path, monkeypatch, capsys
):
    """Every key with a value of another kind is named or unused: no bug, no text on the page."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")  # megabytes a page
    record, path, wrong = json.loads(Path(source).read_text()), tmp_path / "changed.json", {}
    for name in ("per_document", "texts"):
        record[name] = record.get(name, [])[:2]
    told = 0
    # Of the larger records every sixth or second value. One value at each place, another at the next.
    step = 6 if "--eval" in command or "--probe" in command else 1 if "--data" in command else 2
    places = list(_paths(record))[::step]
    for number, place in enumerate(places):
        value = VALUES[number % len(VALUES)]
        path.write_text(json.dumps(_with(record, place, value)))
        status, errors, lines = run(capsys, command.replace("{}", str(path)))
        told += status == 2
        if status not in (0, 2) or (status == 2 and len(lines) != 1):
            wrong[place, str(value)[:20]] = status, errors[-1000:]
    assert not wrong and told > 10


# --- names, encodings, packs


@pytest.mark.parametrize("column", ["id", "domain", "text"])
@pytest.mark.parametrize(
    "command",
    [
        "eval model {}",
        "ask model {} --template question.txt",
        "probe model {}",
        "check-data --train {} --valid good.jsonl",
        "check-data --train good.jsonl --valid {}",
    ],
)
def test_half_of_a_surrogate_pair_is_told_with_its_line(
    folder, command, column, tmp_path, monkeypatch, fails
):
    """Once an id became "?" in the Parquet files, and the ids of two documents the same one."""
    if command.startswith("probe") and column == "domain":
        pytest.skip("prompts have no domain")
    monkeypatch.setattr("perplexity.models.load", lambda *_, **__: pytest.fail("work was begun"))
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1] | {column: "x\ud800"}) + "\n")
    where = f"line 2, column {column!r}: " if column != "text" else "line 2: "
    fails(
        folder,
        command.replace("{}", str(path)).split(),
        [where + "expected Unicode text", "at character 1"],
    )


@pytest.mark.parametrize("suffix", ["jsonl", "txt.zst", "parquet", "bin"])
def test_a_file_name_that_is_not_utf_8(folder, suffix, tmp_path, ppl_here):
    """The name is spelled in ids and domains: no two names become one."""
    first, second = (os.fsdecode(b"\xff%d\xfe." % i + suffix.encode()) for i in (1, 2))
    content = {
        "jsonl": TEXT[:70],
        "txt.zst": STANDARD,
        "parquet": TABLE,
        "bin": bytes(range(2, 42)),
    }
    for name in (first, second):
        (tmp_path / name).write_bytes(content[suffix])
    tables = ["--per-document", tmp_path / "d.parquet", "--per-token", tmp_path / "t.parquet"]
    done = ppl_here(
        "eval", folder / "model", first, second, *tables, "--token-dtype", "uint32", cwd=tmp_path
    )
    if suffix == "bin":
        assert done.returncode == 2 and "\\udcff1\\udcfe.bin" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    rows = pyarrow.parquet.read_table(tmp_path / "d.parquet").to_pylist()
    assert {row["domain"] for row in rows} == {"\\udcff1\\udcfe", "\\udcff2\\udcfe"}
    assert {row["id"].partition(":")[0] for row in rows} == {
        f"\\udcff{i}\\udcfe.{suffix}" for i in (1, 2)
    }
    files = ["--train", first, "--valid", second, "--json", tmp_path / "c.json"]
    assert ppl_here("check-data", *files, cwd=tmp_path).returncode == 0


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "the cat")
    return stream.getvalue()


BOMB = b"the cat sat on the mat\n" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "t.txt",
            "the cat\n".encode("utf-16-le"),
            "expected UTF-8, got UTF-16 without a byte order mark; convert",
        ),
        ("t.txt", "the cat\n".encode("utf-16-be"), "iconv -f UTF-16BE"),
        (
            "t.jsonl",
            TEXT.decode().encode("utf-16-le"),
            "expected UTF-8, got UTF-16 without a byte order mark",
        ),
        ("t.txt", "the cat\n".encode("utf-16"), "expected UTF-8, got UTF-16; convert"),
        ("t.jsonl", _zip(), "expected UTF-8, got a zip archive; unpack it"),
        ("t.txt", PACKED, "expected UTF-8, got a gzip file; its name must end in .gz"),
        ("t.jsonl", STANDARD, "expected UTF-8, got a Zstandard file; its name must end in .zst"),
        (
            "t.npy",
            _archive(),
            "t.npy: expected a whole .npy file, got a broken or truncated one, or another format",
        ),
        (
            "t.parquet",
            _parquet(_no_unicode()),
            "t.parquet, row 1, column 'text': expected UTF-8, got byte 0xff",
        ),
        (
            "t.parquet",
            _parquet(["a"], _no_unicode(), names=("text", "id")),
            "row 1, column 'id': expected UTF-8",
        ),
        ("t.txt.gz", gzip.compress(BOMB), "unpacks to more than 1 MiB, 100 times its size or more"),
        ("t.jsonl.gz", gzip.compress(BOMB.replace(b"\n", b" ")), "unpacks to more than 1 MiB"),
        (
            "t.txt.zst",
            pyarrow.compress(BOMB, codec="zstd", asbytes=True),
            "unpacks to more than 1 MiB",
        ),
    ],
)
def test_a_file_of_another_kind_is_named(
    folder, name, content, words, tmp_path, monkeypatch, fails
):
    monkeypatch.setattr("perplexity.models.load", lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.setattr("perplexity.text.readers.UNPACKED", 1 << 20)
    path = tmp_path / name
    path.write_bytes(content)
    for command in (
        "eval model {}",
        "probe model {}",
        "ask model {} --template question.txt",
        "check-data --train {} --valid good.jsonl",
        "check-data --train good.jsonl --valid {}",
    ):
        fails(folder, command.replace("{}", str(path)).split(), [words])
    if name == "t.jsonl":
        fails(folder, ["monitor", path], [words])


def test_a_file_that_packs_well_is_read(monkeypatch, tmp_path):
    """Equal lines pack to less than a hundredth; up to ``UNPACKED`` bytes that is no bomb."""
    from perplexity.evaluation import read_documents

    path = tmp_path / "t.txt.gz"
    path.write_bytes(gzip.compress(BOMB))
    assert [document.text for document in read_documents([path])] == [BOMB.decode()]
    # Nor is a larger one that packs as text does.
    monkeypatch.setattr("perplexity.text.readers.UNPACKED", 1000)
    text = np.random.default_rng(0).integers(97, 123, 5000, dtype=np.uint8).tobytes()
    path.write_bytes(gzip.compress(text))
    assert [document.text for document in read_documents([path])] == [text.decode()]
