"""``ppl compare``: results of evaluations, paired by document, or two models on one text."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import InputError, visible
from ..files import check_outputs
from ..wording import counted
from . import tables
from .extras import needs
from .json_option import (
    JSON_HELP,
    STANDARD_OUTPUT,
    console_beside,
    json_file,
    write_json,
)
from .options import argument, by_option, option, part
from .parts import DTYPES, TEXT_HELP, TOKENIZER_HELP, Reading, Running, Scoring

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from ..evaluation import Comparison, ManyComparison, ModelComparison
    from ..evaluation.many import Column, Estimate
    from ..terminal import Console
    from .texts import Texts

OTHER_TOKENIZER = (
    "the models have different tokenizers: they are compared in bits per byte, since KL divergence "
    "and token losses are not defined between different tokens"
)
PLANNED = 0.01  # the difference that is planned for, as in evaluation/planning.py
NAME_WIDTH = 24  # columns of a model's or a domain's name that a table is laid out for
CELL, BORDERS = 11, 5  # columns of a number with its borders, and of the first column's
DOMAINS_SHOWN = 20
AVERAGES = 2  # rows above the domains: micro, macro
PAIRS_SHOWN = 15
LOWER = "--batch-size or --context-length"  # the advice when memory runs out


@dataclass(frozen=True, kw_only=True)
class Options:
    """results of ppl eval, paired by document; or two models on one text"""

    a: str = argument("a result of ppl eval --json, or with TEXT a model: the reference")
    b: str = argument("the same, to compare with it")
    text: list[str] = argument(
        f"more results, each compared with all; or of two models the text: {TEXT_HELP}", nargs="*"
    )
    measure: str = option(
        "of results: nats a token (%(default)s)", "loss", choices=("loss", "bits-per-byte")
    )
    plan: float = option(
        "documents needed to detect a difference of this size (%(default)s)",
        PLANNED,
        metavar="DIFFERENCE",
    )
    markdown: bool = option("print the table of results as Markdown", False)
    csv: bool = option("print the table of results as CSV", False)
    scoring: Scoring = part(Scoring)
    reading: Reading = part(Reading)
    running: Running = part(Running)
    revision_b: str | None = option(
        "branch, tag or commit of the second model on the hub", metavar="REV"
    )
    dtype_b: str | None = option("of the second model (--dtype)", choices=DTYPES)
    tokenizer: str | None = option(f"of both models: {TOKENIZER_HELP}", metavar="DIR")
    json: str | None = option(JSON_HELP, metavar="OUT")


def run(options: Options) -> int:
    """Compare, write the file and print the table; return 1 where a loss is not finite, else 0."""
    results = not options.text or _is_result(options.a)
    needs(eval=(*(() if results else ("transformers",)), "rich", "scipy", "pydantic"))
    from ..json_files import to_json

    if not options.plan > 0:
        raise InputError(f"--plan: expected a difference above 0, got {options.plan:g}")
    if options.markdown and options.csv:
        raise InputError("--markdown: expected one of --markdown and --csv, got both")
    if (options.markdown or options.csv) and options.json == STANDARD_OUTPUT:
        raise InputError("--json: expected a file with --markdown or --csv, got standard output")
    inputs = [options.a, options.b, *options.text]
    read = [*inputs, options.tokenizer]
    check_outputs(json_file(options.json), read, folders=by_option(options.scoring, "journal"))
    result: Comparison | ManyComparison | ModelComparison
    if not results:
        if options.markdown or options.csv:
            raise InputError(
                f"{'--markdown' if options.markdown else '--csv'}: expected results of ppl eval "
                "--json, got models and text: evaluate each with ppl eval --json first"
            )
        result = _models(options)
    else:
        from ..evaluation import compare

        if options.tokenizer is not None:
            raise InputError(
                "--tokenizer: expected two models and a text with it, got results of ppl eval"
            )
        result = compare(*inputs, measure=options.measure, plan=options.plan)
    if options.json:
        write_json(options.json, to_json(result.to_dict()))
    if options.markdown or options.csv:
        _publish(options, inputs)
    else:
        show(result, console_beside(options.json))
    return 0 if result.ok else 1


def _is_result(path: str) -> bool:
    """Return whether an argument is a result file; models are folders, or names on the hub."""
    return path.endswith(".json") or os.path.isfile(path)


def _publish(options: Options, inputs: list[str]) -> None:
    """Print the table of results alone, for a file or a pipe; notes of CSV go to stderr."""
    from ..evaluation import publish
    from ..evaluation.comparison import compare_several
    from ..evaluation.text_tables import noted

    table = compare_several(inputs, measure=options.measure, plan=options.plan)
    sys.stdout.write(publish.to_csv(table) if options.csv else publish.to_markdown(table))
    if options.csv:
        for note in table.notes:
            print(visible(noted(note)), file=sys.stderr)


def show(result: Comparison | ManyComparison | ModelComparison, console: Console) -> None:
    """Print the tables and the notes of a comparison to a terminal."""
    from ..evaluation import Comparison, ManyComparison

    if isinstance(result, ManyComparison):
        for table in many(result, console.width):
            console.print(table)
    elif isinstance(result, Comparison):
        console.print(comparison(result))
        if result.columns:
            console.print(by_domain(result))
    else:
        console.print(model_comparison(result))
    tables.print_notes(result.notes, console)


def _models(options: Options) -> Comparison | ModelComparison:
    """Load both models and compare their tokens; with two tokenizers, their bits per byte."""
    from ..evaluation import compare_models
    from ..fingerprints import tokenizer_fingerprint
    from .progress import evaluation_progress
    from .texts import Texts

    texts, running = Texts(options.text, options.reading), options.running
    model_a, tokenizer = running.load(
        options.a, revision=running.revision, tokenizer=options.tokenizer
    )
    model_b, tokenizer_b = running.load(
        options.b,
        revision=options.revision_b,
        dtype=options.dtype_b,
        tokenizer=options.tokenizer,
    )
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(tokenizer_b):
        return _by_bytes(options, texts, {"A": (model_a, tokenizer), "B": (model_b, tokenizer_b)})
    with evaluation_progress(texts, True) as progress:
        return compare_models(
            model_a,
            model_b,
            tokenizer,
            texts.documents(tokenizer),
            tokenizer_b=tokenizer_b,
            **vars(options.scoring),
            backend=running.backend,
            progress=progress,
            plan=options.plan,
        )


def _by_bytes(options: Options, texts: Texts, models: dict[str, tuple]) -> Comparison:
    """Evaluate models of different tokenizers, by name, and compare their bits per byte."""
    from ..evaluation import compare, evaluate
    from .progress import evaluation_progress

    scoring = vars(options.scoring)
    evaluations = []
    for name, (model, tokenizer) in models.items():
        # The journal of a run is of one tokenizer.
        journal = scoring["journal"] and os.path.join(scoring["journal"], name)
        with evaluation_progress(texts, True) as progress:
            evaluations.append(
                evaluate(
                    model,
                    tokenizer,
                    texts.documents(tokenizer),
                    **scoring | {"journal": journal},
                    score=options.reading.score,
                    backend=options.running.backend,
                    progress=progress,
                )
            )
    a, b = evaluations
    result = compare(a, b, measure="bits-per-byte", plan=options.plan)
    notes = [
        f"{name}: {note}"
        for name, evaluation in zip(models, evaluations, strict=True)
        for note in evaluation.notes
        if note.startswith("warning: ")
    ]
    return replace(result, notes=[OTHER_TOKENIZER, *notes, *result.notes])


def comparison(c: Comparison) -> Table:
    """Return the table of a comparison of two evaluations."""
    table = tables.table(c.title, "measure", "value", "meaning")
    for row in c.rows():
        table.add_row(*row)
    return table


def by_domain(c: Comparison) -> Table:
    """Return the table by domain of a comparison of two evaluations: averages, largest domains."""
    title, names = c.by_domain()
    rows = c.domain_rows()
    more = len(rows) - DOMAINS_SHOWN - AVERAGES
    title += f" (the largest; {more:,} more: --json)" if more > 0 else ""
    table = tables.table(title, *names, right=names[1:-1])
    for row in rows[: DOMAINS_SHOWN + AVERAGES]:
        table.add_row(*map(tables.plain, row))
    return table


def many(c: ManyComparison, width: int) -> list[Table | Text]:
    """Return the tables of several results: averages and domains, then the pairs.

    Args:
        c: The comparison.
        width: Columns of the terminal. Domains that do not fit beside the averages stand in
            further tables of the same models.
    """
    from ..evaluation.many import DOMAIN, LEGEND

    averages = [column for column in c.columns if column.kind != DOMAIN]
    domains = sorted(
        (column for column in c.columns if column.kind == DOMAIN), key=lambda column: -column.size
    )
    more = len(domains) - DOMAINS_SHOWN
    room = width - min(NAME_WIDTH, max(map(len, c.names))) - BORDERS
    perplexities = [c.perplexity(place) for place in c.order] if c.measure == "loss" else []
    shown: list[Table | Text] = []
    parts = _fitting(averages, domains[:DOMAINS_SHOWN], room - CELL * bool(perplexities), room)
    for place, columns in enumerate(parts):
        extra = ["perplexity"] if perplexities and not place else []
        table = tables.table(
            c.title if not place else "by domain, continued",
            "model",
            *extra,
            *(column.name for column in columns),
            right=[*extra, *(column.name for column in columns)],
        )
        for row, cells in enumerate(c.cells(columns, _two_lines)):
            value = [f"{perplexities[row]:,.3f}"] if extra else []
            table.add_row(*map(tables.plain, (cells[0], *value, *cells[1:])))
        shown.append(table)
    shown.append(
        tables.plain(f"* {LEGEND}." + (f" {counted(more, 'more domain')}: --json" * (more > 0)))
    )
    columns_ = ("A", "B", "B − A", "±", "p (Holm)", "better")
    table = tables.table("pairs, micro average", *columns_, right=columns_[2:5])
    tests = c.tests()
    for test in tests[:PAIRS_SHOWN]:
        table.add_row(*map(tables.plain, test))
    shown.append(table)
    if len(tests) > PAIRS_SHOWN:
        shown.append(
            tables.plain(f"{counted(len(tests) - PAIRS_SHOWN, 'more pair')}: --json, --markdown")
        )
    return shown


def _fitting(
    averages: list[Column], domains: list[Column], first: int, room: int
) -> list[list[Column]]:
    """Return the columns of each table: averages and domains, as many as fit into ``room``."""
    parts, part, left = [], list(averages), first - CELL * len(averages)
    for column in domains:
        need = max(CELL, min(len(column.name), NAME_WIDTH) + 3)
        if need > left and part:
            parts.append(part)
            part, left = [], room
        part.append(column)
        left -= need
    return [*parts, part]


def _two_lines(estimate: Estimate) -> str:
    """Return an estimate with its mark, and its interval below it."""
    value = f"{estimate.value:.4f}{'*' if estimate.best else ' '}"
    if estimate.interval is None:
        return value
    return f"{value}\n±{(estimate.interval[1] - estimate.interval[0]) / 2:.4f} "


def model_comparison(m: ModelComparison) -> Table:
    """Return the table of a comparison of two models on one text."""
    table = tables.table(m.title, "measure", "value", "meaning")
    for row in m.rows():
        table.add_row(*row)
    return table
