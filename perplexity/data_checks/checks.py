"""``check_data``: all checks of a training and a validation text, in one pass over the first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import checks
from ..errors import InputError, InputTypeError
from ..files import Output
from ..findings import SEVERITIES, Finding, Judged
from ..fingerprints import tokenizer_fingerprint
from ..text.tokenizers import as_tokenizer
from ..wording import by_number, counted
from .index import FEWEST, NGRAM, SHINGLE, Index, Scan, Text
from .leakage import FEWEST_WORDS, Leak, leakage_findings, leaks, overlaps, scan_texts
from .splits import shift_findings, size_findings
from .vocabulary import TRAIN_BYTES, Sample, Tokens, count_tokens, vocabulary_findings

MEMORY_LIMIT = 1 << 30  # bytes
NEAR = 0.25  # Jaccard similarity of shingles; a copy with every tenth word changed has 0.43 or more


@dataclass(frozen=True)
class DataCheck(Judged):
    """The result of ``check_data``; the fields are the keys of ``ppl check-data --json``.

    Args:
        documents: number of "train" and of "valid" documents.
        valid_fraction: share of all words that validation has; None where there are no words.
        leaked_fraction: share of validation documents that leak.
        leaked_token_fraction: share of validation's ``token_unit`` in such documents.
        exact_duplicates: validation documents that training has as they are.
        near_duplicates: validation documents that training has nearly, or inside a longer document.
        ngram_overlap: share of validation's n-grams that training has; None where there are none.
        unknown_token_rate: share of validation's tokens; None without a tokenizer.
        tokenizer_fingerprint: hash of the tokenizer, or None.
        findings: the problems, the most severe first.
        words: words of "train" and of "valid".
        bytes: bytes of "train" and of "valid", UTF-8.
        token_unit: "tokens", or "words" without a tokenizer.
        tokens: counts of tokens on both sides, or None without a tokenizer.
        settings: sizes and thresholds.
        notes: what to know before the numbers are believed.
        leaked: the documents that leak, in their order.

    Example:
        >>> check = check_data(["a text of training"], ["another text, of validation"])
        >>> check.leaked_fraction, check.documents
        (0.0, {'train': 1, 'valid': 1})
    """

    documents: dict[str, int | None]
    valid_fraction: float | None
    leaked_fraction: float
    leaked_token_fraction: float
    exact_duplicates: int
    near_duplicates: int
    ngram_overlap: float | None
    unknown_token_rate: float | None
    tokenizer_fingerprint: str | None
    findings: list[Finding]
    words: dict[str, int]
    bytes: dict[str, int]
    token_unit: str
    tokens: dict | None
    settings: dict
    notes: list[str]
    leaked: list[Leak] = field(repr=False)


def as_texts(texts: Iterable[Text | str], name: str = "texts") -> Iterator[Text]:
    """Return an iterator over texts; strings are named by their number.

    Args:
        texts: strings or ``Text``s.
        name: the argument that an error names.

    Raises:
        InputTypeError: ``texts``, or one of them, is of another type.
    """
    checks.several(name, texts, "texts", (Text,))
    return (_as_text(name, number, text) for number, text in enumerate(texts))


def _as_text(name: str, number: int, text: Text | str) -> Text:
    if isinstance(text, str):
        return Text(str(number), text)
    if not (isinstance(text, Text) and isinstance(text.text, str)):
        kind = type(text.text if isinstance(text, Text) else text).__name__
        raise InputTypeError(f"{name}: expected strings or Texts of them, got {kind} at {number}")
    return text


def check_data(
    train: Iterable[Text | str],
    valid: Iterable[Text | str],
    *,
    tokenizer=None,
    embedding: int | None = None,
    near: float = NEAR,
    interval: float = 0.01,
    memory_limit: int = MEMORY_LIMIT,
    workers: int = 1,
    journal: str | Path | None = None,
    identity: dict | None = None,
    train_bytes: int = TRAIN_BYTES,
    progress: Callable[[Scan], None] | None = None,
) -> DataCheck:
    """Check validation texts against training texts: leakage, sizes, distribution, vocabulary.

    Validation is held in memory. Training is read once, whatever its size.

    Args:
        train: training texts, strings or ``Text``s.
        valid: validation texts, likewise.
        tokenizer: counts tokens: any that ``evaluate`` takes; default None: words are counted.
        embedding: rows of the model's embedding, which the tokenizer's ids must not exceed.
        near: Jaccard similarity of 4-word shingles from which a document is a copy; default 0.25.
        interval: the relative half-width wanted of the perplexity's 95% interval; default 0.01.
        memory_limit: bytes of the tables of validation; default 1 GiB.
        workers: processes that training is shared over; default 1.
        journal: a folder to resume from: the same call resumes where a killed one stopped.
        identity: what the texts are of, as JSON; a journal of another identity is refused.
        train_bytes: bytes of training text that ``tokenizer`` counts, a sample; default 20 MiB.
        progress: called with the ``Scan`` so far as training is read.

    Returns:
        A DataCheck.

    Raises:
        InputError: an argument cannot be used, or there is no validation text.

    Example:
        >>> text = "a sentence of the text that training and validation have in common"
        >>> check_data(["another text", text], [text]).leaked_fraction
        1.0
    """
    checks.number("near", near, "a similarity above 0 and at most 1", most=1, above=0)
    checks.number("interval", interval, "a share above 0 and below 1", above=0, below=1)
    workers = checks.integer("workers", workers, least=1)
    memory_limit = checks.integer("memory_limit", memory_limit, least=1)
    train_bytes = checks.integer("train_bytes", train_bytes, least=0)
    embedding = checks.optional(checks.integer, "embedding", embedding, least=1)
    checks.optional(checks.path, "journal", journal)
    checks.optional(checks.mapping, "identity", identity)
    checks.function("progress", progress)
    if tokenizer is not None:
        tokenizer = as_tokenizer(tokenizer)
    training, validation = as_texts(train, "train"), list(as_texts(valid, "valid"))
    if not validation:
        raise InputError("valid: expected at least one document, got none")
    index = Index(validation, memory_limit, near)
    sample = Sample(train_bytes if tokenizer is not None else 0)
    scan = scan_texts(
        index,
        _sampled(training, sample),
        workers=workers,
        state=journal,
        identity=identity,
        progress=progress,
    )
    leaked = leaks(index, scan)
    lengths = index.lengths
    tokens = train_tokens = None
    if tokenizer is not None:
        tokens = count_tokens(tokenizer, validation, closely=True)
        train_tokens = count_tokens(tokenizer, (text for _, text in sample.texts))
        lengths = tokens.lengths
    unit = "words" if tokenizer is None else "tokens"
    findings, summary = leakage_findings(index, scan, leaked), None
    findings += size_findings(index, scan, sum(lengths), unit, interval) + shift_findings(
        index, scan
    )
    if tokens is not None and train_tokens is not None:
        findings += vocabulary_findings(tokenizer, tokens, train_tokens, embedding)
        summary = _token_summary(tokens, train_tokens)
    table, words = index.tables[NGRAM], sum(index.lengths)
    kinds = [leak.kind for leak in leaked]
    return DataCheck(
        documents=dict(train=scan.documents, valid=len(validation)),
        valid_fraction=words / (words + scan.words) if words + scan.words else None,
        leaked_fraction=len(leaked) / len(validation),
        leaked_token_fraction=sum(lengths[leak.document] for leak in leaked) / max(1, sum(lengths)),
        exact_duplicates=kinds.count("exact"),
        near_duplicates=len(kinds) - kinds.count("exact"),
        ngram_overlap=float(table.seen(scan.seen).sum() / table.sizes.sum())
        if table.sizes.sum()
        else None,
        unknown_token_rate=None if tokens is None else tokens.unknown / max(1, tokens.tokens),
        tokenizer_fingerprint=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        findings=sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity)),
        words=dict(train=scan.words, valid=words),
        bytes=dict(train=scan.bytes, valid=sum(index.bytes)),
        token_unit=unit,
        tokens=summary,
        settings=dict(
            ngram=NGRAM,
            shingle=SHINGLE,
            near=near,
            memory_limit=memory_limit,
            ngrams_kept=index.kept,
        ),
        notes=_notes(index, scan),
        leaked=leaked,
    )


def _sampled(texts: Iterator[Text], sample: Sample) -> Iterator[Text]:
    """Yield texts as they are, and offer each to ``sample``."""
    for text in texts:
        sample.add(text)
        yield text


def _token_summary(valid: Tokens, train: Tokens) -> dict:
    """Return the counts of both sides for ``DataCheck.tokens``."""
    return dict(
        valid=valid.tokens,
        unknown=valid.unknown,
        bytes_per_token=dict(
            valid=valid.bytes / max(1, valid.tokens),
            train=train.bytes / train.tokens if train.tokens else None,
        ),
        unknown_by_domain={
            name: lost / max(1, of) for name, (lost, of) in sorted(valid.by_domain.items())
        },
        worst_documents=valid.worst,
        train_sampled=dict(tokens=train.tokens, bytes=train.bytes),
    )


def _notes(index: Index, scan: Scan) -> list[str]:
    """Return what to know before the numbers are believed."""
    notes = []
    if not scan.words:
        notes.append("training has no words: nothing can leak from it")
    if index.kept < 1:
        sizes = index.tables[SHINGLE].sizes
        notes.append(
            f"of the n-grams one in {round(1 / index.kept)} was kept, for memory_limit: shares are "
            f"estimates, and of {int((sizes < 2 * FEWEST).sum())} short documents only whole "
            "copies are found"
        )
    short = sum(length < FEWEST_WORDS for length in index.lengths)
    if short:
        notes.append(
            f"{counted(short, 'validation document')} {by_number(short, 'has', 'have')} fewer than "
            f"{FEWEST_WORDS} words: nothing is known of {by_number(short, 'it', 'them')}"
        )
    unknown = int(np.isnan(overlaps(index, scan)).sum())
    if unknown:
        notes.append(
            f"{counted(unknown, 'validation document')} {by_number(unknown, 'has', 'have')} no "
            f"n-gram of {NGRAM} words: only whole copies are found"
        )
    return notes


def write_texts(path: str | Path, texts: Iterable[Text], name: str | None = None) -> int:
    """Write texts as lines of JSON, or as paragraphs of a text file whose name ends in .txt.

    Args:
        path: the file, which is written whole or left as it was.
        texts: the texts; a line of JSON has id, text and domain.
        name: how an error names the file, an option; default nothing but the path.

    Returns:
        The number of texts.

    Raises:
        InputError: the system refuses.
    """
    count, plain = 0, str(path).endswith(".txt")
    with Output(path, name) as file:
        for text in texts:
            row = dict(id=text.id, text=text.text, domain=text.domain)
            line = (
                text.text.strip("\n") + "\n\n"
                if plain
                else json.dumps(row, ensure_ascii=False) + "\n"
            )
            file.write(line.encode("utf-8", "replace"))
            count += 1
    return count
