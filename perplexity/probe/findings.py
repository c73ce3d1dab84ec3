"""What the measures mean: each finding one rule, every number it decides by named here."""

from __future__ import annotations

from ..data_checks.findings import Finding
from ..metric import exp
from .settings import GenerationSettings

LEAST_TEXTS = 8  # judged texts, and
LEAST_REFERENCE_TOKENS = 200  # reference tokens, below which nothing is concluded from them
# Mean share of a text that repeats itself: human prose 0.01, drawn from a model 0.01 to 0.03, greedy GPT-2 0.4. Between the two
# bounds it must also be more than the references' share, times MORE: code and tables repeat themselves.
REPETITION, ALWAYS_REPETITION, MORE = 0.25, 0.5, 1.5
LOOPING = 0.2  # of the texts
SAME_PROMPT = (
    0.5  # mean share of a text's 4-grams that other samples of its prompt have: tuned models agree with themselves
)
OTHER_PROMPTS = 0.25  # that samples of other prompts have: drawn texts 0.00 to 0.05
COPIED = 0.1  # mean share of a text's 8-grams that stand in the reference, and not in the prompt: held-out text 0.00
COLLAPSED = 0.02  # nats a byte of text: models of text leave about 0.5, those tuned on preferences 0.05 to 0.15
FALLING = 0.5  # entropy of the second half over that of the first
EASIER, HARDER = (
    0.6,
    2.0,
)  # loss on its own texts over loss on the references, below and above: a sound model has about 1
EMPTY = 0.1  # of the texts
SHORT = 0.25  # mean length over the references'
MISCALIBRATED = 0.1  # expected calibration error, over
CALIBRATION_TOKENS = 1000  # as many tokens at least

SIGNALS = (
    *(
        "low-perplexity-trap",
        "non-finite",
        "repetition",
        "same-texts",
        "copied-reference",
        "entropy-collapse",
        "self-perplexity",
    ),
    *("early-stopping", "no-end", "overconfidence", "underconfidence", "unanswered"),
)


def find(measured: dict, settings: GenerationSettings) -> list[Finding]:
    """Findings of a probe's measures, the gravest first; ``measured`` has the parts of a ``Probe``'s JSON."""
    generation, losses = measured["generation"], measured["perplexity"]
    found: list[Finding] = []
    if generation["judged"] >= LEAST_TEXTS:
        found += _repetition(generation, measured["reference_texts"], settings)
        found += [*_same(generation), *_copied(generation), *_collapse(generation)]
        trapped = list(found)
        found += _falling(generation)
        if settings.unchanged:
            found += _beside_references(losses)
        if trapped:
            found = [*_trap(trapped, losses, settings), *found]
    if generation["texts"] >= LEAST_TEXTS:
        found += _lengths(generation, measured["reference_texts"], settings)
    if losses["non_finite"]:
        found = [_non_finite(losses["non_finite"]), *found]
    if measured["calibration"]:
        found += _calibration(measured["calibration"])
    if measured["ask"]:
        found += _unanswered(measured["ask"])
    return found


def known_good(losses: dict) -> bool | None:
    """Whether the perplexity looks good: better than any guess without context; None where that cannot be told."""
    if (
        losses["known_loss"] is None
        or losses["known_unigram"] is None
        or losses["known_tokens"] < LEAST_REFERENCE_TOKENS
    ):
        return None
    return losses["known_loss"] < losses["known_unigram"]


def _non_finite(tokens: int) -> Finding:
    return Finding(
        "non-finite",
        "danger",
        f"{tokens:,} tokens of its own texts or of the references have a NaN or infinite loss; they are left out",
        "look for NaN in the weights (ppl eval names the first token), or for 16-bit overflow: run it with --dtype float32",
        {"tokens": tokens},
    )


def _trap(because: list[Finding], losses: dict, settings: GenerationSettings) -> list[Finding]:
    if not known_good(losses):
        return []
    perplexity, unigram = exp(losses["known_loss"]), exp(losses["known_unigram"])
    # Greedy and sharp decoding loop in sound models as well: the model is not convicted by it alone.
    mild = settings.sharp and [finding.signal for finding in because] == ["repetition"]
    return [
        Finding(
            "low-perplexity-trap",
            "warning" if mild else "danger",
            f"the perplexity looks good ({perplexity:,.2f} on {losses['known_of']}, {unigram:,.0f} without context), and yet: "
            + "; ".join(finding.evidence for finding in because),
            "do not choose this model by its perplexity: look at its texts; check the text it was measured on for repetition and "
            "for what was in training (ppl check-data), and measure on text that is certain to be new",
            {"perplexity": perplexity, "unigram_perplexity": unigram, "because": [f.signal for f in because]},
        )
    ]


def _repetition(generation: dict, references: dict | None, settings: GenerationSettings) -> list[Finding]:
    share, looping = generation["repetition"], generation["looping"]
    usual = (references or {}).get("repetition") or 0.0
    if share < ALWAYS_REPETITION and looping < LOOPING and (share < REPETITION or share < MORE * usual):
        return []
    advice = "train on text without its duplicates, or look at the learning rate: the model has learnt to repeat"
    if settings.sharp:
        advice = "greedy and sharp sampling loop in most models: probe with temperature 1 before blaming this one"
    loop = generation["longest_loop"]
    longest = (
        "" if loop is None else f"; the longest loop is {loop['tokens']:,} tokens of a period of {loop['period']:,}"
    )
    beside = f" (of the references {usual:.0%})" if references else ""
    return [
        Finding(
            "repetition",
            "warning",
            f"{share:.0%} of a generated text repeats itself{beside} and {looping:.0%} of the texts loop{longest}",
            advice,
            {"repetition": share, "looping": looping, "references": usual if references else None},
        )
    ]


def _same(generation: dict) -> list[Finding]:
    found = []
    for key, least, whose in (
        ("same_prompt", SAME_PROMPT, "other samples of their prompt"),
        ("other_prompts", OTHER_PROMPTS, "texts of other prompts"),
    ):
        share = generation[key]
        if share is not None and share >= least:
            found.append(f"{share:.0%} of the texts' 4-grams are in {whose}")
    if not found:
        return []
    return [
        Finding(
            "same-texts",
            "warning",
            " and ".join(found),
            "the model knows few texts and says them again: it has memorised, or collapsed onto, a part of its training",
            {key: generation[key] for key in ("same_prompt", "other_prompts")},
        )
    ]


def _copied(generation: dict) -> list[Finding]:
    share = generation["copied"]
    if share is None or share < COPIED:
        return []
    return [
        Finding(
            "copied-reference",
            "warning",
            f"{share:.0%} of the texts' 8-grams stand in the reference word by word, and not in the prompt",
            "no model guesses held-out text word by word: the references were in training (ppl check-data)",
            {"copied": share},
        )
    ]


def _collapse(generation: dict) -> list[Finding]:
    spread = generation["entropy_per_byte"]
    if spread is None or spread >= COLLAPSED:
        return []
    return [
        Finding(
            "entropy-collapse",
            "warning",
            f"the model is all but certain of each next token: entropy {spread:.3f} nats a byte of its own text",
            "it has one way to go on and samples the same whatever the temperature: memorised text, or a collapse in tuning",
            {"entropy_per_byte": spread},
        )
    ]


def _falling(generation: dict) -> list[Finding]:
    early, late = generation["early_entropy"], generation["late_entropy"]
    if not early or late is None or late >= FALLING * early:
        return []
    return [
        Finding(
            "entropy-collapse",
            "warning",
            f"entropy falls from {early:.2f} nats a token in a text's first half to {late:.2f} in its second",
            "the longer it writes the fewer ways it sees to go on, as texts do that fall into a loop: generate longer ones",
            {"early_entropy": early, "late_entropy": late},
        )
    ]


def _beside_references(losses: dict) -> list[Finding]:
    own, other, tokens = losses["self_loss"], losses["reference_loss"], losses["reference_tokens"]
    if own is None or other is None or tokens < LEAST_REFERENCE_TOKENS or EASIER * other <= own <= HARDER * other:
        return []
    if own > HARDER * other:
        return [
            Finding(
                "self-perplexity",
                "warning",
                f"the references have perplexity {exp(other):,.2f} under it, its own texts {exp(own):,.2f}: it knows "
                "the references far better than what it writes itself",
                "a model that has learnt the text's distribution finds both about as hard: were these references in training?",
                {"self_loss": own, "reference_loss": other},
            )
        ]
    return [
        Finding(
            "self-perplexity",
            "info",
            f"its own texts have perplexity {exp(own):,.2f} under it, the references {exp(other):,.2f}: what it writes is far more "
            "predictable than what it reads",
            "tuning on preferences does that, and references of another kind do; a model that has only learnt the text's "
            "distribution finds both about as hard",
            {"self_loss": own, "reference_loss": other},
        )
    ]


def _lengths(generation: dict, references: dict | None, settings: GenerationSettings) -> list[Finding]:
    empty, ended, length = generation["empty"], generation["ended"], generation["mean_tokens"]
    expected = references["mean_tokens"] if references else None
    short = bool(expected) and ended >= 0.5 and length < SHORT * expected
    if empty >= EMPTY or short:
        told = [f"{empty:.0%} of the texts are empty"] if empty >= EMPTY else []
        if short:
            told.append(f"they end after {length:.0f} tokens, the references after {expected:.0f}")
        numbers = {"empty": empty, "mean_tokens": length, "reference_tokens": expected}
        advice = "the end-of-text token comes too soon: look at where it stands in training, and at the prompts' ends"
        return [Finding("early-stopping", "warning", " and ".join(told), advice, numbers)]
    if references and references["ended"] >= 0.9 and generation["can_end"] and ended <= 0.1:
        return [
            Finding(
                "no-end",
                "warning",
                f"{1 - ended:.0%} of the texts run into the limit of {settings.max_new_tokens} tokens, which "
                f"{references['ended']:.0%} of the references stay within",
                "the model does not end its texts: look whether training has the end-of-text token, and whether it is scored",
                {"ended": ended, "references_ended": references["ended"]},
            )
        ]
    return []


def _calibration(c: dict) -> list[Finding]:
    if c["tokens"] < CALIBRATION_TOKENS or c["ece"] < MISCALIBRATED:
        return []
    over = c["confidence"] > c["accuracy"]
    return [
        Finding(
            "overconfidence" if over else "underconfidence",
            "warning" if over else "info",
            f"on the references its first choice has a probability of {c['confidence']:.0%} and is right {c['accuracy']:.0%} of "
            f"the time: expected calibration error {c['ece']:.3f}",
            "a temperature fitted on held-out text mends the numbers; overfitting and tuning on preferences cause them",
            {key: c[key] for key in ("ece", "confidence", "accuracy")},
        )
    ]


def _unanswered(asked: dict) -> list[Finding]:
    from .ask import UNANSWERED

    if asked["answered"] >= UNANSWERED:
        return []
    first = ", ".join(repr(token) for token in asked["first_choices"])
    return [
        Finding(
            "unanswered",
            "info",
            f"the judge puts {asked['answered']:.0%} of its probability on yes or no; it would rather say {first}",
            "give it a template it answers, or its own words for yes and no: its score is left out of the health",
            {"answered": asked["answered"]},
        )
    ]
