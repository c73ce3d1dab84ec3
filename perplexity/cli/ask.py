"""``ppl ask``: the probability of yes that a model gives to a question about each text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import STANDARD_INPUT, Output, check_outputs
from ..wording import by_number, counted
from . import tables
from .extras import needs
from .json_option import TO_STANDARD_OUTPUT, console_beside, json_file, write_json
from .options import argument, by_option, option, part
from .parts import (
    JOURNAL_HELP,
    TEXT_HELP,
    Question,
    Running,
    TextReading,
    expect_ending,
)

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation import Document
    from ..probe.ask import Answer

LOWER = "--batch-size"  # the advice when memory runs out
ANSWER_COLUMNS = {
    "id": "string",
    "p_yes": "float64",
    "p_no": "float64",
    "yes_of_two": "float64",
    "first": "string",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Ask-LLM: how probable a model holds yes, asked about each text"""

    model: str = argument("Hugging Face folder or name of the model that is asked")
    text: list[str] = argument(TEXT_HELP, nargs="+")
    question: Question = part(Question)
    plain: bool = option("no chat template, though the tokenizer has one", False)
    batch_size: int | None = option("texts at a time (by their length)", metavar="N")
    reading: TextReading = part(TextReading)
    running: Running = part(Running)
    journal: str | None = option(JOURNAL_HELP, metavar="DIR")
    out: str | None = option(
        "a line a text: its id and p_yes; .jsonl or .parquet", metavar="OUT.jsonl"
    )
    json: str | None = option(f"write the means to this file{TO_STANDARD_OUTPUT}", metavar="OUT")


def run(options: Options) -> int:
    """Ask about each text, write the answers and print their means; return 0."""
    needs(probe=("transformers", "rich", "scipy"))
    from ..evaluation import read_documents
    from ..json_files import to_json
    from ..models.language_model import described
    from ..probe.ask import PROMPT, TEMPLATE, Questioner, Tally
    from ..probe.findings import unanswered
    from .progress import log_texts

    question, reading, running = options.question, options.reading, options.running
    inputs = [options.model, *options.text, question.template]
    check_outputs(
        json_file(options.json) | by_option(options, "out"),
        inputs,
        folders=by_option(options, "journal"),
    )
    expect_ending("--out", options.out, ".jsonl", ".parquet")
    if STANDARD_INPUT in options.text and options.journal:
        raise InputError("-: expected a file with --journal, standard input cannot be read again")
    template = question.template_or(TEMPLATE)
    if PROMPT in template:
        raise InputError(f"--template: expected one without {PROMPT}, which texts have not here")
    for _ in read_documents(
        [path for path in options.text if path != STANDARD_INPUT], reading.options()
    ):
        pass  # errors in the files are reported before the model is loaded
    model, tokenizer = running.load(options.model, revision=running.revision)
    judge = Questioner(
        model,
        tokenizer,
        template=template,
        yes=question.yes,
        no=question.no,
        chat=False if options.plain else None,
        backend=running.backend,
    )
    documents: Iterable[Document] = read_documents(options.text, reading.options_with(tokenizer))
    log, tally = log_texts(), Tally(judge)
    with _written(options.out) as write:
        for answer in judge.ask(documents, batch_size=options.batch_size, journal=options.journal):
            tally.add(answer)
            write(answer)
            log("asking", len(tally), 0)
    means = tally.summary()
    if means is None:
        raise InputError("text: expected at least one document, got none")
    if options.json:
        record = means | {
            "model": described(judge.network, options.model),
            "template": template,
            "notes": judge.notes,
        }
        write_json(options.json, to_json(record))
    notes = [
        *judge.notes,
        *(f"{finding.evidence}; {finding.advice}" for finding in unanswered(means)),
    ]
    for word, token in zip((question.yes, question.no), means["answers"], strict=True):
        if token.strip() != word.strip():
            notes.append(
                f"{word!r} is scored by its first token, {token!r}, which begins other words, too"
            )
    if means["shortened"]:
        notes.append(
            f"{counted(means['shortened'], 'text')} "
            f"{by_number(means['shortened'], 'is', 'are')} too long for the model's context: the end "
            "was not read"
        )
    console = console_beside(options.json)
    console.print(answers(means))
    tables.print_notes(notes, console)
    return 0


@contextmanager
def _written(path: str | None) -> Iterator[Callable[[Answer], object]]:
    """Yield a function that writes an answer to ``path``, as JSON lines or Parquet.

    The file appears under its name once all answers are written.
    """
    row = lambda answer: {name: getattr(answer, name) for name in ANSWER_COLUMNS}  # noqa: E731
    if path is None:
        yield lambda answer: None
    elif path.endswith(".jsonl"):
        with Output(path, "--out") as file:
            yield lambda answer: file.write(json.dumps(row(answer)).encode() + b"\n")
    else:
        from ..evaluation.collect import ParquetTable

        table = ParquetTable(path, ANSWER_COLUMNS, "--out")
        try:
            yield lambda answer: table.add(
                1, **{name: [value] for name, value in row(answer).items()}
            )
            table.finish()
        finally:
            table.discard()


def answers(means: dict) -> Table:
    """Return a table of ``Tally.summary``: the means over texts."""
    table = tables.table(
        f"{counted(means['texts'], 'text')} asked about", "measure", "value", "meaning"
    )
    table.add_row(
        "P(yes)",
        f"{means['p_yes']:.4f}",
        "mean over texts, among the whole vocabulary: the Ask-LLM score",
    )
    spread = ", ".join(f"{at} %: {value:.4f}" for at, value in means["percentiles"].items())
    table.add_row("  percentiles", "", spread)
    two = "–" if means["yes_of_two"] is None else f"{means['yes_of_two']:.4f}"
    table.add_row("yes of the two", two, "P(yes) / (P(yes) + P(no))")
    first = ", ".join(f"{word!r} {count:,}" for word, count in means["first_choices"].items())
    table.add_row(
        "answered",
        f"{means['answered']:.1%}",
        tables.plain(f"of the probability is on the two; first choices: {first}"),
    )
    return table
