"""``torchrun`` with 2 and 3 real processes gives the single process's numbers."""

import json
import os
import sys

import pytest
import torch
from processes import run
from tiny_models import TEXTS, save_small_model

from perplexity import evaluate
from perplexity.errors import InputError
from perplexity.scoring.stream import raise_together


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    save_small_model(folder / "model")
    texts = [" ".join([TEXTS[i % 3]] * (1 + i % 7)) for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


OPTIONS = ("--context-length", 16, "--batch-size", 3)


def over_ranks(ranks: int, *arguments, **variables):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return run(sys.executable, *launcher, "-m", "perplexity", "eval", *arguments, env=environment)


@pytest.fixture
def one_thread():
    """A rank has one thread, and the journal belongs to a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_the_single_process_numbers(folder, tmp_path, ppl_here, one_thread, ranks):
    def written(done, out):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("word perplexity") == 1  # one rank speaks
        return json.loads((tmp_path / out).read_text())

    files = (folder / "model", folder / "text.jsonl", *OPTIONS)
    details = ("--per-token", tmp_path / "t.parquet", "--journal", tmp_path / "j")
    single = written(ppl_here("eval", *files, "--json", tmp_path / "single.json"), "single.json")
    got = written(over_ranks(ranks, *files, "--json", tmp_path / "out.json", *details), "out.json")
    assert got["loss"] == pytest.approx(single["loss"], rel=1e-9)
    assert got["tokens"] == single["tokens"] and got["skipped"] == single["skipped"]
    assert [d["id"] for d in got["per_document"]] == [d["id"] for d in single["per_document"]]
    for ours, theirs in zip(got["per_document"], single["per_document"], strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-9)
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(tmp_path / "t.parquet").num_rows == got["tokens"]
    assert len(list((tmp_path / "j").glob("rank*.sqlite"))) == ranks
    # What any number of ranks wrote, another number reads.
    again = written(
        ppl_here("eval", *files, "--json", tmp_path / "again.json", *details), "again.json"
    )
    assert again["loss"] == got["loss"]


def test_distributed_needs_a_process_group(model, tokenizer):
    with pytest.raises(InputError, match="distributed: expected an initialised torch.distributed"):
        evaluate(model, tokenizer, TEXTS, distributed=True)


def test_another_ranks_error_is_raised_here(monkeypatch):
    def gather(messages, own):
        messages[:] = [own, "OSError: disk"]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with (
        pytest.raises(InputError, match=r"another rank stopped \(OSError: disk\)"),
        raise_together(2),
    ):
        pass
    with pytest.raises(KeyError, match="own"), raise_together(2):
        raise KeyError("own")


@pytest.mark.slow
def test_what_one_rank_cannot_do_stops_all_with_its_words(folder, tmp_path):
    # Only rank 0 writes; the unfinished file's name leads into a folder that does not exist.
    broken = (
        "import os, secrets\n"
        "if os.environ.get('RANK') == '0':\n"
        "    secrets.token_hex = lambda _: 'no/such'\n"
    )
    (tmp_path / "sitecustomize.py").write_text(broken)
    files = (folder / "model", folder / "text.jsonl", "--per-token", tmp_path / "t.parquet")
    done = over_ranks(2, *files, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "t.parquet cannot be written (No such file or directory)" in done.stderr
    assert "distributed: another rank stopped (InputError: per_token" in done.stderr


def test_a_rank_takes_its_own_gpu(monkeypatch):
    """No machine of these tests has two: what torch is asked for is written down instead."""
    from perplexity.cli.ranks import ranks

    told = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    for name, value in (
        ("init_process_group", None),
        ("destroy_process_group", None),
        ("get_rank", 1),
        ("get_world_size", 2),
    ):
        monkeypatch.setattr(
            torch.distributed,
            name,
            lambda *given, name=name, value=value: told.append((name, *given)) or value,
        )
    with ranks("cuda") as found:
        assert found == (1, 2, "cuda:1")
    assert told[:2] == ["cuda:1", ("init_process_group", "nccl")]
