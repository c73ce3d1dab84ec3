"""``evaluate``: text → tokens → windows → hidden states → token NLL → sums, in the memory of the hidden states."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..arguments import choose_backend
from ..errors import InputError
from ..statistics import token_nll
from . import models
from .documents import Document
from .results import DocumentScore, Evaluation, summarise
from .windows import Window, sliding_windows

PROTOCOLS = ("sliding",)
VERIFIED_POSITIONS = 16


@dataclass
class _Scored:
    """A document while its windows are being scored."""

    document: Document
    ids: list[int]
    prefixed: bool
    nll: float = 0.0
    tokens: int = 0


def tokenizer_fingerprint(tokenizer) -> str:
    """Hash of everything that decides the tokens: vocabulary, merges, normaliser, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((state + repr(sorted(tokenizer.special_tokens_map.items()))).encode()).hexdigest()[:16]


def _context_length(model, context_length: int | None) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context_length is None:
        return min(limit or 1024, 1024)
    if context_length < 2 or (limit and context_length > limit):
        raise InputError(f"context_length: expected 2 to {limit or 'any'}, the model's limit, got {context_length}")
    return context_length


def _batches(items: Iterator, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.inference_mode()
def _score(model, head: models.Head, batch: list[tuple[_Scored, Window]], backend: str | None) -> tuple[int, float]:
    """Add a batch of windows to their documents; returns the tokens scored and their NLL."""
    device = head.weight.device
    longest = max(window.end - window.begin for _, window in batch)
    ids = torch.zeros((len(batch), longest), dtype=torch.int64)
    mask = torch.zeros((len(batch), longest), dtype=torch.int64)
    target = torch.full((len(batch), longest), -100, dtype=torch.int64)
    for row, (scored, window) in enumerate(batch):
        length = window.end - window.begin
        ids[row, :length] = torch.tensor(scored.ids[window.begin : window.end])
        mask[row, :length] = 1
        # The hidden state at a position predicts the next one.
        first = window.first_scored - window.begin - 1
        target[row, first : length - 1] = ids[row, first + 1 : length]
    arguments = {"input_ids": ids.to(device), "use_cache": False}
    if not bool(mask.all()):
        arguments["attention_mask"] = mask.to(device)
    hidden = models.backbone(model)(**arguments).last_hidden_state
    chosen = target != -100
    nll = token_nll(
        hidden[chosen.to(device)],
        head.weight,
        target[chosen].to(device),
        linear_bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        backend=backend,
    )
    counts = chosen.sum(1).tolist()
    for (scored, _), values in zip(batch, nll.double().cpu().split(counts), strict=True):
        scored.nll += float(values.sum())
        scored.tokens += values.numel()
    return sum(counts), float(nll.double().sum())


def evaluate(
    model,
    tokenizer,
    documents: Iterable[Document | str],
    *,
    protocol: str = "sliding",
    context_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    backend: str | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Evaluation:
    """Loss and perplexity of ``documents`` under a Hugging Face causal model, every token scored exactly once.

    Hidden states go straight into ``token_nll``: no logits. Each document starts with the tokenizer's BOS token where it
    has one (never doubled, never scored); without one, its first token has no context and is counted as skipped.
    ``context_length`` defaults to the model's (1,024 at most), ``stride`` to half of it. ``progress`` is called with documents
    done, tokens scored and the running loss. Raises InputError naming what cannot be used.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, got {batch_size}")
    context_length = _context_length(model, context_length)
    stride = max(1, context_length // 2) if stride is None else stride
    if not 1 <= stride < context_length:
        raise InputError(f"stride: expected 1 to context_length - 1 = {context_length - 1}, got {stride}")
    head = models.head(model)
    vocabulary = head.weight.shape[0]
    models.check_tokenizer(tokenizer, vocabulary)
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    started = time.perf_counter()
    text_hash = hashlib.sha256()
    all_scored: list[_Scored] = []
    verified = False

    def windows() -> Iterator[tuple[_Scored, Window]]:
        nonlocal verified
        for index, document in enumerate(documents):
            if isinstance(document, str):
                document = Document(str(index), document)
            text_hash.update(hashlib.sha256(document.text.encode()).digest())
            ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
            if ids and max(ids) >= vocabulary:
                raise InputError(
                    f"document {document.id}: token id {max(ids)}, expected below {vocabulary}, the model's vocabulary"
                )
            # Already there where the text itself spells it; twice would be read as another document's start.
            prefixed = bool(prefix) and ids[:1] != prefix
            scored = _Scored(document, prefix + ids if prefixed else ids, prefixed)
            all_scored.append(scored)
            if not verified and len(scored.ids) > 1:
                sample = torch.tensor(
                    [scored.ids[: min(VERIFIED_POSITIONS, context_length)]], device=head.weight.device
                )
                models.verify_head(model, head, sample)
                verified = True
            for window in sliding_windows(len(scored.ids), context_length, stride):
                yield scored, window

    was_training = model.training
    model.eval()
    try:
        tokens, nll = 0, 0.0
        for batch in _batches(windows(), batch_size):
            batch_tokens, batch_nll = _score(model, head, batch, backend)
            tokens, nll = tokens + batch_tokens, nll + batch_nll
            if progress is not None:
                progress(len(all_scored), tokens, nll / tokens)
    finally:
        model.train(was_training)
    if not tokens:
        raise InputError(f"documents: expected at least one token to score, got {len(all_scored)} documents with none")

    scores = [
        DocumentScore(s.document.id, s.document.domain, s.nll, s.tokens, s.document.bytes, s.document.words)
        for s in all_scored
    ]
    by_domain = defaultdict(list)
    for score in scores:
        by_domain[score.domain].append(score)
    return Evaluation(
        **summarise(scores),
        tokens_skipped=sum(len(scored.ids) - scored.prefixed - scored.tokens for scored in all_scored),
        protocol=protocol,
        context_length=context_length,
        stride=stride,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        text_fingerprint=text_hash.hexdigest()[:16],
        vocabulary_size=vocabulary,
        backend=choose_backend(backend, head.weight),
        precision="float64" if head.weight.dtype == torch.float64 else "float32",
        seconds=time.perf_counter() - started,
        domains={name: summarise(members) for name, members in sorted(by_domain.items())},
        per_document=scores,
    )
