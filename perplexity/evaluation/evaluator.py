"""``evaluate``: from text over tokens, windows, hidden states and token NLL to sums.

Hidden states go straight into ``token_nll``, so that no logits are held.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import checks, models
from ..calibration import CalibrationBins
from ..errors import InputError
from ..files import check_outputs
from ..nats import exp
from ..scoring.protocols import choose_protocol
from ..scoring.reading import Given, Score, read_positions
from ..scoring.run import DETAILS, ScoringRun, token_scorer
from ..scoring.stream import Scored, raise_together, tasks
from ..text.documents import Document
from ..text.readers import SCORES
from ..wording import by_number, counted
from .baselines import baseline_notes, unigram_losses
from .collect import DOCUMENT_COLUMNS, TOKEN_COLUMNS, Collector, ParquetTable, described
from .results import Evaluation, summarise
from .uncertainty import scipy_stats


@dataclass(frozen=True)
class Progress:
    """The part of an evaluation that is done.

    Args:
        documents: documents that are scored to their end.
        tokens: tokens scored.
        done: size of the text that was scored: bytes, or tokens of a token file.
        loss: nats a token of what was scored; NaN before the first token.

    Example:
        >>> Progress(documents=1, tokens=20, done=90.0, loss=3.2).tokens
        20
    """

    documents: int
    tokens: int
    done: float
    loss: float


class Reporter:
    """A caller of ``progress``, as windows are scored.

    Args:
        progress: a function of ``Progress``; None: nothing is called.
    """

    def __init__(self, progress: Callable[[Progress], None] | None) -> None:
        self.progress, self.done = progress, 0.0

    def add(self, item: Scored, documents: int, tokens: int, nll: float) -> None:
        """Report a window and the totals with it; ``nll`` is in nats."""
        size = item.positions.document.size
        part = 0.0
        if item.last:
            self.done += size
        elif len(item.places):
            part = size * int(item.places[-1]) / len(item.positions.ids)
        if self.progress is not None:
            self.progress(
                Progress(documents, tokens, self.done + part, nll / tokens if tokens else math.nan)
            )


def evaluate(
    model,
    tokenizer,
    documents: Iterable[Given],
    *,
    score: Score = "auto",
    protocol: str = "sliding",
    context_length: int | None = None,
    stride: int | None = None,
    bos: str = "auto",
    score_special: bool | None = None,
    special_text: str | None = None,
    batch_size: int | None = None,
    backend: str | None = None,
    per_token: str | Path | None = None,
    per_document: str | Path | None = None,
    calibration: bool = False,
    journal: str | Path | None = None,
    distributed: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Return the loss and perplexity of documents under a causal model.

    A token whose loss is NaN or infinite is left out and reported in ``non_finite``.

    Args:
        model: a transformers causal model, or a ``LanguageModel``.
        tokenizer: its tokenizer: transformers', a ``tokenizers.Tokenizer``, tiktoken's,
            sentencepiece's, or a ``Tokenizer`` of one's own.
        documents: texts, ``Document``s, or rows of a data set: dicts with "text" (and "spans"),
            "prompt" and "completion", or "messages"; read once.
        score: part of a document that is scored; the rest is context, shown and never scored.
            "auto" (default): the spans of a document that has some, the completion of a row after
            its prompt, the assistant's turns of messages, and else the whole text. "all": the
            whole text of every document. "spans", "completion" and "assistant" refuse documents
            without. A function of a Document that returns spans, [begin, end) in characters.
        protocol: "sliding" (default) scores every token once, in windows; "lm-eval" and "llama.cpp"
            give the numbers of those tools.
        context_length: positions of a window; default the model's, 1,024 at most.
        stride: positions that a window moves on by; default half of ``context_length``.
        bos: "auto" (default) puts the tokenizer's BOS before each document where it has one and the
            protocol does, never twice; "always" insists; "never" leaves it out, and skips a first
            token, which has no context then.
        score_special: also score special tokens spelled in the text; default as the protocol's tool
            does, and no for "sliding".
        special_text: how "sliding" reads special tokens spelled in the text: as "tokens" (default)
            or as "text". The other protocols read them as their tools do.
        batch_size: windows at a time; default as many as hold a few thousand tokens.
        backend: of the loss, "torch" or "triton"; default by device.
        per_token: a Parquet file to write, a row a scored token, with its statistics.
        per_document: a Parquet file to write, a row a document.
        calibration: measure calibration in the same pass, as ``per_token`` does; default False.
        journal: a folder to resume from: the same call resumes where a killed one stopped, to the
            same bits.
        distributed: share the batches over the ranks of ``torch.distributed``; every rank calls,
            and rank 0 writes; default False.
        progress: called with a ``Progress`` as windows are scored.

    Returns:
        An Evaluation.

    Raises:
        InputError: an argument cannot be used, or no token is left to score.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "the": 1, "cat": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
        >>> sizes = dict(vocab_size=3, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        >>> evaluation = evaluate(GPT2LMHeadModel(config), tokenizer, ["the cat the cat"])
        >>> evaluation.tokens, evaluation.skipped
        (3, {'no-context': 1})
        >>> pair = {"prompt": "the cat", "completion": " the cat"}
        >>> evaluation = evaluate(GPT2LMHeadModel(config), tokenizer, [pair])
        >>> evaluation.tokens, evaluation.skipped
        (2, {'context': 2})
    """
    started = time.perf_counter()
    batch_size = checks.optional(checks.integer, "batch_size", batch_size, least=1)
    checks.several("documents", documents, "them", (Document,))
    if not callable(score):
        checks.choice("score", score, SCORES)
    for name, flag in (("calibration", calibration), ("distributed", distributed)):
        checks.flag(name, flag)
    paths = {"per_token": per_token, "per_document": per_document, "journal": journal}
    for name, path in paths.items():
        checks.optional(checks.path, name, path)
    check_outputs({"per_token": per_token, "per_document": per_document})
    checks.function("progress", progress)
    scipy_stats()  # the intervals need it: its absence must not end an evaluation at its end
    network = models.as_language_model(model)
    chosen = choose_protocol(
        protocol,
        tokenizer,
        limit=models.context_limit(network, context_length),
        context_length=context_length,
        stride=stride,
        bos=bos,
        score_special=score_special,
        special_text=special_text,
    )
    rank, ranks = _ranks(distributed)
    head = network.head
    details = calibration or per_token is not None
    described_model = models.described(network)
    tables = {}
    run = ScoringRun(
        [network], tokenizer, backend=backend, batch_size=batch_size, rank=rank, ranks=ranks
    )
    try:
        with run:
            with raise_together(ranks):
                settings = {"model": described_model["fingerprint"], "statistics": details}
                run.keep_in(journal, chosen.settings() | settings)
                if rank == 0 and per_token is not None:
                    tables["per_token"] = ParquetTable(per_token, TOKEN_COLUMNS, "per_token")
                if rank == 0 and per_document is not None:
                    tables["per_document"] = ParquetTable(
                        per_document, DOCUMENT_COLUMNS, "per_document"
                    )
            bins = CalibrationBins() if details else None
            collector = Collector(run.tokenizer, run.vocabulary, calibration=bins, **tables)
            reporter = Reporter(progress)
            for item in run.stream(
                tasks(read_positions(run, documents, chosen, score), chosen),
                token_scorer(network, run.backend, details),
                fields=len(DETAILS) if details else 1,
                first_of_window=chosen.first_of_window,
            ):
                collector.add(item)
                reporter.add(item, len(collector.scores), collector.tokens, collector.nll)
        if not collector.tokens and collector.non_finite is None:
            why = (
                ", ".join(f"{count} {reason}" for reason, count in collector.skipped.items())
                or "no tokens"
            )
            raise InputError(
                "documents: expected at least one token to score, got "
                f"{counted(len(collector.scores), 'document')} with {why}"
            )
        for table in tables.values():
            table.finish()
    finally:
        for table in tables.values():
            table.discard()
    return _evaluation(
        collector,
        [
            *models.loading_notes(network),
            *models.context_notes(network, chosen.context_length),
            *run.batching.notes,
        ],
        **chosen.settings(),
        tokenizer_fingerprint=run.tokenizer_fingerprint,
        text_fingerprint=run.text_fingerprint,
        vocabulary_size=run.vocabulary,
        backend=run.backend,
        precision="float64" if head.weight.dtype == torch.float64 else "float32",
        seconds=time.perf_counter() - started,
        model=described_model,
    )


def _ranks(distributed: bool) -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    if not distributed:
        return 0, 1
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise InputError("distributed: expected an initialised torch.distributed, got none")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _evaluation(collector: Collector, notes: list[str], **rest) -> Evaluation:
    """Return the Evaluation of what was collected; ``rest`` are fields that it takes as given."""
    summary = summarise(collector.scores, blocks=collector.blocks, squares=collector.squares)
    by_domain = defaultdict(list)
    for score in collector.scores:
        by_domain[score.domain].append(score)
    without_unknown = collector.loss_without_unknown()
    longest, worst = collector.extreme_documents()
    unigram, left_out = unigram_losses(collector.counts, len(collector.counts))
    uniform = math.log(len(collector.counts))
    against = baseline_notes(
        summary["loss"], summary["tokens"], uniform=uniform, unigram=unigram, left_out=left_out
    )
    return Evaluation(
        **summary,
        tokens_read=collector.tokens_read,
        tokens_skipped=sum(collector.skipped.values()),
        bytes_read=summary["bytes"] + collector.bytes_skipped,
        bytes_skipped=collector.bytes_skipped,
        words_read=summary["words"] + collector.words_skipped,
        words_skipped=collector.words_skipped,
        skipped=dict(collector.skipped),
        unknown_tokens=collector.unknown_tokens,
        loss_without_unknown=without_unknown,
        perplexity_without_unknown=None if without_unknown is None else exp(without_unknown),
        non_finite=collector.non_finite,
        baselines={
            name: {"loss": loss, "perplexity": exp(loss)}
            for name, loss in (("uniform", uniform), ("unigram", unigram))
        },
        notes=[*notes, *_notes(summary, collector), *against],
        domains={
            name: summarise(members, bootstrap=False) for name, members in sorted(by_domain.items())
        },
        longest_documents=longest,
        worst_documents=worst,
        surprising_tokens=collector.surprising_tokens(),
        calibration=None if collector.calibration is None else collector.calibration.summary(),
        per_document=collector.scores,
        first_tokens=collector.first_tokens,
        loss_by_position=collector.by_position.result(),
        blocks=None if collector.blocks is None else np.stack(collector.blocks, 1).tolist(),
        **rest,
    )


def _notes(summary: dict, collector: Collector) -> list[str]:
    """Return what to know before the perplexity is believed."""
    notes = []
    if bad := collector.non_finite:
        notes.append(f"{described(bad)}: left out; by byte and by word nothing is defined")
    notes += collector.text_notes()
    if collector.unknown_tokens:
        without = collector.loss_without_unknown()
        notes.append(
            f"{collector.unknown_tokens:,} of {counted(summary['tokens'], 'scored token')} "
            f"{by_number(collector.unknown_tokens, 'is', 'are')} unknown to the tokenizer: the loss "
            "there says nothing about what stood there"
            + (
                ""
                if without is None
                else f"; without them the loss is {without:.4f}, the perplexity {exp(without):,.3f}"
            )
        )
    if math.isinf(summary["perplexity"]):
        notes.append(
            f"exp({summary['loss']:.1f}) is larger than any float: the perplexity reads inf, the "
            "loss is finite"
        )
    clusters = summary["clusters"]
    if clusters["unit"] == "block":
        notes.append(
            "one document: the error bar is over blocks of it and speaks of this document only"
            + (
                ""
                if clusters["trusted"]
                else f"; {counted(clusters['count'], 'block')} "
                f"{by_number(clusters['count'], 'is', 'are')} too few to trust it"
            )
        )
    elif not clusters["trusted"]:
        notes.append(
            f"{counted(clusters['count'], 'document')} with scored tokens "
            f"{by_number(clusters['count'], 'is', 'are')} too few: the interval is not to be trusted"
        )
    return notes
