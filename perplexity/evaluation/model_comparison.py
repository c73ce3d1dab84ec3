"""Two models on one text, token by token: KL divergence, agreement, change of probability.

llama.cpp's perplexity tool reports the same of a quantised model against its original. Here both
heads are read in blocks, without that tool's file of logits.
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
from ..nats import exp
from ..scoring.protocols import choose_protocol
from ..scoring.reading import read_positions
from ..scoring.run import ScoringRun
from ..scoring.stream import IGNORED, tasks
from ..statistics import linear_kl_divergence, token_statistics
from ..text.documents import Document
from ..text.tokenizers import as_tokenizer
from ..wording import by_number, counted
from .collect import described, note_non_finite
from .evaluator import Progress, Reporter
from .planning import PLANNED, Plan, plan_for
from .text_tables import plain_table, with_notes
from .uncertainty import TRUSTED_CLUSTERS, ratio_stderr, scipy_stats

# Values of a token: KL both ways, both losses, agreement, and the probability of the larger head's
# columns that the smaller one has not.
FIELDS = 6
DIVIDED = 0.01  # of such a probability: above it, the divergence of the columns of both misleads
PERCENTILES = (0.0, 0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)


@dataclass(frozen=True)
class ModelComparison:
    """The differences of model B from model A, the baseline, on the same tokens.

    Standard errors are over documents, None of a single document. Percentiles are keyed by their
    number, "0" to "100".

    Args:
        tokens: tokens scored by both.
        documents: documents with such tokens.
        loss_a: nats a token of A.
        loss_b: nats a token of B.
        perplexity_a: exp(loss_a).
        perplexity_b: exp(loss_b).
        loss_difference: loss_b - loss_a.
        loss_difference_stderr: its standard error.
        perplexity_ratio: exp(loss_difference).
        correlation: of the two models' token losses, from -1 to 1.
        kl_divergence: mean KL(A‖B), nats a token.
        kl_divergence_stderr: its standard error.
        kl_percentiles: of the tokens' divergences, nats.
        reverse_kl_divergence: mean KL(B‖A), nats a token.
        reverse_kl_divergence_stderr: its standard error.
        reverse_kl_percentiles: of the tokens' divergences, nats.
        top_1_agreement: share of tokens for which both have the same first choice.
        top_1_agreement_stderr: its standard error.
        probability_change: mean of p_B(target) - p_A(target), a fraction of 1.
        probability_change_stderr: its standard error.
        probability_change_rms: root of the mean square of the changes.
        probability_change_percentiles: of the changes.
        non_finite: number and first place of tokens with a NaN or infinite value, or None.
        protocol, context_length, stride, special_text: as ``compare_models`` chose them.
        tokenizer_fingerprint, text_fingerprint: hashes that tell results apart.
        backend: of the losses.
        seconds: of the whole comparison.
        model_a, model_b: name, fingerprint and configuration, ``models.described``.
        rows_a, rows_b: of the heads. Where they differ (a padded vocabulary), KL is between the
            probabilities of the columns that both have, scaled to sum to 1.
        outside_probability: mean probability that the larger head gives to its further columns.
        model_notes: on both models' weights and batches.
        plan: documents that a difference of the losses takes to be detected; default None.
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
    reverse_kl_divergence: float
    reverse_kl_divergence_stderr: float | None
    reverse_kl_percentiles: dict[str, float]
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
    model_a: dict
    model_b: dict
    rows_a: int
    rows_b: int
    outside_probability: float
    model_notes: list[str]
    plan: Plan | None = None

    def __str__(self) -> str:
        """Return the table of ``ppl compare`` and the notes as plain text."""
        table = plain_table(self.title, ("measure", "value", "meaning"), self.rows())
        return with_notes(table, self.notes)

    @property
    def title(self) -> str:
        """Return the heading of the table."""
        return (
            f"B beside A on {counted(self.tokens, 'token')} of "
            f"{counted(self.documents, 'document')}"
        )

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the rows of the table: measure, value, meaning."""

        def error(value: float | None, form: str = ".6f") -> str:
            return "" if value is None else f" ± {value:{form}}"

        def loss(value: float) -> str:
            return f"loss {value:.4f} nats a token"

        difference = f"nats a token, B − A{error(self.loss_difference_stderr)}"
        forward = f"KL(A‖B), nats a token{error(self.kl_divergence_stderr)}"
        backward = f"KL(B‖A), nats a token{error(self.reverse_kl_divergence_stderr)}"
        change = "mean change, B − A" + error(self.probability_change_stderr, ".4%")
        changes = _shown(self.probability_change_percentiles, "{:+.3%}")
        agreement = "of tokens" + error(self.top_1_agreement_stderr, ".3%")
        return [
            ("perplexity of A", f"{self.perplexity_a:,.4f}", loss(self.loss_a)),
            ("perplexity of B", f"{self.perplexity_b:,.4f}", loss(self.loss_b)),
            ("loss difference", f"{self.loss_difference:+.6f}", difference),
            ("perplexity ratio", f"{self.perplexity_ratio:.6f}", "B over A"),
            ("correlation", f"{self.correlation:.4f}", "of the two models' token losses"),
            ("KL of B from A", f"{self.kl_divergence:.6f}", forward),
            ("  percentiles", "", _shown(self.kl_percentiles, "{:.5f}")),
            ("KL of A from B", f"{self.reverse_kl_divergence:.6f}", backward),
            ("  percentiles", "", _shown(self.reverse_kl_percentiles, "{:.5f}")),
            ("same first choice", f"{self.top_1_agreement:.3%}", agreement),
            ("target's probability", f"{self.probability_change:+.4%}", change),
            ("  root mean square", f"{self.probability_change_rms:.4%}", ""),
            ("  percentiles", "", changes),
        ]

    @property
    def notes(self) -> list[str]:
        """Return what to know before the numbers are believed."""
        notes = list(self.model_notes)
        if self.model_a["fingerprint"] == self.model_b["fingerprint"]:
            notes.append(f"A and B are the same model (fingerprint {self.model_a['fingerprint']})")
        if self.rows_a != self.rows_b:
            notes.append(self._divided())
        if self.non_finite:
            notes.append(f"{described(self.non_finite)} under one of the models: left out")
        if self.documents < TRUSTED_CLUSTERS:
            notes.append(
                f"{counted(self.documents, 'document')} {by_number(self.documents, 'is', 'are')} "
                "too few: the standard errors are not to be trusted"
            )
        if self.plan is not None:
            notes.append(self.plan.note("nats a token"))
        return notes

    def _divided(self) -> str:
        """Return the note on heads of two sizes."""
        larger, rows = ("A", self.rows_a) if self.rows_a > self.rows_b else ("B", self.rows_b)
        both = min(self.rows_a, self.rows_b)
        return (
            f"{'warning: ' * (self.outside_probability > DIVIDED)}the heads have {self.rows_a:,} and "
            f"{self.rows_b:,} rows (A and B): KL is over the {both:,} that both have, where {larger} "
            f"is scaled to sum to 1; its other {rows - both:,} hold "
            f"{self.outside_probability:.2g} of its probability. All else is each model's own"
        )

    @property
    def ok(self) -> bool:
        """Return whether every value is finite."""
        return self.non_finite is None

    def to_dict(self) -> dict:
        """Return the fields and the notes as dicts, lists and scalars."""
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
    plan: float = PLANNED,
) -> ModelComparison:
    """Compare two causal models with one tokenizer, token by token.

    The hidden states of both models are held, and no logits.

    Args:
        model_a: the baseline: a transformers causal model, or a ``LanguageModel``.
        model_b: the model to compare with it, likewise; on the same device.
        tokenizer: the tokenizer of both, any that ``evaluate`` takes.
        documents: texts or ``Document``s, read once.
        tokenizer_b: tokenizer of ``model_b``, checked to be the same; default the same.
        protocol: "sliding" (default), "lm-eval" or "llama.cpp".
        context_length: positions of a window; default the smaller of the models', 1,024 at most.
        stride: positions that a window moves on by; default half of ``context_length``.
        bos: BOS before each document: "auto" (default), "always" or "never".
        special_text: how "sliding" reads special tokens spelled in the text: "tokens" (default) or
            "text".
        batch_size: windows at a time; default as many as hold a few thousand tokens.
        backend: of the losses, "torch" or "triton"; default by device.
        journal: a folder to resume from, as in ``evaluate``.
        progress: called with a ``Progress`` as windows are scored.
        plan: a difference of the losses, in nats a token: the result says how many documents it
            takes to detect; default 0.01.

    Returns:
        A ModelComparison.

    Raises:
        InputError: tokenizers, vocabularies or devices differ, an argument cannot be used, or no
            token is left to score.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "the": 1, "cat": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
        >>> sizes = dict(vocab_size=3, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        >>> compare_models(model, model, tokenizer, ["the cat the cat"]).top_1_agreement
        1.0
    """
    started = time.perf_counter()
    batch_size = checks.optional(checks.integer, "batch_size", batch_size, least=1)
    checks.several("documents", documents, "them", (Document,))
    checks.optional(checks.path, "journal", journal)
    checks.function("progress", progress)
    checks.number("plan", plan, "a number above 0", above=0)
    scipy_stats()  # the plan needs it: its absence must not end a comparison at its end
    networks = [models.as_language_model(model) for model in (model_a, model_b)]
    run = ScoringRun(networks, tokenizer, backend=backend, batch_size=batch_size)
    if (
        tokenizer_b is not None
        and tokenizer_fingerprint(as_tokenizer(tokenizer_b)) != run.tokenizer_fingerprint
    ):
        raise InputError(
            "tokenizer: expected one for both models, got two that differ: their tokens do not "
            "compare"
        )
    rows = [network.head.weight.shape[0] for network in networks]
    if rows[0] != rows[1] and len(run.tokenizer) > run.vocabulary:
        raise InputError(
            f"model: expected heads that both have the tokenizer's {len(run.tokenizer)} ids, got "
            f"{rows[0]} and {rows[1]} rows: evaluate each model and compare the results"
        )
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
    values, sums = [], []  # [FIELDS, n] of each window; the sums of each document
    here: list[np.ndarray] = []  # of the windows of this document
    non_finite: dict | None = None
    tokens, nll, reporter = 0, 0.0, Reporter(progress)
    with run:
        run.keep_in(
            journal,
            chosen.settings()
            | {"model": [side["fingerprint"] for side in described_models], "fields": FIELDS},
        )
        for item in run.stream(
            tasks(read_positions(run, documents, chosen), chosen),
            _pair_scorer(networks, run.backend),
            fields=FIELDS,
            first_of_window=chosen.first_of_window,
        ):
            finite = np.isfinite(item.values).all(axis=0)
            non_finite = note_non_finite(non_finite, item, finite)
            kept = item.values[:, finite]
            values.append(kept)
            here.append(kept)
            tokens += kept.shape[1]
            nll += float(kept[2].sum(dtype=np.float64))
            if item.last:
                sums.append(_document_sums(np.concatenate(here, axis=1).astype(np.float64)))
                here = []
            reporter.add(item, len(sums), tokens, nll)
    every = np.concatenate(values, axis=1).astype(np.float64) if values else np.empty((FIELDS, 0))
    if not every.shape[1] and non_finite is None:
        raise InputError(
            "documents: expected at least one token to score, got "
            f"{counted(len(sums), 'document')} with none"
        )
    return _comparison(
        every,
        np.array(sums),
        plan,
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
        rows_a=rows[0],
        rows_b=rows[1],
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
    """Return a scorer of input_ids and targets [B, T] that gives float32 [FIELDS, scored tokens].

    The rows are KL(A‖B), KL(B‖A), NLL of A, NLL of B, 1 where both have the same first choice, and
    the probability that the larger head gives to its further columns, which has no place in a
    divergence from the smaller one: KL is between the conditional distributions on the columns of
    both. Padding of a vocabulary is no token, so a trained model leaves nearly nothing there.
    """
    head_a, head_b = (network.head for network in networks)
    both = min(len(head_a.weight), len(head_b.weight))
    outside = next((head for head in (head_a, head_b) if len(head.weight) > both), None)
    if outside is not None:
        bias = None if outside.bias is None else outside.bias[both:]
        further_arguments = outside.arguments() | {"linear_bias": bias}

    @torch.no_grad()
    def score(input_ids: Tensor, target: Tensor) -> Tensor:
        chosen = target != IGNORED
        hidden_a, hidden_b = (network.hidden_states(input_ids)[chosen] for network in networks)
        # float32 logits, whatever surrounds the call
        with torch.autocast(input_ids.device.type, enabled=False):
            return compared(hidden_a, hidden_b, target[chosen])

    def compared(hidden_a: Tensor, hidden_b: Tensor, target: Tensor) -> Tensor:
        sides = (hidden_a, head_a), (hidden_b, head_b)
        forward, reverse = divergence(*sides), divergence(*sides[::-1])
        a, b = (
            token_statistics(hidden, head.weight, target, **head.arguments(), backend=backend)
            for hidden, head in sides
        )
        agreed = (a.predicted == b.predicted).float()
        further = torch.zeros_like(a.nll)
        if outside is not None:
            hidden, whole = (hidden_a, a) if outside is head_a else (hidden_b, b)
            rest = token_statistics(
                hidden,
                outside.weight[both:],
                torch.zeros_like(target),
                **further_arguments,
                backend=backend,
            )
            further = (rest.logsumexp - whole.logsumexp).exp()
        return torch.stack([forward, reverse, a.nll, b.nll, agreed, further])

    def divergence(p: tuple[Tensor, models.Head], q: tuple[Tensor, models.Head]) -> Tensor:
        return linear_kl_divergence(
            p[0],
            p[1].weight[:both],
            q[0],
            q[1].weight[:both],
            bias_p=None if p[1].bias is None else p[1].bias[:both],
            bias_q=None if q[1].bias is None else q[1].bias[:both],
            softcap_p=p[1].softcap,
            softcap_q=q[1].softcap,
            logit_scale_p=p[1].logit_scale,
            logit_scale_q=q[1].logit_scale,
            backend=backend,
        )

    return score


def _document_sums(values: np.ndarray) -> list[float]:
    """Return tokens, Σ KL both ways, Σ (NLL_B − NLL_A), Σ agreement, Σ change of probability."""
    forward, reverse, nll_a, nll_b, agreed, _ = values
    change = np.exp(-nll_b) - np.exp(-nll_a)
    sums = (each.sum() for each in (forward, reverse, nll_b - nll_a, agreed, change))
    return [len(forward), *sums]


def _comparison(values: np.ndarray, sums: np.ndarray, plan: float, **rest) -> ModelComparison:
    """Return the comparison from values [FIELDS, tokens] and sums [documents, 6]."""
    forward, reverse, nll_a, nll_b, agreed, further = values
    change = np.exp(-nll_b) - np.exp(-nll_a)
    sums = sums[sums[:, 0] > 0]
    errors = [ratio_stderr(sums[:, column], sums[:, 0]) for column in range(1, 6)]
    if not len(forward):  # nothing but NaN
        forward, reverse, nll_a, nll_b, agreed, further, change = (
            np.full(1, math.nan) for _ in range(7)
        )
    loss_a, loss_b = float(nll_a.mean()), float(nll_b.mean())
    with np.errstate(invalid="ignore", divide="ignore"):  # one token, or equal losses
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
        loss_difference_stderr=errors[2],
        perplexity_ratio=exp(loss_b - loss_a),
        correlation=correlation,
        kl_divergence=float(forward.mean()),
        kl_divergence_stderr=errors[0],
        kl_percentiles=percentiles(forward),
        reverse_kl_divergence=float(reverse.mean()),
        reverse_kl_divergence_stderr=errors[1],
        reverse_kl_percentiles=percentiles(reverse),
        top_1_agreement=float(agreed.mean()),
        top_1_agreement_stderr=errors[3],
        probability_change=float(change.mean()),
        probability_change_stderr=errors[4],
        probability_change_rms=float(np.sqrt(np.mean(change**2))),
        probability_change_percentiles=percentiles(change),
        outside_probability=float(further.mean()),
        plan=None if errors[2] is None else plan_for(plan, errors[2], len(sums)),
        **rest,
    )


def _shown(of: dict[str, float], form: str) -> str:
    """Return some of the percentiles as text."""
    return ", ".join(
        f"{at}%: {form.format(of[at])}" for at in ("0", "1", "10", "50", "90", "99", "100")
    )
