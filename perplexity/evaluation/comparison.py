"""``compare``: the paired difference of two evaluations of one text.

Evaluations that do not compare are refused, with the reason: another text, another tokenizer for
the loss, another part of the text for bits per byte.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .. import checks
from ..errors import InputError, InputTypeError
from ..json_files import SCHEMA_VERSION, same_model
from ..nats import exp
from ..text.spans import Spans, groups_of
from .results import Evaluation, checked_record, read_result
from .uncertainty import (
    CONFIDENCE,
    TRUSTED_CLUSTERS,
    blocks_of,
    half_width,
    ratio_stderr,
    scipy_stats,
)

MEASURES = ("loss", "bits-per-byte")


@dataclass(frozen=True)
class Comparison:
    """The difference of two evaluations, B against A, paired by document.

    Args:
        measure: "loss" or "bits-per-byte".
        a: the measure of A, nats a token or bits a byte.
        b: the measure of B, likewise.
        difference: b - a; negative where B is better.
        stderr: standard error of the difference; None of a single pair.
        interval: 95% interval of the difference; None of a single pair.
        p_value: probability of so large a difference between equals, two-sided.
        perplexity_ratio: exp(difference); None of bits per byte.
        perplexity_ratio_interval: exp of ``interval``; None of bits per byte.
        unit: of the pairs, "document", or "block" of the only document.
        pairs: number of them.
        tokens: tokens scored in both.
        effective_tokens: tokens that an unpaired comparison needs for the same standard error.
        better_in: pairs in which B's loss is the lower one.
        trusted: whether there are enough pairs for the interval.
        notes: what to know before the numbers are believed.
        model_a: model of A, where the result names it; default None.
        model_b: model of B, likewise.

    Example:
        >>> comparison = Comparison(
        ...     "loss", 3.1, 3.0, -0.1, 0.02, (-0.14, -0.06), 1e-4, 0.9, (0.87, 0.94),
        ...     "document", 30, 900, 1200.0, 25, True, [],
        ... )
        >>> comparison.verdict == comparison.to_dict()["verdict"] == "B is better"
        True
    """

    measure: str
    a: float
    b: float
    difference: float
    stderr: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    perplexity_ratio: float | None
    perplexity_ratio_interval: tuple[float, float] | None
    unit: str
    pairs: int
    tokens: int
    effective_tokens: float | None
    better_in: int
    trusted: bool
    notes: list[str]
    model_a: dict | None = None
    model_b: dict | None = None

    @property
    def verdict(self) -> str:
        """Return which of the two is better, if that is more than chance."""
        if self.p_value is None:
            return "one pair: no telling whether the difference is more than chance"
        if self.p_value >= 1 - CONFIDENCE:
            return "no difference beyond chance"
        return f"{'B' if self.difference < 0 else 'A'} is better"

    ok = True  # values that are not finite have failed the evaluation itself

    def to_dict(self) -> dict:
        """Return the fields and the verdict.

        Returns:
            Dicts, lists and scalars: the keys of ``ppl compare --json``.
        """
        return {**asdict(self), "verdict": self.verdict}


def compare(
    a: Evaluation | dict | str | Path, b: Evaluation | dict | str | Path, *, measure: str = "loss"
) -> Comparison:
    """Return the paired difference of two evaluations of one text.

    Args:
        a: the baseline: an Evaluation, its JSON as a dict, or a file of it.
        b: the evaluation to compare with it, likewise.
        measure: "loss" (default), nats a token, refuses different tokenizers: a token is not the
            same unit for both. "bits-per-byte" compares over the bytes that both scored: where one
            has no loss for a document's first token, both leave its bytes out.

    Returns:
        A Comparison of B against A.

    Raises:
        InputError: texts, documents or, for the loss, tokens differ; a loss is not finite.

    Example:
        >>> rows = [{"nll": 6.0, "tokens": 3, "bytes": 9}, {"nll": 4.0, "tokens": 2, "bytes": 5}]
        >>> a = {"loss": 2.0, "tokens": 5, "per_document": rows}
        >>> a |= {"tokenizer_fingerprint": "t", "text_fingerprint": "x"}
        >>> b = a | {"loss": 1.0, "per_document": [row | {"nll": row["tokens"]} for row in rows]}
        >>> compare(a, b).difference
        -1.0
    """
    checks.choice("measure", measure, MEASURES)
    a, b = _record(a, "a"), _record(b, "b")
    if a["text_fingerprint"] != b["text_fingerprint"]:
        raise InputError(
            f"text: expected one text for both, got fingerprints {a['text_fingerprint']} and "
            f"{b['text_fingerprint']}: no measure compares across texts"
        )
    documents = [
        [(d["nll"], d["tokens"], d["bytes"]) for d in side["per_document"]] for side in (a, b)
    ]
    # The fingerprint is of the texts in order, so documents correspond by place, whatever their
    # names.
    rows = [np.array(side, dtype=np.float64).reshape(-1, 3) for side in documents]
    if len(rows[0]) != len(rows[1]):
        raise InputError(
            f"per_document: expected as many for both, got {len(rows[0])} and {len(rows[1])}"
        )
    _check_finite(a, b)
    notes = []
    if measure == "loss":
        _check_tokens(a, b, rows)
    else:
        notes = _same_bytes(a, b, rows)
    nll_a, nll_b = rows[0][:, 0], rows[1][:, 0]
    unit, scale = "document", 1.0
    size = rows[0][:, 1]
    if measure == "bits-per-byte":
        size, scale = rows[0][:, 2], math.log(2)
    kept = (size > 0) & (rows[0][:, 1] > 0) & (rows[1][:, 1] > 0)
    nll_a, nll_b, size = nll_a[kept] / scale, nll_b[kept] / scale, size[kept]
    if not len(size):
        raise InputError("per_document: expected documents with scored tokens, got none")
    if len(size) == 1 and measure == "loss" and a.get("blocks") and b.get("blocks"):
        unit = "block"
        (nll_a, size), (nll_b, others) = (
            blocks_of(*np.array(side["blocks"], dtype=np.float64).T) for side in (a, b)
        )
        if not np.array_equal(size, others):
            raise InputError("blocks: expected as many tokens in each for both, got others")
    total = size.sum()
    loss_a, loss_b = float(nll_a.sum() / total), float(nll_b.sum() / total)
    difference = float((nll_b - nll_a).sum() / total)
    stderr = ratio_stderr(nll_b - nll_a, size)
    interval = p_value = effective = None
    tokens = int(rows[0][kept, 1].sum())
    if stderr is not None:
        width = half_width(stderr, len(size))
        interval = difference - width, difference + width
        p_value = _p_value(difference, stderr, len(size))
        alone = [ratio_stderr(nll, size) for nll in (nll_a, nll_b)]
        if stderr > 0:
            effective = tokens * sum(error**2 for error in alone if error is not None) / stderr**2
    of_loss = measure == "loss"
    return Comparison(
        measure,
        loss_a,
        loss_b,
        difference,
        stderr,
        interval,
        p_value,
        exp(difference) if of_loss else None,
        (exp(interval[0]), exp(interval[1])) if of_loss and interval else None,
        unit,
        len(size),
        tokens,
        effective,
        int((nll_b < nll_a).sum()),
        len(size) >= TRUSTED_CLUSTERS,
        notes + _notes(a, b, len(size), unit, measure),
        *(side["model"] if isinstance(side.get("model"), dict) else None for side in (a, b)),
    )


def _record(side: object, name: str) -> dict:
    """Return the JSON object of one side of a comparison, argument ``name``."""
    if isinstance(side, str | Path):
        return read_result(side)
    if isinstance(side, Evaluation):
        return {"schema_version": SCHEMA_VERSION} | asdict(side)
    if isinstance(side, dict):
        return checked_record(side, name, "the JSON of an Evaluation")
    expected = "an Evaluation, its JSON or a file of it"
    raise InputTypeError(f"{name}: expected {expected}, got {type(side).__name__}")


def _check_finite(a: dict, b: dict) -> None:
    """Raise where one side left out tokens whose loss is not finite."""
    for name, side in (("A", a), ("B", b)):
        if bad := side.get("non_finite"):
            raise InputError(
                f"loss: expected a finite loss of every token, got {bad.get('tokens')} of {name} "
                "that are NaN or infinite and left out: the two are not over the same text"
            )


def _check_tokens(a: dict, b: dict, rows: list[np.ndarray]) -> None:
    """Raise unless both sides scored the same tokens of every document."""
    if a["tokenizer_fingerprint"] != b["tokenizer_fingerprint"]:
        instead = ""
        if all(isinstance(side.get("bits_per_byte"), float | int) for side in (a, b)):
            instead = f": A {a['bits_per_byte']:.4f}, B {b['bits_per_byte']:.4f}"
        raise InputError(
            "tokenizer: token losses and perplexities of different tokenizers do not compare "
            f"({a['tokenizer_fingerprint']} and {b['tokenizer_fingerprint']}): a token is not the "
            f"same piece of text; bits per byte do (--measure bits-per-byte){instead}"
        )
    different = int((rows[0][:, 1] != rows[1][:, 1]).sum())
    if different:
        raise InputError(
            f"tokens: expected the same tokens scored in both, {different} of {len(rows[0])} "
            f"documents differ ({_scoring(a)} and {_scoring(b)})"
        )


def _scoring(side: dict) -> str:
    """Describe what decides which tokens of a text are scored."""
    skipped = ", ".join(f"{count} {reason}" for reason, count in side.get("skipped", {}).items())
    return f"protocol {side.get('protocol')}, BOS {side.get('bos')}, skipped {skipped or 'none'}"


def _check_bytes(a: dict, b: dict, rows: list[np.ndarray]) -> None:
    """Raise unless both sides scored the same bytes of every document."""
    versions = [side.get("schema_version", 1) for side in (a, b)]
    if min(versions) == 1 and versions[0] != versions[1]:
        raise InputError(
            f"bytes: expected both results of one schema_version, got {versions[0]} and "
            f"{versions[1]}: version 1 counts the bytes of text that was not scored, too; evaluate "
            "that model again"
        )
    different = int((rows[0][:, 2] != rows[1][:, 2]).sum())
    if different:
        raise InputError(
            f"bytes: expected the same part of the text scored in both, {different} of "
            f"{len(rows[0])} documents differ ({_scoring(a)} and {_scoring(b)})"
        )


def _same_bytes(a: dict, b: dict, rows: list[np.ndarray]) -> list[str]:
    """Drop from ``rows`` what only one side scored at documents' beginnings, and return notes.

    Raises:
        InputError: the two sides differ further on in a document.
    """
    beginnings = [_beginnings(side, len(rows[0])) for side in (a, b)]
    # A document that only one side scored is not compared.
    one_sided = (rows[0][:, 1] > 0) != (rows[1][:, 1] > 0)
    for row in rows:
        row[one_sided] = 0
    left_out = documents = 0
    apart = int(one_sided.sum())
    both = [side for side in beginnings if side]
    for place in range(len(rows[0])) if len(both) == 2 else ():
        sides = [begun for side in both if (begun := side[place]) is not None]
        # A side without a scored token there has skipped more than a first token.
        if one_sided[place] or len(sides) < 2:
            continue
        if sides[0].first == sides[1].first and rows[0][place, 2] == rows[1][place, 2]:
            continue
        scored = max(side.first for side in sides)
        common = [end for end in sides[0].ends if end >= scored and end in sides[1].ends]
        if common:
            documents, left_out = documents + 1, left_out + min(common)
            for side, row in zip(sides, rows, strict=True):
                row[place] -= side.sums[side.ends.index(min(common))]
        else:
            apart += 1
            for row in rows:
                row[place] = 0
    _check_bytes(a, b, rows)
    notes = []
    if documents:
        notes.append(
            f"over the bytes that both scored: {left_out:,} bytes at the beginning of "
            f"{documents:,} documents, some of which one side did not score, are left out"
        )
    if apart:
        notes.append(
            f"{apart:,} documents are left out: one side scored nothing of them, or less of their "
            "beginning, where the two have no token boundary in common"
        )
    return notes


@dataclass(frozen=True)
class _Beginning:
    """The beginning of a document: the ends of its first tokens and the sums up to each end.

    Args:
        first: the first byte that was scored.
        ends: where tokens end, in bytes.
        sums: before each end the nats, tokens and bytes that were scored.
    """

    first: int
    ends: list[int]
    sums: list[np.ndarray]


def _beginnings(side: dict, count: int) -> list[_Beginning | None] | None:
    """Return the beginning of each document, None for one without a scored token there.

    The whole is None where a result file has no ``first_tokens``.
    """
    first_tokens = side.get("first_tokens")
    if not first_tokens:
        return None
    if len(first_tokens) != count or not all(map(_is_beginning, first_tokens)):
        raise InputError("first_tokens: expected ends and losses of every document's first tokens")
    return [_beginning(pairs) for pairs in first_tokens]


def _is_beginning(pairs: list[float | None]) -> bool:
    """Return whether every second number is an end in bytes, in order, and has a loss or None."""
    ends = pairs[::2]
    known = [end for end in ends if end is not None and end >= 0 and end % 1 == 0]
    return len(pairs) % 2 == 0 and len(known) == len(ends) and known == sorted(known)


def _beginning(pairs: list[float | None]) -> _Beginning | None:
    """Return the beginning of a document from the ends and losses of its first tokens."""
    if not pairs:
        return None
    ends = np.array(pairs[::2], dtype=np.int64)
    spans = Spans(ends, groups_of(ends))
    scored = np.array([loss is not None for loss in pairs[1::2]])
    losses = np.array([loss or 0.0 for loss in pairs[1::2]])
    whole, count = spans.whole(scored), spans.groups[-1] + 1
    reached = np.unique(ends[ends > 0])
    if not whole.any() or len(reached) != count:
        return None
    sizes = np.diff(reached, prepend=0)
    first = int((reached - sizes)[whole][0])
    columns = [
        np.bincount(spans.groups, losses, count),
        np.bincount(spans.groups, scored, count),
        sizes * whole,
    ]
    sums = np.stack(columns, axis=1).cumsum(axis=0)
    return _Beginning(first, [0, *reached.tolist()], [np.zeros(3), *sums])


def _p_value(difference: float, stderr: float, pairs: int) -> float:
    """Return the two-sided p-value under Student's t with pairs - 1 degrees of freedom."""
    if stderr == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * scipy_stats().t.sf(abs(difference) / stderr, pairs - 1))


def _notes(a: dict, b: dict, pairs: int, unit: str, measure: str) -> list[str]:
    """Return what to know before the comparison is believed."""
    notes = []
    if same_model(a, b):
        notes.append(f"A and B are the same model (fingerprint {a['model']['fingerprint']})")
    if measure == "bits-per-byte" and a.get("schema_version", 1) == 1:
        notes.append(
            "both results are of schema_version 1, whose bytes include text that was not scored"
        )
    windows = ("protocol", "context_length", "stride", "bos", "special_text")
    for key in (*windows, "skipped", "precision"):
        if a.get(key) != b.get(key):
            notes.append(
                f"{key.replace('_', ' ')} differs ({a.get(key)} and {b.get(key)}): "
                "part of the difference may be its"
            )
    if pairs < TRUSTED_CLUSTERS:
        notes.append(f"{pairs} {unit}s are too few: interval and p-value are not to be trusted")
    if unit == "block":
        notes.append("one document: paired by blocks of it; it speaks of this document only")
    return notes
