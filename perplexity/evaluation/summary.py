"""Rows of an evaluation's table, which the terminal draws, and the same table as plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import calibration
from ..errors import InputError
from ..json_files import model_name, same_model
from ..nats import exp
from ..wording import counted
from .comparison import compare
from .text_tables import plain_table, with_notes

if TYPE_CHECKING:
    from .results import Evaluation

BASELINES = {
    "unigram": "perplexity of this text's own token frequencies",
    "uniform": "perplexity of equal probabilities: the size of the vocabulary",
}

Row = tuple[str, str, str]  # measure, value, meaning


def title(evaluation: Evaluation) -> str:
    """Return the heading of the table of an evaluation."""
    return (
        f"{counted(evaluation.tokens, 'token')} scored of "
        f"{counted(evaluation.documents, 'document')}"
    )


def rows(evaluation: Evaluation, baseline: dict | None = None) -> list[Row]:
    """Return the measures of an evaluation.

    Args:
        evaluation: the evaluation.
        baseline: the JSON of another evaluation, which gets a row of its own; default None.

    Returns:
        Rows of text: measure, value, meaning.

    Raises:
        InputError: scipy is not installed, and ``baseline`` needs it.
    """
    e = evaluation
    unit = "documents" if e.clusters["unit"] == "document" else "blocks of the document"
    spread = (
        ""
        if e.stderr is None
        else f", ± {e.stderr:.4f} (standard error over {e.clusters['count']:,} {unit})"
    )
    table = [
        ("loss", f"{e.loss:.4f}", f"nats a token{spread}"),
        ("bits per token", f"{e.bits_per_token:.4f}", "the same in bits"),
        (
            "perplexity",
            f"{e.perplexity:,.3f}",
            f"as if choosing among about {e.perplexity:,.0f} equally likely tokens",
        ),
    ]
    if e.perplexity_interval is not None:
        words = _interval(e.perplexity_interval) + ", by the delta method"
        table.append(("  95 % interval", "", words))
    if e.perplexity_interval_bootstrap is not None:
        table.append(("", "", _interval(e.perplexity_interval_bootstrap) + ", by bootstrap"))
    for name, words in BASELINES.items():
        table.append((f"{name} baseline", f"{e.baselines[name]['perplexity']:,.1f}", words))
    if baseline is not None:
        table.append(_beside(evaluation, baseline))
        if (same := same_model({"model": e.model}, baseline)) is not None:
            words = "the same model" if same else model_name(baseline["model"])
            table.append(("  baseline's model", "", words))
    bytes_ = _scored(e.bytes, e.bytes_read, "bytes") + "; comparable across tokenizers"
    words_ = _scored(e.words, e.words_read, "words")
    if e.non_finite:
        bytes_ = words_ = "a token's loss is NaN or infinite"
    table += [
        ("bits per byte", defined(e.bits_per_byte, ".4f"), bytes_),
        ("byte perplexity", defined(e.byte_perplexity, ".4f"), "2 to the power of bits per byte"),
        ("word perplexity", defined(e.word_perplexity, ",.1f"), words_),
    ]
    if e.calibration is not None:
        table += calibration.rows(e.calibration)
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in e.skipped.items())
    table.append(("tokens read", f"{e.tokens_read:,}", f"skipped: {skipped or 'none'}"))
    if e.model is not None:
        words = f"{model_name(e.model)}: {e.model['architecture']}"
        table.append(("model", "", f"{words}, fingerprint {e.model['fingerprint']}"))
    windows = f"context {e.context_length:,}, stride {e.stride:,}, BOS {e.bos}"
    speed = f"{e.tokens / max(e.seconds, 1e-9):,.0f} tokens a second"
    table += [
        ("protocol", e.protocol, windows),
        ("computed", e.backend, f"{e.precision} logits, {e.seconds:.1f} s, {speed}"),
    ]
    return table


def text(evaluation: Evaluation) -> str:
    """Return the table of an evaluation and its notes as plain text of at most 80 columns."""
    table = plain_table(title(evaluation), ("measure", "value", "meaning"), rows(evaluation))
    return with_notes(table, evaluation.notes)


def defined(value: float | None, form: str) -> str:
    """Return a number in a format, "undefined" for None."""
    return "undefined" if value is None else format(value, form)


def _scored(count: int, of: int, unit: str) -> str:
    return f"{count:,} {unit}" if count == of else f"{count:,} of {of:,} {unit}, those scored"


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:,.3f} to {interval[1]:,.3f}"


def _beside(e: Evaluation, other: dict) -> Row:
    """Return the row of a baseline: its perplexity where the texts and tokenizers are the same."""
    name, perplexity = (
        "  beside the baseline",
        f"{other.get('perplexity', exp(other['loss'])):,.3f}",
    )
    if other["text_fingerprint"] != e.text_fingerprint:
        return name, perplexity, "on another text: the two do not compare"
    if other["tokenizer_fingerprint"] != e.tokenizer_fingerprint:
        try:
            bits = compare(other, e, measure="bits-per-byte")
        except InputError as error:
            return name, "", f"another tokenizer: not even bits per byte compare ({error})"
        words = f"only bits per byte compare: {bits.a:.4f}, {bits.difference:+.4f} from it"
        return name, "", f"another tokenizer: {words}"
    words = f"{e.loss - other['loss']:+.4f} nats a token from it"
    if other["tokens"] != e.tokens:
        return (
            name,
            perplexity,
            f"{counted(other['tokens'], 'token')} of the same text scored: the two do not compare",
        )
    if (other.get("protocol"), other.get("context_length")) != (e.protocol, e.context_length):
        words += (
            f"; its windows differ ({other.get('protocol')}, context {other.get('context_length')})"
        )
    return name, perplexity, words
