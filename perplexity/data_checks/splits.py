"""The size of the validation set, its distribution against training's, and another split."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from ..errors import needing
from ..findings import Finding
from ..text.words import digest, hashes, words
from .index import Index, Scan

USUAL = (0.01, 0.05)  # usual share of all text that validation has
# Standard deviation of a token's loss in nats, where it is not measured; models of English have 2.5
# to 3.3.
TOKEN_DEVIATION = 3.0
SHIFT = 0.1  # total variation distance between the sides' shares from which it is reported
CHANCE = 1e-3  # the largest probability of so large a distance between samples of one distribution


def needed_tokens(relative: float, deviation: float = TOKEN_DEVIATION) -> int:
    """Return the tokens that a 95% interval of the perplexity takes.

    (1.96 · deviation / log(1 + relative))², as of independent tokens.

    Args:
        relative: half-width of the interval, as a share of the perplexity.
        deviation: standard deviation of a token's loss, nats; default 3.

    Example:
        >>> needed_tokens(0.1)
        3807
    """
    return math.ceil((1.96 * deviation / math.log1p(relative)) ** 2)


def size_findings(
    index: Index, scan: Scan, tokens: int, unit: str, interval: float
) -> list[Finding]:
    """Return findings on the size of validation.

    Args:
        index: the validation side.
        scan: what was met in training.
        tokens: the size of validation, in ``unit``.
        unit: "tokens" or "words".
        interval: the relative half-width that is wanted of the perplexity's interval.
    """
    findings = []
    words = sum(index.lengths)
    share = words / max(1, words + scan.words)
    if scan.words and not USUAL[0] <= share <= USUAL[1]:
        few = share < USUAL[0]
        findings.append(
            Finding(
                "validation-size",
                "info",
                f"validation is {share:.2%} of all words; "
                f"{USUAL[0]:.0%} to {USUAL[1]:.0%} is usual",
                "enough tokens for the interval are what counts"
                if few
                else "some of it could be trained on",
                dict(valid_fraction=share),
            )
        )
    needed = needed_tokens(interval)
    if tokens < needed:
        half = math.expm1(1.96 * TOKEN_DEVIATION / math.sqrt(max(1, tokens)))
        findings.append(
            Finding(
                "validation-size",
                "warning",
                f"{tokens:,} {unit} give a perplexity to ± {half:.1%} at best (95 %, at "
                f"{TOKEN_DEVIATION:g} nats a token); ± {interval:.0%} needs {needed:,}",
                "differences smaller than that are noise: take a larger validation set, or compare "
                "paired (ppl compare)",
                dict(tokens=tokens, needed=needed),
            )
        )
    return findings


def shift_findings(index: Index, scan: Scan) -> list[Finding]:
    """Return findings on domains and lengths that differ between validation and training.

    They differ by ``SHIFT`` at least, and by more than chance (χ² of two samples).

    Args:
        index: the validation side.
        scan: what was met in training.
    """
    lengths = Counter(int(length).bit_length() for length in index.lengths)
    sides: dict[str, tuple[Counter, Counter]] = {
        "domains": (Counter(index.domains), scan.domains),
        "lengths": (lengths, scan.lengths),
    }
    findings = []
    for what, (valid, train) in sides.items():
        # Domains are the names of files, which differ where each side is one file.
        if what == "domains" and not valid.keys() & train.keys():
            continue
        distance, chance = _difference(valid, train)
        if distance > SHIFT and chance < CHANCE:
            keys = sorted(
                valid.keys() | train.keys(),
                key=lambda key: -abs(_share(valid, key) - _share(train, key)),
            )
            worst = keys[0]
            name = (
                worst
                if what == "domains"
                else f"{2 ** (worst - 1) if worst else 0:,} to {2**worst - 1:,} words"
            )
            findings.append(
                Finding(
                    "distribution-shift",
                    "warning",
                    f"{what} of validation and training documents differ by {distance:.0%} (total "
                    f"variation): {name} are {_share(valid, worst):.0%} of validation and "
                    f"{_share(train, worst):.0%} of training",
                    "validation loss then speaks of other text than training: split by hash "
                    "(--write-split), or report by domain",
                    dict(what=what, distance=distance),
                )
            )
    return findings


def _share(counts: Counter, key) -> float:
    return counts[key] / max(1, sum(counts.values()))


def _difference(valid: Counter, train: Counter) -> tuple[float, float]:
    """Return the total variation distance of the shares, and how probable so large a one is.

    The probability is of two samples of one distribution.
    """
    with needing("check_data", "data"):
        from scipy.stats import chi2_contingency

    keys = sorted(valid.keys() | train.keys(), key=str)
    table = np.array([[side[key] for key in keys] for side in (valid, train)], float)
    if len(keys) < 2 or not table.sum(1).all():
        return 0.0, 1.0
    shares = table / table.sum(1, keepdims=True)
    return float(np.abs(shares[0] - shares[1]).sum() / 2), float(chi2_contingency(table).pvalue)


def goes_to_validation(text: str, fraction: float) -> bool:
    """Return whether a split by hash puts a text on the validation side.

    The hash is of the words, the same in every run and on every machine, so that copies stay on one
    side.

    Args:
        text: the whole text.
        fraction: share of all texts that goes to validation, from 0 to 1.

    Example:
        >>> goes_to_validation("any text", 1.0), goes_to_validation("any text", 0.0)
        (True, False)
    """
    # Hashed twice: the top bits of a few words' hash are not uniform enough to cut by.
    return digest(np.array([digest(hashes(words(text)))], np.uint64)) < fraction * 2**64
