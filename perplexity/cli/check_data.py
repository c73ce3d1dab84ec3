"""``ppl check-data``: leakage, sizes and vocabulary of training and validation text."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import STANDARD_INPUT, check_outputs
from ..findings import SEVERITIES
from ..wording import counted
from . import tables
from .extras import needs
from .json_option import JSON_HELP, console_beside, json_file, write_json
from .options import by_option, option, part, typed
from .parts import (
    FAIL_ON_HELP,
    JOURNAL_HELP,
    TEXT_HELP,
    TextReading,
    expect_ending,
)
from .progress import LOG_EVERY, log_every

if TYPE_CHECKING:
    from rich.console import Group

    from ..data_checks import DataCheck, Text
    from ..data_checks.index import Scan
    from ..evaluation import Document
    from ..terminal import Console
    from .eval import Options as EvalOptions

LOWER = "--memory-limit or --workers"  # the advice when memory runs out
LISTED = 8  # leaked documents in the table


@dataclass(frozen=True, kw_only=True)
class Options:
    """leakage, sizes, vocabulary and tokenizer of training and validation"""

    train: list[str] | None = option(TEXT_HELP, metavar="P", nargs="+")
    valid: list[str] | None = option("the same; it is held in memory", metavar="P", nargs="+")
    tokenizer: str | None = option(
        "counts tokens, unknown ones among them; alone: its fingerprint", metavar="DIR"
    )
    embedding_size: int | None = option(
        "rows of the model's embedding (vocab_size of DIR/config.json)", metavar="V"
    )
    unit: str = option(
        "what counts as a document (paragraphs where --valid is one .txt file)",
        "auto",
        choices=("auto", "document", "paragraph", "line"),
    )
    near: float = option(
        "Jaccard similarity of 4-word shingles that is a copy (%(default)g)", 0.25, metavar="J"
    )
    interval: float = option(
        "wanted of the perplexity's 95 %% interval, ± (%(default)g)", 0.01, metavar="R"
    )
    memory_limit: int = option("of the tables (%(default)s)", 1024, metavar="MIB")
    workers: int = option("processes over --train (%(default)s)", 1, metavar="N")
    journal: str | None = option(JOURNAL_HELP, metavar="DIR")
    write_clean: str | None = option(
        "validation without what leaked: .jsonl or .txt", metavar="OUT"
    )
    write_split: str | None = option(
        "train.jsonl and valid.jsonl of --train, cut by hash, no leaks", metavar="DIR"
    )
    valid_fraction: float = option("of --write-split (%(default)g)", 0.02, metavar="F")
    json: str | None = option(JSON_HELP, metavar="OUT")
    fail_on: str | None = option(FAIL_ON_HELP, choices=SEVERITIES)
    reading: TextReading = part(TextReading)


def run(options: Options) -> int:
    """Check or split the texts, write and print the findings; return the exit status.

    It is 1 where a finding is at least as severe as ``--fail-on``.
    """
    needs(data=("xxhash", "transformers", "rich", "scipy"))
    _check(options)
    from ..data_checks import check_data
    from ..data_checks.checks import write_texts
    from ..data_checks.texts import unit_of, whole
    from ..data_checks.vocabulary import embedding_size
    from ..fingerprints import tokenizer_fingerprint
    from ..models.language_model import load_tokenizer

    tokenizer = (
        None
        if options.tokenizer is None
        else load_tokenizer(options.tokenizer, trust_remote_code=False)
    )
    console = console_beside(options.json)
    if tokenizer is not None:
        console.print(f"tokenizer {tokenizer_fingerprint(tokenizer)}", highlight=False)
    if not options.train:
        return 0
    unit = unit_of(options.unit, options.valid or options.train, options.reading.stdin)
    if options.write_clean and options.write_clean.endswith(".txt") and unit != "paragraph":
        raise InputError(
            f"--write-clean: expected a .jsonl, which holds a {unit} as it is, "
            f"got {options.write_clean}"
        )
    if options.write_split:
        return _write_split(Path(options.write_split), options, tokenizer, unit, console)
    valid = list(whole(_read(options.valid, options, tokenizer, unit)))
    check = check_data(
        _read(options.train, options, tokenizer, unit),
        valid,
        tokenizer=tokenizer,
        embedding=options.embedding_size
        or (embedding_size(options.tokenizer) if options.tokenizer else None),
        near=options.near,
        interval=options.interval,
        memory_limit=options.memory_limit << 20,
        workers=options.workers,
        journal=options.journal,
        identity=_identity(options, unit),
        progress=_log(),
    )
    if options.write_clean:
        leaked = {leak.document for leak in check.leaked}
        clean = (text for number, text in enumerate(valid) if number not in leaked)
        kept = write_texts(options.write_clean, clean, "--write-clean")
        console.print(
            f"{options.write_clean}: {kept:,} of {counted(len(valid), 'document')}", highlight=False
        )
    try:
        if options.json:
            write_json(options.json, check.to_json())
    finally:
        console.print(view(check))
    return int(check.fails(options.fail_on))


def check_evaluation(options: EvalOptions, tokenizer, documents: Iterable[Document]) -> DataCheck:
    """Check the documents of ``ppl eval`` against the training text of its ``--train``."""
    from ..data_checks import check_data
    from ..data_checks.texts import cut, read_texts, text_of, unit_of
    from ..data_checks.vocabulary import embedding_size

    unit = unit_of("auto", options.text, options.reading.stdin)
    return check_data(
        read_texts(options.train or (), options.reading.options_with(tokenizer), unit, tokenizer),
        cut((text_of(document, tokenizer) for document in documents), unit),
        tokenizer=tokenizer,
        embedding=embedding_size(options.model),
        progress=_log(),
    )


def _check(options: Options) -> None:
    """Raise InputError for options that exclude each other and outputs that cannot be written."""
    if not options.train and (options.valid or not options.tokenizer):
        raise InputError(
            "--train: expected training text, got none (--tokenizer alone prints its fingerprint)"
        )
    if options.train and not options.valid and not options.write_split:
        raise InputError(
            "--valid: expected validation text, got none (--write-split cuts one from --train)"
        )
    if options.write_split and options.valid:
        raise InputError("--write-split: expected --train alone to be cut, got --valid as well")
    if STANDARD_INPUT in (options.train or []) and (
        options.write_split or STANDARD_INPUT in (options.valid or [])
    ):
        raise InputError("-: expected a file, standard input cannot be read twice")
    for name in ("valid_fraction", "near", "interval"):
        value = getattr(options, name)
        if not 0 < value < 1 and not (name == "near" and value == 1):
            raise InputError(f"{typed(name)}: expected a share above 0 and below 1, got {value:g}")
    for name in ("workers", "memory_limit"):
        if getattr(options, name) < 1:
            raise InputError(f"{typed(name)}: expected at least 1, got {getattr(options, name)}")
    if options.embedding_size is not None and options.embedding_size < 1:
        raise InputError(f"--embedding-size: expected at least 1, got {options.embedding_size}")
    if STANDARD_INPUT in (options.train or []) and options.journal:
        raise InputError("-: expected a file with --journal, standard input cannot be read again")
    outputs = ("json", "write_clean", "journal", "fail_on")
    named = [typed(name) for name in outputs if getattr(options, name)]
    if named and (options.write_split or not options.train):
        what = "--write-split" if options.write_split else "--train and --valid"
        raise InputError(
            f"{named[0]}: expected {'no' if options.write_split else ''} {what}".replace("  ", " ")
            + " with it"
        )
    texts = [*(options.train or []), *(options.valid or [])]
    check_outputs(
        json_file(options.json) | by_option(options, "write_clean"),
        [*texts, options.tokenizer],
        folders=by_option(options, "journal", "write_split"),
    )
    expect_ending("--write-clean", options.write_clean, ".jsonl", ".txt")
    if options.write_split:
        inputs = {os.path.realpath(path) for path in texts}
        names = {
            os.path.realpath(os.path.join(options.write_split, f"{side}.jsonl"))
            for side in ("train", "valid")
        }
        if names & inputs:
            raise InputError(
                f"--write-split: expected a folder without the inputs, got {options.write_split}"
            )


def _read(paths: list[str] | None, options: Options, tokenizer, unit: str) -> Iterator[Text]:
    from ..data_checks.texts import read_texts

    reading = options.reading
    how = reading.options() if tokenizer is None else reading.options_with(tokenizer)
    return read_texts(paths or (), how, unit, tokenizer)


def _identity(options: Options, unit: str) -> dict:
    """Return what a journal compares before it resumes: the files, and how they are read."""
    paths = [Path(path) for path in options.train or ()]
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file()
    ]
    stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return dict(
        train=stamps, unit=unit, tokenizer=options.tokenizer, separator=options.reading.separator
    ) | vars(options.reading.options())


def _log():
    """Return a function that prints the progress of a pass over the training text."""
    started = time.monotonic()

    def line(scan: Scan) -> str:
        speed = scan.bytes / 1e6 / (time.monotonic() - started)
        return (
            f"{counted(scan.documents, 'document')}  {scan.bytes / 1e6:,.0f} MB  {speed:,.0f} MB/s  "
            f"{len(scan.exact):,} exact"
        )

    return log_every(LOG_EVERY, line)


def _write_split(folder: Path, options: Options, tokenizer, unit: str, console: Console) -> int:
    from ..data_checks.checks import write_texts
    from ..data_checks.index import Index
    from ..data_checks.leakage import without_leaks
    from ..data_checks.splits import goes_to_validation
    from ..data_checks.texts import whole

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--write-split: {folder} cannot be made ({error.strerror})")

    def train() -> Iterator[Text]:
        for text in whole(_read(options.train, options, tokenizer, unit)):
            if not goes_to_validation(text.text, options.valid_fraction):
                yield text

    valid, total = [], 0
    for text in whole(_read(options.train, options, tokenizer, unit)):
        if goes_to_validation(text.text, options.valid_fraction):
            valid.append(text)
        else:
            total += 1
    if not valid or not total:
        raise InputError(
            f"--valid-fraction: expected both sides to have a document, got {len(valid)} for "
            f"validation and {total} for training at {options.valid_fraction:g}; "
            "a smaller --unit makes more of them"
        )
    index = Index(valid, options.memory_limit << 20, options.near)
    write_texts(folder / "valid.jsonl", valid)
    kept = write_texts(folder / "train.jsonl", without_leaks(train, index))
    console.print(
        f"{folder}: {len(valid):,} {unit}s for validation, {kept:,} for training; "
        f"{total - kept:,} dropped that would leak",
        highlight=False,
    )
    return 0


def view(check: DataCheck) -> Group:
    """Return the numbers, findings and leaked documents of a check, for a terminal."""
    numbers = tables.table(None, "", "", right=(), boxed=False)
    numbers.columns[1].justify = "right"
    for name, value in summary(check):
        numbers.add_row(name, value)
    parts: list = [numbers, tables.findings(check.findings)]
    if check.leaked:
        table = tables.table("leaked", "validation", "training", "how", "what they share", right=())
        for leak in check.leaked[:LISTED]:
            how = {
                "near": f"near {leak.similarity:.2f}",
                "contained": f"contained {leak.overlap:.0%}",
            }
            table.add_row(
                *map(
                    tables.plain,
                    (leak.id, leak.train_id, how.get(leak.kind, leak.kind), leak.passage[:160]),
                )
            )
        parts.append(table)
        if len(check.leaked) > LISTED:
            parts.append(tables.plain(f"and {len(check.leaked) - LISTED:,} more, all in --json"))
    parts += tables.notes(check.notes)
    return tables.stacked(*parts)


def summary(check: DataCheck) -> list[tuple[str, str]]:
    """Return the most important numbers of a check as rows (name, value)."""
    rows = [
        (
            "documents",
            f"{check.documents['train']:,} training, {check.documents['valid']:,} validation",
        ),
        (
            "validation, of all words",
            "" if check.valid_fraction is None else f"{check.valid_fraction:.2%}",
        ),
        ("leaked documents", f"{check.leaked_fraction:.2%}"),
        (f"leaked {check.token_unit}", f"{check.leaked_token_fraction:.2%}"),
        ("exact, near or contained", f"{check.exact_duplicates:,}, {check.near_duplicates:,}"),
    ]
    if check.ngram_overlap is not None:
        rows.append((f"{check.settings['ngram']}-grams in training", f"{check.ngram_overlap:.2%}"))
    if check.unknown_token_rate is not None:
        rows.append(("unknown tokens", f"{check.unknown_token_rate:.3%}"))
    return rows
