"""Outputs are whole or as they were, through links and into pipes; inputs that are no files."""

import errno
import json
import os
import re
import resource
import shutil
import stat
import sys
import tarfile
import threading

import pyarrow.parquet
import pytest
from tiny_models import build_tokenizer, save_small_model

from perplexity import evaluate
from perplexity.cli import main
from perplexity.errors import InputError
from perplexity.evaluation import Document, read_documents
from perplexity.evaluation.collect import ParquetTable
from perplexity.files import Output, check_output, check_outputs, other_than_file, write_text
from perplexity.json_files import read_written
from perplexity.probe.prompts import read_prompts

OLD = '{"old": "good result"}'
HISTORY = "step,train_loss\n" + "".join(f"{i},{5 - i / 100}\n" for i in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, texts and a history, with a result of ``ppl eval``."""
    folder = tmp_path_factory.mktemp("files")
    save_small_model(folder / "model")
    rows = [
        {"id": str(i), "text": f"the cat number {i} sat on the mat by the door {7 * i}"}
        for i in range(4)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "question.txt").write_text("{text} Yes or no?\n")
    (folder / "history.csv").write_text(HISTORY)
    (folder / "run").mkdir()
    (folder / "run" / "history.csv").write_text(HISTORY)
    return folder


# --- the writer


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "out.json"
    path.write_text(OLD)
    path.chmod(0o640)
    with Output(path) as file:
        file.write(b"half")
        assert path.read_text() == OLD
        file.write(b" and half")
    assert path.read_text() == "half and half"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(KeyError), Output(path) as file:
        file.write(b"lost")
        raise KeyError
    assert path.read_text() == "half and half" and os.listdir(tmp_path) == ["out.json"]


def test_a_new_file_has_the_permissions_that_a_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / ("é" * 120), "text")  # 240 bytes: a suffix would not fit
    finally:
        os.umask(before)
    (made,) = tmp_path.iterdir()
    assert stat.S_IMODE(made.stat().st_mode) == 0o640 and made.read_text() == "text"


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    target, link, dangling = tmp_path / "far" / "target", tmp_path / "link", tmp_path / "dangling"
    target.write_text(OLD)
    link.symlink_to("far/target")
    dangling.symlink_to("far/new")
    for path in (link, dangling):
        write_text(path, "new")
        assert path.is_symlink() and path.resolve().read_text() == "new"
    assert sorted(os.listdir(tmp_path / "far")) == ["new", "target"]


def _into_a_pipe(path, write) -> bytes:
    """Return what a reader of the pipe at ``path`` gets of ``write(path)``."""
    os.mkfifo(path)
    got = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()), daemon=True)
    reader.start()
    write(path)
    reader.join(60)
    assert stat.S_ISFIFO(path.stat().st_mode)
    return got[0]


def test_pipes_and_devices_are_written_into(tmp_path):
    """Once ``os.replace`` put a regular file in the place of /dev/null, which only root can do."""
    assert _into_a_pipe(tmp_path / "text", lambda path: write_text(path, "through")) == b"through"

    def table(path):
        rows = ParquetTable(path, {"id": "string"}, "--out")
        rows.add(2, id=["a", "b"])
        rows.finish()

    found = _into_a_pipe(tmp_path / "table", table)
    assert pyarrow.parquet.read_table(pyarrow.py_buffer(found)).to_pydict() == {"id": ["a", "b"]}
    table("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(
        InputError, match=r"--json: /dev/full cannot be written \(No space left on device\)"
    ):
        write_text("/dev/full", OLD, "--json")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_device_of_ones_own_stays(tmp_path):
    """The device is made here: as root the mistake would replace the machine's own."""
    node = tmp_path / "null"
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        node.write_bytes(b"")
    except OSError:
        pytest.skip("needs root")
    write_text(node, "text")
    assert stat.S_ISCHR(node.stat().st_mode) and os.listdir(tmp_path) == ["null"]


def test_standard_output_that_is_a_file(tmp_path):
    """/dev/stdout may be a regular file that the shell holds open: a replacement would be lost."""
    out, kept = tmp_path / "both", os.dup(1)
    with out.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
    try:
        os.write(1, b"before ")
        for name in ("/dev/stdout", "/dev/fd/1"):
            write_text(name, "written ")
        os.write(1, b"after")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert out.read_text() == "before written written after" and os.listdir(tmp_path) == ["both"]


@pytest.mark.parametrize("when", ["write", "close", "rename"])
def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, when):
    path = tmp_path / "out"
    path.write_text(OLD)
    if when == "rename":
        monkeypatch.setattr(
            os,
            "replace",
            lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")),
        )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if when != "rename":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        # More than a buffer holds is written at once, less than that at the end.
        with pytest.raises(
            InputError, match=rf"^--json: {path} cannot be written \((File too large|Input/output)"
        ):
            write_text(path, "x" * {"write": 1 << 20, "close": 5000, "rename": 10}[when], "--json")
        table = ParquetTable(path, {"id": "string"}, "--out")
        with pytest.raises(InputError, match=r"^--out: .* cannot be written"):
            try:
                table.add(1 << 10, id=[str(i) for i in range(1 << 10)])
                table.finish()
            finally:
                table.discard()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == OLD and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "expected the name of a file, got ''"),
        ("a\0b", "expected the name of a file"),
        (".", "expected a file, got the folder ."),
        ("no/such", "expected a file in an existing folder, got no/such"),
        ("new/", "expected a file in an existing folder, got new/"),
        ("file/below", "Not a directory"),
        ("loop", "expected a file that can be written, got loop"),
        ("x" * 256, "File name too long"),
    ],
)
def test_what_is_no_file_to_write(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for raises in (lambda: check_output("--json", path), lambda: Output(path, "--json")):
        with pytest.raises(InputError) as raised:
            raises()
        assert str(raised.value).startswith("--json: ") and words in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_what_the_system_does_not_let_write(tmp_path, monkeypatch):
    (tmp_path / "file").write_text(OLD)
    # Root may write everywhere: the system's answer is put in its place.
    for denied, words in (
        (tmp_path / "file", "a file that can"),
        (tmp_path, "a folder that can be written"),
    ):
        monkeypatch.setattr(
            os, "access", lambda path, _, denied=denied: os.fspath(path) != str(denied)
        )
        with pytest.raises(InputError, match=words):
            check_output("--json", tmp_path / "file")


def test_outputs_are_apart_from_inputs_and_from_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "text").write_text("a")
    (tmp_path / "link").symlink_to("model/new")
    for outputs, folders, words in (
        ({"--json": "text"}, {}, "--json: expected a file of its own, got an input, text"),
        ({"--json": "./model/../text"}, {}, "got an input"),
        ({"--json": "model/config.json"}, {}, "got one inside an input, model/config.json"),
        ({"--json": "link"}, {}, "got one inside an input"),
        (
            {"--json": "a", "--out": "./a"},
            {},
            "--out: expected a file of its own, got another output",
        ),
        ({}, {"--journal": "model"}, "--journal: expected a file of its own, got an input"),
        ({}, {"--journal": "model/j"}, "got one inside an input"),
        ({}, {"--journal": "text"}, "--journal: expected a folder, got the file text"),
    ):
        with pytest.raises(InputError) as raised:
            check_outputs(outputs, ["model", "text", None, "organisation/name"], folders=folders)
        assert words in str(raised.value)
    check_outputs(
        {"--json": "model2", "--out": "/dev/null", "--png": "/dev/null"},
        ["model"],
        folders={"-j": "new"},
    )


# --- every command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("eval model text.jsonl --json model/config.json", "--json"),
        ("eval model text.jsonl --per-token model/new.parquet", "--per-token"),
        ("eval model text.jsonl --per-document text.jsonl", "--per-document"),
        ("eval model text.jsonl --reliability .", "--reliability: expected a file, got the folder"),
        ("eval model text.jsonl --journal model", "--journal"),
        ("compare model model text.jsonl --json model/config.json", "--json"),
        (
            "check-data --train text.jsonl --valid text.jsonl --tokenizer model "
            "--json model/tokenizer.json",
            "--json",
        ),
        (
            "check-data --train text.jsonl --valid text.jsonl --write-clean text.jsonl",
            "--write-clean",
        ),
        (
            "check-data --train text.jsonl --valid text.jsonl --journal history.csv",
            "--journal: expected a folder",
        ),
        ("probe model text.jsonl --json model/config.json", "--json"),
        ("probe model text.jsonl --history run --json run/history.csv", "--json"),
        ("ask model text.jsonl --template question.txt --out model/a.jsonl", "--out"),
        ("ask model text.jsonl --template question.txt --json question.txt", "--json"),
        ("monitor history.csv --json history.csv", "--json"),
        ("monitor run --json run/history.csv", "--json"),
        ("report history.csv -o history.csv", "--output"),
        ("report history.csv -o x.html --eval eval.json --png eval.json", "--png"),
        ("report run --svg run/history.csv", "--svg"),
        (
            "report run --svg x.svg --png x.svg",
            "--svg: expected a file of its own, got another output",
        ),
    ],
)
def test_an_input_is_not_overwritten(folder, arguments, words, fails, monkeypatch):
    """``--json MODEL/config.json`` broke the model, after all the work."""
    monkeypatch.setattr("perplexity.models.load", lambda *_, **__: pytest.fail("work was begun"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    fails(folder, arguments.split(), [words])
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "eval model text.jsonl --per-token rows.csv",
            "--per-token: expected a name that ends in .parquet, got rows.csv",
        ),
        (
            "eval model text.jsonl --per-document rows",
            "--per-document: expected a name that ends in .parquet, got rows",
        ),
        (
            "eval model text.jsonl --reliability a.jpg",
            "--reliability: expected a name that ends in .png or .svg",
        ),
        (
            "ask model text.jsonl --out a.JSONL",
            "--out: expected a name that ends in .jsonl or .parquet",
        ),
        (
            "check-data --train text.jsonl --valid text.jsonl --write-clean a.md",
            "--write-clean: expected a name",
        ),
        (
            "report history.csv -o page.pdf",
            "--output: expected a name that ends in .html or .htm, got page.pdf",
        ),
        ("report history.csv --png page.jpg", "--png: expected a name that ends in .png"),
        ("report history.csv --svg page.png", "--svg: expected a name that ends in .svg"),
    ],
)
def test_a_name_says_what_is_written(folder, arguments, words, fails, monkeypatch):
    """Parquet under a name of CSV is an error in whatever reads it next."""
    monkeypatch.setattr("perplexity.models.load", lambda *_, **__: pytest.fail("work was begun"))
    fails(folder, arguments.split(), [words])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("eval model text.jsonl --json {}", ["out.json"]),
        (
            "eval model text.jsonl --per-token {}.parquet --per-document {}2.parquet",
            ["out.json.parquet", "out.json2.parquet"],
        ),
        ("eval model text.jsonl --reliability {}.png", ["out.json.png"]),
        (
            "check-data --train history.csv.txt --valid text.jsonl --write-clean {}.jsonl",
            ["out.json.jsonl"],
        ),
        ("ask model text.jsonl --template question.txt --out {}.jsonl", ["out.json.jsonl"]),
        ("report history.csv --output {}.html", ["out.json.html"]),
        ("report history.csv --png {}.png", ["out.json.png"]),
    ],
)
def test_a_full_disk_under_every_command(folder, arguments, names, tmp_path, fails):
    shutil.copy(folder / "history.csv", folder / "history.csv.txt")
    for name in names:
        (tmp_path / name).write_text(OLD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        fails(
            folder,
            arguments.replace("{}", str(tmp_path / "out.json")).split(),
            ["cannot be written (File too large"],
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == names
    assert {(tmp_path / name).read_text() for name in names} == {OLD}


def test_evaluate_tells_of_an_output_before_the_work(folder):
    """A folder as ``per_token`` was reported after all the work, when the file got its name."""
    tokenizer = build_tokenizer(bos=True)
    with pytest.raises(InputError, match="per_token: expected a file, got the folder"):
        evaluate(None, tokenizer, [Document("a", "the cat")], per_token=folder)
    with pytest.raises(
        InputError, match="per_document: expected a file of its own, got another output"
    ):
        evaluate(None, tokenizer, [], per_token=folder / "x", per_document=folder / "x")


def standing_at(folder):
    """Return what is no regular file, by what an error calls it."""
    folder.joinpath("folder.txt").mkdir()
    os.mkfifo(folder / "pipe.txt")
    for name, target in (
        ("device", "/dev/zero"),
        ("lost", folder / "absent"),
        ("loop", folder / "loop.txt"),
    ):
        (folder / f"{name}.txt").symlink_to(target)
    return {
        "folder": "a folder",
        "pipe": "a pipe (- reads standard input, where texts are expected)",
        "device": "a device",
        "lost": "no such file, but a link that leads nowhere",
        "loop": "one that cannot be read (Too many levels of symbolic links)",
        "none": "no such file",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's devices and its words for errors")
def test_what_is_no_file_is_named(tmp_path):
    """A pipe, a device and a link to itself were "no such file"; an endless file filled memory."""
    for name, expected in standing_at(tmp_path).items():
        path = tmp_path / f"{name}.txt"
        assert other_than_file(path) == expected
        if name != "folder":
            with pytest.raises(
                InputError, match=re.escape(f"{path}: expected a text file, got {expected}")
            ):
                list(read_documents([path]))
            if name != "none":
                with pytest.raises(
                    InputError,
                    match=re.escape(f"{path}: expected a file of prompts, got {expected}"),
                ):
                    list(read_prompts(path))
    assert other_than_file(__file__) is None
    with pytest.raises(
        InputError, match="device.txt: expected a result file of ppl eval --json, got a device"
    ):
        read_written(tmp_path / "device.txt", "eval")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_tar_archive_is_no_text(tmp_path, name):
    """Its header is ASCII and zeros, which is UTF-8: the archive was scored as if it were text."""
    (tmp_path / "words.txt").write_text("the cat sat")
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith(".gz") else "w") as archive:
        archive.add(tmp_path / "words.txt", "words.txt")
    with pytest.raises(InputError, match=f"{name}: expected UTF-8, got a tar archive"):
        list(read_documents([tmp_path / name]))


@pytest.mark.parametrize("command", ["ask", "probe"])
def test_a_template_is_named_by_its_file(tmp_path, command, capsys):
    """The error did not name the file of the template, and a pipe was waited for."""
    text, template = tmp_path / "text.jsonl", tmp_path / "question.txt"
    text.write_text('{"text": "the cat sat"}\n')
    template.write_text("Is it good?")
    options = ["--judge", "none"] if command == "probe" else []
    assert main([command, "none", str(text), "--template", str(template), *options]) == 2
    assert (
        f"--template {template}: expected {{text}} in it once, got it 0 times"
        in capsys.readouterr().err
    )
