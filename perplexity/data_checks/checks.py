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
from ..text.tokens import check_tokenizer
from .index import FEWEST, NGRAM, SHINGLE, Index, Scan, Text
from .leakage import FEWEST_WORDS, Leak, leakage_findings, leaks, overlaps, scan_texts
from .splits import shift_findings, size_findings
from .vocabulary import TRAIN_BYTES, Sample, Tokens, count_tokens, vocabulary_findings

MEMORY_LIMIT = 1 << 30
NEAR = 0.25  # Jaccard similarity of shingles; one word in ten changed leaves 0.43 or more


@dataclass(frozen=True)
class DataCheck(Judged):
    """What was found; fields are the keys of ``ppl check-data --json``.

    documents: {train, valid}; valid_fraction: of all words; leaked_fraction: of validation
    documents; leaked_token_fraction: of their tokens (words where no tokenizer was given:
    ``token_unit``); exact_duplicates, near_duplicates: validation documents that are in training as
    they are, or nearly or as part of a longer document; ngram_overlap: share of all validation
    n-grams that training has; unknown_token_rate, tokenizer_fingerprint: None without a tokenizer.
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
    """Return an iterator of the texts of argument ``name``; strings are named by their number."""
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
    """Leakage, sizes, distribution and vocabulary of validation texts beside training texts.

    valid is held in memory, with tables of at most ``memory_limit`` bytes; train goes by once,
    whatever its size, over ``workers`` processes. near: the Jaccard similarity of 4-word shingles
    from which a document counts as a copy. interval: the relative half-width that is wanted of the
    perplexity's 95 % interval. tokenizer: a transformers tokenizer, which counts the tokens of
    validation, and of a sample of ``train_bytes`` of training; embedding: rows of the model's.
    journal: a folder; the same call again goes on where a killed one stopped, if ``identity`` is
    what it was. Raises InputError.
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
        check_tokenizer(tokenizer)
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
    for text in texts:
        sample.add(text)
        yield text


def _token_summary(valid: Tokens, train: Tokens) -> dict:
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
    notes = []
    if not scan.words:
        notes.append("training has no words: nothing can leak from it")
    if index.kept < 1:
        sizes = index.tables[SHINGLE].sizes
        notes.append(
            f"of the n-grams one in {round(1 / index.kept)} was kept, for memory_limit: shares are estimates, and of "
            f"{int((sizes < 2 * FEWEST).sum())} short documents only whole copies are found"
        )
    short = sum(length < FEWEST_WORDS for length in index.lengths)
    if short:
        notes.append(
            f"{short} validation documents have fewer than {FEWEST_WORDS} words: nothing is told of them"
        )
    unknown = int(np.isnan(overlaps(index, scan)).sum())
    if unknown:
        notes.append(
            f"{unknown} validation documents have no n-gram of {NGRAM} words: only whole copies of them are found"
        )
    return notes


def write_texts(path: str | Path, texts: Iterable[Text], name: str | None = None) -> int:
    """Texts to JSON lines (id, text, domain), or as paragraphs of a text file where the name ends
    in .txt; how many.
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
