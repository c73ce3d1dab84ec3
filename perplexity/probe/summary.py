"""Rows and examples of a probe's JSON, which the terminal and the page both show."""

from __future__ import annotations

from ..calibration import rows as calibration_rows


def rows(record: dict) -> list[tuple[str, str, str, str]]:
    """Return the most important measures of a probe.

    Args:
        record: The JSON of a ``Probe``.

    Returns:
        Rows of text: name, value of the generated texts, value of the references, meaning.
    """
    own, other, losses = record["generation"], record["reference_texts"] or {}, record["perplexity"]

    def number(value: float | None, form: str = ",.2f") -> str:
        return "–" if value is None else format(value, form)

    context = losses["unigram_perplexity"]
    table = [
        (
            "perplexity",
            number(losses["self_perplexity"]),
            number(losses["reference_perplexity"]),
            "of the model on both"
            + ("" if context is None else f"; {context:,.0f} without context"),
        ),
        *(
            (name, number(own[key], form), number(other.get(key), form), meaning)
            for name, key, form, meaning in (
                (
                    "repeated 4-grams",
                    "repeated",
                    ".1%",
                    "share of a text's 4-grams that occurred before in it",
                ),
                ("texts that loop", "looping", ".1%", "a quarter or more in one loop"),
                (
                    "distinct 2-grams",
                    "distinct_2",
                    ".1%",
                    "across one sample per prompt; decreases with more prompts",
                ),
                ("compression", "compression", ".2f", "bytes over compressed bytes; 2.4 is a loop"),
                (
                    "entropy",
                    "entropy",
                    ".2f",
                    "nats a token: how open the model sees what comes next",
                ),
                (
                    "tokens a text",
                    "mean_tokens",
                    ",.0f",
                    f"{number(own['ended'], '.0%')} of its own ended by themselves",
                ),
            )
        ),
    ]
    for name, key, meaning in (
        ("same prompt", "same_prompt", "of 4-grams not in the prompt, in another text of it"),
        ("other prompts", "other_prompts", "of 4-grams not in the prompt, in a text of another"),
        ("copied", "copied", "of 8-grams not in the prompt, word by word in the reference"),
    ):
        if own[key] is not None:
            of_references = "" if other.get(key) is None else f"{other[key]:.1%}"
            table.append((name, f"{own[key]:.1%}", of_references, meaning))
    if record["references"]:
        r = record["references"]
        scores = f"{r['bleu']:.1f}, {r['chrf']:.1f}"
        rouge = ", ".join(number(r[key], ".3f") for key in ("rouge1", "rouge2", "rougeL"))
        table.append(("BLEU, chrF", scores, "", "of 100, against the references"))
        table.append(("ROUGE-1, 2, L", rouge, "", "F1, of 1"))
    if record["coherence"]:
        c = record["coherence"]
        cosines = number(c["with_prompt"]), number(c["with_reference"])
        table.append(("coherence", *cosines, "cosine with prompt; reference"))
    if record["ask"]:
        a = record["ask"]
        meaning = f"of the judge; {a['answered']:.0%} of its probability is on yes or no"
        table.append(("says yes", number(a["yes_of_two"], ".1%"), "", meaning))
    if record["calibration"]:
        table += [
            (name, "", value, meaning)
            for name, value, meaning in calibration_rows(record["calibration"])[:2]
        ]
    return table


def examples(record: dict) -> list[tuple[str, str]]:
    """Return the median text by repetition and the most repetitive one, each as (title, text)."""
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
