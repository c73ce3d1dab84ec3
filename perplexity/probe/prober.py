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
from .prompts import Asked, Prompt, tokenize
from .references import Embeddings, overlap
from .scores import WEIGHTS, Checkpoint, Scorer, check_weights, health, name_of, own_part
from .settings import GenerationSettings


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
    check_weights(weights or {}, [*WEIGHTS, *map(name_of, scorers)])
    network = models.as_language_model(model)
    settings = (settings or GenerationSettings()).of(network.context_length)
    models.check_tokenizer(tokenizer, network.head.weight.shape[0])
    backend = choose_backend(backend, network.head.weight)
    fingerprint = tokenizer_fingerprint(tokenizer)
    if evaluation is not None and evaluation.get("tokenizer_fingerprint") not in (None, fingerprint):
        raise InputError("evaluation: expected one of this model, got one with another tokenizer")
    encoder = None if embeddings is None else Embeddings(embeddings)
    asked, notes = _asked(tokenizer, prompts, settings, network.context_length)
    with evaluation_mode(network):
        count = len(asked) * settings.samples
        generated = generate(model, tokenizer, asked, settings, lambda done: tell("generating", done, count))
        models.verify(network, _example(asked, generated), _longest(asked, generated))
        texts = measure(asked, generated, _scored(network, backend, [(asked[g.prompt].ids, g.ids) for g in generated]))
        referred = [prompt for prompt in asked if len(prompt.reference)]
        scored = _scored(network, backend, [(prompt.ids, prompt.reference) for prompt in referred])
        in_words = [tokenizer.decode(prompt.reference.tolist(), skip_special_tokens=True) for prompt in referred]
        of_references = measure_references(referred, in_words, scored)
        checkpoint = Checkpoint(name, step, model, tokenizer, texts)
        own = [own_part(scorer, checkpoint) for scorer in scorers]
    bins = CalibrationBins()
    for prompt, values in zip(referred, scored, strict=True):
        bins.add(prompt.reference, values)
    losses = perplexities(texts, of_references, [prompt.reference for prompt in referred], len(network.head.weight))
    cut = all(prompt.prompt.document for prompt in asked)
    pairs = [
        (g.text, asked[g.prompt])
        for g in generated
        if asked[g.prompt].references and not asked[g.prompt].prompt.document
    ]
    wrote = [text for text in generated if text.text.strip()]
    tally = Tally()
    for answer in judge.ask(text.text for text in wrote) if judge and wrote else ():
        tally.add(answer)
        tell("asking", len(tally), len(wrote))
    measured: dict[str, Any] = {
        "generation": together(texts) | {"can_end": bool(ends_of_text(model, tokenizer))},
        "reference_texts": together(of_references) if of_references else None,
        "perplexity": losses | _known(losses, evaluation),
        "references": overlap([text for text, _ in pairs], [of.references for _, of in pairs]) if pairs else None,
        "coherence": None,
        "ask": tally.summary(),
        "calibration": bins.summary(),
    }
    if encoder is not None and wrote:
        before = [asked[text.prompt].text for text in wrote]
        references = [asked[text.prompt].references for text in wrote]
        measured["coherence"] = encoder.coherence(before, [text.text for text in wrote], references)
    found = find(measured, settings)
    of_health = health(
        {
            "monitor": scores.monitor_part(diagnosis),
            "perplexity": scores.perplexity_part(measured["perplexity"]),
            "generation": scores.generation_part(measured["generation"], LEAST_TEXTS, COLLAPSED),
            "references": scores.references_part(measured["references"], cut),
            "ask": scores.ask_part(measured["ask"], UNANSWERED),
            **{label: part for label, part, _ in own},
        },
        {label: weight for label, _, weight in own} | dict(weights or {}),
        [finding.severity for finding in found] + [f["severity"] for f in (diagnosis or {}).get("findings", [])],
    )
    notes += _notes(measured, settings)
    return Probe(
        name,
        step,
        _verdict(found, measured),
        of_health.score,
        of_health.to_dict(),
        len(asked),
        vars(settings) | {"in_words": str(settings)},
        findings=found,
        notes=notes,
        tokenizer_fingerprint=fingerprint,
        backend=backend,
        seconds=time.perf_counter() - started,
        texts=texts,
        **measured,
    )


def _asked(tokenizer, prompts: Iterable[Prompt | str], settings: GenerationSettings, context_length: int | None):
    """The prompts as tokens, and notes on what was left out."""
    if isinstance(prompts, str | Prompt):
        raise InputError(f"prompts: expected a sequence of them, got one {type(prompts).__name__}")
    given = [Prompt(str(place), prompt) if isinstance(prompt, str) else prompt for place, prompt in enumerate(prompts)]
    for place, prompt in enumerate(given):
        if not isinstance(prompt, Prompt):
            raise InputError(f"prompts: expected strings or Prompts, got {type(prompt).__name__} at {place}")
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


def _example(asked: list[Asked], generated: list[Generated]) -> np.ndarray:
    return np.concatenate([asked[generated[0].prompt].ids, generated[0].ids])


def _longest(asked: list[Asked], generated: list[Generated]) -> int:
    return max(len(asked[text.prompt].ids) + len(text.ids) for text in generated)


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


def _known(losses: dict, evaluation: Mapping | None) -> dict:
    """Of the references where there are enough, else of the evaluation: what the perplexity is judged by."""
    if evaluation is not None and losses["reference_tokens"] < LEAST_REFERENCE_TOKENS:
        unigram = (evaluation.get("baselines") or {}).get("unigram", {}).get("loss")
        return {
            "known_loss": evaluation["loss"],
            "known_unigram": unigram,
            "known_tokens": evaluation["tokens"],
            "known_of": "the evaluation's text",
        }
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
    bad = sum(not math.isfinite(value) for value in (losses["self_loss"] or 0.0, losses["reference_loss"] or 0.0))
    if bad:
        notes.append("the model gave a NaN or infinite loss")
    return notes
