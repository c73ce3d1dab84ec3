"""Every format gives the same documents; every broken file is named with what is wrong and
where.
"""

import gzip
import io
import json
import sys
import types

import numpy as np
import pytest

from perplexity.errors import InputError
from perplexity.evaluation import ReadOptions, read_documents

ROWS = [
    {"id": "a", "text": "the cat\r\nsat \u2028 on\tthe mat\n", "domain": "x"},
    {"id": "b", "text": "", "domain": "y"},
    {"id": "c", "text": "caf\u00e9 \u4f60\u597d \U0001f600", "domain": "x"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(folder, name: str):
    """A file of ``ROWS`` under ``name``."""
    path = folder / name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES))
    elif name.endswith(".zst"):
        import pyarrow

        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(LINES)
    elif name.endswith(".jsonl"):
        path.write_bytes(LINES)
    else:
        import datasets

        whole = datasets.Dataset.from_list(ROWS)
        (
            datasets.DatasetDict({"test": whole, "train": whole.select([0])})
            if name == "splits"
            else whole
        ).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "folder", "splits"]
)
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = write(tmp_path, name)
    options = ReadOptions(split="test" if name == "splits" else None)
    got = list(read_documents([path], options))
    assert [(d.id, d.text, d.domain) for d in got] == [
        (r["id"], r["text"], r["domain"]) for r in ROWS
    ]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_text_is_taken_as_it_is(tmp_path, suffix):
    """Line endings of every kind, a byte order mark: what is scored is what is in the file."""
    raw = "\ufeffone\r\ntwo\nthree\rfour\x00".encode()
    path = tmp_path / f"mixed.v1{suffix}"
    if suffix.endswith("gz"):
        path.write_bytes(gzip.compress(raw))
    elif suffix.endswith("zst"):
        import pyarrow

        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(raw)
    else:
        path.write_bytes(raw)
    (document,) = read_documents([path])
    assert document.text.encode() == raw and document.bytes == len(raw)
    assert document.domain == "mixed.v1"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt.gz"])
@pytest.mark.parametrize("kept", [0.5, 0.98])
def test_truncated_files(tmp_path, name, kept):
    if name == "a.txt.gz":
        path = tmp_path / name
        path.write_bytes(
            gzip.compress(
                np.random.default_rng(0).integers(32, 127, 5000, dtype=np.uint8).tobytes()
            )
        )
    else:
        path = write(tmp_path, name)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(kept * len(raw))])
    with pytest.raises(
        InputError, match=rf"{name}: expected a whole .* file, got a broken or truncated one"
    ):
        list(read_documents([path]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.npy"])
def test_files_that_are_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is not what the name says, at all, at all" * 3)
    with pytest.raises(InputError, match=rf"{name}: expected a whole"):
        list(read_documents([tmp_path / name]))


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b"caf\xe9", r"a.txt: expected UTF-8, got byte 0xe9 at offset 3"),
        ("a.txt", b" \n", r"a.txt: expected text, got an empty file"),
        ("a.jsonl", b"", r"a.jsonl: expected text, got an empty file"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            r"a.jsonl, line 2: expected UTF-8, got byte 0xff at offset 10",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": \n',
            r"a.jsonl, line 2: expected a JSON object, got broken JSON",
        ),
        (
            "a.jsonl",
            b'{"body": "a"}\n',
            r"a.jsonl, line 1: expected a string 'text', got only 'body'",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl, line 1: expected a string 'text', got int"),
        ("a.jsonl", b"[1]\n", r"a.jsonl, line 1: expected an object"),
        (
            "a.jsonl",
            b'{"text": "\\ud800"}\n',
            r"a.jsonl, line 1: expected Unicode text, got a lone surrogate",
        ),
        ("a.bin", b"\x01\x00\x02", r"a.bin: expected whole uint16 tokens, got 3 bytes"),
        ("a.bin", b"", r"a.bin: expected tokens, got an empty file"),
        ("a.pdf", b"a", r"a.pdf: expected a name that ends in \.txt, .* got '\.pdf'"),
        ("a.parquet.gz", b"a", r"expected a name that ends in"),
        ("a", b"a", r"got 'no suffix'"),
    ],
)
def test_bad_files_are_named(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=message):
        list(read_documents([tmp_path / name]))


def test_columns_by_other_names(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one", "source": "web", "url": 7}\n')
    (document,) = read_documents([path], ReadOptions("body", "source", "url"))
    assert (document.id, document.text, document.domain) == ("7", "one", "web")
    write(tmp_path, "b.parquet")
    with pytest.raises(
        InputError, match=r"b.parquet: expected a column 'body', got id, text, domain"
    ):
        list(read_documents([tmp_path / "b.parquet"], ReadOptions("body")))
    write(tmp_path, "folder")
    with pytest.raises(InputError, match=r"folder: expected a column 'body', got id, text, domain"):
        list(read_documents([tmp_path / "folder"], ReadOptions("body")))


def test_a_split_must_be_named(tmp_path):
    write(tmp_path, "splits")
    with pytest.raises(InputError, match="split: expected one of test, train .* got None"):
        list(read_documents([tmp_path / "splits"]))


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(
        InputError, match="expected a folder written by datasets.*, or one with .txt"
    ):
        list(read_documents([tmp_path]))
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match="expected a datasets folder, got one that cannot be read"):
        list(read_documents([tmp_path]))


TOKENS = [0, 5, 6, 0, 7, 8, 9, 0, 1]


@pytest.mark.parametrize("name", ["a.bin", "b.bin", "llm_c.bin", "a.npy", "i8.npy"])
def test_token_files(tmp_path, name):
    path, options = tmp_path / name, ReadOptions(split_before=0)
    if name == "a.bin":
        np.array(TOKENS, dtype=np.uint16).tofile(path)
    elif name == "b.bin":
        np.array(TOKENS, dtype=np.uint32).tofile(path)
        options = ReadOptions(split_before=0, token_dtype="uint32")
    elif name == "llm_c.bin":
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, len(TOKENS)
        path.write_bytes(header.tobytes() + np.array(TOKENS, dtype=np.uint16).tobytes())
    else:
        np.save(path, np.array(TOKENS, dtype=np.int64 if name == "i8.npy" else np.uint16))
    got = list(read_documents([path], options))
    assert [d.ids.tolist() for d in got] == [[0, 5, 6], [0, 7, 8, 9], [0, 1]]
    assert [d.id for d in got] == [f"{name}:{number}" for number in (1, 2, 3)]
    assert [
        d.ids.tolist() for d in read_documents([path], ReadOptions(token_dtype=options.token_dtype))
    ] == [TOKENS]
    ends = ReadOptions(split_after=0, token_dtype=options.token_dtype)
    assert [d.ids.tolist() for d in read_documents([path], ends)] == [
        [0],
        [5, 6, 0],
        [7, 8, 9, 0],
        [1],
    ]


def test_rows_of_tokens(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    assert [d.ids.tolist() for d in read_documents([tmp_path / "a.npy"])] == [[0, 1, 2], [3, 4, 5]]
    np.save(tmp_path / "b.npy", np.ones(3))
    with pytest.raises(InputError, match=r"b.npy: expected integers .* got float64 \[3\]"):
        list(read_documents([tmp_path / "b.npy"]))


def test_standard_input(monkeypatch):
    for raw, kind, texts in (
        (b"one\r\ntwo", "txt", ["one\r\ntwo"]),
        (LINES, "jsonl", [r["text"] for r in ROWS]),
    ):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(raw)))
        assert [d.text for d in read_documents(["-"], ReadOptions(standard_input=kind))] == texts


def test_files_come_in_order_with_their_stems_as_domains(tmp_path):
    for name in ("z.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    got = list(read_documents([tmp_path / "z.txt", tmp_path / "a.txt"]))
    assert [(d.id, d.domain) for d in got] == [("z.txt", "z"), ("a.txt", "a")]


def test_uint32_tokens_are_not_taken_for_uint16(tmp_path):
    np.arange(50, dtype=np.uint32).tofile(tmp_path / "a.bin")
    with pytest.raises(InputError, match="every second uint16 is 0: these are uint32 tokens"):
        list(read_documents([tmp_path / "a.bin"]))
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 7, 50  # llm.c's version for 32 bits
    (tmp_path / "b.bin").write_bytes(header.tobytes() + np.arange(50, dtype=np.uint32).tobytes())
    assert [d.ids.tolist() for d in read_documents([tmp_path / "b.bin"])] == [list(range(50))]


def test_json_too_deep_for_the_parser(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 200_000 + "\n")
    with pytest.raises(
        InputError, match="a.jsonl, line 1: expected a JSON object, got broken JSON"
    ):
        list(read_documents([tmp_path / "a.jsonl"]))


def test_a_table_of_tokens_is_no_text(tmp_path):
    """It has a text column: a row a token was scored as a document each."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "tokens.parquet"
    columns = {"document": ["a"], "position": [0], "text": ["the"], "nll": [1.5]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(
        InputError, match="expected documents, got a row a token, as ppl eval --per-token writes"
    ):
        list(read_documents([path]))
