"""Measures of texts, one by one and together: of generated texts and of references."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.baselines import unigram_losses
from ..nats import exp
from ..text.words import words
from .repetition import N, compression_ratio, distinct, longest_loop, ngrams, repeated, shared

COPIED = 8  # words of an n-gram that a text shares with its reference by more than coincidence
LOOPING = 0.25  # a text loops where at least this share of its tokens is in one loop, and
LOOP_TOKENS = 16  # at least as many tokens
JUDGED = 16  # fewer tokens are too short a text to repeat itself
NOVEL = 8  # fewer n-grams that are not the prompt's give no share


@dataclass(frozen=True)
class Source:
    """Text to measure, with its tokens and their values under the model.

    Attributes:
        id: Of the prompt.
        sample: Place among the texts of the prompt.
        prompt: The prompt's text.
        text: The text.
        ids: Token ids of the text [tokens].
        ended: Whether the text ended by itself, not at the limit of tokens.
        values: [5, tokens]: the rows of ``scoring.run.DETAILS``.
        references: Good continuations of the prompt.
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
    """Text and its measures; a share is from 0 to 1, or None for a text that is too short.

    Attributes:
        id: Of the prompt.
        sample: Place among the texts of the prompt.
        text: The text.
        tokens: Number of its tokens.
        ended: Whether the text ended by itself.
        non_finite: Number of tokens with a NaN or infinite NLL or entropy, left out of the sums.
        nll: Sum over tokens, nats.
        entropy: Sum over tokens, nats.
        early_entropy: Of the text's first half, nats a token.
        late_entropy: Of the text's second half, nats a token.
        repeated: Share of the 4-grams of words that occurred before in the text.
        loop: Share of the tokens that are in the longest loop.
        loop_tokens: Tokens of the longest loop.
        loop_period: Tokens of its period.
        compression: UTF-8 bytes over the bytes of the zlib-compressed text.
        same_prompt: Share of the 4-grams that are also in another sample of the prompt.
        other_prompts: Share of the 4-grams that are also in the sample of the same number of
            another prompt.
        copied: Share of the 8-grams that are in a reference.
        p_yes: The judge's probability of yes.

    The last three shares are of n-grams that are not the prompt's own.
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
        """Return the number of tokens in the sums."""
        return self.tokens - self.non_finite

    @property
    def repetition(self) -> float:
        """Return the larger of the shares ``repeated`` and ``loop``."""
        return max(self.repeated or 0.0, self.loop)

    @property
    def looping(self) -> bool:
        """Return whether a loop is a large part of the text."""
        return self.loop >= LOOPING and self.loop_tokens >= LOOP_TOKENS


def measure(sources: Sequence[Source]) -> list[Measured]:
    """Measure each text, alone and against the others.

    Args:
        sources: All texts of a probe, or all references.

    Returns:
        The measures in the order of ``sources``.
    """
    of_words = [words(source.text) for source in sources]
    of_prompts = {
        prompt: set(ngrams(words(prompt), 2)) for prompt in {source.prompt for source in sources}
    }
    novel = [
        _novel(text, N, of_prompts[source.prompt])
        for text, source in zip(of_words, sources, strict=True)
    ]
    same: dict[str, list[int]] = defaultdict(list)  # by prompt: the places of its texts
    # By sample: the number of prompts whose text has a 4-gram.
    spread: dict[int, Counter] = defaultdict(Counter)
    seen: dict[int, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    for place, source in enumerate(sources):
        same[source.prompt].append(place)
        seen[source.sample][source.prompt] |= set(novel[place])
    for sample, by_prompt in seen.items():
        for grams in by_prompt.values():
            spread[sample].update(grams)
    measured = []
    for place, source in enumerate(sources):
        siblings = [set(novel[other]) for other in same[source.prompt] if other != place]
        elsewhere = {gram for gram in novel[place] if spread[source.sample][gram] > 1}
        expected = {
            gram for reference in source.references for gram in ngrams(words(reference), COPIED)
        }
        shares: dict[str, float | None] = dict.fromkeys(("same_prompt", "other_prompts", "copied"))
        if siblings:
            shares["same_prompt"] = shared(novel[place], set().union(*siblings), NOVEL)
        if len(seen[source.sample]) > 1:
            shares["other_prompts"] = shared(novel[place], elsewhere, NOVEL)
        if expected:
            longer = _novel(of_words[place], COPIED, of_prompts[source.prompt])
            shares["copied"] = shared(longer, expected, NOVEL)
        measured.append(_measured(source, of_words[place], shares))
    return measured


def _novel(of_words: Sequence, n: int, of_prompt: set) -> list[tuple]:
    """Return the n-grams of a text without those that are made of the prompt's bigrams.

    One bigram of an n-gram may be missing in the prompt: the seam between two of its sentences, as
    in a summary of them.

    Args:
        of_words: Words of the text.
        n: Words of an n-gram.
        of_prompt: The prompt's bigrams.
    """
    if not of_prompt:
        return ngrams(of_words, n)
    known = [gram in of_prompt for gram in ngrams(of_words, 2)]
    return [
        gram for at, gram in enumerate(ngrams(of_words, n)) if sum(known[at : at + n - 1]) < n - 2
    ]


def _measured(source: Source, of_words: list, shares: dict[str, float | None]) -> Measured:
    """Measure a text alone; ``shares`` are its measures against other texts."""
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
    """Return the mean of values that are not None; None for fewer than ``least`` of them.

    Example:
        >>> mean([1.0, None, 2.0])
        1.5
    """
    kept = [value for value in values if value is not None]
    return math.fsum(kept) / len(kept) if len(kept) >= least else None


def totals(texts: Sequence[Measured], least: int) -> dict:
    """Return counts and means over texts; a mean of fewer than ``least`` texts is None.

    Args:
        texts: The texts.
        least: The fewest texts that make a mean.

    Returns:
        texts, tokens: counts; judged: number of texts with 16 tokens or more, whose repetition is
        averaged; mean_tokens, ended and empty (ended without a word): means over all texts;
        longest_loop: its text, tokens and period; entropy: nats a token; entropy_per_byte: nats a
        byte of text, which compares across tokenizers; distinct_n: of one text a prompt together,
        as many as there are references, averaged over the samples; repeated, repetition, looping,
        compression, same_prompt, other_prompts, copied: means over judged texts; early_entropy,
        late_entropy: means over texts that have them.
    """
    judged = [text for text in texts if text.tokens >= JUDGED]
    by_sample: dict[int, list] = defaultdict(list)
    for text in texts:
        by_sample[text.sample].append(words(text.text))
    tokens, scored = sum(text.tokens for text in texts), sum(text.scored for text in texts)
    bytes_ = sum(len(text.text.encode(errors="replace")) for text in texts)
    entropy = math.fsum(text.entropy for text in texts)
    longest = max(texts, key=lambda text: text.loop_tokens, default=None)
    summary: dict[str, Any] = {
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
        summary["longest_loop"] = {
            **{"id": longest.id, "sample": longest.sample},
            **{"tokens": longest.loop_tokens, "period": longest.loop_period},
        }
    for n in (1, 2, 4):
        summary[f"distinct_{n}"] = mean(distinct(of_words, n) for of_words in by_sample.values())
    for name in (
        "repeated",
        "repetition",
        "looping",
        "compression",
        "same_prompt",
        "other_prompts",
        "copied",
    ):
        summary[name] = mean((getattr(text, name) for text in judged), least)
    for name in ("early_entropy", "late_entropy"):
        summary[name] = mean((getattr(text, name) for text in texts), least)
    return summary


def perplexities(
    texts: Sequence[Measured],
    references: Sequence[Measured],
    reference_ids: Sequence[np.ndarray],
    vocabulary: int,
) -> dict:
    """Return losses and perplexities of the model and of guesses without context.

    Args:
        texts: The generated texts.
        references: The references.
        reference_ids: Token ids of each reference.
        vocabulary: Entries of the vocabulary.

    Returns:
        Losses in nats a token. self_*: of the model on its own texts; reference_*: of the model on
        the references; unigram_*: of the references' own token frequencies, which no guess without
        context can beat; left_out_loss: of each token under the frequencies of all others, which
        such a guess can have; uniform_loss: ln V; non_finite: number of tokens left out.
    """

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
    """Return ``unigram_losses`` of texts, None without a token."""
    tokens = np.concatenate(ids) if ids else np.empty(0, np.int64)
    if not len(tokens):
        return None, None
    return unigram_losses(np.unique(tokens, return_counts=True)[1], vocabulary)
