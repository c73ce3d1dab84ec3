"""Does the tokenizer fit the text: unknown tokens, ids beyond the embedding, tokens never trained,
text lost on the way.
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
from ..text.tokens import text_of, token_ids
from .index import Text

AT_ONCE = 64  # documents tokenised in a call
TRAIN_BYTES = 20 << 20  # of training text that is tokenised: a sample over all of it
WORST = 5  # documents listed


@dataclass
class Tokens:
    """Counts over one side's text."""

    counts: np.ndarray  # int64 [V], of each id
    texts: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens of each text
    lossy: int = 0  # texts that decode to something else
    lossy_example: str = ""
    by_domain: dict[str, list[int]] = field(default_factory=dict)  # unknown, tokens
    worst: list[dict] = field(default_factory=list)


class Sample:
    """A share of texts, chosen by the hash of their names, of ``limit`` bytes at most: the same
    whatever their order.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.share = limit, 0, 1.0
        self.texts: list[tuple[float, Text]] = []

    def add(self, text: Text) -> None:
        place = xxhash.xxh3_64_intdigest(text.id.encode(errors="replace")) / 2**64
        if place < self.share and self.limit:
            self.texts.append((place, text))
            self.bytes += len(text.text)
        while self.bytes > self.limit and len(self.texts) > 1:
            self.share /= 2
            self.texts = [(place, text) for place, text in self.texts if place < self.share]
            self.bytes = sum(len(text.text) for _, text in self.texts)


def count_tokens(tokenizer, texts: Iterable[Text], *, closely: bool = False) -> Tokens:
    """Tokens of texts; ``closely``: also decoded again, and unknown ones by domain and document."""
    from ..text.tokens import unknown_id

    unknown = unknown_id(tokenizer)
    found = Tokens(np.zeros(max(len(tokenizer), 1), np.int64))
    stream = iter(texts)
    while group := list(islice(stream, AT_ONCE)):
        for text, ids in zip(
            group, token_ids(tokenizer, [text.text for text in group]), strict=True
        ):
            here = np.bincount(ids, minlength=len(found.counts))
            if len(here) > len(found.counts):
                found.counts = np.pad(found.counts, (0, len(here) - len(found.counts)))
            found.counts[: len(here)] += here
            found.texts += 1
            found.bytes += len(text.text.encode(errors="replace"))
            found.tokens += len(ids)
            found.lengths.append(len(ids))
            lost = 0 if unknown is None else int(here[unknown])
            found.unknown += lost
            if closely:
                _closely(found, tokenizer, text, ids, lost)
    found.worst = sorted(found.worst, key=lambda row: -row["rate"])[:WORST]
    return found


def _closely(found: Tokens, tokenizer, text: Text, ids: np.ndarray, lost: int) -> None:
    pair = found.by_domain.setdefault(text.domain, [0, 0])
    pair[0] += lost
    pair[1] += len(ids)
    if lost:
        found.worst.append(
            dict(
                id=text.id, domain=text.domain, unknown=lost, tokens=len(ids), rate=lost / len(ids)
            )
        )
        if len(found.worst) > 100 * WORST:
            found.worst = sorted(found.worst, key=lambda row: -row["rate"])[:WORST]
    again = text_of(tokenizer, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if again != text.text and again.strip() != text.text.strip():  # a space put in front is no loss
        found.lossy += 1
        if not found.lossy_example:
            place = next(
                (
                    i
                    for i, pair in enumerate(zip(again, text.text, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(again), len(text.text)),
            )
            begin = max(0, place - 10)
            found.lossy_example = (
                f"{text.text[begin : place + 20]!r} became {again[begin : place + 20]!r}"
            )


def embedding_size(folder: str) -> int | None:
    """``vocab_size`` of a config.json beside the tokenizer, where there is one."""
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
    from ..text.tokens import unknown_id

    findings = []
    rate = valid.unknown / max(1, valid.tokens)
    if valid.unknown:
        # The tokenizer's own model may have an unknown token that transformers has no name for.
        unknown = tokenizer.unk_token or tokenizer.decode([unknown_id(tokenizer)])
        domains = sorted(valid.by_domain.items(), key=lambda item: -item[1][0] / max(1, item[1][1]))
        name, (lost, of) = domains[0]
        findings.append(
            Finding(
                "unknown-tokens",
                "danger" if rate >= 0.01 else "warning",
                f"{valid.unknown:,} of {valid.tokens:,} validation tokens ({rate:.2%}) are {unknown}; "
                f"most in {name} "
                f"({lost / max(1, of):.2%}), worst document {valid.worst[0]['id']} ({valid.worst[0]['rate']:.1%})",
                "an unknown token is cheap to predict and says nothing of the text: compare perplexities without them too "
                "(ppl eval tells both), or take a tokenizer with bytes to fall back on",
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
                f"the embedding has {embedding:,} rows, the tokenizer ids up to {len(tokenizer) - 1:,}; {beyond:,} validation "
                "tokens are beyond it",
                "resize the embedding (model.resize_token_embeddings), or take the tokenizer the model was made with",
                dict(beyond=beyond, embedding=embedding),
            )
        )
    if valid.lossy:
        findings.append(
            Finding(
                "round-trip-loss",
                "warning",
                f"{valid.lossy} of {valid.texts} validation documents decode to another text: {valid.lossy_example}",
                "bits per byte then count bytes that no token stands for: check the normaliser, or take a lossless tokenizer",
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
                    f"{unseen:,} validation tokens ({unseen / valid.tokens:.2%}, {kinds:,} kinds) were not met in {train.tokens:,} "
                    f"sampled training tokens: {examples}",
                    "what training never shows keeps the embedding it was initialised with, and its loss stays at chance",
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
                    "validation is text of another kind, of which a token says less: compare bits per byte, not perplexities",
                    dict(valid=here, train=there),
                )
            )
    return findings
