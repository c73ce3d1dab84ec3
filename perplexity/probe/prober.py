"""``probe``: texts that a model generates, measured and compared with its perplexity."""

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
from ..wording import by_number, counted
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

# A greedy token counts as a first choice from this share of the largest probability on: in 16-bit
# arithmetic a batch decides between two tokens that are nearly as likely.
NEARLY = 0.9

Progress = Callable[[str, int, int], None]  # activity, number done, number in all


@dataclass(frozen=True)
class Probe(Judged):
    """Result of ``probe``; the fields are the keys of ``ppl probe --json`` (docs/probe.md).

    Attributes:
        model: Name, fingerprint and configuration, as ``models.described`` gives them.
        step: Training step of the checkpoint; None where it is unknown.
        verdict: "healthy", "watch" or "unhealthy" by the worst finding; "insufficient-data" where
            nothing could be judged.
        health_score: 0 to 100; None where nothing could be judged.
        health: The parts of the score, their weights, and their coverage.
        prompts: Number of prompts.
        settings: Of the generation.
        generation: Measures of all generated texts together.
        reference_texts: The same measures of the references; None without references.
        perplexity: Losses and perplexities on the texts, on the references and without context.
        references: BLEU, chrF and ROUGE; None for documents and without references.
        coherence: Cosines of embeddings; None without ``embeddings``.
        ask: Means of the judge's answers; None without a judge.
        calibration: On the references; None without references.
        findings: The most severe first.
        notes: What limits the result.
        tokenizer_fingerprint: Of the tokenizer.
        backend: Of the losses.
        seconds: Time that the call took.
        texts: The generated texts with their measures.

    Example:
        >>> from dataclasses import fields
        >>> [field.name for field in fields(Probe)][:4]
        ['model', 'step', 'verdict', 'health_score']
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
    """Generate texts with a model, measure them and compute a health score.

    Args:
        model: A transformers causal model.
        tokenizer: Its tokenizer, any that ``evaluate`` takes.
        prompts: Strings or ``Prompt``s for the model to continue.
        settings: Of the generation; None takes the defaults of ``GenerationSettings``.
        judge: A model that is asked yes or no about each text.
        embeddings: Folder of a sentence-transformers model, for the coherence.
        evaluation: Content of ``ppl eval --json`` of this model: its loss judges the perplexity
            where the prompts have no references.
        diagnosis: Content of ``ppl monitor --json`` of the training run.
        scorers: The user's own benchmarks, each a part of the health score.
        weights: Weights of the health score's parts, by name; by default ``scores.WEIGHTS``.
        backend: Of the losses, "triton" or "torch"; None chooses by the model's device.
        name: Name of the model in the result.
        step: Training step of the checkpoint.
        progress: Called with the activity, the number done, and the number in all.

    Returns:
        The measures, findings, verdict and health score.

    Raises:
        InputError: An argument cannot be used; the message names it.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = {word: id for id, word in enumerate("the cat sat on a mat <unk>".split())}
        >>> tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        >>> tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>")
        >>> sizes = dict(vocab_size=7, n_embd=8, n_layer=1, n_head=1, n_positions=32)
        >>> config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> settings = GenerationSettings(samples=2, max_new_tokens=8)
        >>> result = probe(model, tokenizer, ["the cat", "a mat"], settings=settings)
        >>> len(result.texts), result.verdict
        (4, 'insufficient-data')
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
    own_weights = scores.own_weights(scorers, [*WEIGHTS, scores.FACTOR])
    scores.check_weights(weights or {}, [*WEIGHTS, *own_weights])
    network = models.as_language_model(model)
    settings = (settings or GenerationSettings()).of(network.context_length)
    run = ScoringRun([network], tokenizer, backend=backend)
    tokenizer = run.tokenizer
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
    texts, compared = _compared(asked, texts, generated, encoder, judge, tell)
    measured: dict[str, Any] = {
        "generation": totals(texts, LEAST_TEXTS),
        "reference_texts": totals(references, LEAST_TEXTS) if references else None,
        "perplexity": losses | {"judged_by": evaluated or _by_references(losses)},
        **compared,
        "calibration": bins.summary(),
    }
    findings = [*find(measured, asking), *of_the_run(diagnosis)]
    findings += failed({name: part.evidence for name, part in own.items() if part.failed})
    findings.sort(key=lambda finding: -SEVERITIES.index(finding.severity))
    parts = _parts(measured, asking, diagnosis) | own
    verdict = _verdict(findings, parts, measured)
    health = scores.health(
        parts, own_weights | dict(weights or {}), [finding.severity for finding in findings]
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
        findings=findings,
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
    """Score the generated texts."""
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
    """Score the references.

    Each has the next one as its own reference. So its share ``copied`` is the share that two texts
    of this kind have in common: a generated text may have as much in common with its reference.
    """
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
            next_text,
        )
        for of, text, values, next_text in zip(referred, texts, scored, following, strict=True)
    ]


def _compared(
    asked: list[Asked],
    texts: list[Measured],
    generated: list[Generated],
    encoder: Embeddings | None,
    judge: Questioner | None,
    tell: Progress,
) -> tuple[list[Measured], dict]:
    """Compare the texts with references and prompts, and ask the judge about them.

    Returns:
        The texts with the judge's p_yes; and "references", "coherence" and "ask", None each where
        the comparison was not possible or not wanted.
    """
    of_texts = [asked[text.prompt] for text in generated]
    with_references = [
        (text.text, of.references)
        for text, of in zip(texts, of_texts, strict=True)
        if of.references and not of.prompt.document
    ]
    places = [place for place, text in enumerate(texts) if text.text.strip()]
    prompts = [of_texts[place].text for place in places]
    written = [texts[place].text for place in places]
    compared: dict[str, Any] = {"references": None, "coherence": None, "ask": None}
    if with_references:
        compared["references"] = overlap(*zip(*with_references, strict=True))
    if encoder is not None:
        compared["coherence"] = encoder.coherence(
            prompts, written, [of_texts[place].references for place in places]
        )
    if judge is not None:
        tally, texts = Tally(judge), list(texts)
        for place, answer in zip(places, judge.ask(written, prompts=prompts), strict=True):
            tally.add(answer)
            texts[place] = replace(texts[place], p_yes=answer.p_yes)
            tell("asking", len(tally), len(places))
        compared["ask"] = tally.summary()
    return texts, compared


def _parts(measured: Mapping, asking: Asking, diagnosis: Mapping | None) -> dict[str, Part]:
    """Return the parts of the health score, without the user's own."""
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
    """Return the prompts as tokens, and notes on what was left out."""
    checked = [checked_prompt(place, prompt) for place, prompt in enumerate(prompts)]
    asked, short = tokenize(tokenizer, checked, settings, context_length)
    if not asked:
        why = f"{counted(short, 'document')} too short to cut" if short else "none"
        raise InputError(f"prompts: expected at least one, got {why}")
    notes = []
    if short:
        notes.append(
            f"{counted(short, 'document')} {by_number(short, 'is', 'are')} left out: too short to cut "
            f"a prompt of {counted(settings.prompt_tokens, 'token')} from"
        )
    if shortened := sum(prompt.shortened for prompt in asked):
        notes.append(
            f"{counted(shortened, 'prompt')} {by_number(shortened, 'is', 'are')} too long for the "
            "model's context: the beginning is left out"
        )
    return asked, notes


def _evaluated(evaluation: Mapping | None, fingerprint: str, model: Mapping) -> dict | None:
    """Return the losses and the number of tokens of a result of ``ppl eval --json``.

    Raises:
        InputError: A number is missing, or the result is of another tokenizer or model. (A result
            of schema_version 1 names no model.)
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
    numbers = {
        "loss": evaluation.get("loss"),
        "unigram_loss": unigram,
        "tokens": evaluation.get("tokens"),
    }
    for key, value in numbers.items():
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise InputError(f"evaluation: expected a number for {key}, got {value!r:.40}")
    return numbers | {"of": "the evaluation's text", "guess_loss": unigram}


def _first_choices(run: ScoringRun, prompt: np.ndarray, ids: np.ndarray) -> bool:
    """Return whether each of ``ids`` is the most probable token after those before it, or nearly.

    NaN counts as such: it is reported elsewhere.
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
    scored = run.stream(continuations(sequences), scorer, fields=len(DETAILS))
    return [item.values for item in scored]


def _by_references(losses: Mapping) -> dict | None:
    """Return the losses on the references, for ``findings.known_good``; None without references."""
    if losses["reference_loss"] is None:
        return None
    bounds = {"unigram_loss": losses["unigram_loss"], "guess_loss": losses["left_out_loss"]}
    return {
        "loss": losses["reference_loss"],
        "tokens": losses["reference_tokens"],
        "of": "the references",
    } | bounds


def _verdict(findings: list[Finding], parts: Mapping[str, Part], measured: Mapping) -> str:
    """Return the verdict by the worst finding.

    A model is not called healthy by its texts alone, nor by too few of them: random text is varied.
    """
    gravest = worst(finding.severity for finding in findings)
    others = [
        name
        for name, part in parts.items()
        if part.score is not None and name not in ("generation", "monitor")
    ]
    enough = measured["generation"]["judged"] >= LEAST_TEXTS and others
    return VERDICTS[gravest] if enough or gravest != "info" else "insufficient-data"


def _notes(measured: dict, settings: GenerationSettings) -> list[str]:
    """Return notes on what the measures cannot show."""
    notes, generation, judged_by = [], measured["generation"], measured["perplexity"]["judged_by"]
    if generation["judged"] < LEAST_TEXTS:
        notes.append(
            f"{generation['judged']} of {counted(generation['texts'], 'text')} "
            f"{by_number(generation['judged'], 'is', 'are')} long enough to judge repetition by; {LEAST_TEXTS} are the least"
        )
    if judged_by is None or judged_by["tokens"] < LEAST_TOKENS:
        notes.append(
            "the perplexity is not known well enough to tell the low-perplexity trap: "
            f"it takes references (or an evaluation) of {LEAST_TOKENS} tokens"
        )
    elif known_good(judged_by) is None:
        notes.append(
            f"whether the perplexity on {judged_by['of']} is better than a guess without context "
            "cannot be told"
        )
    if not settings.unchanged:
        notes.append(
            f"texts were not drawn from the model's own distribution ({settings}): "
            "self-perplexity says little"
        )
    return notes
