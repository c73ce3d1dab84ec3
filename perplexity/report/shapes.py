"""Shapes of JSON values: what a part of the page needs of a record, checked before the part is
made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..findings import SEVERITIES, VERDICTS

SHOWN = 40  # characters of a value in an error


class Mismatch(Exception):
    """A value of another shape; the message names the value's place, what was expected and what
    came.
    """


@dataclass(frozen=True)
class Number:
    """A number from ``least`` to ``most``; infinity and NaN only where they lie between."""

    least: float = -math.inf
    most: float = math.inf
    finite: bool = False

    def check(self, value: Any, place: str) -> None:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if fits and self.least > -math.inf:
            fits = self.least <= value <= self.most
        if not fits or (self.finite and not math.isfinite(value)):
            raise _mismatch(place, f"a {'finite ' if self.finite else ''}number", value)


@dataclass(frozen=True)
class Whole:
    """A whole number."""

    def check(self, value: Any, place: str) -> None:
        if type(value) is not int:
            raise _mismatch(place, "a whole number", value)


@dataclass(frozen=True)
class Text:
    """A text, one of ``among`` where given."""

    among: tuple[str, ...] = ()

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, str) or (self.among and value not in self.among):
            raise _mismatch(
                place, f"one of {', '.join(self.among)}" if self.among else "a text", value
            )


@dataclass(frozen=True)
class Optional:
    """Shape of null, or of what ``of`` takes."""

    of: Any

    def check(self, value: Any, place: str) -> None:
        if value is not None:
            self.of.check(value, place)


@dataclass(frozen=True)
class Many:
    """A list of values that ``of`` takes."""

    of: Any

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, list | tuple):
            raise _mismatch(place, "a list", value)
        for number, item in enumerate(value):
            self.of.check(item, f"{place}[{number}]")


@dataclass(frozen=True)
class Named:
    """An object whose values ``of`` takes, whatever their names."""

    of: Any

    def check(self, value: Any, place: str) -> None:
        for name, item in _object(value, place).items():
            self.of.check(item, f"{place}.{name}")


@dataclass(frozen=True)
class Keys:
    """An object with these keys; it may have more."""

    of: dict[str, Any]

    def check(self, value: Any, place: str = "") -> None:
        given = _object(value, place)
        for name, shape in self.of.items():
            inside = f"{place}.{name}" if place else name
            if name not in given:
                raise Mismatch(f"none without {inside}")
            shape.check(given[name], inside)


def _object(value: Any, place: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise _mismatch(place, "an object", value)
    return value


def _mismatch(place: str, expected: str, value: Any) -> Mismatch:
    return Mismatch(f"{expected} for {place or 'the whole'}, got {value!r:.{SHOWN}}")


NUMBER, FINITE = Number(), Number(finite=True)
_MAYBE = Optional(NUMBER)
_MEASURES = "distinct_2 compression entropy mean_tokens ended repeated looping same_prompt other_prompts copied"
_OF_TEXTS = dict.fromkeys(_MEASURES.split(), _MAYBE)


def _bins(*names: str) -> Many:
    return Many(Keys(dict.fromkeys(names, NUMBER) | {"tokens": Number(1, 2.0**63)}))


# What the page reads of ``ppl probe --json``.
PROBE = Keys(
    {
        "step": Optional(Whole()),
        "verdict": Text((*VERDICTS.values(), "insufficient-data")),
        "health_score": Optional(FINITE),
        "health": Keys(
            {
                "parts": Named(
                    Keys(
                        {
                            "score": Optional(Number(0, 1)),
                            "weight": Number(0, 1e9),
                            "evidence": Text(),
                        }
                    )
                )
            }
        ),
        "prompts": Optional(FINITE),
        "settings": Keys({"in_words": Text()}),
        "generation": Keys(_OF_TEXTS | {"texts": Optional(FINITE), "repetition": Optional(FINITE)}),
        "reference_texts": Optional(Named(_MAYBE)),
        "perplexity": Keys(
            dict.fromkeys(("self_perplexity", "reference_perplexity", "unigram_perplexity"), _MAYBE)
        ),
        "references": Optional(
            Keys(
                {"bleu": NUMBER, "chrf": NUMBER}
                | dict.fromkeys(("rouge1", "rouge2", "rougeL"), _MAYBE)
            )
        ),
        "coherence": Optional(Keys(dict.fromkeys(("with_prompt", "with_reference"), _MAYBE))),
        "ask": Optional(Keys({"answered": NUMBER, "yes_of_two": _MAYBE})),
        "calibration": Optional(
            Keys(
                dict.fromkeys(("accuracy", "confidence", "ece", "entropy", "loss"), NUMBER)
                | {
                    "bins": _bins("confidence", "accuracy"),
                    "entropy_bins": _bins("entropy", "loss"),
                }
            )
        ),
        "findings": Many(
            Keys(
                {
                    "signal": Text(),
                    "severity": Text(SEVERITIES),
                    "evidence": Text(),
                    "advice": Text(),
                }
            )
        ),
        "notes": Many(Text()),
        "texts": Many(Keys({"tokens": NUMBER, "loop": NUMBER, "repeated": _MAYBE, "text": Text()})),
        "model": Optional(Keys({})),
    }
)
