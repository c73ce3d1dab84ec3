"""Rules that turn a probe's measures into findings, with every threshold they decide by.

docs/probe.md gives the source of each threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..findings import Finding
from ..nats import exp
from ..wording import by_number, counted
from .settings import GenerationSettings

LEAST_TEXTS = 8  # fewer texts make no mean
LEAST_TOKENS = 200  # fewer tokens of references or of an evaluation conclude nothing
# A share counts from this many times the references' own: code and tables repeat themselves, too.
MORE = 1.5
FALLING = 0.5  # entropy of a text's second half over that of its first
# Loss on the model's own texts over loss on the documents that the texts continue; a sound model
# has about 1.
EASIER, HARDER = 0.6, 2.0
EMPTY = 0.1  # share of texts without a word
SHORT = 0.25  # mean length over the references' mean length
MISCALIBRATED = 0.1  # expected calibration error
CALIBRATION_TOKENS = 1000  # fewer tokens give no calibration error
COLLAPSED = 0.02  # entropy, nats a byte of text
UNANSWERED = 0.5  # probability that a judge puts on yes or no

SIGNALS = (
    "low-perplexity-trap",
    "non-finite",
    "repetition",
    "same-texts",
    "copied-reference",
    "entropy-collapse",
    "self-perplexity",
    "no-better-than-chance",
    "early-stopping",
    "no-end",
    "overconfidence",
    "underconfidence",
    "unanswered",
    "scorer-failed",
    "training-run",
)


@dataclass(frozen=True)
class Bounds:
    """Bounds from which a share of repeated or shared text is too large.

    Attributes:
        least: Too large where the share is also ``MORE`` times that of the references.
        always: Too large whatever the references have.
        alone: The references cannot have the measure: too large from ``least`` on.
    """

    least: float
    always: float
    alone: bool = False

    def passed(self, share: float | None, usual: float | None) -> bool:
        """Return whether a share is too large.

        Args:
            share: Of the generated texts, 0 to 1; None is unknown and never too large.
            usual: The share of the references, 0 to 1; None is unknown.
        """
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
    """Circumstances of a probe that decide which rules apply.

    Attributes:
        documents: All prompts are cut from documents.
        answers: Some prompts have references of their own: two samples may rightly agree.
        can_end: The model has an end-of-text token.
        settings: Of the generation.
    """

    documents: bool
    answers: bool
    can_end: bool
    settings: GenerationSettings


def find(measured: Mapping, asking: Asking) -> list[Finding]:
    """Return the findings of a probe's measures, in the order of the rules.

    Args:
        measured: "generation", "reference_texts", "perplexity", "calibration" and "ask", as in the
            JSON of a ``Probe``.
        asking: The circumstances of the probe.
    """
    generation, references = measured["generation"], measured["reference_texts"] or {}
    losses, judged_by = measured["perplexity"], measured["perplexity"]["judged_by"]
    about_texts = [
        *_repetition(generation, references, asking),
        *_same(generation, references, asking),
    ]
    about_texts += [*_copied(generation, references), *_collapse(generation, asking)]
    convicting = [finding for finding, convicts in about_texts if convicts]
    return [
        *(_trap(convicting, judged_by) if convicting else ()),
        *([_non_finite(losses["non_finite"])] if losses["non_finite"] else ()),
        *(finding for finding, _ in about_texts),
        *_chance(judged_by),
        *_self_perplexity(losses, asking),
        *_lengths(generation, references, asking),
        *_calibration(measured["calibration"]),
        *unanswered(measured["ask"]),
    ]


def known_good(judged_by: Mapping | None) -> bool | None:
    """Return whether a perplexity is better than that of a guess without context.

    Args:
        judged_by: "loss" of the model, "unigram_loss" (the least that a guess can have) and
            "guess_loss" (what a guess can have), nats a token, over "tokens" tokens; or None.

    Returns:
        True below ``unigram_loss``, False above ``guess_loss``. None between the two, without
        ``judged_by`` and with fewer than ``LEAST_TOKENS`` tokens.
    """
    if judged_by is None or judged_by["tokens"] < LEAST_TOKENS:
        return None
    if judged_by["loss"] < judged_by["unigram_loss"]:
        return True
    return False if judged_by["loss"] > judged_by["guess_loss"] else None


def _trap(because: list[Finding], judged_by: Mapping | None) -> Iterator[Finding]:
    """Yield the trap: a good perplexity of a model whose texts are convicted by other findings."""
    if judged_by is None or not known_good(judged_by):
        return
    perplexity, unigram = exp(judged_by["loss"]), exp(judged_by["unigram_loss"])
    yield Finding(
        "low-perplexity-trap",
        "danger",
        f"the perplexity looks good ({perplexity:,.2f} on {judged_by['of']}, "
        f"{unigram:,.0f} without context), and yet: "
        + "; ".join(finding.evidence for finding in because),
        "do not choose this model by its perplexity: look at its texts; check the text it was "
        "measured on for repetition and for what was in training (ppl check-data), "
        "and measure on text that is certain to be new",
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
        f"{counted(tokens, 'token')} of its own texts or of the references "
        f"{by_number(tokens, 'has', 'have')} a NaN or infinite loss: left out",
        "look for NaN in the weights (ppl eval names the first token), "
        "or for 16-bit overflow: run it with --dtype float32",
        {"tokens": tokens},
    )


# Each finding of the next four functions comes with a flag: whether it convicts a model whose
# perplexity looks good. Texts of greedy and sharp decoding loop and agree in sound models as well:
# under such settings only a copy of the reference convicts.


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
        advice = (
            "greedy and sharp sampling loop in most models: "
            "probe with temperature 1 before blaming this one"
        )
    elif usual is not None and usual >= 0.5 * share:
        advice = (
            "the text it is measured on repeats itself, too: what was it trained on? "
            "measure on other text"
        )
    else:
        advice = (
            "train on text without its duplicates, or look at the learning rate: "
            "the model has learnt to repeat"
        )
    loop = generation["longest_loop"]
    longest = (
        ""
        if loop is None
        else f"; the longest loop is {counted(loop['tokens'], 'token')} of a period of {loop['period']:,}"
    )
    of_references = "" if usual is None else f" (of the references {usual:.0%})"
    finding = Finding(
        "repetition",
        "warning",
        f"{share:.0%} of a generated text repeats itself{of_references} "
        f"and {looping:.0%} of the texts loop{longest}",
        advice,
        {"repetition": share, "looping": looping, "references": usual},
    )
    yield finding, not asking.settings.sharp


def _same(
    generation: Mapping, references: Mapping, asking: Asking
) -> Iterator[tuple[Finding, bool]]:
    agreeing, everywhere = generation["same_prompt"], generation["other_prompts"]
    usual = references.get("other_prompts")
    evidence, convicts = [], False
    if BOUNDS["other_prompts"].passed(everywhere, usual):
        of_references = "" if usual is None else f" (of the references {usual:.0%})"
        evidence.append(
            f"{everywhere:.0%} of the texts' 4-grams are in texts of other prompts{of_references}"
        )
        convicts = True
    # Samples of a prompt that has an answer may rightly agree.
    if not asking.answers and BOUNDS["same_prompt"].passed(agreeing, None):
        evidence.append(
            f"{agreeing:.0%} of the texts' 4-grams are in other samples of their prompt"
        )
        convicts = convicts or asking.documents
    if evidence:
        finding = Finding(
            "same-texts",
            "warning",
            " and ".join(evidence),
            "the model knows few texts and says them again: "
            "it has memorised, or collapsed onto, a part of its training",
            {"same_prompt": agreeing, "other_prompts": everywhere, "references": usual},
        )
        yield finding, convicts and not asking.settings.sharp


def _copied(generation: Mapping, references: Mapping) -> Iterator[tuple[Finding, bool]]:
    share, usual = generation["copied"], references.get("copied")
    if BOUNDS["copied"].passed(share, usual or 0.0):
        finding = Finding(
            "copied-reference",
            "warning",
            f"{share:.0%} of the texts' 8-grams stand in the reference word by word, "
            "and not in the prompt",
            "no model guesses held-out text word by word: "
            "the references were in training (ppl check-data)",
            {"copied": share, "references": usual},
        )
        yield finding, True


def _collapse(generation: Mapping, asking: Asking) -> Iterator[tuple[Finding, bool]]:
    spread, early, late = (
        generation["entropy_per_byte"],
        generation["early_entropy"],
        generation["late_entropy"],
    )
    # Sharp decoding takes paths that the model seldom takes, so their entropy says nothing. An
    # answer to a question may rightly be certain.
    if asking.settings.sharp or asking.answers or generation["judged"] < LEAST_TEXTS:
        return
    if spread is not None and spread < COLLAPSED:
        finding = Finding(
            "entropy-collapse",
            "warning",
            f"the model is all but certain of each next token: "
            f"entropy {spread:.3f} nats a byte of its own text",
            "it has one way to go on and samples the same whatever the temperature: "
            "memorised text, or a collapse in tuning",
            {"entropy_per_byte": spread},
        )
        yield finding, True
    if early and late is not None and late < FALLING * early:
        finding = Finding(
            "entropy-collapse",
            "warning",
            f"entropy falls from {early:.2f} nats a token in a text's first half "
            f"to {late:.2f} in its second",
            "the longer it writes the fewer ways it sees to go on, "
            "as texts do that fall into a loop: generate longer ones",
            {"early_entropy": early, "late_entropy": late},
        )
        yield finding, False


def _chance(judged_by: Mapping | None) -> Iterator[Finding]:
    if judged_by is not None and known_good(judged_by) is False:
        loss, guess = exp(judged_by["loss"]), exp(judged_by["guess_loss"])
        yield Finding(
            "no-better-than-chance",
            "warning",
            f"perplexity {loss:,.1f} on {judged_by['of']}, "
            f"where a guess without context has {guess:,.1f}",
            "it knows nothing of that text, and varied texts are no merit then: "
            "is it trained, is the tokenizer its own, is the text of its kind?",
            {"perplexity": loss, "guess_perplexity": guess},
        )


def _self_perplexity(losses: Mapping, asking: Asking) -> Iterator[Finding]:
    """Compare the losses on generated texts and on references, where all prompts are documents.

    Only continuations of documents are as long and as open as the model's own texts.
    """
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
            f"the references have perplexity {exp(other):,.2f} under it, "
            f"its own texts {exp(own):,.2f}: "
            "it knows the references far better than what it writes itself",
            "a model that has learnt the text's distribution finds both about as hard: "
            "were these references in training?",
            numbers,
        )
        return
    yield Finding(
        "self-perplexity",
        "info",
        f"its own texts have perplexity {exp(own):,.2f} under it, "
        f"the references {exp(other):,.2f}: "
        "what it writes is far more predictable than what it reads",
        "tuning on preferences does that, and text of another kind does; "
        "a model that has only learnt the text's distribution finds both about as hard",
        numbers,
    )


def _lengths(generation: Mapping, references: Mapping, asking: Asking) -> Iterator[Finding]:
    if generation["texts"] < LEAST_TEXTS:
        return
    empty, ended, length = generation["empty"], generation["ended"], generation["mean_tokens"]
    expected, whole = references.get("mean_tokens"), references.get("ended")
    short = bool(expected and ended >= 0.5 and length < SHORT * expected)
    if empty >= EMPTY or short:
        evidence = [f"{empty:.0%} of the texts end without a word"] if empty >= EMPTY else []
        if short:
            evidence.append(
                f"they end after {length:.0f} tokens, the references after {expected:.0f}"
            )
        yield Finding(
            "early-stopping",
            "warning",
            " and ".join(evidence),
            "the end-of-text token comes too soon: "
            "look at where it stands in training, and at the prompts' ends",
            {"empty": empty, "mean_tokens": length, "reference_tokens": expected},
        )
    elif whole is not None and whole >= 0.9 and ended <= 0.1 and asking.can_end:
        chat = asking.settings.chat
        yield Finding(
            "no-end",
            "warning" if chat else "info",
            f"{1 - ended:.0%} of the texts run into the limit of "
            f"{asking.settings.max_new_tokens} tokens, "
            f"which {whole:.0%} of the references stay within",
            "the model does not end its answers: "
            "look whether training has the end-of-text token, and whether it is scored"
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
            f"on the references its first choice has a probability of {c['confidence']:.0%} "
            f"and is right {c['accuracy']:.0%} of the time: "
            f"expected calibration error {c['ece']:.3f}",
            "a temperature fitted on held-out text mends the numbers; "
            "overfitting and tuning on preferences cause them",
            {key: c[key] for key in ("ece", "confidence", "accuracy")},
        )


def unanswered(asked: Mapping | None) -> Iterator[Finding]:
    """Yield a finding where a judge puts too little probability on yes or no.

    Args:
        asked: ``Tally.summary``, or None.
    """
    if asked and asked["answered"] < UNANSWERED:
        first = ", ".join(repr(token) for token in asked["first_choices"])
        words = " or ".join(repr(word) for word in asked["answers"])
        yield Finding(
            "unanswered",
            "info",
            f"the judge puts {asked['answered']:.0%} of its probability on {words}; "
            f"it would rather say {first}",
            "give it a template it answers, or its own words (--yes, --no): "
            "in a health score it is left out",
            {"answered": asked["answered"]},
        )


def failed(parts: Mapping[str, str]) -> Iterator[Finding]:
    """Yield a finding for each scorer that failed; ``parts`` has the reasons by name."""
    for name, reason in parts.items():
        advice = (
            "mend it: its part is missing, "
            "and the mean of the others says nothing of what it would have shown"
        )
        yield Finding("scorer-failed", "warning", f"{name}: {reason}", advice)


def of_the_run(diagnosis: Mapping | None) -> Iterator[Finding]:
    """Yield one finding that sums up the monitor's on the training run, infos left out.

    Args:
        diagnosis: ``Diagnosis.to_dict()``, or None.
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
