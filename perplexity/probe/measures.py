"""What is measured on generated texts, each alone and all together; on references the same, to compare with."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data_checks.words import words
from ..metric import exp
from .generation import Generated
from .prompts import Asked
from .repetition import N, compression_ratio, distinct, longest_loop, ngrams, repeated, shared

COPIED = 8  # words in a row that are no coincidence: of n-grams shared with a reference
LOOPING = 0.25  # of a text's tokens in one loop, and
LOOP_TOKENS = 16  # as many at least: a text that loops
JUDGED = 16  # tokens of a text that is long enough to repeat itself


@dataclass(frozen=True)
class Measured:
    """A text and its measures; shares are of 1, None where the text is too short for one.

    nll, entropy: sums over its tokens, nats; non_finite: tokens left out of them, whose NLL or entropy is NaN or infinite;
    early_entropy, late_entropy: nats a token of its two halves. repeated: of 4-grams of words, those that were in the text
    before; loop: of tokens, those in its longest loop, of loop_tokens with a period of loop_period; compression: bytes over
    zlib's; same_prompt: of 4-grams, those that another sample of the prompt has, too; other_prompts: those that a sample of
    another prompt has; copied: of 8-grams, those that the reference has and the prompt has not.
    """

    id: str
    sample: int
    text: str
    tokens: int
    ended: bool
    non_finite: int
    nll: float
    entropy: float
    early_entropy: float | None
    late_entropy: float | None
    repeated: float | None
    loop: float
    loop_tokens: int
    loop_period: int
    compression: float | None
    same_prompt: float | None = None
    other_prompts: float | None = None
    copied: float | None = None

    @property
    def scored(self) -> int:
        """Tokens whose NLL is a number."""
        return self.tokens - self.non_finite

    @property
    def repetition(self) -> float:
        """The worse of the two: words that come again, tokens in a loop."""
        return max(self.repeated or 0.0, self.loop)

    @property
    def looping(self) -> bool:
        return self.loop >= LOOPING and self.loop_tokens >= LOOP_TOKENS


def measure(asked: list[Asked], generated: list[Generated], scored: list[np.ndarray]) -> list[Measured]:
    """Each of ``generated`` measured; ``scored``: of each its tokens' statistics [5, tokens]."""
    of_words = [words(text.text) for text in generated]
    grams = [set(ngrams(found, N)) for found in of_words]
    by_prompt = defaultdict(list)
    for place, text in enumerate(generated):
        by_prompt[text.prompt].append(place)
    # In how many prompts' samples a 4-gram is.
    prompts_with = Counter(
        gram for places in by_prompt.values() for gram in set().union(*(grams[place] for place in places))
    )
    found = []
    for place, (text, values) in enumerate(zip(generated, scored, strict=True)):
        siblings = [grams[other] for other in by_prompt[text.prompt] if other != place]
        elsewhere = {gram for gram in grams[place] if prompts_with[gram] > 1}
        own = asked[text.prompt]
        said = {gram for reference in own.references for gram in ngrams(words(reference), COPIED)}
        said -= set(ngrams(words(own.text), COPIED))  # what the prompt says may be said again: quotations, summaries
        found.append(
            _measured(
                own.prompt.id,
                text.sample,
                text.text,
                text.ids,
                text.ended,
                values,
                of_words[place],
                same_prompt=shared(of_words[place], set().union(*siblings)) if siblings else None,
                other_prompts=shared(of_words[place], elsewhere) if len(by_prompt) > 1 else None,
                copied=shared(of_words[place], said, COPIED) if said else None,
            )
        )
    return found


def measure_references(asked: list[Asked], texts: list[str], scored: list[np.ndarray]) -> list[Measured]:
    """The references as scored, ``texts`` and their statistics, measured as if they had been generated; ``ended``: none of it
    is left out, and it is no piece of a document."""
    return [
        _measured(
            prompt.prompt.id,
            0,
            text,
            prompt.reference,
            not (prompt.cut or prompt.prompt.document),
            values,
            words(text),
        )
        for prompt, text, values in zip(asked, texts, scored, strict=True)
    ]


def _measured(
    id: str, sample: int, text: str, ids, ended: bool, values: np.ndarray, of_words: list, **more
) -> Measured:
    nll, entropy = values[0].astype(np.float64), values[1].astype(np.float64)
    finite = np.isfinite(nll) & np.isfinite(entropy)
    nll, entropy = nll[finite], entropy[finite]
    loop = longest_loop(ids)
    half = len(nll) // 2 if len(nll) >= JUDGED else 0
    return Measured(
        id,
        sample,
        text,
        len(ids),
        ended,
        int((~finite).sum()),
        float(nll.sum()),
        float(entropy.sum()),
        float(entropy[:half].mean()) if half else None,
        float(entropy[half:].mean()) if half else None,
        repeated(of_words),
        loop.length / len(ids) if loop else 0.0,
        loop.length if loop else 0,
        loop.period if loop else 0,
        compression_ratio(text),
        **more,
    )


def mean(values) -> float | None:
    """Of those that are numbers; None of none."""
    kept = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(kept) / len(kept) if kept else None


def together(texts: Sequence[Measured]) -> dict:
    """Of all texts: counts, mean lengths, distinct-n, and means of what was measured over texts of 16 tokens or more (``judged``).

    entropy: nats a token; entropy_per_byte: the same by byte of text, which no tokenizer changes.
    """
    of_words = [words(text.text) for text in texts]
    judged = [text for text in texts if text.tokens >= JUDGED]
    tokens, bytes_ = sum(text.tokens for text in texts), sum(len(text.text.encode(errors="replace")) for text in texts)
    entropy, scored = math.fsum(text.entropy for text in texts), sum(text.scored for text in texts)
    worst = max(texts, key=lambda text: text.loop_tokens, default=None)
    return {
        "texts": len(texts),
        "judged": len(judged),
        "tokens": tokens,
        "mean_tokens": tokens / len(texts) if texts else None,
        "ended": mean(text.ended for text in texts),
        "empty": mean(not text.text.strip() for text in texts),
        **{f"distinct_{n}": distinct(of_words, n) for n in (1, 2, 4)},
        "repeated": mean(text.repeated for text in judged),
        "repetition": mean(text.repetition for text in judged),
        "looping": mean(text.looping for text in judged),
        "longest_loop": None
        if worst is None or not worst.loop_tokens
        else {"id": worst.id, "sample": worst.sample, "tokens": worst.loop_tokens, "period": worst.loop_period},
        "compression_ratio": mean(text.compression for text in judged),
        "same_prompt": mean(text.same_prompt for text in judged),
        "other_prompts": mean(text.other_prompts for text in judged),
        "copied": mean(text.copied for text in judged),
        "entropy": entropy / scored if scored else None,
        "entropy_per_byte": entropy / bytes_ if bytes_ and scored == tokens else None,
        "early_entropy": mean(text.early_entropy for text in texts),
        "late_entropy": mean(text.late_entropy for text in texts),
    }


def perplexities(
    texts: Sequence[Measured], references: Sequence[Measured], reference_ids: Sequence[np.ndarray], vocabulary: int
) -> dict:
    """Loss and perplexity of the model on its own texts and on the references, nats a token; beside the references also the
    best guess without context, from their own tokens' frequencies, and the uniform one."""

    def loss(of: Sequence[Measured]) -> float | None:
        tokens = sum(text.scored for text in of)
        return math.fsum(text.nll for text in of) / tokens if tokens else None

    own, on_references = loss(texts), loss(references)
    unigram = None
    if references:
        counts = np.unique(np.concatenate(reference_ids), return_counts=True)[1]
        shares = counts / counts.sum()
        unigram = float(-(shares * np.log(shares)).sum())
    return {
        "self_loss": own,
        "self_perplexity": exp(own),
        "self_tokens": sum(text.scored for text in texts),
        "reference_loss": on_references,
        "reference_perplexity": exp(on_references),
        "reference_tokens": sum(text.scored for text in references),
        "unigram_loss": unigram,
        "unigram_perplexity": exp(unigram),
        "uniform_loss": math.log(vocabulary),
        "non_finite": sum(text.non_finite for text in (*texts, *references)),
    }
