"""What an evaluation found: the object, its JSON, and the reading of a JSON back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .. import checks
from ..errors import InputError
from ..files import write_text
from ..json_files import read_written, schema_of, to_json
from ..metric import exp, measures
from .uncertainty import uncertainty


@dataclass(frozen=True)
class DocumentScore:
    """One document: ``nll`` is the sum over its scored tokens, in nats.

    bytes, words: of its text that were scored. non_finite: tokens left out, of NaN or infinite
    loss.
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


@dataclass(frozen=True)
class Evaluation:
    """Loss and perplexity of a text; fields are the keys of ``ppl eval --json``, defined with their
    formulas in docs/evaluation.md.

    loss: nats a scored token; stderr: its standard error over ``clusters``; perplexity_interval: 95
    %, by the delta method on the scale of the loss; tokens: tokens scored; tokens_read = tokens +
    tokens_skipped, the latter by reason in ``skipped``. bytes, words: those of the text that were
    scored; bytes_read = bytes + bytes_skipped, and so for words. The measures by byte and by word
    are over the scored ones. They are None where nothing was scored or a token's loss is not
    finite. first_tokens: for each document the tokens of its first 32 bytes, as end in bytes, loss
    in nats (None: not scored), end, loss, ...; ``compare`` finds by them the bytes that both sides
    scored. loss_without_unknown: over the tokens that the tokenizer knows; data_check: of ``ppl
    eval --train``, as ppl check-data's JSON; calibration: ``calibration.CalibrationBins.summary``,
    where it was measured; model: name, fingerprint and configuration.
    """

    loss: float
    perplexity: float
    bits_per_token: float
    bits_per_byte: float | None
    byte_perplexity: float | None
    word_perplexity: float | None
    tokens: int
    tokens_read: int
    tokens_skipped: int
    skipped: dict[str, int]
    unknown_tokens: int
    loss_without_unknown: float | None
    perplexity_without_unknown: float | None
    non_finite: dict | None
    bytes: int
    bytes_read: int
    bytes_skipped: int
    words: int
    words_read: int
    words_skipped: int
    documents: int
    stderr: float | None
    perplexity_stderr: float | None
    perplexity_interval: tuple[float, float] | None
    perplexity_interval_bootstrap: tuple[float, float] | None
    clusters: dict
    effective_tokens: float | None
    baselines: dict[str, dict[str, float]]
    protocol: str
    context_length: int
    stride: int
    bos: str
    special_text: str
    tokenizer_fingerprint: str
    text_fingerprint: str
    vocabulary_size: int
    backend: str
    precision: str
    seconds: float
    notes: list[str]
    domains: dict[str, dict]
    longest_documents: list[dict]
    worst_documents: list[dict]
    surprising_tokens: list[dict]
    per_document: list[DocumentScore] = field(repr=False)
    first_tokens: list[list[float | None]] = field(default_factory=list, repr=False)
    blocks: list[list[float]] | None = field(default=None, repr=False)
    data_check: dict | None = field(default=None, repr=False)
    calibration: dict | None = field(default=None, repr=False)
    model: dict | None = None  # ``models.described``

    @property
    def ok(self) -> bool:
        """No token's loss was NaN or infinite."""
        return self.non_finite is None

    def to_json(self) -> str:
        """JSON (RFC 8259: an infinite perplexity is the string "inf")."""
        record = asdict(self)
        kept = ("id", "domain", "nll", "tokens", "bytes")
        documents = record["per_document"]
        record["per_document"] = [{key: document[key] for key in kept} for document in documents]
        return to_json(record)

    def save(self, path: str | Path) -> None:
        """Write ``to_json``; InputError naming the file where the system refuses."""
        write_text(path, self.to_json() + "\n")


# What `read_result` needs of a file, whichever program wrote it.
NEEDED = ("loss", "tokens", "tokenizer_fingerprint", "text_fingerprint", "per_document")


def read_result(path: str | Path) -> dict:
    """Return the keys of a file that ``ppl eval --json`` wrote; InputError where it is not one."""
    checks.path("path", path)
    record = read_written(path, "eval")
    return checked_record(record, str(path), "a result file of ppl eval --json")


def checked_record(record: object, source: str, expected: str) -> dict:
    """Return a result's keys that are not null; InputError naming ``source`` where it is none."""
    wanted = f"{source}: expected {expected}, got"
    missing = [key for key in NEEDED if key not in record] if isinstance(record, dict) else NEEDED
    if not isinstance(record, dict) or missing:
        raise InputError(f"{wanted} one without {', '.join(missing)}")
    schema_of(record, source)
    hints, found = _hints(Evaluation), {}
    for key, value in record.items():
        try:
            found[key] = _from_json(value, hints.get(key, Any))
        except _OtherKind as error:
            raise InputError(f"{wanted} one whose {key} is broken: {error}")
    if missing := [key for key in NEEDED if found[key] is None]:
        raise InputError(f"{wanted} null for {', '.join(missing)}")
    return {key: value for key, value in found.items() if value is not None}


class _OtherKind(Exception):
    """A value of another kind than a field's."""


# What a document of a result file must have. Files leave the rest out, or leave parts of it out.
NEEDED_OF_A_DOCUMENT = ("nll", "tokens", "bytes")


@cache
def _hints(kind: type) -> dict:
    return get_type_hints(kind)


def _from_json(value, hint):
    """Return what ``to_json`` made of a field of type ``hint``, null included; raise _OtherKind
    where it is none.
    """
    kind, inner = get_origin(hint), get_args(hint)
    if value is None or hint is Any:
        return value
    if kind in (Union, UnionType):
        return _from_json(value, next(of for of in inner if of is not type(None)))
    if hint in (int, float):
        return _number(value)
    if is_dataclass(hint) and isinstance(value, dict):
        counts = {key: value.get(key) for key in NEEDED_OF_A_DOCUMENT}
        if None in counts.values() or not all(
            math.isfinite(_number(count)) for count in counts.values()
        ):
            raise _OtherKind(
                f"expected finite {', '.join(counts)} of a document, got {list(counts.values())!r:.60}"
            )
        if min(value["tokens"], value["bytes"]) < 0:
            raise _OtherKind(
                f"expected counts of 0 or more of a document, got {list(counts.values())!r:.60}"
            )
        return value
    if kind is dict and isinstance(value, dict):
        return {key: _from_json(item, inner[1]) for key, item in value.items()}
    if (
        kind in (list, tuple)
        and isinstance(value, list | tuple)
        and (kind is list or len(value) == len(inner))
    ):
        return [_from_json(item, inner[0]) for item in value]
    if kind is None and not is_dataclass(hint) and isinstance(value, hint):
        return value
    raise _OtherKind(f"expected {getattr(hint, '__name__', hint)}, got {value!r:.60}")


def _number(value):
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _OtherKind(f"expected a number, got {value!r:.60}")
    return value


def summarise(
    scores: Sequence[DocumentScore],
    *,
    blocks=None,
    squares: float | None = None,
    bootstrap: bool = True,
) -> dict:
    """Loss, perplexities, counts, standard error and intervals of documents; totals are divided
    once.
    """
    nll = math.fsum(score.nll for score in scores)
    tokens, bytes_, words = (
        sum(getattr(score, name) for score in scores) for name in ("tokens", "bytes", "words")
    )
    # Of a text with a token that is not finite nothing is known by byte and by word.
    text = (None, None) if any(score.non_finite for score in scores) else (bytes_, words)
    found = measures(nll, tokens, *text)
    loss = math.nan if found["loss"] is None else found["loss"]
    sure = uncertainty(
        [score.nll for score in scores],
        [score.tokens for score in scores],
        blocks,
        squares,
        bootstrap,
    )
    return {
        **found,
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
