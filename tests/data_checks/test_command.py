"""``ppl check-data`` and ``ppl eval --train`` as they are called: files in, numbers out, bad input
in one line.
"""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import documentation, sources
from tiny_models import build_model, build_tokenizer

from perplexity.cli import main

CONTRACT = {
    *(
        "documents",
        "valid_fraction",
        "leaked_fraction",
        "leaked_token_fraction",
        "exact_duplicates",
        "near_duplicates",
    ),
    *("ngram_overlap", "unknown_token_rate", "tokenizer_fingerprint", "findings"),
}


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def files(tmp_path):
    valid = documentation()[:100]
    train = [*sources()[:30], *valid[:5]]
    return lines(tmp_path / "train.jsonl", train), lines(tmp_path / "valid.jsonl", valid), tmp_path


def run(*arguments):
    return main(["check-data", *map(str, arguments)])


def test_the_numbers(files, capsys):
    train, valid, folder = files
    assert run("--train", train, "--valid", valid, "--json", folder / "out.json") == 0
    record = json.loads((folder / "out.json").read_text())
    assert record.keys() >= CONTRACT
    assert record["documents"] == {"train": 35, "valid": 100}
    assert (
        record["leaked_fraction"] == 0.05
        and record["exact_duplicates"] == 5
        and record["near_duplicates"] == 0
    )
    assert record["unknown_token_rate"] is None and record["tokenizer_fingerprint"] is None
    assert all(
        finding.keys() >= {"signal", "severity", "evidence", "advice"}
        for finding in record["findings"]
    )
    assert [leak["train_id"] for leak in record["leaked"]] == [
        f"train.jsonl:{place}" for place in range(31, 36)
    ]
    said = capsys.readouterr().out
    assert "leaked documents" in said and "5.00%" in said and "valid.jsonl:1" in said


def test_exit_status(files):
    train, valid, folder = files
    assert run("--train", train, "--valid", valid, "--fail-on", "danger") == 1
    clean = folder / "clean.jsonl"
    assert run("--train", train, "--valid", valid, "--write-clean", clean) == 0
    assert len(clean.read_text().splitlines()) == 95
    assert run("--train", train, "--valid", clean, "--fail-on", "danger") == 0


def test_one_text_file_is_its_paragraphs(tmp_path, capsys):
    valid = documentation()[:40]
    (tmp_path / "valid.txt").write_text("\n\n".join(valid))
    (tmp_path / "train.txt").write_text("\n\n".join([*sources()[:10], *valid[:6]]))
    out = tmp_path / "out.json"
    pair = ("--train", tmp_path / "train.txt", "--valid", tmp_path / "valid.txt")
    assert run(*pair, "--json", out) == 0
    assert json.loads(out.read_text())["leaked_fraction"] == 0.15
    assert run(*pair, "--json", out, "--unit", "document") == 0
    record = json.loads(out.read_text())
    assert record["documents"] == {"train": 1, "valid": 1} and record["leaked_fraction"] == 0.0
    assert 0.05 < record["ngram_overlap"] < 0.3


def test_a_long_text_file_goes_by_in_pieces(tmp_path, monkeypatch):
    from perplexity.data_checks import texts

    monkeypatch.setattr(texts, "PIECE", 1000)
    valid = documentation()[:30]
    (tmp_path / "train.txt").write_text(
        "\u00e9 " * 3000 + "\n\n" + "\n\n".join([*sources()[:3], *valid[:9]])
    )
    lines(tmp_path / "valid.jsonl", valid)
    for unit, documents in (("document", 1), ("paragraph", None)):
        out = tmp_path / "out.json"
        assert (
            run(
                "--train",
                tmp_path / "train.txt",
                "--valid",
                tmp_path / "valid.jsonl",
                "--json",
                out,
                "--unit",
                unit,
            )
            == 0
        )
        record = json.loads(out.read_text())
        assert documents in (None, record["documents"]["train"])
        # a piece may end inside a paragraph
        assert record["leaked_fraction"] == pytest.approx(0.3, abs=0.04)


def test_other_formats(files):
    train, valid, folder = files
    packed = folder / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(train).read_bytes()))
    plain, zipped = folder / "a.json", folder / "b.json"
    assert run("--train", train, "--valid", valid, "--json", plain) == 0
    assert run("--train", packed, "--valid", valid, "--json", zipped) == 0
    first, second = json.loads(plain.read_text()), json.loads(zipped.read_text())
    assert first["leaked_fraction"] == second["leaked_fraction"] == 0.05
    tokenizer = build_tokenizer(bos=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    import numpy as np

    ids = [
        token
        for text in documentation()[:5]
        for token in [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    ]
    np.array(ids, np.uint16).tofile(folder / "valid.bin")
    tokens = (
        "--train",
        train,
        "--valid",
        folder / "valid.bin",
        "--tokenizer",
        folder / "tokenizer",
        "--json",
        plain,
    )
    assert run(*tokens) == 0
    record = json.loads(plain.read_text())
    assert (
        record["documents"]["valid"] == 5
        and record["leaked_fraction"] == 1.0
        and record["unknown_token_rate"] == 0.0
    )


def test_files_of_one_name_are_told_apart(files):
    train, valid, folder = files
    (folder / "b").mkdir()
    other = lines(folder / "b" / "train.jsonl", documentation()[50:53])
    assert run("--train", train, other, "--valid", valid, "--json", folder / "out.json") == 0
    found = {leak["train_id"] for leak in json.loads((folder / "out.json").read_text())["leaked"]}
    assert f"{other}:1" in found and f"{train}:31" in found and len(found) == 8


def test_a_journal_is_of_its_files_and_options(files, capsys):
    import datasets

    _, valid, folder = files
    texts = documentation()[:60]
    for name, rows in (("a", texts), ("b", texts[:20])):
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(folder / name))
    journal = ("--journal", folder / "journal")
    assert run("--train", folder / "a", "--valid", valid, *journal) == 0
    assert run("--train", folder / "a", "--valid", valid, *journal) == 0
    capsys.readouterr()
    for other in (("--train", folder / "b"), ("--train", folder / "a", "--id-column", "name")):
        assert run(*other, "--valid", valid, *journal) == 2
        assert "is of another run, with" in capsys.readouterr().err


def test_a_tokenizer_alone_prints_its_fingerprint(tmp_path, capsys):
    from perplexity.fingerprints import tokenizer_fingerprint

    build_tokenizer(bos=True).save_pretrained(tmp_path)
    assert run("--tokenizer", tmp_path) == 0
    assert (
        capsys.readouterr().out == f"tokenizer {tokenizer_fingerprint(build_tokenizer(bos=True))}\n"
    )


def test_a_split_that_does_not_leak(files, capsys):
    _, _, folder = files
    texts = documentation()
    source = lines(
        folder / "all.jsonl",
        [*texts, *(f"{text}\n\nand a tail of its own, {len(text)}" for text in texts[::3])],
    )
    out = folder / "split"
    assert run("--train", source, "--write-split", out, "--valid-fraction", "0.1") == 0
    counts = [len((out / f"{side}.jsonl").read_text().splitlines()) for side in ("train", "valid")]
    assert 60 < counts[1] < 170 and counts[0] > 900
    first = (out / "valid.jsonl").read_bytes()
    assert run("--train", source, "--write-split", out, "--valid-fraction", "0.1") == 0
    assert (out / "valid.jsonl").read_bytes() == first
    pair = ("--train", out / "train.jsonl", "--valid", out / "valid.jsonl")
    assert run(*pair, "--json", folder / "out.json") == 0
    assert json.loads((folder / "out.json").read_text())["leaked_fraction"] == 0.0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b"", "expected text, got an empty file"),
        ("x.txt", b" \n\n ", "expected text, got an empty file"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "line 2: expected a JSON object"),
        ("x.jsonl", b'{"body": "a"}\n', "line 1: expected a string 'text'"),
        ("x.txt", b"good \xff bad", "expected UTF-8, got byte 0xff at offset 5"),
        ("x.txt", "caf\u00e9".encode()[:-1], "expected UTF-8"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:40], "expected a whole .gz file"),
        ("x.txt.gz", gzip.compress(b"words " * 9999)[:60], "expected a whole .gz file"),
        ("x.parquet", b"PAR1 and no more", "expected a whole Parquet file"),
        ("x.bin", b"\1\0\2\0", "expected a text, got tokens; --tokenizer"),
        ("x.pdf", b"%PDF", "expected a name that ends in"),
    ],
)
@pytest.mark.parametrize("side", ["--train", "--valid"])
def test_corrupted_files_are_told_in_a_line(name, content, said, side, files, capsys):
    train, valid, folder = files
    path = folder / name
    path.write_bytes(content)
    sides = {"--train": train, "--valid": valid} | {side: str(path)}
    assert run(*(part for pair in sides.items() for part in pair)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and str(path) in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--train: expected training text"),
        (["--valid", "VALID"], "--train: expected training text"),
        (["--train", "TRAIN"], "--valid: expected validation text"),
        (
            ["--train", "TRAIN", "--valid", "VALID", "--write-split", "x"],
            "--write-split: expected --train alone",
        ),
        (["--train", "TRAIN", "--valid", "VALID", "--near", "0"], "--near: expected a share"),
        (
            ["--train", "TRAIN", "--valid", "VALID", "--workers", "0"],
            "--workers: expected at least 1",
        ),
        (
            ["--train", "TRAIN", "--valid", "VALID", "--json", "/nowhere/x"],
            "--json: expected a file in an existing folder",
        ),
        (
            ["--train", "TRAIN", "--valid", "VALID", "--write-clean", "VALID"],
            "--write-clean: expected a file of its own",
        ),
        (
            ["--train", "missing.txt", "--valid", "VALID"],
            "missing.txt: expected a text file, got no such file",
        ),
        (["--train", "TRAIN", "--valid", "VALID", "--tokenizer", "missing"], "missing: expected a"),
        (["--train", "-", "--valid", "-"], "-: expected a file"),
        (
            ["--train", "-", "--valid", "VALID", "--journal", "FOLDER/j"],
            "-: expected a file with --journal",
        ),
        (
            ["--train", "TRAIN", "--valid", "VALID", "--write-clean", "FOLDER/c.jsonl.gz"],
            "--write-clean: expected a name",
        ),
        (
            ["--train", "TRAIN", "--valid", "VALID", "--write-clean", "FOLDER/c.txt"],
            "--write-clean: expected a .jsonl",
        ),
        (
            [
                "--train",
                "TRAIN",
                "--valid",
                "VALID",
                "--write-clean",
                "FOLDER/c.jsonl",
                "--json",
                "FOLDER/c.jsonl",
            ],
            "--write-clean: expected a file of its own, got another output",
        ),
        (
            ["--train", "TRAIN", "--write-split", "FOLDER/s", "--json", "FOLDER/j"],
            "--json: expected no --write-split with it",
        ),
        (
            ["--train", "VALID", "--write-split", "FOLDER/s", "--valid-fraction", "0.00001"],
            "--valid-fraction: expected both",
        ),
    ],
)
def test_bad_options_are_told_in_a_line(arguments, said, files, capsys, monkeypatch):
    train, valid, folder = files
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"TRAIN": train, "VALID": valid}
    assert run(*(names.get(part, part).replace("FOLDER", str(folder)) for part in arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_beside_an_evaluation(files, capsys):
    train, valid, folder = files
    tokenizer = build_tokenizer(bos=True)
    tokenizer.save_pretrained(folder / "model")
    build_model(len(tokenizer)).save_pretrained(folder / "model")
    assert (
        main(
            [
                "eval",
                str(folder / "model"),
                valid,
                "--train",
                train,
                "--json",
                str(folder / "out.json"),
            ]
        )
        == 0
    )
    record = json.loads((folder / "out.json").read_text())
    assert (
        record["data_check"]["leaked_fraction"] == 0.05 and record["data_check"].keys() >= CONTRACT
    )
    assert record["data_check"]["tokenizer_fingerprint"] == record["tokenizer_fingerprint"]
    assert "leaked documents" in capsys.readouterr().out


def test_nothing_is_loaded_that_is_not_needed():
    code = (
        "import perplexity.cli, sys\n"
        "assert not {'xxhash', 'transformers', 'rich', 'scipy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
