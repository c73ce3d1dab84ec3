"""Two models on one text, token by token: KL divergence, agreement, what became of the target's
probability.

What llama.cpp's perplexity tool reports of a quantised model against its original, without its file
of logits: both heads are read in blocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import checks, models
from ..errors import InputError
from ..fingerprints import tokenizer_fingerprint
from ..metric import exp
from ..scoring.protocols import choose_protocol
from ..scoring.reading import read_positions
from ..scoring.run import ScoringRun
from ..scoring.stream import IGNORED, tasks
from ..statistics import linear_kl_divergence, token_statistics
from ..text.documents import Document
from .collect import described, note_non_finite
from .evaluator import Progress, Reporter
from .uncertainty import TRUSTED_CLUSTERS, ratio_stderr

PERCENTILES = (0.0, 0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)


@dataclass(frozen=True)
class ModelComparison:
    """B beside A, the reference, on the same tokens; standard errors over documents (None for a
    single one).

    kl_divergence: mean KL(A‖B), nats a token; top_1_agreement: share of tokens for which both have
    the same first choice; probability_change: of p_B(target) − p_A(target), its mean, root of the
    mean square and percentiles, as a fraction of 1; correlation: of the two models' token losses.
    Percentiles are keyed by their number.
    """

    tokens: int
    documents: int
    loss_a: float
    loss_b: float
    perplexity_a: float
    perplexity_b: float
    loss_difference: float
    loss_difference_stderr: float | None
    perplexity_ratio: float
    correlation: float
    kl_divergence: float
    kl_divergence_stderr: float | None
    kl_percentiles: dict[str, float]
    top_1_agreement: float
    top_1_agreement_stderr: float | None
    probability_change: float
    probability_change_stderr: float | None
    probability_change_rms: float
    probability_change_percentiles: dict[str, float]
    non_finite: dict | None
    protocol: str
    context_length: int
    stride: int
    special_text: str
    tokenizer_fingerprint: str
    text_fingerprint: str
    backend: str
    seconds: float
    model_a: dict  # ``models.described``
    model_b: dict
    model_notes: list[str]  # on both models' weights and batches

    @property
    def notes(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        notes = list(self.model_notes)
        if self.model_a["fingerprint"] == self.model_b["fingerprint"]:
            notes.append(f"A and B are the same model (fingerprint {self.model_a['fingerprint']})")
        if self.non_finite:
            notes.append(f"{described(self.non_finite)} under one of the models and are left out")
        if self.documents < TRUSTED_CLUSTERS:
            notes.append(
                f"{self.documents} documents are too few: the standard errors are not to be trusted"
            )
        return notes

    @property
    def ok(self) -> bool:
        """No value was NaN or infinite."""
        return self.non_finite is None

    def to_dict(self) -> dict:
        record = {**asdict(self), "notes": self.notes}
        del record["model_notes"]
        return record


def compare_models(
    model_a,
    model_b,
    tokenizer,
    documents: Iterable[Document | str],
    *,
    tokenizer_b=None,
    protocol: str = "sliding",
    context_length: int | None = None,
    stride: int | None = None,
    bos: str = "auto",
    special_text: str | None = None,
    batch_size: int | None = None,
    backend: str | None = None,
    journal: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ModelComparison:
    """``ModelComparison`` of two causal models with one tokenizer; arguments as in ``evaluate``.

    Both models' hidden states are in memory, no logits of either. Raises InputError where
    tokenizers or vocabularies differ.
    """
    started = time.perf_counter()
    batch_size = checks.optional(checks.integer, "batch_size", batch_size, least=1)
    checks.several("documents", documents, "them", (Document,))
    checks.optional(checks.path, "journal", journal)
    checks.function("progress", progress)
    networks = [models.as_language_model(model) for model in (model_a, model_b)]
    run = ScoringRun(networks, tokenizer, backend=backend, batch_size=batch_size)
    if tokenizer_b is not None and tokenizer_fingerprint(tokenizer_b) != run.tokenizer_fingerprint:
        raise InputError(
            "tokenizer: expected one for both models, got two that differ: their tokens do not compare"
        )
    rows = [network.head.weight.shape[0] for network in networks]
    if rows[0] != rows[1]:
        raise InputError(f"model: expected vocabularies of one size, got {rows[0]} and {rows[1]}")
    if networks[0].head.weight.device != networks[1].head.weight.device:
        raise InputError("model: expected both on one device")
    limits = [
        limit for network in networks if (limit := models.context_limit(network, context_length))
    ]
    chosen = choose_protocol(
        protocol,
        tokenizer,
        limit=min(limits, default=None),
        context_length=context_length,
        stride=stride,
        bos=bos,
        score_special=None,
        special_text=special_text,
    )
    described_models = [models.described(network) for network in networks]
    values, sums = [], []  # per window [4, n]; per document its sums
    here: list[np.ndarray] = []
    non_finite: dict | None = None
    tokens, nll, reporter = 0, 0.0, Reporter(progress)
    with run:
        run.keep_in(
            journal,
            chosen.settings() | {"model": [side["fingerprint"] for side in described_models]},
        )
        for item in run.stream(
            tasks(read_positions(run, documents, chosen), chosen),
            _pair_scorer(networks, run.backend),
            fields=4,
            first_of_window=chosen.first_of_window,
        ):
            finite = np.isfinite(item.values).all(axis=0)
            non_finite = note_non_finite(non_finite, item, finite)
            kept = item.values[:, finite]
            values.append(kept)
            here.append(kept)
            tokens += kept.shape[1]
            nll += float(kept[1].sum(dtype=np.float64))
            if item.last:
                sums.append(_document_sums(np.concatenate(here, axis=1).astype(np.float64)))
                here = []
            reporter.add(item, len(sums), tokens, nll)
    every = np.concatenate(values, axis=1).astype(np.float64) if values else np.empty((4, 0))
    if not every.shape[1] and non_finite is None:
        raise InputError(
            f"documents: expected at least one token to score, got {len(sums)} documents with none"
        )
    return _comparison(
        every,
        np.array(sums),
        non_finite=non_finite,
        protocol=chosen.name,
        context_length=chosen.context_length,
        stride=chosen.stride,
        special_text=chosen.special_text,
        tokenizer_fingerprint=run.tokenizer_fingerprint,
        text_fingerprint=run.text_fingerprint,
        backend=run.backend,
        seconds=time.perf_counter() - started,
        model_a=described_models[0],
        model_b=described_models[1],
        model_notes=[
            f"model {name}: {note}"
            for name, network in zip("AB", networks, strict=True)
            for note in models.loading_notes(network)
            + models.context_notes(network, chosen.context_length)
        ]
        + run.batching.notes,
    )


def _pair_scorer(
    networks: list[models.LanguageModel], backend: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """input_ids, targets -> [4, n]: KL(A‖B), NLL of A, NLL of B, 1 where both have the same first
    choice.
    """
    head_a, head_b = (network.head for network in networks)

    @torch.no_grad()
    def score(input_ids: Tensor, target: Tensor) -> Tensor:
        chosen = target != IGNORED
        hidden_a, hidden_b = (network.hidden_states(input_ids)[chosen] for network in networks)
        # float32 logits, whatever surrounds the call
        with torch.autocast(input_ids.device.type, enabled=False):
            return compared(hidden_a, hidden_b, target[chosen])

    def compared(hidden_a: Tensor, hidden_b: Tensor, target: Tensor) -> Tensor:
        divergence = linear_kl_divergence(
            hidden_a,
            head_a.weight,
            hidden_b,
            head_b.weight,
            bias_p=head_a.bias,
            bias_q=head_b.bias,
            softcap_p=head_a.softcap,
            softcap_q=head_b.softcap,
            logit_scale_p=head_a.logit_scale,
            logit_scale_q=head_b.logit_scale,
            backend=backend,
        )
        a, b = (
            token_statistics(hidden, head.weight, target, **head.arguments(), backend=backend)
            for hidden, head in ((hidden_a, head_a), (hidden_b, head_b))
        )
        return torch.stack([divergence, a.nll, b.nll, (a.predicted == b.predicted).float()])

    return score


def _document_sums(values: np.ndarray) -> list[float]:
    """tokens, Σ KL, Σ (NLL_B − NLL_A), Σ agreement, Σ change of probability."""
    divergence, nll_a, nll_b, agreed = values
    change = np.exp(-nll_b) - np.exp(-nll_a)
    return [len(divergence), divergence.sum(), (nll_b - nll_a).sum(), agreed.sum(), change.sum()]


def _comparison(values: np.ndarray, sums: np.ndarray, **rest) -> ModelComparison:
    divergence, nll_a, nll_b, agreed = values
    change = np.exp(-nll_b) - np.exp(-nll_a)
    sums = sums[sums[:, 0] > 0]
    errors = [ratio_stderr(sums[:, column], sums[:, 0]) for column in range(1, 5)]
    if not len(divergence):  # nothing but NaN
        divergence, nll_a, nll_b, agreed, change = (np.full(1, math.nan) for _ in range(5))
    loss_a, loss_b = float(nll_a.mean()), float(nll_b.mean())
    with np.errstate(invalid="ignore", divide="ignore"):  # of a single token, or of equal ones
        correlation = float(np.corrcoef(nll_a, nll_b)[0, 1]) if len(nll_a) > 1 else math.nan

    def percentiles(of: np.ndarray) -> dict[str, float]:
        return {
            f"{at:g}": float(value)
            for at, value in zip(PERCENTILES, np.percentile(of, PERCENTILES), strict=True)
        }

    return ModelComparison(
        tokens=values.shape[1],
        documents=len(sums),
        loss_a=loss_a,
        loss_b=loss_b,
        perplexity_a=exp(loss_a),
        perplexity_b=exp(loss_b),
        loss_difference=loss_b - loss_a,
        loss_difference_stderr=errors[1],
        perplexity_ratio=exp(loss_b - loss_a),
        correlation=correlation,
        kl_divergence=float(divergence.mean()),
        kl_divergence_stderr=errors[0],
        kl_percentiles=percentiles(divergence),
        top_1_agreement=float(agreed.mean()),
        top_1_agreement_stderr=errors[2],
        probability_change=float(change.mean()),
        probability_change_stderr=errors[3],
        probability_change_rms=float(np.sqrt(np.mean(change**2))),
        probability_change_percentiles=percentiles(change),
        **rest,
    )
