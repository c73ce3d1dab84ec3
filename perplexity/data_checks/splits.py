"""Is the validation set large enough, of the same kind as training, and how else would it be
cut.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from ..errors import needing
from ..findings import Finding
from ..text.words import digest, hashes, words
from .index import Index, Scan

USUAL = (0.01, 0.05)  # share of all text that validation usually is
# nats: of a token's loss, where nobody measured it; 2.5 to 3.3 for models of English
TOKEN_DEVIATION = 3.0
SHIFT = 0.1  # total variation distance between the sides' shares from which a difference is told
CHANCE = 1e-3  # of a difference that large between samples of one distribution


def needed_tokens(relative: float, deviation: float = TOKEN_DEVIATION) -> int:
    """Tokens for a 95 % interval of ± ``relative`` of the perplexity: (1.96 · deviation / log(1 +
    relative))².
    """
    return math.ceil((1.96 * deviation / math.log1p(relative)) ** 2)


def size_findings(
    index: Index, scan: Scan, tokens: int, unit: str, interval: float
) -> list[Finding]:
    """``tokens``: of validation, in ``unit``; ``interval``: the relative half-width that is wanted
    of the perplexity.
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
                f"validation is {share:.2%} of all words; {USUAL[0]:.0%} to {USUAL[1]:.0%} is usual",
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
                f"{tokens:,} {unit} give a perplexity to ± {half:.1%} at best (95 %, at {TOKEN_DEVIATION:g} nats a token); "
                f"± {interval:.0%} needs {needed:,}",
                "differences smaller than that are noise: take a larger validation set, or compare paired (ppl compare)",
                dict(tokens=tokens, needed=needed),
            )
        )
    return findings


def shift_findings(index: Index, scan: Scan) -> list[Finding]:
    """Domains and lengths of both sides: told where they differ by ``SHIFT`` and by more than
    chance (χ² of two samples).
    """
    lengths = Counter(int(length).bit_length() for length in index.lengths)
    sides: dict[str, tuple[Counter, Counter]] = {
        "domains": (Counter(index.domains), scan.domains),
        "lengths": (lengths, scan.lengths),
    }
    findings = []
    for what, (valid, train) in sides.items():
        # One file a side says nothing of domains: they are the files' names.
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
                    f"{what} of validation and training documents differ by {distance:.0%} (total variation): {name} are "
                    f"{_share(valid, worst):.0%} of validation and {_share(train, worst):.0%} of training",
                    "validation loss then speaks of other text than training: split by hash (--write-split), or report by domain",
                    dict(what=what, distance=distance),
                )
            )
    return findings


def _share(counts: Counter, key) -> float:
    return counts[key] / max(1, sum(counts.values()))


def _difference(valid: Counter, train: Counter) -> tuple[float, float]:
    """Total variation distance of the shares, and the chance of one as large between samples of the
    same kind.
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
    """By the hash of its words: the same in every run and on every machine, and copies stay on one
    side.
    """
    # Hashed once more: the first digest of few words is not even enough in its top bits to be cut
    # by.
    return digest(np.array([digest(hashes(words(text)))], np.uint64)) < fraction * 2**64
