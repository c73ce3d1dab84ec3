"""``probe``: a model writes, and what it wrote is measured beside its perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import checks, models
from ..calibration import CalibrationBins
from ..errors import InputError
from ..findings import SEVERITIES, VERDICTS, Finding, Judged, worst
from ..json_files import model_name, same_model, schema_of
from ..scoring.protocols import Positions
from ..scoring.run import DETAILS, ScoringRun, token_scorer
from ..scoring.stream import continuations
from ..text.documents import Document, check_ids
from ..text.tokens import text_of
from . import scores
from .ask import Questioner, Tally
from .findings import (
    COLLAPSED,
    LEAST_TEXTS,
    LEAST_TOKENS,
    UNANSWERED,
    Asking,
    failed,
    find,
    known_good,
    of_the_run,
)
from .generation import Generated, ends_of_text, generate
from .measures import Measured, Source, measure, perplexities, totals
from .prompts import Asked, Prompt, checked_prompt, tokenize
from .references import Embeddings, overlap
from .scores import WEIGHTS, Checkpoint, Part, Scorer
from .settings import GenerationSettings

# of the likeliest token's probability: 16-bit arithmetic in a batch chooses the other of two that
# are as likely
NEARLY = 0.9

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Probe(Judged):
    """What a model's own texts say; fields are the keys of ``ppl probe --json``, explained in
    docs/probe.md.

    model: ``models.described``: its name, fingerprint and configuration.
    verdict: "healthy", "watch" or "unhealthy" by the worst finding, "insufficient-data" where
    nothing could be judged; health_score: 0 to 100 or None; health: its parts, weights and
    coverage. generation, reference_texts: measures of all texts and of the references; perplexity:
    on both, and without context; references: BLEU, chrF, ROUGE; ask: the judge's answers;
    calibration: on the references. texts: each generated one with its measures.
    """

    model: dict
    step: int | None
    verdict: str
    health_score: float | None
    health: dict
    prompts: int
    settings: dict
    generation: dict
    reference_texts: dict | None
    perplexity: dict
    references: dict | None
    coherence: dict | None
    ask: dict | None
    calibration: dict | None
    findings: list[Finding]
    notes: list[str]
    tokenizer_fingerprint: str
    backend: str
    seconds: float
    texts: list[Measured] = field(repr=False)


def probe(
    model,
    tokenizer,
    prompts: Iterable[Prompt | str],
    *,
    settings: GenerationSettings | None = None,
    judge: Questioner | None = None,
    embeddings: str | None = None,
    evaluation: Mapping | None = None,
    diagnosis: Mapping | None = None,
    scorers: Sequence[Scorer] = (),
    weights: Mapping[str, float] | None = None,
    backend: str | None = None,
    name: str = "",
    step: int | None = None,
    progress: Progress | None = None,
) -> Probe:
    """``Probe`` of a transformers causal model: it continues ``prompts`` as ``settings`` say, and
    its texts are measured.

    judge: asks another model about each text. embeddings: a sentence-transformers folder, for
    coherence. evaluation: a result of ``ppl eval --json`` of this model, where the prompts have no
    references; diagnosis: of ``ppl monitor --json``, of its run. scorers, weights: of the health
    score. progress: told what is done, how many of how many. Raises InputError.
    """
    started = time.perf_counter()
    checks.several("prompts", prompts, "them", (Prompt,))
    kinds = (
        ("settings", settings, GenerationSettings, "GenerationSettings or None"),
        ("judge", judge, Questioner, "a Questioner or None"),
        (
            "evaluation",
            evaluation,
            Mapping,
            "a dict, read from the file of ppl eval --json, or None",
        ),
        ("diagnosis", diagnosis, Mapping, "a dict, as Diagnosis.to_dict() gives, or None"),
        ("weights", weights, Mapping, "a dict of weights by part, or None"),
    )
    for argument, value, kind, expected in kinds:
        checks.optional(checks.instance, argument, value, kind, expected)
    for key in ("verdict", "health_score", "findings"):
        if diagnosis is not None and key not in diagnosis:
            raise checks.wrong("diagnosis", "the keys of Diagnosis.to_dict()", f"none for {key}")
    checks.several("scorers", scorers, "them")
    checks.optional(checks.path, "embeddings", embeddings)
    checks.text("name", name)
    step = checks.optional(checks.integer, "step", step, least=0)
    checks.function("progress", progress)
    tell = progress or (lambda *_: None)
    own_weights = scores.own_weights(scorers, WEIGHTS)
    scores.check_weights(weights or {}, [*WEIGHTS, *own_weights])
    network = models.as_language_model(model)
    settings = (settings or GenerationSettings()).of(network.context_length)
    run = ScoringRun([network], tokenizer, backend=backend)
    described = models.described(network, name)
    evaluated = _evaluated(evaluation, run.tokenizer_fingerprint, described)
    encoder = None if embeddings is None else Embeddings(embeddings)
    asked, notes = _asked(tokenizer, prompts, settings, network.context_length)
    for prompt in asked:
        document = Document(prompt.prompt.id, "")
        for ids in (prompt.ids, prompt.reference):
            check_ids(
                document, ids, network.head.weight.shape[0], "the model's vocabulary", tokenizer
            )
    asking = Asking(
        documents=all(prompt.prompt.document for prompt in asked),
        answers=any(prompt.references and not prompt.prompt.document for prompt in asked),
        can_end=bool(ends_of_text(model, tokenizer)),
        settings=settings,
    )
    with run:
        run.verify(asked[0].ids, network.context_length)
        generated = generate(
            model,
            tokenizer,
            asked,
            settings,
            first_choices=lambda prompt, ids: _first_choices(run, prompt, ids),
            progress=lambda done: tell("generating", done, len(asked) * settings.samples),
        )
        texts = measure(_of_texts(run, asked, generated))
        referred = [prompt for prompt in asked if len(prompt.reference)]
        sources = _of_references(run, referred)
        checkpoint = Checkpoint(name, step, model, tokenizer, texts)
        own = {scores.name_of(scorer): scores.own_part(scorer, checkpoint) for scorer in scorers}
    references = measure(sources)
    bins = CalibrationBins()
    for source in sources:
        bins.add(source.ids, source.values)
    losses = perplexities(
        texts, references, [source.ids for source in sources], len(network.head.weight)
    )
    texts, beside = _beside_others(asked, texts, generated, encoder, judge, tell)
    measured: dict[str, Any] = {
        "generation": totals(texts, LEAST_TEXTS),
        "reference_texts": totals(references, LEAST_TEXTS) if references else None,
        "perplexity": losses | {"judged_by": evaluated or _by_references(losses)},
        **beside,
        "calibration": bins.summary(),
    }
    found = [*find(measured, asking), *of_the_run(diagnosis)]
    found += failed({name: part.evidence for name, part in own.items() if part.failed})
    found.sort(key=lambda finding: -SEVERITIES.index(finding.severity))
    parts = _parts(measured, asking, diagnosis) | own
    verdict = _verdict(found, parts, measured)
    health = scores.health(
        parts, own_weights | dict(weights or {}), [finding.severity for finding in found]
    )
    if verdict == "insufficient-data":
        health = replace(health, score=None)
    return Probe(
        model=described,
        step=step,
        verdict=verdict,
        health_score=health.score,
        health=health.to_dict(),
        prompts=len(asked),
        settings=vars(settings) | {"in_words": str(settings)},
        findings=found,
        notes=[
            *models.loading_notes(network),
            *run.batching.notes,
            *([] if judge is None else (f"judge: {note}" for note in judge.notes)),
            *notes,
            *_notes(measured, settings),
        ],
        tokenizer_fingerprint=run.tokenizer_fingerprint,
        backend=run.backend,
        seconds=time.perf_counter() - started,
        texts=texts,
        **measured,
    )


def _of_texts(run: ScoringRun, asked: list[Asked], generated: list[Generated]) -> list[Source]:
    scored = _scored(run, [(asked[text.prompt].ids, text.ids) for text in generated])
    return [
        Source(
            of.prompt.id,
            text.sample,
            of.text,
            text.text,
            text.ids,
            text.ended,
            values,
            of.references,
        )
        for text, values, of in zip(
            generated, scored, (asked[text.prompt] for text in generated), strict=True
        )
    ]


def _of_references(run: ScoringRun, referred: list[Asked]) -> list[Source]:
    """The references as they are scored; ``ended``: whole, and no piece of a document. Each is
    measured beside the next one's: what two texts of the kind have in common, one that is written
    may have in common with its reference."""
    scored = _scored(run, [(of.ids, of.reference) for of in referred])
    texts = [text_of(run.tokenizer, of.reference, skip_special_tokens=True) for of in referred]
    following = (
        [(text,) for text in [*texts[1:], *texts[:1]]] if len(texts) > 1 else [()] * len(texts)
    )
    return [
        Source(
            of.prompt.id,
            0,
            of.text,
            text,
            of.reference,
            not (of.cut or of.prompt.document),
            values,
            beside,
        )
        for of, text, values, beside in zip(referred, texts, scored, following, strict=True)
    ]


def _beside_others(
    asked: list[Asked],
    texts: list[Measured],
    generated: list[Generated],
    encoder: Embeddings | None,
    judge: Questioner | None,
    tell: Progress,
) -> tuple[list[Measured], dict]:
    """The texts with the judge's p_yes, and what libraries, embeddings and the judge say of them;
    None where nobody was asked.
    """
    of_texts = [asked[text.prompt] for text in generated]
    meant = [
        (text.text, of.references)
        for text, of in zip(texts, of_texts, strict=True)
        if of.references and not of.prompt.document
    ]
    wrote = [place for place, text in enumerate(texts) if text.text.strip()]
    before, said = [of_texts[place].text for place in wrote], [texts[place].text for place in wrote]
    beside: dict[str, Any] = {"references": None, "coherence": None, "ask": None}
    if meant:
        beside["references"] = overlap(*zip(*meant, strict=True))
    if encoder is not None:
        beside["coherence"] = encoder.coherence(
            before, said, [of_texts[place].references for place in wrote]
        )
    if judge is not None:
        tally, texts = Tally(judge), list(texts)
        for place, answer in zip(wrote, judge.ask(said, prompts=before), strict=True):
            tally.add(answer)
            texts[place] = replace(texts[place], p_yes=answer.p_yes)
            tell("asking", len(tally), len(wrote))
        beside["ask"] = tally.summary()
    return texts, beside


def _parts(measured: Mapping, asking: Asking, diagnosis: Mapping | None) -> dict[str, Part]:
    return {
        "monitor": scores.monitor_part(diagnosis),
        "perplexity": scores.perplexity_part(measured["perplexity"], LEAST_TOKENS),
        "generation": scores.generation_part(
            measured["generation"], LEAST_TEXTS, COLLAPSED, asking.answers
        ),
        "references": scores.references_part(measured["references"], asking.documents, LEAST_TEXTS),
        "ask": scores.ask_part(measured["ask"], UNANSWERED, LEAST_TEXTS),
    }


def _asked(
    tokenizer,
    prompts: Iterable[Prompt | str],
    settings: GenerationSettings,
    context_length: int | None,
):
    """The prompts as tokens, and notes on what was left out."""
    given = [checked_prompt(place, prompt) for place, prompt in enumerate(prompts)]
    asked, short = tokenize(tokenizer, given, settings, context_length)
    if not asked:
        why = f"{short} documents too short to cut" if short else "none"
        raise InputError(f"prompts: expected at least one, got {why}")
    notes = []
    if short:
        notes.append(
            f"{short:,} documents are too short to cut a prompt of {settings.prompt_tokens} tokens from and are left out"
        )
    if shortened := sum(prompt.shortened for prompt in asked):
        notes.append(
            f"{shortened:,} prompts are too long for the model's context and lost their beginning"
        )
    return asked, notes


def _evaluated(evaluation: Mapping | None, fingerprint: str, model: Mapping) -> dict | None:
    """Return loss, the unigram's and tokens of a result of ``ppl eval --json``.

    InputError where they are none, or of another tokenizer or model. A result of schema_version 1
    names no model.
    """
    if evaluation is None:
        return None
    if evaluation.get("tokenizer_fingerprint") not in (None, fingerprint):
        raise InputError("evaluation: expected one of this model, got one with another tokenizer")
    schema_of(evaluation, "evaluation")
    if same_model(evaluation, {"model": model}) is False:
        of = [
            f"{model_name(side)} (fingerprint {side.get('fingerprint')}, {side.get('dtype')})"
            for side in (model, evaluation["model"])
        ]
        raise InputError(
            f"evaluation: expected one of the probed model, {of[0]}, got one of {of[1]}"
        )
    unigram = evaluation.get("baselines")
    for key in ("unigram", "loss"):
        unigram = unigram.get(key) if isinstance(unigram, Mapping) else None
    found = {
        "loss": evaluation.get("loss"),
        "unigram_loss": unigram,
        "tokens": evaluation.get("tokens"),
    }
    for key, value in found.items():
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise InputError(f"evaluation: expected a number for {key}, got {value!r:.40}")
    return found | {"of": "the evaluation's text", "guess_loss": unigram}


def _first_choices(run: ScoringRun, prompt: np.ndarray, ids: np.ndarray) -> bool:
    """Whether each of ``ids`` is the likeliest after those before it, or all but; NaN is told
    elsewhere.
    """
    nll, _, _, _, confidence = _scored(run, [(prompt, ids)])[0]
    return not (np.exp(-nll) < NEARLY * confidence).any()


def _scored(run: ScoringRun, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Return values [5, tokens] of each continuation after its prompt: ``scoring.run.DETAILS``."""
    sequences = [
        (Positions(Document(str(place), ""), np.concatenate(pair), 0), len(pair[0]))
        for place, pair in enumerate(pairs)
    ]
    scorer = token_scorer(run.networks[0], run.backend, details=True)
    found = run.stream(continuations(sequences), scorer, fields=len(DETAILS))
    return [item.values for item in found]


def _by_references(losses: Mapping) -> dict | None:
    """What the perplexity is judged by where no evaluation is given: ``findings.known_good``."""
    if losses["reference_loss"] is None:
        return None
    bounds = {"unigram_loss": losses["unigram_loss"], "guess_loss": losses["left_out_loss"]}
    return {
        "loss": losses["reference_loss"],
        "tokens": losses["reference_tokens"],
        "of": "the references",
    } | bounds


def _verdict(found: list[Finding], parts: Mapping[str, Part], measured: Mapping) -> str:
    """By the worst finding; a model whose texts alone are known, or too few of them, is not called
    healthy: noise is varied.
    """
    gravest = worst(finding.severity for finding in found)
    others = [
        name
        for name, part in parts.items()
        if part.score is not None and name not in ("generation", "monitor")
    ]
    enough = measured["generation"]["judged"] >= LEAST_TEXTS and others
    return VERDICTS[gravest] if enough or gravest != "info" else "insufficient-data"


def _notes(measured: dict, settings: GenerationSettings) -> list[str]:
    notes, generation, judged_by = [], measured["generation"], measured["perplexity"]["judged_by"]
    if generation["judged"] < LEAST_TEXTS:
        notes.append(
            f"{generation['judged']} of {generation['texts']} texts are long enough to judge repetition by; "
            f"{LEAST_TEXTS} are the least"
        )
    if judged_by is None or judged_by["tokens"] < LEAST_TOKENS:
        notes.append(
            "the perplexity is not known well enough to tell the low-perplexity trap: it takes references (or an evaluation) of "
            f"{LEAST_TOKENS} tokens"
        )
    elif known_good(judged_by) is None:
        notes.append(
            f"whether the perplexity on {judged_by['of']} is better than a guess without context cannot be told"
        )
    if not settings.unchanged:
        notes.append(
            f"texts were not drawn from the model's own distribution ({settings}): self-perplexity says little"
        )
    return notes
