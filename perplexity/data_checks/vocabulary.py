"""The tokenizer against the text: unknown tokens, ids beyond the embedding, untrained tokens, loss.

Text is lost where the tokens of a document decode to another text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from ..findings import Finding
from ..text.tokens import text_of, token_ids, unknown_id
from ..wording import by_number, counted
from .index import Text

AT_ONCE = 64  # documents tokenised in a call
TRAIN_BYTES = 20 << 20  # training text that is tokenised, a sample over all of it
WORST = 5  # documents listed


@dataclass
class Tokens:
    """Counts of tokens over one side's text.

    Args:
        counts: int64 [V], of each id.
        texts: texts read.
        bytes: bytes of the texts, UTF-8.
        tokens: tokens of the texts.
        unknown: tokens that stand for text outside the vocabulary.
        lengths: tokens of each text.
        lossy: texts that decode to another text.
        lossy_example: a place where one does.
        by_domain: unknown tokens and tokens of each domain.
        worst: documents with the largest shares of unknown tokens.
    """

    counts: np.ndarray
    texts: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    lengths: list[int] = field(default_factory=list)
    lossy: int = 0
    lossy_example: str = ""
    by_domain: dict[str, list[int]] = field(default_factory=dict)
    worst: list[dict] = field(default_factory=list)


class Sample:
    """A sample of texts by the hash of their names, the same in any order of arrival.

    Args:
        limit: the most characters of the sample; one text may exceed it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.share = limit, 0, 1.0
        self.texts: list[tuple[float, Text]] = []

    def add(self, text: Text) -> None:
        """Take the text in, or leave it out; a full sample halves the share of texts it takes."""
        place = xxhash.xxh3_64_intdigest(text.id.encode(errors="replace")) / 2**64
        if place < self.share and self.limit:
            self.texts.append((place, text))
            self.bytes += len(text.text)
        while self.bytes > self.limit and len(self.texts) > 1:
            self.share /= 2
            self.texts = [(place, text) for place, text in self.texts if place < self.share]
            self.bytes = sum(len(text.text) for _, text in self.texts)


def count_tokens(tokenizer, texts: Iterable[Text], *, closely: bool = False) -> Tokens:
    """Return counts of the texts' tokens.

    Args:
        tokenizer: a transformers tokenizer.
        texts: read once.
        closely: also decode the tokens again, and count unknown ones by domain and document;
            default False.

    Raises:
        InputError: the tokenizer fails on a text.
    """
    unknown = unknown_id(tokenizer)
    totals = Tokens(np.zeros(max(len(tokenizer), 1), np.int64))
    stream = iter(texts)
    while group := list(islice(stream, AT_ONCE)):
        for text, ids in zip(
            group, token_ids(tokenizer, [text.text for text in group]), strict=True
        ):
            counts = np.bincount(ids, minlength=len(totals.counts))
            if len(counts) > len(totals.counts):
                totals.counts = np.pad(totals.counts, (0, len(counts) - len(totals.counts)))
            totals.counts[: len(counts)] += counts
            totals.texts += 1
            totals.bytes += len(text.text.encode(errors="replace"))
            totals.tokens += len(ids)
            totals.lengths.append(len(ids))
            lost = 0 if unknown is None else int(counts[unknown])
            totals.unknown += lost
            if closely:
                _closely(totals, tokenizer, text, ids, lost)
    totals.worst = sorted(totals.worst, key=lambda row: -row["rate"])[:WORST]
    return totals


def _closely(totals: Tokens, tokenizer, text: Text, ids: np.ndarray, lost: int) -> None:
    """Add a text's unknown tokens by domain and document, and whether it decodes to itself."""
    pair = totals.by_domain.setdefault(text.domain, [0, 0])
    pair[0] += lost
    pair[1] += len(ids)
    if lost:
        totals.worst.append(
            dict(
                id=text.id, domain=text.domain, unknown=lost, tokens=len(ids), rate=lost / len(ids)
            )
        )
        if len(totals.worst) > 100 * WORST:
            totals.worst = sorted(totals.worst, key=lambda row: -row["rate"])[:WORST]
    again = text_of(tokenizer, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if again != text.text and again.strip() != text.text.strip():  # a space put in front is no loss
        totals.lossy += 1
        if not totals.lossy_example:
            place = next(
                (
                    i
                    for i, pair in enumerate(zip(again, text.text, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(again), len(text.text)),
            )
            begin = max(0, place - 10)
            totals.lossy_example = (
                f"{text.text[begin : place + 20]!r} became {again[begin : place + 20]!r}"
            )


def embedding_size(folder: str) -> int | None:
    """Return ``vocab_size`` of the config.json beside a tokenizer.

    Args:
        folder: the tokenizer's, or the name of one elsewhere.

    Returns:
        The rows of the embedding, or None where no such file has the number.

    Example:
        >>> embedding_size("no/such/folder") is None
        True
    """
    path = Path(folder) / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        size = record.get("vocab_size", record.get("text_config", {}).get("vocab_size"))
        return size if isinstance(size, int) else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def vocabulary_findings(
    tokenizer, valid: Tokens, train: Tokens | None, embedding: int | None
) -> list[Finding]:
    """Return findings on how the tokenizer fits the text.

    Args:
        tokenizer: a transformers tokenizer.
        valid: counts of validation, taken closely.
        train: counts of a sample of training, or None.
        embedding: rows of the model's embedding, or None where they are not known.
    """
    findings = []
    rate = valid.unknown / max(1, valid.tokens)
    if valid.unknown:
        # A fast tokenizer's model may have an unknown token that transformers has no name for.
        unknown = tokenizer.unk_token or tokenizer.decode([unknown_id(tokenizer)])
        domains = sorted(valid.by_domain.items(), key=lambda item: -item[1][0] / max(1, item[1][1]))
        name, (lost, of) = domains[0]
        findings.append(
            Finding(
                "unknown-tokens",
                "danger" if rate >= 0.01 else "warning",
                f"{valid.unknown:,} of {counted(valid.tokens, 'validation token')} ({rate:.2%}) "
                f"{by_number(valid.unknown, 'is', 'are')} {unknown}; most in {name} ({lost / max(1, of):.2%}), worst document "
                f"{valid.worst[0]['id']} ({valid.worst[0]['rate']:.1%})",
                "an unknown token is cheap to predict and says nothing of the text: compare "
                "perplexities without them too (ppl eval tells both), or take a tokenizer with "
                "bytes to fall back on",
                dict(unknown_token_rate=rate),
            )
        )
    largest = int(np.flatnonzero(valid.counts)[-1]) if valid.tokens else -1
    if embedding is not None and max(largest, len(tokenizer) - 1) >= embedding:
        beyond = int(valid.counts[embedding:].sum())
        findings.append(
            Finding(
                "ids-beyond-embedding",
                "danger" if beyond else "warning",
                f"the embedding has {embedding:,} rows, the tokenizer ids up to "
                f"{len(tokenizer) - 1:,}; {counted(beyond, 'validation token')} "
                f"{by_number(beyond, 'is', 'are')} beyond it",
                "resize the embedding (model.resize_token_embeddings), or take the tokenizer the "
                "model was made with",
                dict(beyond=beyond, embedding=embedding),
            )
        )
    if valid.lossy:
        findings.append(
            Finding(
                "round-trip-loss",
                "warning",
                f"{valid.lossy} of {counted(valid.texts, 'validation document')} "
                f"{by_number(valid.lossy, 'decodes', 'decode')} to another text: "
                f"{valid.lossy_example}",
                "bits per byte then count bytes that no token stands for: check the normaliser, or "
                "take a lossless tokenizer",
                dict(documents=valid.lossy),
            )
        )
    if train is not None and train.tokens and valid.tokens:
        new = valid.counts.copy()
        seen = train.counts[: len(new)] > 0
        new[: len(seen)][seen] = 0
        unseen, kinds = int(new.sum()), int((new > 0).sum())
        if unseen >= 0.001 * valid.tokens:
            examples = ", ".join(repr(text_of(tokenizer, [i])) for i in np.argsort(-new)[:3])
            findings.append(
                Finding(
                    "unseen-tokens",
                    "warning" if unseen >= 0.01 * valid.tokens else "info",
                    f"{counted(unseen, 'validation token')} ({unseen / valid.tokens:.2%}, "
                    f"{counted(kinds, 'kind')}) {by_number(unseen, 'was', 'were')} not met in "
                    f"{counted(train.tokens, 'sampled training token')}: {examples}",
                    "what training never shows keeps the embedding it was initialised with, and "
                    "its loss stays at chance",
                    dict(unseen=unseen, kinds=kinds),
                )
            )
        here, there = valid.bytes / valid.tokens, train.bytes / train.tokens
        if here < 0.8 * there:
            findings.append(
                Finding(
                    "tokenizer-fit",
                    "warning",
                    f"validation has {here:.2f} bytes a token, training {there:.2f}",
                    "validation is text of another kind, of which a token says less: compare bits "
                    "per byte, not perplexities",
                    dict(valid=here, train=there),
                )
            )
    return findings
