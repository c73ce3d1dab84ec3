"""``ppl compare``: two evaluations, paired by document, or two models on one text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..files import check_outputs, write_text
from . import tables
from .extras import needs
from .options import argument, by_option, option, part
from .parts import DTYPES, JSON_HELP, TEXT_HELP, Reading, Running, Scoring

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation import Comparison, ModelComparison

LOWER = "--batch-size or --context-length"  # the advice when memory runs out


@dataclass(frozen=True, kw_only=True)
class Options:
    """two evaluations, paired by document; or two models on one text"""

    a: str = argument("a result of ppl eval --json, or with TEXT a model: the reference")
    b: str = argument("the same, to compare with it")
    text: list[str] = argument(TEXT_HELP, nargs="*")
    measure: str = option(
        "of two results: nats a token (%(default)s)", "loss", choices=("loss", "bits-per-byte")
    )
    scoring: Scoring = part(Scoring)
    reading: Reading = part(Reading)
    running: Running = part(Running)
    revision_b: str | None = option(
        "branch, tag or commit of the second model on the hub", metavar="REV"
    )
    dtype_b: str | None = option("of the second model (--dtype)", choices=DTYPES)
    json: str | None = option(JSON_HELP, metavar="OUT")


def run(options: Options) -> int:
    """Compare, write the file and print the table; return 1 where a loss is not finite, else 0."""
    needs(eval=("transformers", "rich", "scipy", "pydantic"))
    from ..evaluation import compare
    from ..json_files import to_json

    inputs = [options.a, options.b, *options.text]
    check_outputs(by_option(options, "json"), inputs, folders=by_option(options.scoring, "journal"))
    result: Comparison | ModelComparison
    if options.text:
        result = _models(options)
        table = model_comparison(result)
    else:
        result = compare(options.a, options.b, measure=options.measure)
        table = comparison(result)
    if options.json:
        write_text(options.json, to_json(result.to_dict()) + "\n", "--json")
    console = tables.console()
    console.print(table)
    tables.print_notes(result.notes, console)
    return 0 if result.ok else 1


def _models(options: Options) -> ModelComparison:
    """Load both models and compare their tokens."""
    from ..evaluation import compare_models
    from .progress import evaluation_progress
    from .texts import Texts

    texts, running = Texts(options.text, options.reading), options.running
    model_a, tokenizer = running.load(options.a, revision=running.revision)
    model_b, tokenizer_b = running.load(
        options.b, revision=options.revision_b, dtype=options.dtype_b
    )
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
        )


def comparison(c: Comparison) -> Table:
    """Return the table of a comparison of two evaluations."""
    unit = "nats a token" if c.measure == "loss" else "bits a byte"
    table = tables.table(f"B against A: {c.verdict}", "measure", "value", "meaning")
    table.add_row("A", f"{c.a:.4f}", unit)
    table.add_row("B", f"{c.b:.4f}", unit)
    spread = (
        ""
        if c.stderr is None
        else f", ± {c.stderr:.4f} (standard error, {c.pairs:,} {c.unit}s paired)"
    )
    table.add_row("difference", f"{c.difference:+.4f}", f"B − A{spread}")
    if c.interval is not None:
        table.add_row("  95 % interval", "", f"{c.interval[0]:+.4f} to {c.interval[1]:+.4f}")
        table.add_row(
            "  p-value",
            f"{c.p_value:.2g}",
            "of a difference as large by chance, if there were none",
        )
    if c.perplexity_ratio is not None:
        interval = c.perplexity_ratio_interval
        meaning = "perplexity of B over A's" + (
            "" if interval is None else f"; 95 % {interval[0]:.4f} to {interval[1]:.4f}"
        )
        table.add_row("perplexity ratio", f"{c.perplexity_ratio:.4f}", meaning)
    table.add_row(
        "better", f"{c.better_in:,} of {c.pairs:,}", f"{c.unit}s in which B's loss is the lower"
    )
    if c.effective_tokens is not None:
        meaning = (
            f"an unpaired comparison would need as many to be as sure; {c.tokens:,} were scored"
        )
        table.add_row("effective tokens", f"{c.effective_tokens:,.0f}", meaning)
    return table


def model_comparison(m: ModelComparison) -> Table:
    """Return the table of a comparison of two models on one text."""

    def error(value: float | None, form: str = ".6f") -> str:
        return "" if value is None else f" ± {value:{form}}"

    table = tables.table(
        f"B beside A on {m.tokens:,} tokens of {m.documents:,} documents",
        "measure",
        "value",
        "meaning",
    )
    table.add_row("perplexity of A", f"{m.perplexity_a:,.4f}", f"loss {m.loss_a:.4f} nats a token")
    table.add_row("perplexity of B", f"{m.perplexity_b:,.4f}", f"loss {m.loss_b:.4f} nats a token")
    table.add_row(
        "loss difference",
        f"{m.loss_difference:+.6f}",
        f"nats a token, B − A{error(m.loss_difference_stderr)}",
    )
    table.add_row("perplexity ratio", f"{m.perplexity_ratio:.6f}", "B over A")
    table.add_row("correlation", f"{m.correlation:.4f}", "of the two models' token losses")
    table.add_row(
        "KL divergence",
        f"{m.kl_divergence:.6f}",
        f"of B from A, nats a token{error(m.kl_divergence_stderr)}",
    )
    table.add_row("  percentiles", "", _percentiles(m.kl_percentiles, "{:.5f}"))
    table.add_row(
        "same first choice",
        f"{m.top_1_agreement:.3%}",
        "of tokens" + error(m.top_1_agreement_stderr, ".3%"),
    )
    table.add_row(
        "target's probability",
        f"{m.probability_change:+.4%}",
        "mean change, B − A" + error(m.probability_change_stderr, ".4%"),
    )
    table.add_row("  root mean square", f"{m.probability_change_rms:.4%}", "")
    table.add_row("  percentiles", "", _percentiles(m.probability_change_percentiles, "{:+.3%}"))
    return table


def _percentiles(of: dict[str, float], form: str) -> str:
    return ", ".join(
        f"{at}%: {form.format(of[at])}" for at in ("0", "1", "10", "50", "90", "99", "100")
    )
