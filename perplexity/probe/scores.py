"""One health score from several kinds of evidence: what each part gives, what it weighs, and what
is missing.
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

# Of 100, where nothing else is said. A scorer of one's own weighs OWN_WEIGHT beside them.
WEIGHTS = {"monitor": 25.0, "perplexity": 20.0, "generation": 30.0, "references": 10.0, "ask": 15.0}
OWN_WEIGHT = 10.0


@dataclass(frozen=True)
class Checkpoint:
    """What a ``Scorer`` is given: the model and its tokenizer, ready to run, and what it wrote when
    it was probed.
    """

    name: str
    step: int | None
    model: Any
    tokenizer: Any
    texts: list  # of measures.Measured


class Scorer(Protocol):
    """A benchmark of one's own: 0 (worst) to 1, or None where it does not apply.

    The class's name is the part's; attributes ``name`` and ``weight``, where it has them, are used
    instead.
    """

    def score(self, checkpoint: Checkpoint) -> float | None: ...


@dataclass(frozen=True)
class Part:
    """``score``: 0 to 1, None where it is missing; ``evidence``: what it is made of, or why it is
    missing (``failed``).
    """

    score: float | None
    evidence: str
    failed: bool = False


@dataclass(frozen=True)
class Health:
    """score: 0 to 100, None where no part was measured; coverage: share of the weight that was, 0
    to 1; ceiling: the most that the worst finding allows; parts: weight, score and evidence by
    name."""

    score: float | None
    coverage: float
    ceiling: float
    parts: dict[str, dict]

    def to_dict(self) -> dict:
        return asdict(self)


def health(
    parts: Mapping[str, Part], weights: Mapping[str, float], severities: Iterable[str] = ()
) -> Health:
    """Σ weight · score / Σ weight over the parts that were measured, times 100, at most the worst
    severity's ceiling.

    Missing parts are left out of both sums and shown; ``coverage`` says how much of the weight is
    left. The ceilings are the monitor's: 70 with a warning, 30 with a danger.
    """
    checks.mapping("parts", parts, "a dict of Parts by name")
    for name, part in parts.items():
        checks.instance(f"parts: {name}", part, Part, "a Part")
    checks.mapping("weights", weights, "a dict of weights by part")
    check_weights(weights, parts)
    severities = list(severities)
    for severity in severities:
        checks.choice("severities", severity, SEVERITIES)
    shown, whole, present, total = {}, 0.0, 0.0, 0.0
    for name, part in parts.items():
        weight = float(weights.get(name, WEIGHTS.get(name, OWN_WEIGHT)))
        shown[name] = {"weight": weight, "score": part.score, "evidence": part.evidence}
        total += weight
        if part.score is not None:
            whole, present = whole + weight * part.score, present + weight
    ceiling = CEILING[worst(severities)]
    score = None if not present else min(100 * whole / present, ceiling)
    return Health(score, present / total if total else 0.0, ceiling, shown)


def check_weights(weights: Mapping[str, float], parts: Iterable[str]) -> None:
    """InputError unless each weight is a number of 0 or more and of a part."""
    parts = list(parts)
    for name, weight in weights.items():
        if name not in parts:
            raise InputError(f"weights: expected names among {', '.join(parts)}, got {name!r}")
        if not _number(weight, math.inf):
            raise InputError(f"weights: expected a number of 0 or more for {name}, got {weight!r}")


def own_weights(scorers: Iterable[Scorer], taken: Iterable[str]) -> dict[str, float]:
    """Weights by name; InputError where one is no ``Scorer``, its weight no number, or its name
    among ``taken`` or another's.
    """
    found: dict[str, float] = {}
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
        if name in taken or name in found:
            raise InputError(f"scorers: expected a name of its own, got {name!r} twice")
        if not _number(weight, math.inf):
            raise InputError(f"scorer {name}: expected a weight of 0 or more, got {weight!r}")
        found[name] = float(weight)
    return found


def name_of(scorer: Scorer) -> str:
    return str(getattr(scorer, "name", type(scorer).__name__))


def own_part(scorer: Scorer, checkpoint: Checkpoint) -> Part:
    """A scorer's part: missing, with the reason, where it has no score, fails, or gives something
    else than 0 to 1.
    """
    try:
        value = scorer.score(checkpoint)
    except (Exception, SystemExit) as error:  # theirs: anything; the probe is not lost by it
        return Part(None, f"it failed: {type(error).__name__}: {error}", failed=True)
    if value is None:
        return Part(None, "it has no score")
    if not _number(value, 1):
        return Part(None, f"it failed: expected a score from 0 to 1, got {value!r}", failed=True)
    return Part(float(value), "a scorer of your own")


def _number(value, most: float) -> bool:
    """Whether it is a finite number from 0 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    real: Any = value  # numbers.Real declares no comparison with a float
    return 0 <= real <= most and real < math.inf


def monitor_part(diagnosis: Mapping | None) -> Part:
    """Of ``ppl monitor --json``."""
    if diagnosis is None:
        return Part(None, "no history was given")
    score, verdict = diagnosis.get("health_score"), diagnosis.get("verdict")
    if score is None:
        return Part(None, f"the curves do not say: {verdict}")
    return Part(score / 100, f"the run's curves: {verdict}, {score:.0f} of 100")


def perplexity_part(losses: Mapping, least: int) -> Part:
    """Of what a guess without context lacks, the share that the model knows: 1 − loss / the
    guess's, at least 0.
    """
    judged_by = losses["judged_by"]
    if losses["non_finite"]:
        return Part(0.0, f"{losses['non_finite']:,} tokens have a NaN or infinite loss")
    if judged_by is None:
        return Part(None, "neither references nor an evaluation were given")
    if judged_by["tokens"] < least:
        return Part(
            None,
            f"{judged_by['tokens']:,} tokens of {judged_by['of']} are too few, {least} are needed",
        )
    loss, guess = judged_by["loss"], judged_by["guess_loss"]
    told = (
        f"loss {loss:.3f} nats a token on {judged_by['of']}, {guess:.3f} of a guess without context"
    )
    return Part(min(1.0, max(0.0, 1 - loss / guess)) if guess > 0 else 0.0, told)


def generation_part(generation: Mapping, least: int, collapsed: float, answers: bool) -> Part:
    """Product of what is not repeated, not the same as other texts, not copied and not empty, and
    of the entropy left.

    answers: samples of one prompt may agree, and be certain: neither is held against them.
    """
    if generation["judged"] < least:
        return Part(
            None, f"{generation['judged']} texts are long enough to judge, {least} are needed"
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
    """chrF of texts that were asked for; what happens to follow in a document is one of many good
    continuations.
    """
    if references is None:
        return Part(
            None,
            "documents have one of many continuations"
            if documents
            else "the prompts have no references",
        )
    if references["texts"] < least:
        return Part(None, f"{references['texts']} texts have references, {least} are needed")
    return Part(
        references["chrf"] / 100,
        f"chrF {references['chrf']:.1f} over {references['texts']:,} texts",
    )


def ask_part(asked: Mapping | None, answered: float, least: int) -> Part:
    if asked is None:
        return Part(None, "no judge was given")
    if asked["texts"] < least:
        return Part(None, f"{asked['texts']} texts were asked about, {least} are needed")
    if asked["answered"] < answered or asked["yes_of_two"] is None:
        return Part(
            None,
            f"the judge does not answer yes or no ({asked['answered']:.0%} of its probability)",
        )
    return Part(
        asked["yes_of_two"],
        f"the judge says yes to {asked['yes_of_two']:.0%} of {asked['texts']:,} texts",
    )
