"""What the measures mean: each finding one rule, every number it decides by named here
(docs/probe.md says where from).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..findings import Finding
from ..metric import exp
from .settings import GenerationSettings

LEAST_TEXTS = 8  # texts that a mean is taken over, and
LEAST_TOKENS = 200  # of references or of an evaluation, below which nothing is concluded
# times the references' own share, where they have one: code, tables and templates repeat themselves
MORE = 1.5
FALLING = 0.5  # entropy of the second half over that of the first
# loss on its own texts over loss on the documents they continue: a sound model has about 1
EASIER, HARDER = 0.6, 2.0
EMPTY = 0.1  # of the texts
SHORT = 0.25  # mean length over the references'
MISCALIBRATED = 0.1  # expected calibration error, over
CALIBRATION_TOKENS = 1000  # as many tokens at least
COLLAPSED = 0.02  # nats a byte of text
UNANSWERED = 0.5  # of a judge's probability on yes or no

SIGNALS = (
    *(
        "low-perplexity-trap",
        "non-finite",
        "repetition",
        "same-texts",
        "copied-reference",
        "entropy-collapse",
    ),
    *(
        "self-perplexity",
        "no-better-than-chance",
        "early-stopping",
        "no-end",
        "overconfidence",
        "underconfidence",
    ),
    *("unanswered", "scorer-failed", "training-run"),
)


@dataclass(frozen=True)
class Bounds:
    """A share is too much from ``always`` on, or from ``least`` on where it is also MORE times the
    references'; of a measure that references cannot have (``alone``), from ``least`` on."""

    least: float
    always: float
    alone: bool = False

    def passed(self, share: float | None, usual: float | None) -> bool:
        if share is None:
            return False
        if self.alone:
            return share >= self.least
        return share >= self.always or (
            usual is not None and share >= self.least and share >= MORE * usual
        )


BOUNDS = {
    "repetition": Bounds(0.25, 0.5),
    "looping": Bounds(0.2, 0.5),
    "other_prompts": Bounds(0.25, 0.9),
    "same_prompt": Bounds(0.5, 0.5, alone=True),
    "copied": Bounds(0.25, 0.9),
}


@dataclass(frozen=True)
class Asking:
    """How the model was asked: ``documents``: all prompts are cut from documents; ``answers``: some
    bring references of their own, so that two texts may rightly agree; ``can_end``: it has an
    end-of-text token; settings: of generation."""

    documents: bool
    answers: bool
    can_end: bool
    settings: GenerationSettings


def find(measured: Mapping, asking: Asking) -> list[Finding]:
    """Findings of a probe's measures, the gravest first; ``measured`` has the parts of a
    ``Probe``'s JSON.
    """
    generation, references = measured["generation"], measured["reference_texts"] or {}
    losses, judged_by = measured["perplexity"], measured["perplexity"]["judged_by"]
    about_texts = [
        *_repetition(generation, references, asking),
        *_same(generation, references, asking),
    ]
    about_texts += [*_copied(generation, references), *_collapse(generation, asking)]
    convicting = [finding for finding, convicts in about_texts if convicts]
    found = list(_trap(convicting, judged_by)) if convicting else []
    if losses["non_finite"]:
        found.append(_non_finite(losses["non_finite"]))
    found += [finding for finding, _ in about_texts]
    found += [
        *_chance(judged_by),
        *_self_perplexity(losses, asking),
        *_lengths(generation, references, asking),
    ]
    found += [*_calibration(measured["calibration"]), *unanswered(measured["ask"])]
    return found


def known_good(judged_by: Mapping | None) -> bool | None:
    """Whether the perplexity looks good: True below what any guess without context can have, False
    above what one can have; None between the two, and where there are too few tokens."""
    if judged_by is None or judged_by["tokens"] < LEAST_TOKENS:
        return None
    if judged_by["loss"] < judged_by["unigram_loss"]:
        return True
    return False if judged_by["loss"] > judged_by["guess_loss"] else None


def _trap(because: list[Finding], judged_by: Mapping | None) -> Iterator[Finding]:
    if judged_by is None or not known_good(judged_by):
        return
    perplexity, unigram = exp(judged_by["loss"]), exp(judged_by["unigram_loss"])
    yield Finding(
        "low-perplexity-trap",
        "danger",
        f"the perplexity looks good ({perplexity:,.2f} on {judged_by['of']}, {unigram:,.0f} without context), and yet: "
        + "; ".join(finding.evidence for finding in because),
        "do not choose this model by its perplexity: look at its texts; check the text it was measured on for repetition and "
        "for what was in training (ppl check-data), and measure on text that is certain to be new",
        {
            "perplexity": perplexity,
            "unigram_perplexity": unigram,
            "because": [finding.signal for finding in because],
        },
    )


def _non_finite(tokens: int) -> Finding:
    return Finding(
        "non-finite",
        "danger",
        f"{tokens:,} tokens of its own texts or of the references have a NaN or infinite loss; they are left out",
        "look for NaN in the weights (ppl eval names the first token), or for 16-bit overflow: run it with --dtype float32",
        {"tokens": tokens},
    )


# The next four say also whether they convict a model whose perplexity looks good. Greedy and sharp
# decoding loop, and agree, in sound models as well: under them only a copy convicts.


def _repetition(
    generation: Mapping, references: Mapping, asking: Asking
) -> Iterator[tuple[Finding, bool]]:
    share, looping = generation["repetition"], generation["looping"]
    usual, usually = references.get("repetition"), references.get("looping")
    if not (
        BOUNDS["repetition"].passed(share, usual or 0.0)
        or BOUNDS["looping"].passed(looping, usually or 0.0)
    ):
        return
    if asking.settings.sharp:
        advice = "greedy and sharp sampling loop in most models: probe with temperature 1 before blaming this one"
    elif usual is not None and usual >= 0.5 * share:
        advice = "the text it is measured on repeats itself, too: what was it trained on? measure on other text"
    else:
        advice = "train on text without its duplicates, or look at the learning rate: the model has learnt to repeat"
    loop = generation["longest_loop"]
    longest = (
        ""
        if loop is None
        else f"; the longest loop is {loop['tokens']:,} tokens of a period of {loop['period']:,}"
    )
    beside = "" if usual is None else f" (of the references {usual:.0%})"
    finding = Finding(
        "repetition",
        "warning",
        f"{share:.0%} of a generated text repeats itself{beside} and {looping:.0%} of the texts loop{longest}",
        advice,
        {"repetition": share, "looping": looping, "references": usual},
    )
    yield finding, not asking.settings.sharp


def _same(
    generation: Mapping, references: Mapping, asking: Asking
) -> Iterator[tuple[Finding, bool]]:
    agreeing, everywhere = generation["same_prompt"], generation["other_prompts"]
    usual = references.get("other_prompts")
    told, convicts = [], False
    if BOUNDS["other_prompts"].passed(everywhere, usual):
        beside = "" if usual is None else f" (of the references {usual:.0%})"
        told.append(f"{everywhere:.0%} of the texts' 4-grams are in texts of other prompts{beside}")
        convicts = True
    # Where a question has an answer it is right to say it again.
    if not asking.answers and BOUNDS["same_prompt"].passed(agreeing, None):
        told.append(f"{agreeing:.0%} of the texts' 4-grams are in other samples of their prompt")
        convicts = convicts or asking.documents
    if told:
        finding = Finding(
            "same-texts",
            "warning",
            " and ".join(told),
            "the model knows few texts and says them again: it has memorised, or collapsed onto, a part of its training",
            {"same_prompt": agreeing, "other_prompts": everywhere, "references": usual},
        )
        yield finding, convicts and not asking.settings.sharp


def _copied(generation: Mapping, references: Mapping) -> Iterator[tuple[Finding, bool]]:
    share, usual = generation["copied"], references.get("copied")
    if BOUNDS["copied"].passed(share, usual or 0.0):
        finding = Finding(
            "copied-reference",
            "warning",
            f"{share:.0%} of the texts' 8-grams stand in the reference word by word, and not in the prompt",
            "no model guesses held-out text word by word: the references were in training (ppl check-data)",
            {"copied": share, "references": usual},
        )
        yield finding, True


def _collapse(generation: Mapping, asking: Asking) -> Iterator[tuple[Finding, bool]]:
    spread, early, late = (
        generation["entropy_per_byte"],
        generation["early_entropy"],
        generation["late_entropy"],
    )
    # Under sharp decoding it is the entropy along a path that the model would seldom take; an
    # answer may be certain.
    if asking.settings.sharp or asking.answers or generation["judged"] < LEAST_TEXTS:
        return
    if spread is not None and spread < COLLAPSED:
        finding = Finding(
            "entropy-collapse",
            "warning",
            f"the model is all but certain of each next token: entropy {spread:.3f} nats a byte of its own text",
            "it has one way to go on and samples the same whatever the temperature: memorised text, or a collapse in tuning",
            {"entropy_per_byte": spread},
        )
        yield finding, True
    if early and late is not None and late < FALLING * early:
        finding = Finding(
            "entropy-collapse",
            "warning",
            f"entropy falls from {early:.2f} nats a token in a text's first half to {late:.2f} in its second",
            "the longer it writes the fewer ways it sees to go on, as texts do that fall into a loop: generate longer ones",
            {"early_entropy": early, "late_entropy": late},
        )
        yield finding, False


def _chance(judged_by: Mapping | None) -> Iterator[Finding]:
    if judged_by is not None and known_good(judged_by) is False:
        loss, guess = exp(judged_by["loss"]), exp(judged_by["guess_loss"])
        yield Finding(
            "no-better-than-chance",
            "warning",
            f"perplexity {loss:,.1f} on {judged_by['of']}, where a guess without context has {guess:,.1f}",
            "it knows nothing of that text, and varied texts are no merit then: is it trained, is the tokenizer its own, is the "
            "text of its kind?",
            {"perplexity": loss, "guess_perplexity": guess},
        )


def _self_perplexity(losses: Mapping, asking: Asking) -> Iterator[Finding]:
    """Of documents only, whose continuations are as long and as open as the model's own."""
    own, other = losses["self_loss"], losses["reference_loss"]
    if not asking.documents or not asking.settings.unchanged or own is None or other is None:
        return
    if losses["reference_tokens"] < LEAST_TOKENS or EASIER * other <= own <= HARDER * other:
        return
    numbers = {"self_loss": own, "reference_loss": other}
    if own > HARDER * other:
        yield Finding(
            "self-perplexity",
            "warning",
            f"the references have perplexity {exp(other):,.2f} under it, its own texts {exp(own):,.2f}: it knows the references "
            "far better than what it writes itself",
            "a model that has learnt the text's distribution finds both about as hard: were these references in training?",
            numbers,
        )
        return
    yield Finding(
        "self-perplexity",
        "info",
        f"its own texts have perplexity {exp(own):,.2f} under it, the references {exp(other):,.2f}: what it writes is far more "
        "predictable than what it reads",
        "tuning on preferences does that, and text of another kind does; a model that has only learnt the text's distribution "
        "finds both about as hard",
        numbers,
    )


def _lengths(generation: Mapping, references: Mapping, asking: Asking) -> Iterator[Finding]:
    if generation["texts"] < LEAST_TEXTS:
        return
    empty, ended, length = generation["empty"], generation["ended"], generation["mean_tokens"]
    expected, whole = references.get("mean_tokens"), references.get("ended")
    short = bool(expected and ended >= 0.5 and length < SHORT * expected)
    if empty >= EMPTY or short:
        told = [f"{empty:.0%} of the texts end without a word"] if empty >= EMPTY else []
        if short:
            told.append(f"they end after {length:.0f} tokens, the references after {expected:.0f}")
        yield Finding(
            "early-stopping",
            "warning",
            " and ".join(told),
            "the end-of-text token comes too soon: look at where it stands in training, and at the prompts' ends",
            {"empty": empty, "mean_tokens": length, "reference_tokens": expected},
        )
    elif whole is not None and whole >= 0.9 and ended <= 0.1 and asking.can_end:
        chat = asking.settings.chat
        yield Finding(
            "no-end",
            "warning" if chat else "info",
            f"{1 - ended:.0%} of the texts run into the limit of {asking.settings.max_new_tokens} tokens, which {whole:.0%} of the "
            "references stay within",
            "the model does not end its answers: look whether training has the end-of-text token, and whether it is scored"
            if chat
            else "a model that is not tuned to answer goes on; of one that is, ask with --chat",
            {"ended": ended, "references_ended": whole},
        )


def _calibration(c: Mapping | None) -> Iterator[Finding]:
    if c and c["tokens"] >= CALIBRATION_TOKENS and c["ece"] >= MISCALIBRATED:
        over = c["confidence"] > c["accuracy"]
        yield Finding(
            "overconfidence" if over else "underconfidence",
            "warning" if over else "info",
            f"on the references its first choice has a probability of {c['confidence']:.0%} and is right {c['accuracy']:.0%} of "
            f"the time: expected calibration error {c['ece']:.3f}",
            "a temperature fitted on held-out text mends the numbers; overfitting and tuning on preferences cause them",
            {key: c[key] for key in ("ece", "confidence", "accuracy")},
        )


def unanswered(asked: Mapping | None) -> Iterator[Finding]:
    if asked and asked["answered"] < UNANSWERED:
        first = ", ".join(repr(token) for token in asked["first_choices"])
        words = " or ".join(repr(word) for word in asked["answers"])
        yield Finding(
            "unanswered",
            "info",
            f"the judge puts {asked['answered']:.0%} of its probability on {words}; it would rather say {first}",
            "give it a template it answers, or its own words (--yes, --no): in a health score it is left out",
            {"answered": asked["answered"]},
        )


def failed(parts: Mapping[str, str]) -> Iterator[Finding]:
    """Of scorers, by name: why they gave no score."""
    for name, reason in parts.items():
        advice = "mend it: its part is missing, and the mean of the others says nothing of what it would have shown"
        yield Finding("scorer-failed", "warning", f"{name}: {reason}", advice)


def of_the_run(diagnosis: Mapping | None) -> Iterator[Finding]:
    """What the monitor found in the run's curves, as one finding: a model is no better than its
    run.
    """
    grave = [
        finding
        for finding in (diagnosis or {}).get("findings", ())
        if finding["severity"] != "info"
    ]
    if grave:
        severity = (
            "danger" if any(finding["severity"] == "danger" for finding in grave) else "warning"
        )
        signals = ", ".join(sorted({finding["signal"] for finding in grave}))
        yield Finding(
            "training-run",
            severity,
            f"the run's curves show {signals}",
            "ppl monitor says what to do",
        )
