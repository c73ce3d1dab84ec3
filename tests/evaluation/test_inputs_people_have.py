"""Folders, CSV, TSV and JSON lists; limits and samples; what the command writes and says."""

import csv
import gzip
import json

import pytest
from tiny_models import save_small_model

from perplexity.errors import InputError
from perplexity.evaluation import ReadOptions, read_documents

ROWS = [
    {"id": "a", "text": 'the cat, "sat"\non the mat', "domain": "one"},
    {"id": "b", "text": "caf\u00e9", "domain": "two"},
    {"id": "", "text": " the dog", "domain": ""},
]


def table(path, rows, delimiter):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("name", ["r.csv", "r.tsv", "r.csv.gz", "r.json", "r.json.gz"])
def test_tables_and_lists(tmp_path, name):
    path = tmp_path / name
    if ".json" in name:
        raw = json.dumps([*ROWS[:2], {"text": " the dog"}]).encode()
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    else:
        table(path, ROWS, "\t" if "tsv" in name else ",")
    got = [(each.id, each.text, each.domain) for each in read_documents([path])]
    assert got == [
        ("a", ROWS[0]["text"], "one"),
        ("b", ROWS[1]["text"], "two"),
        (f"{name}:3", " the dog", "r"),
    ]


def test_lists_of_texts_and_lists_within_an_object(tmp_path):
    path = tmp_path / "a.json"
    for content in (["one", "two"], {"version": 1, "data": [{"text": "one"}, {"text": "two"}]}):
        path.write_text(json.dumps(content))
        assert [each.text for each in read_documents([path])] == ["one", "two"]


def test_parts_in_a_table(tmp_path):
    """Spans and messages are JSON in a cell; an empty prompt is a prompt."""
    messages = [{"role": "assistant", "content": "hi"}]
    rows = [{"text": "the cat", "spans": "[[0, 3]]"}, {"text": "sat", "spans": ""}]
    table(tmp_path / "spans.csv", rows, ",")
    got = list(read_documents([tmp_path / "spans.csv"]))
    assert [each.spans for each in got] == [[[0, 3]], None]
    table(tmp_path / "chat.csv", [{"messages": json.dumps(messages)}], ",")
    (got,) = read_documents([tmp_path / "chat.csv"])
    assert got.messages == messages
    table(tmp_path / "pairs.csv", [{"prompt": "", "completion": "sat"}], ",")
    (got,) = read_documents([tmp_path / "pairs.csv"])
    assert (got.text, got.spans) == ("sat", [(0, 3)])


def test_a_folder_is_its_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/2.txt", "a.txt", ".git/x.txt", "README.md", "weights.bin", "config.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    assert [each.text for each in read_documents([tmp_path])] == ["a.txt", "b/2.txt", "c"]


def test_limit_and_sample(tmp_path):
    texts = [f"text {number}" for number in range(200)]
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(order))

    def read(name, **options):
        return [each.text for each in read_documents([tmp_path / name], ReadOptions(**options))]

    assert read("a.json", limit=3) == texts[:3]
    assert read("a.json", limit=999) == texts == read("a.json", sample=999)
    chosen = read("a.json", sample=20)
    # The same documents in any order of the file, each file's order kept; a larger sample has them.
    assert len(chosen) == 20 and chosen == sorted(chosen, key=texts.index) != texts[:20]
    assert read("b.json", sample=20) == chosen[::-1]
    assert set(chosen) < set(read("a.json", sample=40))


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.csv", b"text\n", "a.csv: expected text, got no rows"),
        ("a.csv", b"", "a.csv: expected text, got no rows"),
        ("a.csv", b"content,id\nx,1\n", "expected a column 'text', got content, id; --text-column"),
        ("a.csv", b"text,id\nx\n", "a.csv, line 2: expected 2 cells, got 1"),
        ("a.csv", b"text,text\nx,y\n", "one column of a name, got text more than once"),
        ("a.csv", b'text\n"x\n', "a.csv, line 2: expected rows of cells, got a broken row"),
        ("a.csv", b"text\n\xff\n", "expected UTF-8, got byte 0xff"),
        ("a.json", b"[1]", "a.json, item 1: expected an object or a text, got int"),
        ("a.json", b"[]", "a.json: expected text, got an empty list"),
        ("a.json", b"3", "a.json: expected a JSON list of objects or texts, got int"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "got broken JSON .* name a file .* .jsonl"),
        ("a.json", b'[{"body": "a"}]', "item 1: expected a string 'text', got only 'body'; --text"),
    ],
)
def test_bad_tables_and_lists(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=message):
        list(read_documents([tmp_path / name]))


def test_a_limit_or_a_sample():
    with pytest.raises(InputError, match="limit: expected one of limit and sample, got 1 and 2"):
        ReadOptions(limit=1, sample=2)
    with pytest.raises(InputError, match="limit: expected a whole number"):
        ReadOptions(limit=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_small_model(folder / "model")
    (folder / "texts").mkdir()
    for number in range(3):
        (folder / "texts" / f"{number}.txt").write_text("the cat sat on the mat " * (number + 1))
    (folder / "notes").mkdir()
    (folder / "notes" / "a.md").write_text("the cat")
    table(folder / "named.csv", [{"content": "the cat sat"}], ",")
    return folder


def test_json_to_standard_output(folder, ppl_here):
    done = ppl_here(
        "eval", "model", "texts", "--limit", "2", "--dtype", "fp32", "--json", "-", cwd=folder
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["documents"] == 2
    assert "perplexity" in done.stderr and not (folder / "-").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model", "named.csv"], ["'text'", "got content", "--text-column"]),
        (["model", "."], ["'text'", "--text-column"]),
        (["model", "model/missing"], ["model/missing"]),
        (["nobody/nothing", "texts"], ["no answer from the hub", "folder"]),
        (["texts", "texts"], ["texts: expected a Hugging Face model folder", "config.json"]),
        (["./modle", "texts"], ["local model folder", "check the path"]),
        (["model/config.json", "texts"], ["got a file; give its folder"]),
        (["model", "text"], ["text: expected a text file", "did you mean texts?"]),
        (["model", "zzz.txt"], ["no such file; check the path"]),
        (["model", "notes"], [".parquet files, got one with a.md; give texts the ending .txt"]),
        (["model", "texts", "--tokenizer", "texts"], ["tokenizer", "--tokenizer DIR"]),
        (["model", "texts", "--tokenizer", "nowhere"], ["a tokenizer folder", "no answer"]),
    ],
)
def test_errors_say_what_to_do(folder, fails, monkeypatch, arguments, words):
    import huggingface_hub

    def unreachable(self, *arguments, **keywords):
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    fails(folder, ["eval", *arguments], words)
    if arguments[1] == "named.csv":
        fails(folder, ["eval", *arguments, "--text-column", "body"], ["'body'"])
