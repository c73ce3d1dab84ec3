"""Evaluations and comparisons as a person reads them in a terminal (rich tables)."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..findings import COLOURS, Finding
from ..metric import exp
from ..terminal import Console
from .comparison import Comparison, compare
from .model_comparison import ModelComparison
from .results import Evaluation, model_name, same_model

SHOWN = 5  # of each kind of extreme
DOMAINS_SHOWN = 20


def _table(title: str, *columns: str, text: int = 1) -> Table:
    """The first ``text`` columns and the last are words, the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        words = place < text or place == len(columns) - 1
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def summary(evaluation: Evaluation, baseline: dict | None = None) -> Table:
    """Each measure, its value and what it means; ``baseline`` is another evaluation's JSON."""
    e = evaluation
    table = _table(f"{e.tokens:,} tokens scored of {e.documents:,} documents", "measure", "value", "meaning")
    unit = "documents" if e.clusters["unit"] == "document" else "blocks of the document"
    spread = "" if e.stderr is None else f", ± {e.stderr:.4f} (standard error over {e.clusters['count']:,} {unit})"
    table.add_row("loss", f"{e.loss:.4f}", f"nats a token{spread}")
    table.add_row("bits per token", f"{e.bits_per_token:.4f}", "the same in bits")
    table.add_row(
        "perplexity", f"{e.perplexity:,.3f}", f"as if choosing among about {e.perplexity:,.0f} equally likely tokens"
    )
    if e.perplexity_interval is not None:
        table.add_row("  95 % interval", "", _interval(e.perplexity_interval) + ", by the delta method")
    if e.perplexity_interval_bootstrap is not None:
        table.add_row("", "", _interval(e.perplexity_interval_bootstrap) + ", by bootstrap")
    for name, words in (
        ("unigram", "of the best guess without context: how often each token comes in this text"),
        ("uniform", "of a guess that knows nothing: the size of the vocabulary"),
    ):
        table.add_row(f"  beside {name}", f"{e.baselines[name]['perplexity']:,.1f}", words)
    if baseline is not None:
        table.add_row(*_beside(evaluation, baseline))
        if (same := same_model({"model": e.model}, baseline)) is not None:
            table.add_row("  baseline's model", "", "the same model" if same else Text(model_name(baseline["model"])))
    bytes_ = _scored(e.bytes, e.bytes_read, "bytes") + "; comparable across tokenizers"
    words = _scored(e.words, e.words_read, "words")
    if e.non_finite:
        bytes_ = words = "a token's loss is NaN or infinite"
    table.add_row("bits per byte", _defined(e.bits_per_byte, ".4f"), bytes_)
    table.add_row("byte perplexity", _defined(e.byte_perplexity, ".4f"), "2 to the power of bits per byte")
    table.add_row("word perplexity", _defined(e.word_perplexity, ",.1f"), words)
    if e.calibration is not None:
        for row in calibration(e.calibration):
            table.add_row(*row)
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in e.skipped.items())
    table.add_row("tokens read", f"{e.tokens_read:,}", f"skipped: {skipped or 'none'}")
    if e.model is not None:
        words = f"{model_name(e.model)}: {e.model['architecture']}, fingerprint {e.model['fingerprint']}"
        table.add_row("model", "", Text(words))
    table.add_row("protocol", e.protocol, f"context {e.context_length:,}, stride {e.stride:,}, BOS {e.bos}")
    table.add_row(
        "computed",
        e.backend,
        f"{e.precision} logits, {e.seconds:.1f} s, {e.tokens / max(e.seconds, 1e-9):,.0f} tokens a second",
    )
    return table


def _scored(count: int, of: int, unit: str) -> str:
    return f"{count:,} {unit}" if count == of else f"{count:,} of {of:,} {unit}, those scored"


def _defined(value: float | None, form: str) -> str:
    return "undefined" if value is None else format(value, form)


def calibration(c: dict) -> list[tuple[str, str, str]]:
    """Measure, value and meaning of ``CalibrationBins.summary``."""
    over = c["confidence"] - c["accuracy"]
    sure = (
        "as sure as it is right"
        if abs(over) < 0.005
        else "surer than it is right"
        if over > 0
        else "less sure than right"
    )
    return [
        ("right first choices", f"{c['accuracy']:.2%}", f"of the tokens; it gives them {c['confidence']:.2%}: {sure}"),
        (
            "calibration error",
            f"{c['ece']:.4f}",
            f"expected, over {len(c['bins'])} bins of confidence; 0 is calibrated",
        ),
        (
            "entropy",
            f"{c['entropy']:.4f}",
            f"nats; a calibrated model's loss, this one's is {c['loss'] - c['entropy']:+.4f}",
        ),
    ]


def _interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:,.3f} to {interval[1]:,.3f}"


def _beside(e: Evaluation, other: dict) -> tuple[str, str, str]:
    name, perplexity = "  beside the baseline", f"{other.get('perplexity', exp(other['loss'])):,.3f}"
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
        return name, perplexity, f"{other['tokens']:,} tokens of the same text scored: the two do not compare"
    if (other.get("protocol"), other.get("context_length")) != (e.protocol, e.context_length):
        words += f"; its windows differ ({other.get('protocol')}, context {other.get('context_length')})"
    return name, perplexity, words


def domains(evaluation: Evaluation) -> Table:
    more = len(evaluation.domains) - DOMAINS_SHOWN
    title = "by domain" + (f" (the largest; {more:,} more in the JSON)" if more > 0 else "")
    table = _table(title, "domain", "documents", "tokens", "loss", "±", "perplexity", "bits per byte")
    largest = sorted(evaluation.domains, key=lambda name: -evaluation.domains[name]["tokens"])[:DOMAINS_SHOWN]
    for name in largest:
        d = evaluation.domains[name]
        table.add_row(
            Text(name),
            f"{d['documents']:,}",
            f"{d['tokens']:,}",
            f"{d['loss']:.4f}",
            "" if d["stderr"] is None else f"{d['stderr']:.4f}",
            f"{d['perplexity']:,.2f}",
            _defined(d["bits_per_byte"], ".4f"),
        )
    return table


def documents(title: str, of: list[dict]) -> Table:
    table = _table(title, "document", "tokens", "loss", "perplexity", "domain")
    for d in of[:SHOWN]:
        table.add_row(
            Text(d["id"]), f"{d['tokens']:,}", f"{d['loss']:.3f}", f"{exp(d['loss']):,.1f}", Text(d["domain"])
        )
    return table


def surprising(evaluation: Evaluation) -> Table:
    table = _table("most surprising tokens", "document", "position", "nats", "probability", "after … the token")
    for token in evaluation.surprising_tokens[:SHOWN]:
        table.add_row(
            Text(token["document"]),
            f"{token['position']:,}",
            f"{token['nll']:.2f}",
            f"1 in {exp(token['nll']):,.0f}",
            Text(f"…{_visible(token['before'])} ⟨{_visible(token['text'])}⟩"),
        )
    return table


def _visible(text: str) -> str:
    return "".join("⏎" if c == "\n" else "·" if not c.isprintable() else c for c in text)


def show(evaluation: Evaluation, console: Console, baseline: dict | None = None) -> None:
    """Everything a terminal is told of an evaluation."""
    console.print(summary(evaluation, baseline))
    if len(evaluation.domains) > 1:
        console.print(domains(evaluation))
    if evaluation.documents > 1:
        console.print(documents("hardest documents", evaluation.worst_documents))
    if evaluation.documents > SHOWN:
        console.print(documents("longest documents", evaluation.longest_documents))
    console.print(surprising(evaluation))
    notes(evaluation.notes, console)


def notes(of: list[str], console: Console) -> None:
    for note in of:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def comparison(c: Comparison) -> Table:
    """B against A, paired."""
    unit = "nats a token" if c.measure == "loss" else "bits a byte"
    table = _table(f"B against A: {c.verdict}", "measure", "value", "meaning")
    table.add_row("A", f"{c.a:.4f}", unit)
    table.add_row("B", f"{c.b:.4f}", unit)
    spread = "" if c.stderr is None else f", ± {c.stderr:.4f} (standard error, {c.pairs:,} {c.unit}s paired)"
    table.add_row("difference", f"{c.difference:+.4f}", f"B − A{spread}")
    if c.interval is not None:
        table.add_row("  95 % interval", "", f"{c.interval[0]:+.4f} to {c.interval[1]:+.4f}")
        table.add_row("  p-value", f"{c.p_value:.2g}", "of a difference as large by chance, if there were none")
    if c.perplexity_ratio is not None:
        interval = c.perplexity_ratio_interval
        meaning = "perplexity of B over A's" + (
            "" if interval is None else f"; 95 % {interval[0]:.4f} to {interval[1]:.4f}"
        )
        table.add_row("perplexity ratio", f"{c.perplexity_ratio:.4f}", meaning)
    table.add_row("better", f"{c.better_in:,} of {c.pairs:,}", f"{c.unit}s in which B's loss is the lower")
    if c.effective_tokens is not None:
        meaning = f"an unpaired comparison would need as many to be as sure; {c.tokens:,} were scored"
        table.add_row("effective tokens", f"{c.effective_tokens:,.0f}", meaning)
    return table


def model_comparison(m: ModelComparison) -> Table:
    """B beside A token by token."""

    def error(value: float | None) -> str:
        return "" if value is None else f" ± {value:.6f}"

    table = _table(f"B beside A on {m.tokens:,} tokens of {m.documents:,} documents", "measure", "value", "meaning")
    table.add_row("perplexity of A", f"{m.perplexity_a:,.4f}", f"loss {m.loss_a:.4f} nats a token")
    table.add_row("perplexity of B", f"{m.perplexity_b:,.4f}", f"loss {m.loss_b:.4f} nats a token")
    table.add_row(
        "loss difference", f"{m.loss_difference:+.6f}", f"nats a token, B − A{error(m.loss_difference_stderr)}"
    )
    table.add_row("perplexity ratio", f"{m.perplexity_ratio:.6f}", "B over A")
    table.add_row("correlation", f"{m.correlation:.4f}", "of the two models' token losses")
    table.add_row(
        "KL divergence", f"{m.kl_divergence:.6f}", f"of B from A, nats a token{error(m.kl_divergence_stderr)}"
    )
    table.add_row("  percentiles", "", _percentiles(m.kl_percentiles, "{:.5f}"))
    table.add_row("same first choice", f"{m.top_1_agreement:.3%}", f"of tokens{error(m.top_1_agreement_stderr)}")
    table.add_row(
        "target's probability",
        f"{m.probability_change:+.4%}",
        f"mean change, B − A{error(m.probability_change_stderr)}",
    )
    table.add_row("  root mean square", f"{m.probability_change_rms:.4%}", "")
    table.add_row("  percentiles", "", _percentiles(m.probability_change_percentiles, "{:+.3%}"))
    return table


def _percentiles(of: dict[str, float], form: str) -> str:
    return ", ".join(f"{at}%: {form.format(of[at])}" for at in ("0", "1", "10", "50", "90", "99", "100"))


def findings_table(findings: list[Finding]) -> Table | Text:
    """Each finding, what it saw and what to do."""
    if not findings:
        return Text("nothing found", style="green")
    table = Table(title="findings", title_justify="left", title_style="bold")
    table.add_column("signal")
    table.add_column("evidence and advice")
    for finding in findings:
        told = Text(finding.evidence)
        told.append(f"\n{finding.advice}", style="italic")
        table.add_row(Text(f"{finding.signal}\n{finding.severity}", style=COLOURS[finding.severity]), told)
    return table
