"""``ppl eval``: loss and perplexity of a model on text.

``Options`` declares the options of this command alone. Those that it shares with other commands
(``--stride``, ``--journal``, ``--device``, ...) are declared in ``parts.py``, once each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import STANDARD_INPUT, check_outputs
from . import tables
from .extras import needs
from .json_option import JSON_HELP, console_beside, json_file, write_json
from .options import argument, by_option, option, part
from .parts import TEXT_HELP, TOKENIZER_HELP, Reading, Running, Scoring, expect_ending

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation import Evaluation
    from ..terminal import Console

LOWER = "--batch-size or --context-length"  # the advice when memory runs out
SHOWN = 5  # rows of a table of documents or tokens
DOMAINS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Contexts(Scoring):
    """The options of ``Scoring``, with any number of context lengths."""

    context_length: tuple[int, ...] | None = option(  # type: ignore[assignment]
        "tokens a window shows (by protocol and model); 512,2048 compares both",
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """loss and perplexity of a model on text"""

    model: str = argument("Hugging Face model folder or name")
    text: list[str] = argument(TEXT_HELP, nargs="+")
    scoring: Contexts = part(Contexts)
    score_special: bool | None = option("score special tokens in the text, too")
    reading: Reading = part(Reading)
    running: Running = part(Running)
    tokenizer: str | None = option(TOKENIZER_HELP, metavar="DIR")
    json: str | None = option(JSON_HELP, metavar="OUT")
    per_token: str | None = option(
        "a row a token: text, loss, entropy, rank", metavar="OUT.parquet"
    )
    per_document: str | None = option(
        "a row a document: loss, tokens, bytes", metavar="OUT.parquet"
    )
    calibration: bool = option("measure calibration: confidence against accuracy", False)
    reliability: str | None = option("the same, drawn: .png or .svg", metavar="OUT.png")
    baseline: str | None = option(
        "another evaluation's --json, shown beside this one", metavar="FILE"
    )
    train: list[str] | None = option(
        "training text: ppl check-data beside the evaluation", metavar="P", nargs="+"
    )


def run(options: Options) -> int:
    """Evaluate, write the files and print the tables; return 1 if a loss is not finite, else 0."""
    _check(options)
    from ..evaluation import evaluate, evaluate_contexts, read_result
    from .progress import evaluation_progress
    from .ranks import ranks, world_size
    from .texts import Texts

    if STANDARD_INPUT in options.text and world_size() > 1:
        raise InputError("-: expected a file, standard input cannot be read by several processes")
    baseline = None if options.baseline is None else read_result(options.baseline)
    lengths = options.scoring.context_length or ()
    texts = Texts(options.text, options.reading)
    with ranks(options.running.device) as (rank, size, device):
        model, tokenizer = options.running.load(
            options.model,
            device=device,
            revision=options.running.revision,
            tokenizer=options.tokenizer,
        )
        with evaluation_progress(texts, rank == 0) as progress:
            scoring = vars(options.scoring) | {"context_length": (lengths or (None,))[0]}
            if len(lengths) > 1:
                evaluate = partial(evaluate_contexts, context_lengths=lengths)
                del scoring["context_length"]
            evaluation = evaluate(
                model,
                tokenizer,
                texts.documents(tokenizer),
                **scoring,
                score=options.reading.score,
                backend=options.running.backend,
                score_special=options.score_special,
                per_token=options.per_token,
                per_document=options.per_document,
                calibration=bool(options.calibration or options.reliability),
                distributed=size > 1,
                progress=progress,
            )
    if rank == 0:
        check = None
        if options.train:
            from . import check_data

            check = check_data.check_evaluation(options, tokenizer, texts.documents(tokenizer))
            evaluation = replace(evaluation, data_check=check.to_dict())
        try:
            if options.json:
                write_json(options.json, evaluation.to_json())
            if options.reliability and evaluation.calibration:
                from ..report.plots import reliability

                reliability(evaluation.calibration, options.reliability, title=options.model)
        finally:  # the numbers are printed even where a file cannot be written
            console = console_beside(options.json)
            show(evaluation, console, baseline)
            if check is not None:
                console.print(check_data.view(check))
    return 0 if evaluation.ok else 1


def _check(options: Options) -> None:
    """Raise InputError for missing packages and for outputs that cannot be written."""
    needs(
        eval=("transformers", "rich", "scipy"),
        data=("xxhash",) if options.train else (),
        report=("matplotlib",) if options.reliability else (),
    )
    check_outputs(
        json_file(options.json) | by_option(options, "per_token", "per_document", "reliability"),
        [
            options.model,
            options.tokenizer,
            options.baseline,
            *options.text,
            *(options.train or []),
        ],
        folders=by_option(options.scoring, "journal"),
    )
    expect_ending("--per-token", options.per_token, ".parquet")
    expect_ending("--per-document", options.per_document, ".parquet")
    expect_ending("--reliability", options.reliability, ".png", ".svg")


def summary(evaluation: Evaluation, baseline: dict | None = None) -> Table:
    """Return a table of the measures of an evaluation.

    Args:
        evaluation: The evaluation.
        baseline: The JSON of another evaluation, which gets a row of its own.
    """
    from ..evaluation import summary

    table = tables.table(summary.title(evaluation), "measure", "value", "meaning")
    for row in summary.rows(evaluation, baseline):
        table.add_row(*map(tables.plain, row))
    return table


def domains(evaluation: Evaluation) -> Table:
    """Return a table with a row for each of the largest domains."""
    from ..evaluation.summary import defined

    more = len(evaluation.domains) - DOMAINS_SHOWN
    title = "by domain" + (f" (the largest; {more:,} more in the JSON)" if more > 0 else "")
    table = tables.table(
        title, "domain", "documents", "tokens", "loss", "±", "perplexity", "bits per byte"
    )
    largest = sorted(evaluation.domains, key=lambda name: -evaluation.domains[name]["tokens"])[
        :DOMAINS_SHOWN
    ]
    for name in largest:
        d = evaluation.domains[name]
        table.add_row(
            tables.plain(name),
            f"{d['documents']:,}",
            f"{d['tokens']:,}",
            f"{d['loss']:.4f}",
            "" if d["stderr"] is None else f"{d['stderr']:.4f}",
            f"{d['perplexity']:,.2f}",
            defined(d["bits_per_byte"], ".4f"),
        )
    return table


def positions(evaluation: Evaluation) -> Table:
    """Return a table of the loss by position in the document and in the window."""
    from ..evaluation.positions import rows

    table = tables.table(
        "loss by position in the document, and by tokens of context in the window",
        *("position", "document", "±", "tokens", "window", "±", "tokens"),
        right=("position", "document", "±", "tokens", "window"),
    )
    for row in rows(evaluation.loss_by_position) if evaluation.loss_by_position else []:
        table.add_row(*row)
    return table


def contexts(evaluation: Evaluation) -> Table:
    """Return a table of the loss under each context length, paired with the longest."""
    table = tables.table(
        "the same tokens by context length; gain: what the longest context takes off the loss",
        *("context", "loss", "±", "perplexity", "gain", "±", "p (Holm)"),
        right=("context", "loss", "±", "perplexity", "gain", "p (Holm)"),
    )
    for c in evaluation.contexts or []:
        table.add_row(
            f"{c['context_length']:,}",
            f"{c['loss']:.4f}",
            "" if c["stderr"] is None else f"{c['stderr']:.4f}",
            f"{c['perplexity']:,.3f}",
            "" if c["difference"] is None else f"{-c['difference']:+.4f}",
            "" if c["difference_stderr"] is None else f"{c['difference_stderr']:.4f}",
            "" if c["p_holm"] is None else f"{c['p_holm']:.2g}",
        )
    return table


def contexts_by_position(evaluation: Evaluation) -> Table:
    """Return a table of the loss by position in the document, a column a context length."""
    from ..evaluation.positions import span

    found = [
        {each["first"]: each for each in context["loss_by_position"]["document"]}
        for context in evaluation.contexts or []
    ]
    names = [f"{context['context_length']:,}" for context in evaluation.contexts or []]
    table = tables.table(
        "loss by position in the document, by context length",
        *("position", "tokens", *names),
        right=("position", "tokens", *names),
    )
    for first, each in found[-1].items():
        losses = (f"{by[first]['loss']:.4f}" if first in by else "" for by in found)
        table.add_row(span(first), f"{each['tokens']:,}", *losses)
    return table


def documents(title: str, of: list[dict]) -> Table:
    """Return a table of the first ``SHOWN`` of some documents."""
    from ..nats import exp

    table = tables.table(title, "document", "tokens", "loss", "perplexity", "domain")
    for d in of[:SHOWN]:
        table.add_row(
            tables.plain(d["id"]),
            f"{d['tokens']:,}",
            f"{d['loss']:.3f}",
            f"{exp(d['loss']):,.1f}",
            tables.plain(d["domain"]),
        )
    return table


def surprising(evaluation: Evaluation) -> Table:
    """Return a table of the tokens with the largest losses."""
    from ..nats import exp

    table = tables.table(
        "most surprising tokens", "document", "position", "nats", "probability", "after … the token"
    )
    for token in evaluation.surprising_tokens[:SHOWN]:
        table.add_row(
            tables.plain(token["document"]),
            f"{token['position']:,}",
            f"{token['nll']:.2f}",
            f"1 in {exp(token['nll']):,.0f}",
            tables.plain(f"…{_visible(token['before'])} ⟨{_visible(token['text'])}⟩"),
        )
    return table


def _visible(text: str) -> str:
    return "".join("⏎" if c == "\n" else "·" if not c.isprintable() else c for c in text)


def show(evaluation: Evaluation, console: Console, baseline: dict | None = None) -> None:
    """Print all tables and notes of an evaluation to a terminal."""
    console.print(summary(evaluation, baseline))
    if evaluation.contexts:
        console.print(contexts(evaluation))
        console.print(contexts_by_position(evaluation))
    if len(evaluation.domains) > 1:
        console.print(domains(evaluation))
    if evaluation.loss_by_position:
        console.print(positions(evaluation))
    if evaluation.documents > 1:
        console.print(documents("hardest documents", evaluation.worst_documents))
    if evaluation.documents > SHOWN:
        console.print(documents("longest documents", evaluation.longest_documents))
    console.print(surprising(evaluation))
    tables.print_notes(evaluation.notes, console)
