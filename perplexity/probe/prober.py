"""``probe``: a model writes, and what it wrote is measured beside its perplexity."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arguments import choose_backend
from ..data_checks.findings import Finding
from ..errors import InputError
from ..evaluation import models
from ..evaluation.calibration import CalibrationBins
from ..evaluation.collect import DETAILS
from ..evaluation.documents import Document
from ..evaluation.evaluator import evaluation_mode, token_scorer
from ..evaluation.fingerprints import tokenizer_fingerprint
from ..evaluation.protocols import Positions
from ..evaluation.scoring import continuations, stream
from ..metric import exp
from ..monitor.findings import Judged
from ..monitor.health import VERDICTS
from . import scores
from .ask import UNANSWERED, Questioner, Tally
from .findings import COLLAPSED, LEAST_REFERENCE_TOKENS, LEAST_TEXTS, find, known_good
from .generation import Generated, ends_of_text, generate
from .measures import Measured, measure, measure_references, perplexities, together
from .prompts import Asked, Prompt, checked_prompt, tokenize
from .references import Embeddings, overlap
from .scores import WEIGHTS, Checkpoint, Scorer, check_weights, health, name_of
from .settings import GenerationSettings

NEARLY = 0.9  # of the likeliest token's probability: 16-bit arithmetic in a batch chooses the other of two that are as likely


@dataclass(frozen=True)
class Probe(Judged):
    """What a model's own texts say; fields are the keys of ``ppl probe --json``, explained in docs/probe.md.

    verdict: "healthy", "watch" or "unhealthy" by the worst finding, "insufficient-data" where nothing could be judged;
    health_score: 0 to 100 or None; health: its parts, weights and coverage. generation, reference_texts: measures of all
    texts and of the references; perplexity: on both, and without context; references: BLEU, chrF, ROUGE; ask: the judge's
    answers; calibration: on the references. texts: each generated one with its measures.
    """

    model: str
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
    progress: Callable[[str, int, int], None] | None = None,
) -> Probe:
    """``Probe`` of a transformers causal model: it continues ``prompts`` as ``settings`` say, and its texts are measured.

    judge: asks another model about each text. embeddings: a sentence-transformers folder, for coherence. evaluation: a result of
    ``ppl eval --json`` of this model, where the prompts have no references; diagnosis: of ``ppl monitor --json``, of its run.
    scorers, weights: of the health score. progress: told what is done, how many of how many. Raises InputError.
    """
    started = time.perf_counter()
    tell = progress or (lambda *_: None)
    own_weights = scores.own_weights(scorers, WEIGHTS)
    check_weights(weights or {}, [*WEIGHTS, *own_weights])
    network = models.as_language_model(model)
    settings = (settings or GenerationSettings()).of(network.context_length)
    models.check_tokenizer(tokenizer, network.head.weight.shape[0])
    backend = choose_backend(backend, network.head.weight)
    fingerprint = tokenizer_fingerprint(tokenizer)
    evaluated = _evaluated(evaluation, fingerprint)
    encoder = None if embeddings is None else Embeddings(embeddings)
    asked, notes = _asked(tokenizer, prompts, settings, network.context_length)
    with evaluation_mode(network):
        models.verify(network, asked[0].ids, network.context_length or len(asked[0].ids) + settings.max_new_tokens)
        generated = generate(
            model,
            tokenizer,
            asked,
            settings,
            first_choices=lambda prompt, ids: _first_choices(network, backend, prompt, ids),
            progress=lambda done: tell("generating", done, len(asked) * settings.samples),
        )
        texts = measure(asked, generated, _scored(network, backend, [(asked[g.prompt].ids, g.ids) for g in generated]))
        referred = [prompt for prompt in asked if len(prompt.reference)]
        scored = _scored(network, backend, [(prompt.ids, prompt.reference) for prompt in referred])
        checkpoint = Checkpoint(name, step, model, tokenizer, texts)
        own = {name_of(scorer): scores.own_part(scorer, checkpoint) for scorer in scorers}
    in_words = [tokenizer.decode(prompt.reference.tolist(), skip_special_tokens=True) for prompt in referred]
    of_references = measure_references(referred, in_words, scored)
    bins = CalibrationBins()
    for prompt, values in zip(referred, scored, strict=True):
        bins.add(prompt.reference, values)
    losses = perplexities(texts, of_references, [prompt.reference for prompt in referred], len(network.head.weight))
    measured: dict[str, Any] = {
        "generation": together(texts) | {"can_end": bool(ends_of_text(model, tokenizer))},
        "reference_texts": together(of_references) if of_references else None,
        "perplexity": losses | _known(losses, evaluated),
        **_beside_others(asked, [text for text in generated if text.text.strip()], encoder, judge, tell),
        "calibration": bins.summary(),
    }
    found = find(measured, settings)
    of_health = health(
        {
            "monitor": scores.monitor_part(diagnosis),
            "perplexity": scores.perplexity_part(measured["perplexity"]),
            "generation": scores.generation_part(measured["generation"], LEAST_TEXTS, COLLAPSED),
            "references": scores.references_part(measured["references"], all(a.prompt.document for a in asked)),
            "ask": scores.ask_part(measured["ask"], UNANSWERED),
            **own,
        },
        own_weights | dict(weights or {}),
        [finding.severity for finding in found] + [f["severity"] for f in (diagnosis or {}).get("findings", [])],
    )
    return Probe(
        name,
        step,
        _verdict(found, measured),
        of_health.score,
        of_health.to_dict(),
        len(asked),
        vars(settings) | {"in_words": str(settings)},
        findings=found,
        notes=[*notes, *_notes(measured, settings)],
        tokenizer_fingerprint=fingerprint,
        backend=backend,
        seconds=time.perf_counter() - started,
        texts=texts,
        **measured,
    )


def _beside_others(
    asked: list[Asked],
    wrote: list[Generated],
    encoder: Embeddings | None,
    judge: Questioner | None,
    tell: Callable[[str, int, int], None],
) -> dict:
    """What libraries, embeddings and the judge say of the texts that are not blank; None where there is nothing to say it by."""
    pairs = [(text.text, asked[text.prompt]) for text in wrote]
    meant = [(text, of.references) for text, of in pairs if of.references and not of.prompt.document]
    tally = Tally()
    for answer in judge.ask(text for text, _ in pairs) if judge else ():
        tally.add(answer)
        tell("asking", len(tally), len(pairs))
    return {
        "references": overlap(*zip(*meant, strict=True)) if meant else None,
        "coherence": None
        if encoder is None
        else encoder.coherence(
            [of.text for _, of in pairs], [text for text, _ in pairs], [of.references for _, of in pairs]
        ),
        "ask": tally.summary(),
    }


def _asked(tokenizer, prompts: Iterable[Prompt | str], settings: GenerationSettings, context_length: int | None):
    """The prompts as tokens, and notes on what was left out."""
    if isinstance(prompts, str | Prompt):
        raise InputError(f"prompts: expected a sequence of them, got one {type(prompts).__name__}")
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
        notes.append(f"{shortened:,} prompts are too long for the model's context and lost their beginning")
    return asked, notes


def _evaluated(evaluation: Mapping | None, fingerprint: str) -> dict | None:
    """Loss, the unigram's and tokens of a result of ``ppl eval --json``; InputError where they are none, or another tokenizer's."""
    if evaluation is None:
        return None
    if evaluation.get("tokenizer_fingerprint") not in (None, fingerprint):
        raise InputError("evaluation: expected one of this model, got one with another tokenizer")
    unigram = evaluation.get("baselines")
    for key in ("unigram", "loss"):
        unigram = unigram.get(key) if isinstance(unigram, Mapping) else None
    found = {"known_loss": evaluation.get("loss"), "known_unigram": unigram, "known_tokens": evaluation.get("tokens")}
    for key, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise InputError(f"evaluation: expected a number for {key.removeprefix('known_')}, got {value!r:.40}")
    return found | {"known_of": "the evaluation's text"}


def _first_choices(network, backend: str, prompt: np.ndarray, ids: np.ndarray) -> bool:
    """Whether each of ``ids`` is the likeliest after those before it, or all but."""
    nll, _, _, _, confidence = _scored(network, backend, [(prompt, ids)])[0]
    return bool((np.exp(-nll) >= NEARLY * confidence).all())


def _scored(network, backend: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """[5, tokens] of each continuation after its prompt: ``collect.DETAILS``."""
    sequences = [
        (Positions(Document(str(place), ""), np.concatenate(pair), 0), len(pair[0])) for place, pair in enumerate(pairs)
    ]
    found = stream(
        continuations(sequences),
        token_scorer(network, backend, details=True),
        device=network.head.weight.device,
        batch_size=None,
        fields=len(DETAILS),
    )
    return [item.values for item in found]


def _known(losses: dict, evaluated: dict | None) -> dict:
    """What the perplexity is judged by: the references where there are enough, else the evaluation."""
    if evaluated is not None and losses["reference_tokens"] < LEAST_REFERENCE_TOKENS:
        return evaluated
    return {
        "known_loss": losses["reference_loss"],
        "known_unigram": losses["unigram_loss"],
        "known_tokens": losses["reference_tokens"],
        "known_of": "the references",
    }


def _verdict(found: list[Finding], measured: dict) -> str:
    worst = max((finding.severity for finding in found), key=list(VERDICTS).index, default="info")
    enough = measured["generation"]["judged"] >= LEAST_TEXTS
    return VERDICTS[worst] if enough or worst != "info" else "insufficient-data"


def _notes(measured: dict, settings: GenerationSettings) -> list[str]:
    notes, generation, losses = [], measured["generation"], measured["perplexity"]
    if generation["judged"] < LEAST_TEXTS:
        notes.append(
            f"{generation['judged']} of {generation['texts']} texts are long enough to judge repetition by; "
            f"{LEAST_TEXTS} are the least"
        )
    if known_good(losses) is None:
        notes.append(
            "the perplexity is not known well enough to tell the low-perplexity trap: it takes references (or an evaluation) of "
            f"{LEAST_REFERENCE_TOKENS} tokens"
        )
    elif not known_good(losses):
        notes.append(
            f"the perplexity does not look good: {exp(losses['known_loss']):,.1f} on {losses['known_of']}, where the best guess "
            f"without context has {exp(losses['known_unigram']):,.1f}"
        )
    if not settings.unchanged:
        notes.append(
            f"texts were not drawn from the model's own distribution ({settings}): self-perplexity says little"
        )
    return notes
