"""What an evaluation found, as an object, as JSON and as a table."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..metric import exp


@dataclass(frozen=True)
class DocumentScore:
    """One document: ``nll`` is the sum over its scored tokens, in nats."""

    id: str
    domain: str
    nll: float
    tokens: int
    bytes: int
    words: int


@dataclass(frozen=True)
class Evaluation:
    """Loss and perplexity of a text; fields are the keys of ``ppl eval --json``.

    loss: nats a scored token; stderr: its standard error, clustered by document (None for a single one);
    perplexity_interval: exp(loss ± 1.96 stderr), 95 %; tokens: tokens scored; tokens_skipped: first tokens without a context.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    byte_perplexity: float
    word_perplexity: float
    tokens: int
    tokens_skipped: int
    bytes: int
    words: int
    documents: int
    stderr: float | None
    perplexity_interval: tuple[float, float] | None
    protocol: str
    context_length: int
    stride: int
    tokenizer_fingerprint: str
    text_fingerprint: str
    vocabulary_size: int
    backend: str
    precision: str
    seconds: float
    domains: dict[str, dict]
    per_document: list[DocumentScore] = field(repr=False)

    def to_json(self) -> str:
        """JSON (RFC 8259: an infinite perplexity is the string "inf")."""
        record = asdict(self)
        for document in record["per_document"]:
            del document["words"]
        return json.dumps(_finite(record), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n")


def _finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def clustered_stderr(scores: list[DocumentScore]) -> float | None:
    """Standard error of Σ nll / Σ tokens with documents as clusters: the ratio estimator's linearisation.

    sqrt(K / (K − 1) · Σ_k (nll_k − loss · tokens_k)²) / Σ tokens over K documents (Cochran, Sampling Techniques, ch. 6).
    """
    scores = [score for score in scores if score.tokens]
    if len(scores) < 2:
        return None
    tokens = sum(score.tokens for score in scores)
    loss = math.fsum(score.nll for score in scores) / tokens
    residuals = math.fsum((score.nll - loss * score.tokens) ** 2 for score in scores)
    return math.sqrt(len(scores) / (len(scores) - 1) * residuals) / tokens


def summarise(scores: list[DocumentScore]) -> dict:
    """Loss, perplexities, counts, standard error and interval of documents; totals are divided once."""
    nll = math.fsum(score.nll for score in scores)
    tokens, bytes_, words = (sum(getattr(score, name) for score in scores) for name in ("tokens", "bytes", "words"))
    loss = nll / tokens if tokens else math.nan
    stderr = clustered_stderr(scores)
    return {
        "loss": loss,
        "perplexity": exp(loss),
        "bits_per_byte": nll / bytes_ / math.log(2) if bytes_ else math.nan,
        "byte_perplexity": exp(nll / bytes_) if bytes_ else math.nan,
        "word_perplexity": exp(nll / words) if words else math.nan,
        "tokens": tokens,
        "bytes": bytes_,
        "words": words,
        "documents": len(scores),
        "stderr": stderr,
        "perplexity_interval": None if stderr is None else (exp(loss - 1.96 * stderr), exp(loss + 1.96 * stderr)),
    }


def table(evaluation: Evaluation):
    """A rich table of the evaluation, for a terminal."""
    from rich.table import Table

    out = Table(title=f"{evaluation.tokens:,} tokens of {evaluation.documents:,} documents", title_justify="left")
    out.add_column("measure")
    out.add_column("value", justify="right")
    out.add_column("meaning")
    interval = evaluation.perplexity_interval
    rows = [
        (
            "loss",
            f"{evaluation.loss:.4f}",
            "nats a token"
            + ("" if evaluation.stderr is None else f", ± {evaluation.stderr:.4f} (standard error, by document)"),
        ),
        (
            "perplexity",
            f"{evaluation.perplexity:.3f}",
            f"as if choosing among about {evaluation.perplexity:,.0f} tokens of {evaluation.vocabulary_size:,}"
            + ("" if interval is None else f"; 95 % interval {interval[0]:.2f} to {interval[1]:.2f}"),
        ),
        (
            "bits per byte",
            f"{evaluation.bits_per_byte:.4f}",
            f"{evaluation.bytes:,} bytes; comparable across tokenizers",
        ),
        ("byte perplexity", f"{evaluation.byte_perplexity:.4f}", "2 to the power of bits per byte"),
        ("word perplexity", f"{evaluation.word_perplexity:.1f}", f"{evaluation.words:,} words"),
        (
            "windows",
            evaluation.protocol,
            f"context {evaluation.context_length}, stride {evaluation.stride}; "
            f"{evaluation.tokens_skipped:,} first tokens without a context",
        ),
        (
            "computed",
            evaluation.backend,
            f"{evaluation.precision} logits, {evaluation.seconds:.1f} s, "
            f"{evaluation.tokens / max(evaluation.seconds, 1e-9):,.0f} tokens a second",
        ),
    ]
    for row in rows:
        out.add_row(*row)
    return out
