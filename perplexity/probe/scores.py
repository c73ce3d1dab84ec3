"""Health score from 0 to 100: a weighted mean of parts, each from one kind of evidence.

What the texts lack, repetition, is a factor below that mean: noise repeats nothing, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Protocol

from .. import checks
from ..errors import InputError, theirs
from ..findings import CEILING, SEVERITIES, worst
from ..wording import by_number, counted

# Default weights of the parts. A user's scorer has OWN_WEIGHT in addition.
WEIGHTS = {"monitor": 25.0, "perplexity": 20.0, "references": 10.0, "ask": 15.0}
OWN_WEIGHT = 10.0
# The part that lowers the mean of the others and never raises it, and what it is called.
FACTOR = "generation"
SHOWN = {FACTOR: "no repetition found"}
# The parts that say nothing of what the texts are worth.
NO_QUALITY = ("monitor", "perplexity", FACTOR)


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint that is probed, as a ``Scorer`` receives it.

    Attributes:
        name: Of the model, as ``probe`` was given it.
        step: Training step of the checkpoint; None where it is unknown.
        model: The transformers model, in evaluation mode.
        tokenizer: The model's tokenizer.
        texts: The generated texts, a ``measures.Measured`` each.

    Example:
        >>> Checkpoint("run/checkpoint-500", 500, model=None, tokenizer=None, texts=[]).step
        500
    """

    name: str
    step: int | None
    model: Any
    tokenizer: Any
    texts: list  # of measures.Measured


class Scorer(Protocol):
    """Interface of a user's benchmark, whose score becomes a part of the health score.

    The part is called after the class and weighs 10, unless the object has attributes ``name``
    and ``weight``.

    Example:
        >>> class ShortTexts:
        ...     name, weight = "short texts", 5.0
        ...
        ...     def score(self, checkpoint):
        ...         short = [text for text in checkpoint.texts if text.tokens < 50]
        ...         return len(short) / len(checkpoint.texts)
    """

    def score(self, checkpoint: Checkpoint) -> float | None:
        """Return the score of a checkpoint, 0 (worst) to 1; None where there is none."""
        ...


@dataclass(frozen=True)
class Part:
    """Part of a health score.

    Attributes:
        score: 0 (worst) to 1; None where the part is missing.
        evidence: The measures that the score is made of, or the reason why it is missing.
        failed: The part is missing because its scorer failed.

    Example:
        >>> Part(0.8, "chrF 80.0 over 64 texts").failed
        False
    """

    score: float | None
    evidence: str
    failed: bool = False


@dataclass(frozen=True)
class Health:
    """Health score with the parts that it is made of.

    Attributes:
        score: 0 to 100; None where no part was measured.
        coverage: Share of the weight whose parts were measured, 0 to 1.
        ceiling: The most that the worst finding allows, 0 to 100.
        quality: Whether a part says what the texts are worth: references, a judge or a scorer.
        parts: "weight", "score" and "evidence" of each part, by name; the weight of "generation",
            a factor of the whole, is 0.

    Example:
        >>> Health(80.0, 0.5, 100.0, False, {}).to_dict()
        {'score': 80.0, 'coverage': 0.5, 'ceiling': 100.0, 'quality': False, 'parts': {}}
    """

    score: float | None
    coverage: float
    ceiling: float
    quality: bool
    parts: dict[str, dict]

    def to_dict(self) -> dict:
        """Return the fields by name."""
        return asdict(self)


def health(
    parts: Mapping[str, Part], weights: Mapping[str, float], severities: Iterable[str] = ()
) -> Health:
    """Compute the health score 100 · generation · Σ weight · score / Σ weight.

    The sums are over the other parts that were measured; missing ones lower ``coverage``. The score
    is at most 70 with a warning and at most 30 with a danger, as the monitor's.

    Args:
        parts: The parts by name.
        weights: Weights of parts by name, 0 or more; by default ``WEIGHTS``, 10 for other names.
        severities: Of the findings: "info", "warning" or "danger" each.

    Returns:
        The score, its coverage and its parts.

    Raises:
        InputError: A part, weight or severity is none.

    Example:
        >>> parts = {"generation": Part(0.9, "9 of 10"), "monitor": Part(1.0, "healthy")}
        >>> result = health(parts | {"ask": Part(None, "no judge was given")}, {"ask": 75.0})
        >>> result.score, result.coverage, result.quality
        (90.0, 0.25, False)
        >>> health(parts, {}, ["warning"]).score
        70.0
    """
    checks.mapping("parts", parts, "a dict of Parts by name")
    for name, part in parts.items():
        checks.instance(f"parts: {name}", part, Part, "a Part")
    checks.mapping("weights", weights, "a dict of weights by part")
    check_weights(weights, parts)
    severities = list(severities)
    for severity in severities:
        checks.choice("severities", severity, SEVERITIES)
    shown: dict[str, dict[str, Any]] = {}
    whole = present = total = 0.0
    factor = 1.0
    for name, part in parts.items():
        weight = float(weights.get(name, WEIGHTS.get(name, OWN_WEIGHT)))
        weight = 0.0 if name == FACTOR else weight
        shown[name] = {"weight": weight, "score": part.score, "evidence": part.evidence}
        total += weight
        if part.score is None:
            continue
        if name == FACTOR:
            factor = part.score
        else:
            whole, present = whole + weight * part.score, present + weight
    ceiling = CEILING[worst(severities)]
    score = None if not present else min(100 * factor * whole / present, ceiling)
    quality = any(
        part.score is not None and shown[name]["weight"]
        for name, part in parts.items()
        if name not in NO_QUALITY
    )
    return Health(score, present / total if total else 0.0, ceiling, quality, shown)


def in_words(health: Mapping) -> str:
    """Return what a health score is made of, for a headline.

    Args:
        health: ``Health.to_dict()``, or that of a file; one without "quality" is of an older version.

    Example:
        >>> in_words(health({"monitor": Part(1.0, "healthy")}, {}).to_dict())
        'from 100% of its weight; quality of the texts not measured'
    """
    words = f"from {health['coverage']:.0%} of its weight"
    if health.get("quality") is False:
        words += "; quality of the texts not measured"
    return words


def check_weights(weights: Mapping[str, float], parts: Iterable[str]) -> None:
    """Raise InputError unless each weight is a number of 0 or more and belongs to a part."""
    parts = list(parts)
    for name, weight in weights.items():
        if name not in parts:
            raise InputError(f"weights: expected names among {', '.join(parts)}, got {name!r}")
        if not _number(weight, math.inf):
            raise InputError(f"weights: expected a number of 0 or more for {name}, got {weight!r}")


def own_weights(scorers: Iterable[Scorer], taken: Iterable[str]) -> dict[str, float]:
    """Return the weights of users' scorers by name.

    Args:
        scorers: The scorers.
        taken: Names of other parts.

    Raises:
        InputError: An object has no method ``score``, a weight is no number of 0 or more, or two
            parts have one name.
    """
    weights: dict[str, float] = {}
    taken = set(taken)
    for scorer in scorers:
        with theirs(
            f"scorers: expected a name and a weight of {type(scorer).__name__}, got an error"
        ):
            known = callable(getattr(scorer, "score", None))
            name, weight = name_of(scorer), getattr(scorer, "weight", OWN_WEIGHT)
        if not known:
            raise InputError(
                f"scorers: expected objects with a method score, got {type(scorer).__name__}"
            )
        if name in taken or name in weights:
            raise InputError(f"scorers: expected a name of its own, got {name!r} twice")
        if not _number(weight, math.inf):
            raise InputError(f"scorer {name}: expected a weight of 0 or more, got {weight!r}")
        weights[name] = float(weight)
    return weights


def name_of(scorer: Scorer) -> str:
    """Return the name of a scorer's part: its attribute ``name``, else the name of its class."""
    return str(getattr(scorer, "name", type(scorer).__name__))


def own_part(scorer: Scorer, checkpoint: Checkpoint) -> Part:
    """Return the part of a user's scorer.

    The part is missing, with the reason, where the scorer fails or returns no number from 0 to 1.
    """
    try:
        value = scorer.score(checkpoint)
    except (Exception, SystemExit) as error:  # a user's code may raise anything: the probe goes on
        return Part(None, f"it failed: {type(error).__name__}: {error}", failed=True)
    if value is None:
        return Part(None, "it has no score")
    if not _number(value, 1):
        return Part(None, f"it failed: expected a score from 0 to 1, got {value!r}", failed=True)
    return Part(float(value), "a scorer of your own")


def _number(value, most: float) -> bool:
    """Return whether a value is a finite number from 0 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    real: Any = value  # numbers.Real declares no comparison with a float
    return 0 <= real <= most and real < math.inf


def monitor_part(diagnosis: Mapping | None) -> Part:
    """Return the part of the training run's curves, from the JSON of ``ppl monitor``."""
    if diagnosis is None:
        return Part(None, "no history was given")
    score, verdict = diagnosis.get("health_score"), diagnosis.get("verdict")
    if score is None:
        return Part(None, f"the curves do not say: {verdict}")
    return Part(score / 100, f"the run's curves: {verdict}, {score:.0f} of 100")


def perplexity_part(losses: Mapping, least: int) -> Part:
    """Return the part of the perplexity: 1 − loss / loss of a guess without context, at least 0.

    Args:
        losses: "perplexity" of a probe's measures.
        least: The fewest tokens that give a score.
    """
    judged_by = losses["judged_by"]
    if losses["non_finite"]:
        return Part(
            0.0,
            f"{counted(losses['non_finite'], 'token')} "
            f"{by_number(losses['non_finite'], 'has', 'have')} a NaN or infinite loss",
        )
    if judged_by is None:
        return Part(None, "neither references nor an evaluation were given")
    if judged_by["tokens"] < least:
        return Part(
            None,
            f"{counted(judged_by['tokens'], 'token')} of {judged_by['of']} "
            f"{by_number(judged_by['tokens'], 'is', 'are')} too few, {least} are needed",
        )
    loss, guess = judged_by["loss"], judged_by["guess_loss"]
    evidence = (
        f"loss {loss:.3f} nats a token on {judged_by['of']}, {guess:.3f} of a guess without context"
    )
    return Part(min(1.0, max(0.0, 1 - loss / guess)) if guess > 0 else 0.0, evidence)


def generation_part(generation: Mapping, least: int, collapsed: float, answers: bool) -> Part:
    """Return the part of the generated texts: a product of shares that are sound.

    The factors are the shares of text that is not repeated, not in other texts, not copied and not
    empty, and the entropy over ``collapsed``.

    Args:
        generation: "generation" of a probe's measures.
        least: The fewest texts that give a score.
        collapsed: Entropy that counts as collapsed, nats a byte.
        answers: Prompts have answers, so that samples may rightly agree and be certain: the factors
            of one prompt's samples and of the entropy are left out.
    """
    if generation["judged"] < least:
        return Part(
            None,
            f"{counted(generation['judged'], 'text')} "
            f"{by_number(generation['judged'], 'is', 'are')} long enough to judge, {least} are needed",
        )
    same = max(
        generation["other_prompts"] or 0.0, 0.0 if answers else generation["same_prompt"] or 0.0
    )
    factors = {
        "not repeated": 1 - generation["repetition"],
        "not the same": 1 - same,
        "not copied": 1 - (generation["copied"] or 0.0),
        "not empty": 1 - generation["empty"],
    }
    if not answers and generation["entropy_per_byte"] is not None:
        factors["entropy"] = min(1.0, generation["entropy_per_byte"] / collapsed)
    return Part(
        math.prod(factors.values()),
        ", ".join(f"{name} {value:.2f}" for name, value in factors.items()),
    )


def references_part(references: Mapping | None, documents: bool, least: int) -> Part:
    """Return the part of the references: chrF / 100.

    It is missing for documents, whose continuation is only one of many good ones.

    Args:
        references: "references" of a probe's measures; None without references.
        documents: Whether all prompts are cut from documents.
        least: The fewest texts that give a score.
    """
    if references is None:
        return Part(
            None,
            "documents have one of many continuations"
            if documents
            else "the prompts have no references",
        )
    if references["texts"] < least:
        return Part(
            None,
            f"{counted(references['texts'], 'text')} {by_number(references['texts'], 'has', 'have')} "
            f"references, {least} are needed",
        )
    return Part(
        references["chrf"] / 100,
        f"chrF {references['chrf']:.1f} over {counted(references['texts'], 'text')}",
    )


def ask_part(asked: Mapping | None, answered: float, least: int) -> Part:
    """Return the part of the judge: the mean of p_yes / (p_yes + p_no).

    Args:
        asked: ``Tally.summary``; None without a judge.
        answered: The least probability that the judge has to put on yes and no.
        least: The fewest texts that give a score.
    """
    if asked is None:
        return Part(None, "no judge was given")
    if asked["texts"] < least:
        return Part(
            None,
            f"{counted(asked['texts'], 'text')} {by_number(asked['texts'], 'was', 'were')} asked "
            f"about, {least} are needed",
        )
    if asked["answered"] < answered or asked["yes_of_two"] is None:
        return Part(
            None,
            f"the judge does not answer yes or no ({asked['answered']:.0%} of its probability)",
        )
    return Part(
        asked["yes_of_two"],
        f"the judge says yes to {asked['yes_of_two']:.0%} of {counted(asked['texts'], 'text')}",
    )
