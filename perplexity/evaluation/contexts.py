"""One model on the same tokens under several context lengths, paired."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .. import checks
from ..errors import InputError
from ..nats import exp
from .evaluator import evaluate
from .many import several
from .pairing import record_of
from .results import Evaluation


def evaluate_contexts(
    model,
    tokenizer,
    documents: Iterable,
    context_lengths: Sequence[int],
    *,
    journal: str | Path | None = None,
    per_token: str | Path | None = None,
    per_document: str | Path | None = None,
    calibration: bool = False,
    protocol: str = "sliding",
    **options,
) -> Evaluation:
    """Evaluate a model under several context lengths, and compare them paired by document.

    The documents are held in memory. With the default stride, half of each context length, a token
    sees between half a context and a whole one.

    Args:
        model, tokenizer, documents: as ``evaluate`` takes them.
        context_lengths: two or more, each once.
        journal: a folder to resume from, with a folder in it for each length; default none.
        per_token, per_document, calibration: of the longest context, as in ``evaluate``.
        protocol: "sliding" (default) or "lm-eval", which score every token under every context.
        options: of ``evaluate``, for every length.

    Returns:
        The evaluation under the longest context. Its ``contexts`` has of every length, the shortest
        first: context_length, stride, loss, stderr, perplexity, bits_per_byte, loss_by_position,
        and difference (the longest context's loss minus this one's) with its difference_stderr,
        interval, p_value and p_holm, which are None for the longest.

    Raises:
        InputError: a length cannot be used, or lengths score other tokens.
    """
    checks.several("context_lengths", context_lengths, "whole numbers", (str,))
    lengths = sorted(
        checks.integer("context_lengths", length, least=2) for length in [*context_lengths]
    )
    if len(lengths) < 2 or len(set(lengths)) < len(lengths):
        raise InputError(
            "context_lengths: expected two or more different lengths, got "
            f"{', '.join(map(str, lengths)) or 'none'}"
        )
    if protocol == "llama.cpp":
        raise InputError(
            "context_length: expected one length with llama.cpp, which scores other tokens under "
            "each; 'sliding' scores the same"
        )
    held = list(documents)
    found = []
    for length in lengths:
        longest = length == lengths[-1]
        found.append(
            evaluate(
                model,
                tokenizer,
                held,
                protocol=protocol,
                context_length=length,
                journal=None if journal is None else Path(journal) / f"context-{length}",
                per_token=per_token if longest else None,
                per_document=per_document if longest else None,
                calibration=calibration and longest,
                **options,
            )
        )
    return paired_contexts(found)


def paired_contexts(found: Sequence[Evaluation]) -> Evaluation:
    """Return the last of several evaluations of one model and text, with ``contexts`` of all.

    Args:
        found: evaluations under rising context lengths.
    """
    names = [f"context {evaluation.context_length:,}" for evaluation in found]
    table = several([record_of(each, "evaluation") for each in found], names=names)
    column = table.columns[0]
    tests = {test.a: test for test in column.tests if test.b == names[-1]}
    contexts = []
    for name, evaluation in zip(names, found, strict=True):
        test = tests.get(name)
        contexts.append(
            {
                "context_length": evaluation.context_length,
                "stride": evaluation.stride,
                "loss": evaluation.loss,
                "stderr": evaluation.stderr,
                "perplexity": exp(evaluation.loss),
                "bits_per_byte": evaluation.bits_per_byte,
                "difference": None if test is None else test.difference,
                "difference_stderr": None if test is None else test.stderr,
                "interval": None if test is None else test.interval,
                "p_value": None if test is None else test.p_value,
                "p_holm": None if test is None else test.p_holm,
                "loss_by_position": evaluation.loss_by_position,
            }
        )
    longest = found[-1]
    notes = [*longest.notes, *(note for note in table.notes if note not in longest.notes)]
    return replace(longest, contexts=contexts, notes=notes)
