"""Results of one text side by side: which compare, and their sums over the same tokens or bytes.

Results that do not compare are refused, with the reason: another text, another tokenizer for the
loss, another part of the text for bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError, InputTypeError
from ..json_files import SCHEMA_VERSION, same_model
from ..text.spans import Spans, groups_of
from ..wording import by_number, counted
from .results import Evaluation, checked_record, read_result
from .uncertainty import TRUSTED_CLUSTERS, blocks_of

MEASURES = {"loss": "nats a token", "bits-per-byte": "bits a byte"}


@dataclass(frozen=True)
class Paired:
    """Sums of several results over the same documents, or blocks of the only document.

    Args:
        measure: "loss" or "bits-per-byte".
        sums: float64 [sides, K], nats or bits.
        sizes: float64 [K], tokens or bytes that all sides scored.
        domains: of each of the K documents.
        unit: "document", or "block" of the only document.
        tokens: scored by the first side.
        notes: what was left out.
    """

    measure: str
    sums: np.ndarray
    sizes: np.ndarray
    domains: list[str]
    unit: str
    tokens: int
    notes: list[str]


def pair(sides: Sequence[dict], names: Sequence[str], measure: str) -> Paired:
    """Return the sums of several results over what all of them scored.

    Args:
        sides: the results, as ``record_of`` returns them.
        names: of the sides, for errors.
        measure: "loss" or "bits-per-byte".

    Raises:
        InputError: texts, documents or, for the loss, tokens differ; a loss is not finite.
    """
    first = sides[0]
    for name, side in zip(names[1:], sides[1:], strict=True):
        whose = _whose(names, name)
        if first["text_fingerprint"] != side["text_fingerprint"]:
            raise InputError(
                f"text: expected one text for {whose}, got fingerprints "
                f"{first['text_fingerprint']} and {side['text_fingerprint']}: no measure compares "
                "across texts"
            )
    documents = [
        [(d["nll"], d["tokens"], d["bytes"]) for d in side["per_document"]] for side in sides
    ]
    # The fingerprint is of the texts in order, so documents correspond by place, whatever their
    # names.
    rows = [np.array(side, dtype=np.float64).reshape(-1, 3) for side in documents]
    for name, row in zip(names[1:], rows[1:], strict=True):
        if len(rows[0]) != len(row):
            whose = _whose(names, name)
            raise InputError(
                f"per_document: expected as many for {whose}, got {len(rows[0])} and {len(row)}"
            )
    _check_finite(sides, names)
    notes = []
    if measure == "loss":
        for place in range(1, len(sides)):
            _check_tokens(sides, names, rows, place)
    else:
        notes = _same_bytes(sides, rows)
    scale = 1.0 if measure == "loss" else math.log(2)
    sizes = rows[0][:, 1 if measure == "loss" else 2]
    kept = (sizes > 0) & np.all([row[:, 1] > 0 for row in rows], axis=0)
    sums, sizes = np.stack([row[kept, 0] / scale for row in rows]), sizes[kept]
    if not len(sizes):
        raise InputError("per_document: expected documents with scored tokens, got none")
    names_of = [str(document.get("domain", "")) for document in first["per_document"]]
    domains = [names_of[place] for place in np.flatnonzero(kept)]
    unit, tokens = "document", int(rows[0][kept, 1].sum())
    if len(sizes) == 1 and measure == "loss" and all(side.get("blocks") for side in sides):
        unit = "block"
        blocks = [blocks_of(*np.array(side["blocks"], dtype=np.float64).T) for side in sides]
        sizes = blocks[0][1]
        if not all(np.array_equal(sizes, others) for _, others in blocks):
            raise InputError("blocks: expected as many tokens in each for both, got others")
        sums, domains = np.stack([nll for nll, _ in blocks]), domains * len(sizes)
    return Paired(measure, sums, sizes, domains, unit, tokens, notes)


def _whose(names: Sequence[str], name: str) -> str:
    return "both" if len(names) == 2 else f"{names[0]} and {name}"


def record_of(side: object, name: str) -> dict:
    """Return the JSON object of one side of a comparison, argument ``name``.

    Raises:
        InputError: it is no result of an evaluation.
    """
    if isinstance(side, str | Path):
        return read_result(side)
    if isinstance(side, Evaluation):
        return {"schema_version": SCHEMA_VERSION} | asdict(side)
    if isinstance(side, dict):
        return checked_record(side, name, "the JSON of an Evaluation")
    expected = "an Evaluation, its JSON or a file of it"
    raise InputTypeError(f"{name}: expected {expected}, got {type(side).__name__}")


def _check_finite(sides: Sequence[dict], names: Sequence[str]) -> None:
    """Raise where one side left out tokens whose loss is not finite."""
    for name, side in zip(names, sides, strict=True):
        if bad := side.get("non_finite"):
            raise InputError(
                f"loss: expected a finite loss of every token, got {bad.get('tokens')} of {name} "
                "that are NaN or infinite and left out: the two are not over the same text"
            )


def _check_tokens(
    sides: Sequence[dict], names: Sequence[str], rows: list[np.ndarray], place: int
) -> None:
    """Raise unless the first side and the one at ``place`` scored the same tokens everywhere."""
    a, b = sides[0], sides[place]
    if a["tokenizer_fingerprint"] != b["tokenizer_fingerprint"]:
        instead = ""
        if all(isinstance(side.get("bits_per_byte"), float | int) for side in sides):
            values = (f"{n} {s['bits_per_byte']:.4f}" for n, s in zip(names, sides, strict=True))
            instead = f": {', '.join(values)}"
        raise InputError(
            "tokenizer: token losses and perplexities of different tokenizers do not compare "
            f"({a['tokenizer_fingerprint']} and {b['tokenizer_fingerprint']}): a token is not the "
            f"same piece of text; bits per byte do (--measure bits-per-byte){instead}"
        )
    different = int((rows[0][:, 1] != rows[place][:, 1]).sum())
    if different:
        raise InputError(
            f"tokens: expected the same tokens scored in {_whose(names, names[place])}, "
            f"{different} of {counted(len(rows[0]), 'document')} "
            f"{by_number(different, 'differs', 'differ')} ({_scoring(a)} and {_scoring(b)})"
        )


def _scoring(side: dict) -> str:
    """Describe what decides which tokens of a text are scored."""
    skipped = ", ".join(f"{count} {reason}" for reason, count in side.get("skipped", {}).items())
    return f"protocol {side.get('protocol')}, BOS {side.get('bos')}, skipped {skipped or 'none'}"


def _check_bytes(sides: Sequence[dict], rows: list[np.ndarray]) -> None:
    """Raise unless all sides scored the same bytes of every document."""
    who = "both" if len(sides) == 2 else "all"
    versions = [side.get("schema_version", 1) for side in sides]
    if min(versions) == 1 and max(versions) != 1:
        raise InputError(
            f"bytes: expected {who} results of one schema_version, got "
            f"{' and '.join(map(str, versions))}: version 1 counts the bytes of text that was not "
            "scored, too; evaluate that model again"
        )
    for side, row in zip(sides[1:], rows[1:], strict=True):
        different = int((rows[0][:, 2] != row[:, 2]).sum())
        if different:
            raise InputError(
                f"bytes: expected the same part of the text scored in {who}, {different} of "
                f"{counted(len(rows[0]), 'document')} {by_number(different, 'differs', 'differ')} "
                f"({_scoring(sides[0])} and {_scoring(side)})"
            )


def _same_bytes(sides: Sequence[dict], rows: list[np.ndarray]) -> list[str]:
    """Drop from ``rows`` what only some sides scored at documents' beginnings, and return notes.

    Raises:
        InputError: two sides differ further on in a document.
    """
    beginnings = [_beginnings(side, len(rows[0])) for side in sides]
    # A document that a side did not score is not compared.
    scored = np.sum([row[:, 1] > 0 for row in rows], axis=0)
    one_sided: np.ndarray = (scored > 0) & (scored < len(rows))
    for row in rows:
        row[one_sided] = 0
    left_out = documents = 0
    apart = int(one_sided.sum())
    known = [side for side in beginnings if side]
    for place in range(len(rows[0])) if len(known) == len(sides) else ():
        begun = [beginning for side in known if (beginning := side[place]) is not None]
        # A side without a scored token there has skipped more than a first token.
        if one_sided[place] or len(begun) < len(sides):
            continue
        if len({(b.first, row[place, 2]) for b, row in zip(begun, rows, strict=True)}) == 1:
            continue
        from_here = max(beginning.first for beginning in begun)
        common = [
            end
            for end in begun[0].ends
            if end >= from_here and all(end in other.ends for other in begun[1:])
        ]
        if common:
            documents, left_out = documents + 1, left_out + min(common)
            for beginning, row in zip(begun, rows, strict=True):
                row[place] -= beginning.sums[beginning.ends.index(min(common))]
        else:
            apart += 1
            for row in rows:
                row[place] = 0
    _check_bytes(sides, rows)
    who, sides_ = ("both", "the two") if len(sides) == 2 else ("all", "they")
    notes = []
    if documents:
        notes.append(
            f"over the bytes that {who} scored: {counted(left_out, 'byte')} at the beginning of "
            f"{counted(documents, 'document')}, some of which one side did not score, "
            f"{by_number(left_out, 'is', 'are')} left out"
        )
    if apart:
        notes.append(
            f"{counted(apart, 'document')} {by_number(apart, 'is', 'are')} left out: one side scored "
            f"nothing there, or less of the beginning, where {sides_} have no token boundary in common"
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


def comparison_notes(
    sides: Sequence[dict], names: Sequence[str], paired: Paired, *, same: bool = True
) -> list[str]:
    """Return what to know before a comparison is believed.

    Args:
        sides: the results.
        names: of the results.
        paired: their sums.
        same: note that two are of one model, or of other context lengths; default True.
    """
    notes = list(paired.notes)
    for place, name in enumerate(names if same else ()):
        for other in range(place + 1, len(names)):
            if same_model(sides[place], sides[other]):
                fingerprint = sides[place]["model"]["fingerprint"]
                notes.append(
                    f"{name} and {names[other]} are the same model (fingerprint {fingerprint})"
                )
    if paired.measure == "bits-per-byte" and sides[0].get("schema_version", 1) == 1:
        who = "both results are" if len(sides) == 2 else "all results are"
        notes.append(f"{who} of schema_version 1, whose bytes include text that was not scored")
    contexts = ("context_length", "stride") if same else ()
    for key in ("protocol", *contexts, "bos", "special_text", "skipped", "precision"):
        values = [side.get(key) for side in sides]
        if any(value != values[0] for value in values):
            notes.append(
                f"{key.replace('_', ' ')} differs ({' and '.join(map(str, values))}): "
                "part of the difference may be its"
            )
    pairs = len(paired.sizes)
    if pairs < TRUSTED_CLUSTERS:
        notes.append(
            f"{counted(pairs, paired.unit)} {by_number(pairs, 'is', 'are')} too few: interval and "
            "p-value are not to be trusted"
        )
    if paired.unit == "block":
        notes.append("one document: paired by blocks of it; it speaks of this document only")
    return notes
