"""What of a probe's JSON a person reads first: the same rows in a terminal and on the page."""

from __future__ import annotations

from ..calibration import rows as calibration_rows


def rows(record: dict) -> list[tuple[str, str, str, str]]:
    """Name, of the texts, of the references, meaning: what a reader wants first."""
    own, other, losses = record["generation"], record["reference_texts"] or {}, record["perplexity"]

    def number(value: float | None, form: str = ",.2f") -> str:
        return "–" if value is None else format(value, form)

    def both(name: str, key: str, form: str, meaning: str) -> tuple[str, str, str, str]:
        return name, number(own[key], form), number(other.get(key), form), meaning

    found = [
        (
            "perplexity",
            number(losses["self_perplexity"]),
            number(losses["reference_perplexity"]),
            "of the model on both"
            + (
                ""
                if losses["unigram_perplexity"] is None
                else f"; {losses['unigram_perplexity']:,.0f} without context"
            ),
        ),
        both("repeated 4-grams", "repeated", ".1%", "of a text's words, said before in it"),
        both("texts that loop", "looping", ".1%", "a quarter or more in one loop"),
        both(
            "distinct 2-grams",
            "distinct_2",
            ".1%",
            "of one text a prompt together; falls with their number",
        ),
        both("compression", "compression", ".2f", "bytes over compressed bytes; 2.4 is a loop"),
        both("entropy", "entropy", ".2f", "nats a token: how open the model sees what comes next"),
        both(
            "tokens a text",
            "mean_tokens",
            ",.0f",
            f"{number(own['ended'], '.0%')} of its own ended by themselves",
        ),
    ]
    for name, key, meaning in (
        ("same prompt", "same_prompt", "of 4-grams not in the prompt, in another text of it"),
        ("other prompts", "other_prompts", "of 4-grams not in the prompt, in a text of another"),
        ("copied", "copied", "of 8-grams not in the prompt, word by word in the reference"),
    ):
        if own[key] is not None:
            found.append(
                (
                    name,
                    f"{own[key]:.1%}",
                    "" if other.get(key) is None else f"{other[key]:.1%}",
                    meaning,
                )
            )
    if record["references"]:
        r = record["references"]
        found.append(
            (
                "BLEU, chrF",
                f"{r['bleu']:.1f}, {r['chrf']:.1f}",
                "",
                "of 100, against the references",
            )
        )
        found.append(
            (
                "ROUGE-1, 2, L",
                ", ".join(number(r[k], ".3f") for k in ("rouge1", "rouge2", "rougeL")),
                "",
                "F1, of 1",
            )
        )
    if record["coherence"]:
        c = record["coherence"]
        found.append(
            (
                "coherence",
                number(c["with_prompt"]),
                number(c["with_reference"]),
                "cosine with prompt; reference",
            )
        )
    if record["ask"]:
        a = record["ask"]
        meaning = f"of the judge; {a['answered']:.0%} of its probability is on yes or no"
        found.append(("says yes", number(a["yes_of_two"], ".1%"), "", meaning))
    if record["calibration"]:
        found += [
            (name, "", value, meaning)
            for name, value, meaning in calibration_rows(record["calibration"])[:2]
        ]
    return found


def examples(record: dict) -> list[tuple[str, str]]:
    """The text in the middle of the order of repetition, and the most repetitive one."""
    repetition = lambda text: max(text["repeated"] or 0.0, text["loop"])  # noqa: E731
    texts = sorted((text for text in record["texts"] if text["tokens"]), key=repetition)
    if not texts:
        return []
    middle = texts[len(texts) // 2]
    chosen = [("a typical text", middle)]
    if repetition(texts[-1]) > repetition(middle):
        chosen.append(("the most repetitive", texts[-1]))
    return [
        (f"{title} (prompt {text['id']}, sample {text['sample']})", text["text"])
        for title, text in chosen
    ]
