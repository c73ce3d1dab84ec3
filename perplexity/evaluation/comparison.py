"""``compare``: is one evaluation better than another, paired by document; refused where the two
cannot be compared.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .. import checks
from ..errors import InputError, InputTypeError
from ..json_files import SCHEMA_VERSION, same_model
from ..metric import exp
from ..text.spans import Spans, groups_of
from .results import Evaluation, checked_record, read_result
from .uncertainty import CONFIDENCE, TRUSTED_CLUSTERS, half_width, ratio_stderr, scipy_stats

MEASURES = ("loss", "bits-per-byte")


@dataclass(frozen=True)
class Comparison:
    """B against A; ``difference`` = b − a in the measure's unit (nats a token, or bits a byte):
    negative, B is better.

    stderr, interval (95 %) and p_value of the difference, paired by ``unit`` (document, or block of
    the only one); perplexity_ratio: exp(difference), of the loss. effective_tokens: tokens that an
    unpaired comparison would need for the same standard error.
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
    better_in: int  # pairs in which B's is the lower loss
    trusted: bool
    notes: list[str]
    model_a: dict | None = None  # of the results, where they name their model
    model_b: dict | None = None

    @property
    def verdict(self) -> str:
        if self.p_value is None:
            return "one pair: no telling whether the difference is more than chance"
        if self.p_value >= 1 - CONFIDENCE:
            return "no difference beyond chance"
        return f"{'B' if self.difference < 0 else 'A'} is better"

    ok = True  # an evaluation's own exit status told of its values that are not finite

    def to_dict(self) -> dict:
        return {**asdict(self), "verdict": self.verdict}


def compare(
    a: Evaluation | dict | str | Path, b: Evaluation | dict | str | Path, *, measure: str = "loss"
) -> Comparison:
    """Paired difference of two evaluations (objects, their JSON, or files of it) of one text.

    measure "loss" refuses different tokenizers: a token is not the same unit for both.
    "bits-per-byte" compares those too, over the bytes that both scored: where one has no loss for a
    document's first token, both leave its bytes out. Raises InputError where texts, documents or,
    for the loss, tokens differ, and where a loss is not finite.
    """
    checks.choice("measure", measure, MEASURES)
    a, b = _record(a, "a"), _record(b, "b")
    if a["text_fingerprint"] != b["text_fingerprint"]:
        raise InputError(
            f"text: expected one text for both, got fingerprints {a['text_fingerprint']} and {b['text_fingerprint']}: "
            "no measure compares across texts"
        )
    documents = [
        [(d["nll"], d["tokens"], d["bytes"]) for d in side["per_document"]] for side in (a, b)
    ]
    # One fingerprint of the texts in their order: the documents correspond by place, whatever files
    # named them.
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
        from .uncertainty import blocks_of

        unit = "block"
        (nll_a, size), (nll_b, others) = (blocks_of(*_blocks(side)) for side in (a, b))
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


def _record(side, name: str) -> dict:
    if isinstance(side, str | Path):
        return read_result(side)
    if isinstance(side, Evaluation):
        return {"schema_version": SCHEMA_VERSION} | asdict(side)
    if isinstance(side, dict):
        return checked_record(side, name, "the JSON of an Evaluation")
    expected = "an Evaluation, its JSON or a file of it"
    raise InputTypeError(f"{name}: expected {expected}, got {type(side).__name__}")


def _blocks(side: dict) -> np.ndarray:
    """NLL and tokens of the blocks of the only document, [2, blocks]."""
    blocks = side["blocks"]
    if not all(
        isinstance(block, list | tuple) and len(block) == 2 and None not in block
        for block in blocks
    ):
        raise InputError(f"blocks: expected pairs of nll and tokens, got {blocks!r:.60}")
    return np.array(blocks, dtype=np.float64).T


def _check_finite(a: dict, b: dict) -> None:
    for name, side in (("A", a), ("B", b)):
        if bad := side.get("non_finite"):
            count = bad.get("tokens") if isinstance(bad, dict) else bad
            raise InputError(
                f"loss: expected a finite loss of every token, got {count} of {name} that are NaN or "
                "infinite and left out: the two are not over the same text"
            )


def _check_tokens(a: dict, b: dict, rows: list[np.ndarray]) -> None:
    if a["tokenizer_fingerprint"] != b["tokenizer_fingerprint"]:
        instead = ""
        if all(isinstance(side.get("bits_per_byte"), float | int) for side in (a, b)):
            instead = f": A {a['bits_per_byte']:.4f}, B {b['bits_per_byte']:.4f}"
        raise InputError(
            "tokenizer: token losses and perplexities of different tokenizers do not compare "
            f"({a['tokenizer_fingerprint']} and {b['tokenizer_fingerprint']}): a token is not the same piece of text; "
            f"bits per byte do (--measure bits-per-byte){instead}"
        )
    different = int((rows[0][:, 1] != rows[1][:, 1]).sum())
    if different:
        raise InputError(
            f"tokens: expected the same tokens scored in both, {different} of {len(rows[0])} documents differ "
            f"({_scoring(a)} and {_scoring(b)})"
        )


def _scoring(side: dict) -> str:
    """What decides which tokens of a text are scored."""
    skipped = ", ".join(f"{count} {reason}" for reason, count in side.get("skipped", {}).items())
    return f"protocol {side.get('protocol')}, BOS {side.get('bos')}, skipped {skipped or 'none'}"


def _check_bytes(a: dict, b: dict, rows: list[np.ndarray]) -> None:
    versions = [side.get("schema_version", 1) for side in (a, b)]
    if min(versions) == 1 and versions[0] != versions[1]:
        raise InputError(
            f"bytes: expected both results of one schema_version, got {versions[0]} and {versions[1]}: version 1 counts "
            "the bytes of text that was not scored, too; evaluate that model again"
        )
    different = int((rows[0][:, 2] != rows[1][:, 2]).sum())
    if different:
        raise InputError(
            f"bytes: expected the same part of the text scored in both, {different} of {len(rows[0])} documents differ "
            f"({_scoring(a)} and {_scoring(b)})"
        )


def _same_bytes(a: dict, b: dict, rows: list[np.ndarray]) -> list[str]:
    """Leave out of ``rows`` what only one side scored at documents' beginnings; return notes.

    Raises InputError where the two differ further on in a document.
    """
    beginnings = [_beginnings(side, len(rows[0])) for side in (a, b)]
    # Of such a document nothing is compared.
    one_sided = (rows[0][:, 1] > 0) != (rows[1][:, 1] > 0)
    for row in rows:
        row[one_sided] = 0
    left_out = documents = 0
    apart = int(one_sided.sum())
    both = [side for side in beginnings if side]
    for place in range(len(rows[0])) if len(both) == 2 else ():
        sides = [begun for begun in (side[place] for side in both) if begun is not None]
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
            f"over the bytes that both scored: {left_out:,} bytes at the beginning of {documents:,} "
            "documents, some of which one side did not score, are left out"
        )
    if apart:
        notes.append(
            f"{apart:,} documents are left out: one side scored nothing of them, or less of their "
            "beginning, where the two have no token boundary in common"
        )
    return notes


@dataclass(frozen=True)
class _Beginning:
    """The beginning of a document: where tokens end, in bytes, and the sums up to each end.

    first: the first byte that was scored; sums: nats, tokens and bytes that were scored before an
    end.
    """

    first: int
    ends: list[int]
    sums: list[np.ndarray]


def _beginnings(side: dict, count: int) -> list[_Beginning | None] | None:
    """Return the beginning of each document, None for one without a scored token there.

    None in all: a result file that does not tell.
    """
    found = side.get("first_tokens")
    if not found:
        return None
    if not (isinstance(found, list) and len(found) == count and all(map(_is_beginning, found))):
        raise InputError("first_tokens: expected ends and losses of every document's first tokens")
    return [_beginning(pairs) for pairs in found]


def _is_beginning(pairs) -> bool:
    return (
        isinstance(pairs, list)
        and len(pairs) % 2 == 0
        and all(isinstance(end, int) and end >= 0 for end in pairs[::2])
        and all(loss is None or isinstance(loss, int | float) for loss in pairs[1::2])
        and pairs[::2] == sorted(pairs[::2])
    )


def _beginning(pairs: list) -> _Beginning | None:
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
    sums = np.stack(
        [
            np.bincount(spans.groups, losses, count),
            np.bincount(spans.groups, scored, count),
            sizes * whole,
        ],
        axis=1,
    ).cumsum(axis=0)
    return _Beginning(first, [0, *reached.tolist()], [np.zeros(3), *sums])


def _p_value(difference: float, stderr: float, pairs: int) -> float:
    """Two-sided, of the paired difference under Student's t with pairs − 1 degrees of freedom."""
    if stderr == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * scipy_stats().t.sf(abs(difference) / stderr, pairs - 1))


def _notes(a: dict, b: dict, pairs: int, unit: str, measure: str) -> list[str]:
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
                f"{key.replace('_', ' ')} differs ({a.get(key)} and {b.get(key)}): part of the difference may be its"
            )
    if pairs < TRUSTED_CLUSTERS:
        notes.append(f"{pairs} {unit}s are too few: interval and p-value are not to be trusted")
    if unit == "block":
        notes.append("one document: paired by blocks of it; it speaks of this document only")
    return notes
