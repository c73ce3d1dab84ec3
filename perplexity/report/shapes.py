"""What the page reads of each command's JSON, as types that ``json_files.read_as`` checks.

The fields are those of ``Evaluation``, ``DataCheck`` and ``Probe``, with two differences. Results
of earlier versions lack some, and the page leaves out what a result lacks: fields of the first two
may be absent. And the page makes arithmetic of what ``Probe`` has as a dict, so its keys are here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from typing_extensions import NotRequired, TypedDict

from ..findings import Severity, Verdict
from ..json_files import Finite, JsonNumber, Number, Share, Whole


@dataclass(frozen=True)
class WorstDocument:
    """A document of a large mean loss."""

    id: str | None = None
    tokens: Number | None = None
    loss: Number | None = None


@dataclass(frozen=True)
class SurprisingToken:
    """A token of a large loss."""

    document: str | None = None
    position: Number | None = None
    before: str | None = None
    text: str | None = None
    nll: Number | None = None


class BinShape(TypedDict):
    """The mean loss from one position to another."""

    first: Annotated[float, JsonNumber(1.0, 2.0**63)]
    tokens: Number
    loss: Number
    interval: NotRequired[tuple[Number, Number] | None]


class PositionsShape(TypedDict):
    """The mean loss by position in the document and in the window."""

    document: list[BinShape]
    window: list[BinShape]


@dataclass(frozen=True)
class ContextShape:
    """The loss under one of several context lengths."""

    context_length: Number | None = None
    loss: Number | None = None
    stderr: Number | None = None
    perplexity: Number | None = None
    difference: Number | None = None
    difference_stderr: Number | None = None
    p_holm: Number | None = None


@dataclass(frozen=True)
class EvaluationShape:
    """A result of ``ppl eval --json``, of any version."""

    loss: Number | None = None
    stderr: Number | None = None
    perplexity: Number | None = None
    perplexity_interval: tuple[Number, Number] | None = None
    bits_per_byte: Number | None = None
    tokens: Number | None = None
    documents: Number | None = None
    protocol: str | None = None
    context_length: Number | None = None
    model: dict | None = None
    worst_documents: list[WorstDocument] | None = None
    surprising_tokens: list[SurprisingToken] | None = None
    loss_by_position: PositionsShape | None = None
    contexts: list[ContextShape] | None = None
    notes: list[str] | None = None


@dataclass(frozen=True)
class SideShape:
    """Numbers of the training and the validation side."""

    train: Number | None = None
    valid: Number | None = None


@dataclass(frozen=True)
class FindingShape:
    """A finding of a data check."""

    signal: str | None = None
    severity: str | None = None
    evidence: str | None = None
    advice: str | None = None


@dataclass(frozen=True)
class LeakShape:
    """A validation document that training holds."""

    id: str | None = None
    train_id: str | None = None
    kind: str | None = None
    passage: str | None = None
    similarity: Number | None = None
    overlap: Number | None = None


@dataclass(frozen=True)
class DataCheckShape:
    """A result of ``ppl check-data --json``, of any version."""

    leaked_fraction: Number
    leaked_token_fraction: Number | None = None
    valid_fraction: Number | None = None
    ngram_overlap: Number | None = None
    unknown_token_rate: Number | None = None
    exact_duplicates: Number | None = None
    near_duplicates: Number | None = None
    documents: SideShape = field(default_factory=SideShape)
    token_unit: str = "tokens"
    findings: list[FindingShape] | None = None
    leaked: list[LeakShape] | None = None
    notes: list[str] | None = None


class PartShape(TypedDict):
    """A part of the health score."""

    score: Share | None
    weight: Annotated[float, JsonNumber(0.0, 1e9)]
    evidence: str


class HealthShape(TypedDict):
    """The health score by its parts."""

    parts: dict[str, PartShape]


class SettingsShape(TypedDict):
    """How texts were drawn."""

    in_words: str


class GenerationShape(TypedDict):
    """Measures over all texts that the model wrote."""

    texts: Finite | None
    repetition: Finite | None
    repeated: Number | None
    looping: Number | None
    distinct_2: Number | None
    compression: Number | None
    entropy: Number | None
    mean_tokens: Number | None
    ended: Number | None
    same_prompt: Number | None
    other_prompts: Number | None
    copied: Number | None


class PerplexityShape(TypedDict):
    """Perplexities of the model's texts, of the references, and without context."""

    self_perplexity: Number | None
    reference_perplexity: Number | None
    unigram_perplexity: Number | None


class ReferencesShape(TypedDict):
    """Overlap of the texts with their references."""

    bleu: Number
    chrf: Number
    rouge1: Number | None
    rouge2: Number | None
    rougeL: Number | None


class CoherenceShape(TypedDict):
    """Cosines of the texts' embeddings."""

    with_prompt: Number | None
    with_reference: Number | None


class AskShape(TypedDict):
    """Answers of the judge."""

    answered: Number
    yes_of_two: Number | None


Tokens = Annotated[float, JsonNumber(1.0, 2.0**63)]


class ConfidenceBin(TypedDict):
    """Tokens of about one confidence."""

    tokens: Tokens
    confidence: Number
    accuracy: Number


class EntropyBin(TypedDict):
    """Tokens of about one entropy."""

    tokens: Tokens
    entropy: Number
    loss: Number


class CalibrationShape(TypedDict):
    """Calibration on the references, ``calibration.CalibrationBins.summary``."""

    accuracy: Number
    confidence: Number
    ece: Number
    entropy: Number
    loss: Number
    bins: list[ConfidenceBin]
    entropy_bins: list[EntropyBin]


class ProbeFindingShape(TypedDict):
    """A finding of a probe."""

    signal: str
    severity: Severity
    evidence: str
    advice: str


class TextShape(TypedDict):
    """A text that the model wrote."""

    id: str
    sample: Whole
    tokens: Number
    loop: Number
    repeated: Number | None
    text: str


class ProbeShape(TypedDict):
    """A result of ``ppl probe --json``."""

    step: Whole | None
    verdict: Verdict
    health_score: Finite | None
    health: HealthShape
    prompts: Finite | None
    settings: SettingsShape
    generation: GenerationShape
    reference_texts: dict[str, Number | None] | None
    perplexity: PerplexityShape
    references: ReferencesShape | None
    coherence: CoherenceShape | None
    ask: AskShape | None
    calibration: CalibrationShape | None
    findings: list[ProbeFindingShape]
    notes: list[str]
    texts: list[TextShape]
    model: NotRequired[dict | None]
