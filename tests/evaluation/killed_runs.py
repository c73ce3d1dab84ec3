"""Evaluations that are killed at drawn places and resumed: ``python killed_runs.py FOLDER`` prints
a line of JSON a life.

A life is a fork of this process, which has imported everything. A life counts what it does (forward
passes, writes) and kills itself at the drawn place, so that the place does not depend on the
machine's speed.
"""

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import torch
from tiny_models import TEXTS, build_model, build_tokenizer

import perplexity
from perplexity.evaluation import collect
from perplexity.files import Output
from perplexity.journal import Journal

DOCUMENTS = [" ".join([TEXTS[i % 3]] * (1 + i % 7)) for i in range(20)]
STORIES = 5  # runs from an empty folder to the end; each of them is killed ten times:
SCORING = (
    "before a forward pass",
    "after a forward pass",
    "before a write",
    "in a transaction",
    "in a torn write",
)
ENDING = (
    "rows in the table",
    "table without its name",
    "table with its name",
    "half of the result",
)
FRAME = 4120  # bytes that SQLite adds to its log for a page


def plan(generator: random.Random) -> list[tuple[str, int]]:
    """Draw where the lives of one story end: eight while they score, two after the last batch."""
    scoring = [(place, generator.randint(1, 12)) for place in generator.sample(SCORING * 2, 8)]
    return scoring + [(place, 1) for place in sorted(generator.sample(ENDING, 2), key=ENDING.index)]


def arm(model, folder: Path, place: str, count: int) -> None:
    """Have this process killed at ``place`` when the process comes there for the ``count``-th
    time.
    """
    left = count
    forward, write = model.model.forward, Journal._write
    flush, replace, write_output = collect.ParquetTable._flush, os.replace, Output.write

    def reached(here: str) -> None:
        nonlocal left
        left -= here == place
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_forward(*positional, **keywords):
        reached("before a forward pass")
        out = forward(*positional, **keywords)
        reached("after a forward pass")
        return out

    def counted_write(journal, statement, values):
        reached("before a write")
        if place != "in a transaction":
            return write(journal, statement, values)
        journal.own.execute("BEGIN IMMEDIATE")
        write(journal, statement, values)
        reached("in a transaction")
        journal.own.execute("COMMIT")

    def counted_flush(table):
        flush(table)
        reached("rows in the table")

    def counted_replace(*paths):
        reached("table without its name")
        replace(*paths)
        reached("table with its name")

    def counted_output(output, content):
        if not str(output.path).endswith(".json"):
            return write_output(output, content)
        half = len(content) // 2
        write_output(output, content[:half])
        output.file.flush()
        reached("half of the result")
        return half + write_output(output, content[half:])

    model.model.forward, Journal._write = counted_forward, counted_write
    collect.ParquetTable._flush, os.replace, Output.write = (
        counted_flush,
        counted_replace,
        counted_output,
    )
    if place == "in a torn write":
        # The system writes the bytes up to this size and ends the process at the next one, as
        # SIGKILL between them would.
        log = folder / "rank0.sqlite-wal"
        size = max(log.stat().st_size if log.exists() else 0, 16 * FRAME)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(
            resource.RLIMIT_FSIZE, [size + random.Random(count).randrange(count * FRAME)] * 2
        )
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def live(model, tokenizer, folder: Path, place: str | None, count: int) -> str:
    """Evaluate in a fork until it is killed or comes to its end; return the signal's name or the
    exit status.
    """
    pid = os.fork()
    if not pid:
        status = 1
        try:
            if place is not None:
                arm(model, folder, place, count)
            options = dict(journal=folder, per_token=folder.with_suffix(".parquet"))
            got = perplexity.evaluate(
                model, tokenizer, DOCUMENTS, context_length=16, batch_size=2, **options
            )
            got.save(folder.with_suffix(".json"))
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    return (
        signal.Signals(os.WTERMSIG(status)).name
        if os.WIFSIGNALED(status)
        else str(os.WEXITSTATUS(status))
    )


def batches(folder: Path) -> int:
    """Return the number of batches that are in the journal; of a copy, because to open a journal
    repairs it.
    """
    copy = folder.with_suffix(".copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    with closing(sqlite3.connect(copy / "rank0.sqlite")) as journal:
        try:
            return journal.execute("SELECT count(*) FROM batches").fetchone()[0]
        except sqlite3.OperationalError:  # killed before there was a table
            return 0


def main(out: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(bos=True)
    model = build_model(len(tokenizer) + 3)
    # Imports what is imported late.
    perplexity.evaluate(model, tokenizer, DOCUMENTS[:2], per_token=out / "warm.parquet").to_json()
    generator = random.Random(20_241)
    stories = {"whole": [], **{f"killed{number}": plan(generator) for number in range(STORIES)}}
    for name, deaths in stories.items():
        for place, count in [*deaths, (None, 0)]:
            ended = live(model, tokenizer, out / name, place, count)
            print(
                json.dumps(dict(name=name, place=place, ended=ended, batches=batches(out / name))),
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
