"""The result of an evaluation: the object, its JSON, and the reading of such JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from typing_extensions import NotRequired, TypedDict

from .. import checks
from ..errors import InputError
from ..files import write_text
from ..json_files import Count, Finite, Number, read_as, read_written, schema_of, to_json
from ..metric import measures
from ..nats import exp
from .positions import LossByPosition
from .uncertainty import uncertainty


@dataclass(frozen=True)
class DocumentScore:
    """The score of one document.

    Args:
        id: name of the document.
        domain: name of what the document is part of, a file's by default.
        nll: sum over the scored tokens, nats.
        tokens: tokens scored.
        bytes: bytes of the text that were scored.
        words: words of the text that were scored.
        skipped: tokens read and not scored; default 0.
        bytes_skipped: bytes that were not scored; default 0.
        words_skipped: words that were not scored; default 0.
        non_finite: tokens left out because their loss is NaN or infinite; default 0.

    Example:
        >>> score = DocumentScore("a", "news", nll=6.0, tokens=3, bytes=12, words=2)
        >>> score.nll / score.tokens
        2.0
    """

    id: str
    domain: str
    nll: float
    tokens: int
    bytes: int
    words: int
    skipped: int = 0
    bytes_skipped: int = 0
    words_skipped: int = 0
    non_finite: int = 0


class DocumentRow(TypedDict):
    """A ``DocumentScore`` in JSON; files of other programs may leave the names out."""

    id: NotRequired[str]
    domain: NotRequired[str]
    nll: Finite
    tokens: Count
    bytes: Count


@dataclass(frozen=True)
class Evaluation:
    """Loss and perplexity of a text under a model; the fields are the keys of ``ppl eval --json``.

    docs/evaluation.md defines every field with its formula. The measures by byte and by word are
    over the scored text, and None where nothing was scored or a token's loss is not finite.

    Args:
        loss: nats a scored token.
        perplexity: exp(loss).
        bits_per_token: loss / ln 2.
        bits_per_byte: bits a scored byte of text.
        byte_perplexity: 2 to the power of bits_per_byte.
        word_perplexity: exp of the nats a scored word.
        tokens: tokens scored.
        tokens_read: tokens + tokens_skipped.
        tokens_skipped: tokens read and not scored.
        skipped: tokens_skipped by reason.
        unknown_tokens: scored tokens that the tokenizer does not know.
        loss_without_unknown: nats a token over the tokens that the tokenizer knows.
        perplexity_without_unknown: exp(loss_without_unknown).
        non_finite: number and first place of the tokens with a NaN or infinite loss, or None.
        bytes: bytes of text that were scored.
        bytes_read: bytes + bytes_skipped.
        bytes_skipped: bytes of text that were not scored.
        words: words of text that were scored.
        words_read: words + words_skipped.
        words_skipped: words of text that were not scored.
        documents: documents read.
        stderr: standard error of the loss over ``clusters``, nats; None of a single cluster.
        perplexity_stderr: perplexity times stderr.
        perplexity_interval: 95% interval, by the delta method on the scale of the loss.
        perplexity_interval_bootstrap: 95% interval by bootstrap over the clusters.
        clusters: unit ("document" or "block"), count, and trusted: whether they are enough.
        effective_tokens: independent tokens that would give this standard error.
        baselines: loss and perplexity of a "uniform" and a "unigram" guess.
        protocol, context_length, stride, bos, special_text: as ``evaluate`` chose them.
        tokenizer_fingerprint, text_fingerprint: hashes that tell results apart.
        vocabulary_size: rows of the model's head.
        backend, precision: of the losses.
        seconds: of the whole evaluation.
        notes: what to know before the numbers are believed.
        domains: the measures of each domain.
        longest_documents, worst_documents: up to ten, by tokens and by mean loss.
        surprising_tokens: up to ten, by loss.
        per_document: the score of each document.
        first_tokens: of each document the tokens of its first 32 bytes: end in bytes, loss in nats
            (None: not scored), end, loss, ...; ``compare`` aligns different tokenizers by them. Of
            a document with spans, the end of the context and then those of the first 32 bytes.
        blocks: sums of nll and of tokens over blocks of the only document.
        data_check: of ``ppl eval --train``, as the JSON of ppl check-data.
        calibration: ``calibration.CalibrationBins.summary`` where it was measured.
        model: name, fingerprint and configuration, ``models.described``.
        loss_by_position: mean losses by position in the document and in the window, ``positions``.
        contexts: of several context lengths, the losses and paired differences of each.

    Example:
        >>> names = [*Evaluation.__dataclass_fields__]
        >>> evaluation = Evaluation(**dict.fromkeys(names) | {"loss": 2.0, "per_document": []})
        >>> evaluation.ok, '"loss": 2.0' in evaluation.to_json()
        (True, True)
        >>> evaluation.save("/dev/null")
    """

    loss: Number
    perplexity: Number
    bits_per_token: Number
    bits_per_byte: Number | None
    byte_perplexity: Number | None
    word_perplexity: Number | None
    tokens: Count
    tokens_read: Count
    tokens_skipped: Count
    skipped: dict[str, Count]
    unknown_tokens: Count
    loss_without_unknown: Number | None
    perplexity_without_unknown: Number | None
    non_finite: dict | None
    bytes: Count
    bytes_read: Count
    bytes_skipped: Count
    words: Count
    words_read: Count
    words_skipped: Count
    documents: Count
    stderr: Number | None
    perplexity_stderr: Number | None
    perplexity_interval: tuple[Number, Number] | None
    perplexity_interval_bootstrap: tuple[Number, Number] | None
    clusters: dict
    effective_tokens: Number | None
    baselines: dict[str, dict[str, Number]]
    protocol: str
    context_length: Count
    stride: Count
    bos: str
    special_text: str
    tokenizer_fingerprint: str
    text_fingerprint: str
    vocabulary_size: Count
    backend: str
    precision: str
    seconds: Number
    notes: list[str]
    domains: dict[str, dict]
    longest_documents: list[dict]
    worst_documents: list[dict]
    surprising_tokens: list[dict]
    per_document: list[DocumentScore] = field(repr=False)
    first_tokens: list[list[Number | None]] = field(default_factory=list, repr=False)
    blocks: list[tuple[Number, Number]] | None = field(default=None, repr=False)
    data_check: dict | None = field(default=None, repr=False)
    calibration: dict | None = field(default=None, repr=False)
    model: dict | None = None
    loss_by_position: LossByPosition | None = field(default=None, repr=False)
    contexts: list[dict] | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """Return whether every token's loss is finite."""
        return self.non_finite is None

    def __str__(self) -> str:
        """Return the table of ``ppl eval`` and the notes as plain text."""
        from .summary import text

        return text(self)

    def to_json(self) -> str:
        """Return the fields as a JSON document.

        Returns:
            RFC 8259; an infinite perplexity is the text "inf", and documents are ``DocumentRow``s.
        """
        record = asdict(self)
        record["per_document"] = [
            {key: document[key] for key in DocumentRow.__annotations__}
            for document in record["per_document"]
        ]
        return to_json(record)

    def save(self, path: str | Path) -> None:
        """Write ``to_json`` into a file.

        Args:
            path: the file, which is written whole or left as it was.

        Raises:
            InputError: the system refuses; the file is named.
        """
        write_text(path, self.to_json() + "\n")


# What `read_result` needs of a file, whichever program wrote it.
NEEDED = ("loss", "tokens", "tokenizer_fingerprint", "text_fingerprint", "per_document")


@cache
def _result_type() -> Any:
    """Return the fields of ``Evaluation`` as keys of JSON, each of which may be absent or null.

    Results of earlier versions lack some.
    """
    fields = get_type_hints(Evaluation, include_extras=True) | {"per_document": list[DocumentRow]}
    keys = {name: kind | None for name, kind in fields.items()}
    return TypedDict("Result", keys, total=False)  # type: ignore[operator]  # of our own making


def read_result(path: str | Path) -> dict:
    """Return the result in a file that ``ppl eval --json`` wrote, without its nulls.

    Args:
        path: the file.

    Returns:
        The fields of ``Evaluation`` by name, those that the file has; infinities and NaN as floats.

    Raises:
        InputError: the file is no such result, or a field is of another type.

    Example:
        >>> read_result(".")
        Traceback (most recent call last):
        perplexity.errors.InputError: .: expected a result file of ppl eval --json, got a folder...
    """
    checks.path("path", path)
    record = read_written(path, "eval")
    return checked_record(record, str(path), "a result file of ppl eval --json")


def checked_record(record: dict, source: str, expected: str) -> dict:
    """Return a result's keys that are not null, those of ``Evaluation`` by their types.

    Args:
        record: the JSON object.
        source: how an error names the record, a file or an argument.
        expected: what an error says the record should be.

    Raises:
        InputError: a key that ``compare`` needs is missing, or one is of another type.
    """
    if missing := [key for key in NEEDED if record.get(key) is None]:
        null = "null for" if all(key in record for key in missing) else "one without"
        raise InputError(f"{source}: expected {expected}, got {null} {', '.join(missing)}")
    schema_of(record, source)
    result = read_as(_result_type(), record, f"{source}: expected {expected}")
    return {key: value for key, value in result.items() if value is not None}


def summarise(
    scores: Sequence[DocumentScore],
    *,
    blocks=None,
    squares: float | None = None,
    bootstrap: bool = True,
) -> dict:
    """Return loss, perplexities, counts, standard error and intervals over documents.

    Totals are divided once, so that a long document weighs as much as its tokens.

    Args:
        scores: the documents.
        blocks: sums of nll and of tokens over blocks of the only document with tokens.
        squares: sum of nll² over the tokens, for the effective number of tokens.
        bootstrap: draw the bootstrap interval; default True.

    Returns:
        The fields of ``Evaluation`` from "loss" to "effective_tokens" that follow from the scores.
    """
    nll = math.fsum(score.nll for score in scores)
    tokens, bytes_, words = (
        sum(getattr(score, name) for score in scores) for name in ("tokens", "bytes", "words")
    )
    # Of a text with a token that is not finite nothing is known by byte and by word.
    text = (None, None) if any(score.non_finite for score in scores) else (bytes_, words)
    ratios = measures(nll, tokens, *text)
    loss = math.nan if ratios["loss"] is None else ratios["loss"]
    sure = uncertainty(
        [score.nll for score in scores],
        [score.tokens for score in scores],
        blocks,
        squares,
        bootstrap,
    )
    return {
        **ratios,
        "loss": loss,
        "perplexity": exp(loss),
        "bits_per_token": loss / math.log(2),
        "tokens": tokens,
        "bytes": bytes_,
        "words": words,
        "documents": len(scores),
        "stderr": sure.stderr,
        "perplexity_stderr": sure.perplexity_stderr,
        "perplexity_interval": sure.perplexity_interval,
        "perplexity_interval_bootstrap": sure.bootstrap_interval,
        "clusters": {"unit": sure.unit, "count": sure.clusters, "trusted": sure.trusted},
        "effective_tokens": sure.effective_tokens,
    }
