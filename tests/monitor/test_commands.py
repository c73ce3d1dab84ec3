"""``ppl monitor`` and ``ppl report`` as processes: what they print and write, exit statuses,
following a file that grows.
"""

import json
import os
import select
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from faults import runs
from processes import HANG, ppl, ppl_after

from perplexity.monitor import read_history
from perplexity.monitor.follower import Follower, NotYet

# The least that a result file of ``ppl eval --json`` holds.
RESULT = {
    "loss": 3.0,
    "tokens": 10,
    "per_document": [],
    "tokenizer_fingerprint": "a",
    "text_fingerprint": "b",
}


def csv_of(rows) -> str:
    lines = [f"{step},{train},{'' if value is None else value}" for step, train, value in rows]
    return "step,train_loss,val_loss\n" + "".join(f"{line}\n" for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitor")
    for name in ("healthy", "overfitting", "frozen-rate"):
        (folder / f"{name}.csv").write_text(csv_of(runs(name)[0]))
    (folder / "nothing.jsonl").write_text('{"epoch": 1, "ppl": 2}\n')
    (folder / "odd.json").write_text(json.dumps(RESULT | {"tokens": [1]}))
    (folder / "broken.csv").write_text("step,train_loss\n1,x\n")
    return folder


@pytest.mark.parametrize(
    ("name", "options", "status", "verdict"),
    [
        ("healthy", [], 0, "healthy"),
        ("healthy", ["--fail-on", "warning"], 0, "healthy"),
        ("overfitting", [], 0, "unhealthy"),
        ("overfitting", ["--fail-on", "danger"], 1, "unhealthy"),
        ("frozen-rate", ["--fail-on", "danger"], 0, "watch"),
        ("frozen-rate", ["--fail-on", "warning"], 1, "watch"),
    ],
)
def test_verdict_and_exit_status(folder, tmp_path, ppl_here, name, options, status, verdict):
    out = tmp_path / "out.json"
    done = ppl_here(
        "monitor", folder / f"{name}.csv", "--vocabulary-size", 512, "--json", out, *options
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.startswith(verdict)
    record = json.loads(out.read_text())
    assert record["verdict"] == verdict
    assert {f["signal"] for f in record["findings"]} >= (
        {"overfitting"} if name == "overfitting" else set()
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["monitor", "absent.csv"], ["absent.csv", "no such file"]),
        (
            ["monitor", "broken.csv"],
            ["broken.csv, line 2", "expected a number for train_loss, got 'x'"],
        ),
        (["monitor", "healthy.csv", "--vocabulary-size", "1"], ["--vocabulary-size"]),
        (["monitor", "healthy.csv", "--tag", "x"], ["--tag", "MEASURE=NAME"]),
        (["monitor", "healthy.csv", "--json", "no/such"], ["--json", "existing folder"]),
        (["monitor", "healthy.csv", "--unit", "bans"], ["--unit"]),
        (["monitor", "absent.csv", "--follow"], ["absent.csv", "no such file"]),
        (["monitor", "healthy.csv", "--tag", "val_loss=typo"], ["tag", "typo"]),
        (
            ["monitor", "healthy.csv", "--follow", "--interval", "inf"],
            ["--interval", "a finite number"],
        ),
        (
            ["monitor", "healthy.csv", "--follow", "--interval", "1e6"],
            ["--interval", "at most a day"],
        ),
        (["monitor", "nothing.jsonl", "--follow", "--polls", "1"], ["nothing.jsonl"]),
        (["report", "healthy.csv", "--png", "."], ["--png: expected a file, got the folder ."]),
        (
            ["report", "healthy.csv", "-o", "x.html", "--eval", "odd.json"],
            ["odd.json", "whole number for tokens", "got [1]"],
        ),
        (["report", "healthy.csv"], ["-o", "--png"]),
        (["report", "healthy.csv", "-o", "no/such.html"], ["--output", "existing folder"]),
        (
            ["report", "healthy.csv", "-o", "x.html", "--eval", "healthy.csv"],
            ["healthy.csv", "result file"],
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(folder, arguments, words, fails):
    fails(folder, arguments, words)


def test_a_file_that_grows_is_followed(tmp_path, ppl_here, monkeypatch):
    """Half a line is written between two looks, then the rest, then an interruption ends the
    following.

    What is written stands where the command sleeps, so that each look has its own state of the file
    on any machine.
    """
    path, told, out = tmp_path / "run.csv", tmp_path / "told", tmp_path / "out.json"
    text = csv_of(runs("overfitting")[0])
    half = text.index("\n", len(text) // 3) + 5
    path.write_text(text[: half // 2])
    parts = iter([text[half // 2 : half], text[half:], ""])
    seen, slept = [], []
    new = Follower.new

    def look(follower):
        history, whole = new(follower)
        seen.append((len(history.train_step), whole))
        return history, whole

    def sleep(seconds):
        slept.append(seconds)
        part = next(parts, None)
        if part is None:
            raise KeyboardInterrupt
        with path.open("a") as file:
            file.write(part)

    monkeypatch.setattr(Follower, "new", look)
    monkeypatch.setattr("perplexity.cli.monitor.time.sleep", sleep)
    options = [
        "--json",
        out,
        "--on-finding",
        f'echo "$PPL_SIGNAL $PPL_SEVERITY $PPL_STEP" >> {told}',
    ]
    done = ppl_here("monitor", path, "--follow", "--interval", 0.1, "--fail-on", "danger", *options)
    assert done.returncode == 1, done.stderr
    assert slept == [0.1] * 4
    record = json.loads(out.read_text())
    whole = read_history(path)
    assert record["points"] == len(whole.train_step) and record["verdict"] == "unhealthy"
    assert [again for _, again in seen] == [True, False, False, False]
    assert (
        sum(rows for rows, _ in seen) == len(whole.train_step)
        and seen[1][0]
        and seen[2][0]
        and not seen[3][0]
    )
    lines = told.read_text().splitlines()
    assert sum(line.startswith("overfitting danger") for line in lines) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_followed_file_is_reported_in_a_log_as_well(tmp_path, ppl_here, monkeypatch):
    """Where no terminal redraws it, the view is printed when the diagnosis changes, and once more
    at the end.
    """
    path = tmp_path / "run.csv"
    lines = [
        "step,train_loss,val_loss",
        *(f"{step},{4 - step / 400:.3f},{4.1 - step / 400:.3f}" for step in range(400)),
    ]
    path.write_text("\n".join(lines[:200]) + "\n")
    later = ["\n".join(lines[200:260]) + "\n", "401,nan,4.0\n"]

    def sleep(_):
        if later:
            with path.open("a") as file:
                file.write(later.pop(0))

    monkeypatch.setattr("perplexity.cli.monitor.time.sleep", sleep)
    done = ppl_here("monitor", path, "--follow", "--polls", 3)
    assert done.returncode == 0, done.stderr
    verdicts = [
        line.split()[0]
        for line in done.stdout.splitlines()
        if "health" in line and "of 100" in line
    ]
    assert verdicts == ["healthy", "unhealthy"]


class Received(BaseHTTPRequestHandler):
    """A webhook that keeps what it is sent."""

    def do_POST(self):
        self.server.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_new_findings_are_sent(folder, ppl_here, fails, monkeypatch):
    monkeypatch.setattr("perplexity.cli.monitor.time.sleep", lambda _: None)
    with HTTPServer(("127.0.0.1", 0), Received) as server:
        server.received = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        followed = ["monitor", folder / "overfitting.csv", "--follow", "--polls", 3, "--notify"]
        done = ppl_here(*followed, f"json://127.0.0.1:{server.server_port}/")
        server.shutdown()
    assert done.returncode == 0, done.stderr
    sent = [json.loads(body) for body in server.received]
    titles = [each["title"] for each in sent]  # each once, whatever the number of looks
    assert (
        titles.count("overfitting.csv: overfitting (danger)")
        == 1
        == len(titles) - titles.count("overfitting.csv: generalisation-gap (warning)")
    )
    assert sent[0]["message"].startswith("danger: overfitting, steps")
    # The service is gone: one line, and the following goes on.
    done = ppl_here(*followed, f"json://127.0.0.1:{server.server_port}/")
    assert done.returncode == 0 and "unhealthy" in done.stdout
    assert done.stderr.count("--notify: overfitting could not be told") == 1
    secret = fails(folder, [*followed, "foo://a-secret@b"], ["--notify: expected a URL of apprise"])
    assert "secret" not in secret
    fails(
        folder, ["monitor", "overfitting.csv", "--notify", "json://a"], ["--notify: expected with"]
    )


def test_a_process_that_follows_ends_when_it_is_interrupted(folder, tmp_path):
    """SIGINT ends the following with the last diagnosis; the command of the first finding says when
    to send it.
    """
    told, out = tmp_path / "told", tmp_path / "out.json"
    os.mkfifo(told)
    reader = os.open(told, os.O_RDONLY | os.O_NONBLOCK)
    # Tests that run in the background of a shell ignore SIGINT, and a process that they start
    # would, too.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    history = folder / "overfitting.csv"
    options = ["--follow", "--interval", 3600, "--fail-on", "danger", "--json", out]
    command = ppl_after(
        heeds, "monitor", history, *options, "--on-finding", f"echo $PPL_SIGNAL > {told}"
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert select.select([reader], [], [], HANG)[0]
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=HANG)
    finally:
        process.kill()
        os.close(reader)
    assert process.returncode == 1 and printed.startswith("unhealthy")
    assert json.loads(out.read_text())["verdict"] == "unhealthy"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_whole_line_that_is_broken_costs_a_note_and_the_following_goes_on(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text(
        "step,train_loss\n1,3\n" if suffix == "csv" else '{"step": 1, "train_loss": 3}\n'
    )
    follower = Follower(path)
    follower.new()
    with path.open("a") as file:
        file.write("2,x")
    assert len(follower.new()[0]) == 0  # being written
    with path.open("a") as file:
        file.write("yz\n")
    history, whole = follower.new()
    assert len(history) == 0 and not whole and "expected" in history.notes[0]
    assert "left out" in history.notes[0]
    with path.open("a") as file:
        file.write("3,2.5\n" if suffix == "csv" else '{"step": 3, "train_loss": 2.5}\n')
    history, whole = follower.new()
    assert history.arrays()[1].tolist() == [2.5] and not whole
    path.unlink()
    with pytest.raises(NotYet, match="no such file"):
        follower.new()


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_read_as_they_come_are_the_file(tmp_path, suffix):
    from perplexity.monitor.digest import Digest

    rows = runs("healthy")[0]
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        text = csv_of(rows)
    else:
        text = "".join(
            json.dumps({"step": s, "train_loss": t} | ({"val_loss": v} if v else {})) + "\n"
            for s, t, v in rows
        )
    follower, digest = Follower(path), Digest()
    for end in (300, 1000, 1001, 5000, len(text)):
        path.write_text(text[:end])
        history, whole = follower.new()
        assert whole == (end == 300)
        digest.feed(history)
    expected = read_history(path).digest()
    assert digest.points == expected.points and digest.evaluations == expected.evaluations
    assert digest.all_blocks() == expected.all_blocks()
    path.write_text(text[:400])  # begun anew
    assert follower.new()[1]


def test_report(folder, tmp_path):
    done = ppl(
        "report",
        folder / "overfitting.csv",
        "-o",
        tmp_path / "r.html",
        "--png",
        tmp_path / "r.png",
        "--svg",
        tmp_path / "r.svg",
    )
    assert done.returncode == 0, done.stderr
    assert "unhealthy" in done.stdout
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("r.html", "r.png", "r.svg"))
