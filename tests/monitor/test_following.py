"""A file that is followed: bad lines, second headers, rotation, files that are read as a whole; runs
chosen and judged by the command.
"""

import json
import sqlite3

import pytest

from perplexity.errors import InputError
from perplexity.monitor import read_history
from perplexity.monitor.follower import Follower, NotYet
from perplexity.monitor.history import History
from perplexity.monitor.readers import extend

KINDS = {
    "csv": ("a.csv", "step,loss\n", "{n},{x}\n"),
    "jsonl": ("a.jsonl", "", '{{"step": {n}, "loss": {x}}}\n'),
    "console": ("a.log", "starting\n", "[rank0]: step {n}: loss {x}, time 1ms\n"),
}


def write(path, text: str, mode: str = "a") -> None:
    with path.open(mode) as file:
        file.write(text)


def rows(line: str, first: int, last: int) -> str:
    return "".join(line.format(n=n, x=4 - n / 100) for n in range(first, last))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["renamed", "renamed with a rest", "cut", "gone for a while"])
def test_rotation_goes_on(tmp_path, kind, how):
    """The rows of a file before it was rotated were forgotten, and those that it got last unread."""
    name, head, line = KINDS[kind]
    path = tmp_path / name
    write(path, head + rows(line, 1, 11))
    follower = Follower(path)
    history, whole = follower.new()
    assert whole and len(history.train_step) == 10
    if how == "renamed with a rest":
        write(path, rows(line, 11, 13))
    if how == "cut":
        (tmp_path / "a.1").write_text(path.read_text())
        path.write_text("")
        with pytest.raises(NotYet):
            follower.new()
    else:
        path.rename(tmp_path / f"{name}.1")
    if how == "gone for a while":
        with pytest.raises(NotYet, match="no such file"):
            follower.new()
    first = 13 if how == "renamed with a rest" else 11
    write(path, rows(line, first, 20))  # a rotated table has no header of its own
    more, whole = follower.new()
    assert not whole
    extend(history, more)
    assert history.train_step.tolist() == list(range(1, 20))
    assert "the file was rotated" in history.notes[-1]
    write(path, rows(line, 20, 22))
    more, whole = follower.new()
    assert not whole and more.train_step.tolist() == [20, 21]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_run_in_the_same_file_begins_anew(tmp_path, kind):
    name, head, line = KINDS[kind]
    path = tmp_path / name
    write(path, head + rows(line, 1, 30))
    follower = Follower(path)
    follower.new()
    path.write_text(head + rows(line, 1, 5))
    history, whole = follower.new()
    assert whole and history.train_step.tolist() == [1, 2, 3, 4]


def test_bad_lines_and_a_second_header(tmp_path):
    path = tmp_path / "a.csv"
    write(path, "step,loss\n1,3.5\n")
    follower, history = Follower(path), History()
    for text in (
        "2,x\n",
        "step,val_loss,loss\n",
        "3,3.3,3.25\n",
        "4,,3.0,,,\n5,3.1,a b\n",
        "6,3.0,2.5\n",
    ):
        extend(history, follower.new()[0])
        write(path, text)
    extend(history, follower.new()[0])
    assert history.train_loss.tolist() == [3.5, 3.25, 3.0, 2.5]
    assert history.of("val_loss")[1].tolist() == [3.3, 3.1, 3.0]
    assert history.train_loss.tolist() == read_history(path).train_loss.tolist()
    assert [note for note in history.notes if "left out" in note] == [
        "line 3: expected a number for loss, got 'x'; 1 cell left out",
        "line 7: expected a number for loss, got 'a b'; 1 cell left out",
    ]


def test_a_better_name_that_comes_later_makes_it_read_the_whole(tmp_path):
    """A mean of an epoch is the training loss only as long as no step's own is there."""
    path = tmp_path / "a.jsonl"
    write(path, '{"step": 1, "train_loss_epoch": 9.0, "eval_wiki_loss": 4.0}\n')
    follower = Follower(path)
    assert follower.new()[0].train_loss.tolist() == [9.0]
    write(path, '{"step": 2, "train_loss_step": 3.0, "eval_c4_loss": 5.0}\n')
    history, whole = follower.new()
    assert whole and history.train_loss.tolist() == [3.0]
    assert history.main_set == "wiki" and history.sets() == ["wiki", "c4"]
    write(
        path, '{"step": 3, "train_loss_step": 2.5, "train_loss_epoch": 9.0, "eval_c4_loss": 5.0}\n'
    )
    history, whole = follower.new()
    assert not whole and history.train_loss.tolist() == [2.5]
    assert history.main_set == "wiki" and history.sets() == ["c4"]


def test_files_that_are_read_as_a_whole(tmp_path):
    """Rows without a step are numbered over the whole file; a database is read anew if it changed."""
    path = tmp_path / "trainer.log"
    write(path, "{'loss': 3.5, 'epoch': 0.01}\n")
    follower = Follower(path)
    assert follower.new()[1]
    history, whole = follower.new()
    assert not len(history) and not whole
    write(path, "{'loss': 3.25, 'epoch': 0.01}\n")
    history, whole = follower.new()
    assert whole and history.train_step.tolist() == [1, 2]

    base = sqlite3.connect(tmp_path / "a.db")
    base.execute("CREATE TABLE metrics (key, value, timestamp, run_uuid, step, is_nan)")
    base.execute("INSERT INTO metrics VALUES ('loss', 3.5, 1, 'r', 1, 0)")
    base.commit()
    follower = Follower(tmp_path / "a.db")
    assert follower.new()[0].train_loss.tolist() == [3.5]
    assert not follower.new()[1]
    base.execute("INSERT INTO metrics VALUES ('loss', 3.25, 2, 'r', 2, 0)")
    base.commit()
    base.close()
    assert follower.new()[0].train_loss.tolist() == [3.5, 3.25]


def test_nothing_yet(tmp_path):
    path = tmp_path / "a.log"
    follower = Follower(path)
    for text in (None, "", "loading", " the model\n", "step 1: lo"):
        if text is not None:
            write(path, text)
        with pytest.raises(NotYet):
            follower.new()
    write(path, "ss 3.5\n")
    assert follower.new()[0].train_loss.tolist() == [3.5]
    (tmp_path / "b.log").write_bytes("step 1 loss 2\n".encode("utf-16"))
    with pytest.raises(InputError, match="expected UTF-8") as raised:
        Follower(tmp_path / "b.log").new()
    assert not isinstance(raised.value, NotYet)


def test_runs_by_the_command(tmp_path, ppl_here, fails):
    path, out = tmp_path / "runs.csv", tmp_path / "out.json"
    lines = ["run,step,loss"]
    for step in range(200):
        lines += [f"good,{step},{4 - step / 400}", f"bad,{step},{'nan' if step > 150 else 3}"]
    path.write_text("\n".join(lines) + "\n")
    fails(tmp_path, ["monitor", "runs.csv"], ["expected one run, got 2: good, bad", "--all"])
    fails(tmp_path, ["monitor", "runs.csv", "--run", "x"], ["expected one of good, bad, got 'x'"])
    fails(tmp_path, ["monitor", "runs.csv", "--all", "--follow"], ["--all", "--follow"])
    done = ppl_here("monitor", path, "--run", "bad", "--json", out, "--fail-on", "danger")
    assert done.returncode == 1 and json.loads(out.read_text())["verdict"] == "unhealthy"
    done = ppl_here("monitor", path, "--all", "--json", out, "--fail-on", "danger")
    assert done.returncode == 1, done.stderr
    found = {each["run"]: each["verdict"] for each in json.loads(out.read_text())["runs"]}
    assert found["bad"] == "unhealthy" and found["good"] != "unhealthy" and len(found) == 2
    assert [line for line in done.stdout.splitlines() if line.startswith(("good: ", "bad: "))]
    done = ppl_here("monitor", path, "--run", "bad", "--follow", "--polls", 1)
    assert done.returncode == 0 and "unhealthy" in done.stdout


def test_patterns_by_the_command(tmp_path, ppl_here, fails):
    (tmp_path / "a.log").write_text("".join(f"at {n} it is {4 - n / 400}\n" for n in range(200)))
    fails(tmp_path, ["monitor", "a.log"], ["a.log", "--pattern"])
    fails(tmp_path, ["monitor", "a.log", "--pattern", "("], ["--pattern: expected a regular"])
    pattern = r"at (?P<step>\d+) it is (?P<train_loss>\S+)"
    for more in ([], ["--follow", "--polls", 1]):
        done = ppl_here("monitor", tmp_path / "a.log", "--pattern", pattern, *more)
        assert done.returncode == 0 and "step 199" in done.stdout, done.stderr
