"""What is measured on texts, each alone and all together: on a model's own and, to compare with, on
the references.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metric import exp
from ..text.words import words
from .repetition import N, compression_ratio, distinct, longest_loop, ngrams, repeated, shared

COPIED = 8  # words in a row that are no coincidence: of n-grams shared with a reference
LOOPING = 0.25  # of a text's tokens in one loop, and
LOOP_TOKENS = 16  # as many at least: a text that loops
JUDGED = 16  # tokens of a text that is long enough to repeat itself
NOVEL = 8  # n-grams that are not the prompt's, at least, for a share of them


@dataclass(frozen=True)
class Source:
    """A text to measure: ``prompt`` and ``references`` as texts, ``ids`` [tokens], ``values`` [5,
    tokens], ``collect.DETAILS``.
    """

    id: str
    sample: int
    prompt: str
    text: str
    ids: np.ndarray
    ended: bool
    values: np.ndarray
    references: Sequence[str] = ()


@dataclass(frozen=True)
class Measured:
    """A text and its measures; shares are of 1, None where the text is too short for one.

    nll, entropy: sums over its tokens, nats; non_finite: tokens left out of them, whose NLL or
    entropy is NaN or infinite; early_entropy, late_entropy: nats a token of its two halves.
    repeated: of 4-grams of words, those that were in the text before; loop: of tokens, those in its
    longest loop, of loop_tokens with a period of loop_period; compression: bytes over zlib's. Of
    n-grams that are not the prompt's: same_prompt, 4-grams that another sample of the prompt has,
    too; other_prompts, that the text of another prompt has (the sample of the same number); copied,
    8-grams of the reference. p_yes: the judge's.
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
    same_prompt: float | None
    other_prompts: float | None
    copied: float | None
    p_yes: float | None = None

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


def measure(sources: Sequence[Source]) -> list[Measured]:
    """Each of ``sources`` measured, alone and beside the others."""
    of_words = [words(source.text) for source in sources]
    of_prompts = {
        prompt: set(ngrams(words(prompt), 2)) for prompt in {source.prompt for source in sources}
    }
    novel = [
        _novel(found, N, of_prompts[source.prompt])
        for found, source in zip(of_words, sources, strict=True)
    ]
    same: dict[str, list[int]] = defaultdict(list)  # by prompt: its texts
    # by sample: in how many prompts' texts a 4-gram is
    spread: dict[int, Counter] = defaultdict(Counter)
    seen: dict[int, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    for place, source in enumerate(sources):
        same[source.prompt].append(place)
        seen[source.sample][source.prompt] |= set(novel[place])
    for sample, by_prompt in seen.items():
        for found in by_prompt.values():
            spread[sample].update(found)
    measured = []
    for place, source in enumerate(sources):
        siblings = [set(novel[other]) for other in same[source.prompt] if other != place]
        elsewhere = {gram for gram in novel[place] if spread[source.sample][gram] > 1}
        said = {
            gram for reference in source.references for gram in ngrams(words(reference), COPIED)
        }
        measured.append(
            _measured(
                source,
                of_words[place],
                same_prompt=shared(novel[place], set().union(*siblings), NOVEL)
                if siblings
                else None,
                other_prompts=shared(novel[place], elsewhere, NOVEL)
                if len(seen[source.sample]) > 1
                else None,
                copied=shared(
                    _novel(of_words[place], COPIED, of_prompts[source.prompt]), said, NOVEL
                )
                if said
                else None,
            )
        )
    return measured


def _novel(found: Sequence, n: int, said: set) -> list[tuple]:
    """n-grams of a text but for the prompt's: those of which all but one of the bigrams, or all,
    are in the prompt.

    The one is a seam: a summary of the prompt's own sentences says nothing of its own there either.
    """
    if not said:
        return ngrams(found, n)
    known = [gram in said for gram in ngrams(found, 2)]
    return [gram for at, gram in enumerate(ngrams(found, n)) if sum(known[at : at + n - 1]) < n - 2]


def _measured(source: Source, of_words: list, **shares) -> Measured:
    nll, entropy = source.values[0].astype(np.float64), source.values[1].astype(np.float64)
    finite = np.isfinite(nll) & np.isfinite(entropy)
    nll, entropy, tokens = nll[finite], entropy[finite], len(source.ids)
    loop = longest_loop(source.ids)
    half = len(nll) // 2 if len(nll) >= JUDGED else 0
    return Measured(
        id=source.id,
        sample=source.sample,
        text=source.text,
        tokens=tokens,
        ended=source.ended,
        non_finite=int((~finite).sum()),
        nll=float(nll.sum()),
        entropy=float(entropy.sum()),
        early_entropy=float(entropy[:half].mean()) if half else None,
        late_entropy=float(entropy[half:].mean()) if half else None,
        repeated=repeated(of_words),
        loop=loop.length / tokens if loop else 0.0,
        loop_tokens=loop.length if loop else 0,
        loop_period=loop.period if loop else 0,
        compression=compression_ratio(source.text),
        **shares,
    )


def mean(values: Iterable, least: int = 1) -> float | None:
    """Of those that are numbers; None where there are fewer than ``least``."""
    kept = [value for value in values if value is not None]
    return math.fsum(kept) / len(kept) if len(kept) >= least else None


def totals(texts: Sequence[Measured], least: int) -> dict:
    """Of all texts: counts, lengths, and means over the texts that have a measure, ``least`` of
    them at least, else None.

    judged: texts of 16 tokens or more, which alone say something of repetition; empty: that ended
    without a word. distinct_n: of the texts of one sample a prompt, mean over the samples: as many
    texts as there are references. entropy: nats a token; entropy_per_byte: the same by byte of
    text, which no tokenizer changes.
    """
    judged = [text for text in texts if text.tokens >= JUDGED]
    by_sample: dict[int, list] = defaultdict(list)
    for text in texts:
        by_sample[text.sample].append(words(text.text))
    tokens, scored = sum(text.tokens for text in texts), sum(text.scored for text in texts)
    bytes_ = sum(len(text.text.encode(errors="replace")) for text in texts)
    entropy = math.fsum(text.entropy for text in texts)
    longest = max(texts, key=lambda text: text.loop_tokens, default=None)
    found: dict[str, Any] = {
        "texts": len(texts),
        "judged": len(judged),
        "tokens": tokens,
        "mean_tokens": mean(text.tokens for text in texts),
        "ended": mean(text.ended for text in texts),
        "empty": mean(text.ended and not text.text.strip() for text in texts),
        "longest_loop": None,
        "entropy": entropy / scored if scored else None,
        "entropy_per_byte": entropy / bytes_ if bytes_ and scored == tokens else None,
    }
    if longest is not None and longest.loop_tokens:
        found["longest_loop"] = {
            **{"id": longest.id, "sample": longest.sample},
            **{"tokens": longest.loop_tokens, "period": longest.loop_period},
        }
    for n in (1, 2, 4):
        found[f"distinct_{n}"] = mean(distinct(of_words, n) for of_words in by_sample.values())
    for name in (
        "repeated",
        "repetition",
        "looping",
        "compression",
        "same_prompt",
        "other_prompts",
        "copied",
    ):
        found[name] = mean((getattr(text, name) for text in judged), least)
    for name in ("early_entropy", "late_entropy"):
        found[name] = mean((getattr(text, name) for text in texts), least)
    return found


def perplexities(
    texts: Sequence[Measured],
    references: Sequence[Measured],
    reference_ids: Sequence[np.ndarray],
    vocabulary: int,
) -> dict:
    """Loss and perplexity of the model on its own texts and on the references, nats a token, and
    beside the references what a guess without context would have: ``unigram_loss``, by their own
    tokens' frequencies, which no such guess can beat; and ``left_out_loss``, each token by the
    frequencies of all the others, which a guess can have."""

    def loss(of: Sequence[Measured]) -> float | None:
        tokens = sum(text.scored for text in of)
        return math.fsum(text.nll for text in of) / tokens if tokens else None

    own, on_references = loss(texts), loss(references)
    unigram, left_out = _without_context(reference_ids, vocabulary)
    return {
        "self_loss": own,
        "self_perplexity": exp(own),
        "self_tokens": sum(text.scored for text in texts),
        "reference_loss": on_references,
        "reference_perplexity": exp(on_references),
        "reference_tokens": sum(text.scored for text in references),
        "unigram_loss": unigram,
        "unigram_perplexity": exp(unigram),
        "left_out_loss": left_out,
        "uniform_loss": math.log(vocabulary),
        "non_finite": sum(text.non_finite for text in (*texts, *references)),
    }


def _without_context(
    ids: Sequence[np.ndarray], vocabulary: int
) -> tuple[float | None, float | None]:
    """Entropy of the tokens' own frequencies; and each token under those of the others, a half
    added to all V (Krichevsky and Trofimov 1981), at most log V."""
    tokens = np.concatenate(ids) if ids else np.empty(0, np.int64)
    if not len(tokens):
        return None, None
    counts = np.unique(tokens, return_counts=True)[1].astype(np.float64)
    count = counts.sum()
    unigram = -(counts / count * np.log(counts / count)).sum()
    left_out = -(counts / count * np.log((counts - 0.5) / (count - 1 + 0.5 * vocabulary))).sum()
    return float(unigram), min(float(left_out), math.log(vocabulary))
