"""``ppl check-data``: what is wrong with a training and a validation text, before a run is spent on them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text as Line

from ..errors import InputError
from ..evaluation.commands import options, read_options, with_separator
from ..evaluation.documents import Document
from ..evaluation.fingerprints import tokenizer_fingerprint
from ..evaluation.models import load_tokenizer
from ..evaluation.readers import STANDARD_INPUT
from ..evaluation.tables import findings_table
from ..files import check_outputs
from ..terminal import Console
from .checks import DataCheck, check_data, write_texts
from .index import Index, Scan, Text
from .leakage import without_leaks
from .splits import goes_to_validation
from .texts import cut, read_texts, text_of, unit_of, whole
from .vocabulary import embedding_size

LISTED = 8  # leaked documents in a terminal
LOG_EVERY = 10.0  # seconds between lines of progress


def run_check_data(arguments: argparse.Namespace) -> int:
    _check(arguments)
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer, trust_remote_code=False)
    console = Console()
    if tokenizer is not None:
        console.print(f"tokenizer {tokenizer_fingerprint(tokenizer)}", highlight=False)
    if not arguments.train:
        return 0
    unit = unit_of(arguments.unit, arguments.valid or arguments.train, arguments.stdin)
    if arguments.write_clean and arguments.write_clean.endswith(".txt") and unit != "paragraph":
        raise InputError(
            f"--write-clean: expected a .jsonl, which holds a {unit} as it is, got {arguments.write_clean}"
        )
    if arguments.write_split:
        return _write_split(arguments, tokenizer, unit, console)
    valid = list(whole(_read(arguments.valid, arguments, tokenizer, unit)))
    check = check_data(
        _read(arguments.train, arguments, tokenizer, unit),
        valid,
        tokenizer=tokenizer,
        embedding=arguments.embedding_size or (arguments.tokenizer and embedding_size(arguments.tokenizer)),
        near=arguments.near,
        interval=arguments.interval,
        memory_limit=arguments.memory_limit << 20,
        workers=arguments.workers,
        journal=arguments.journal,
        identity=_identity(arguments, unit),
        progress=_progress(),
    )
    if arguments.write_clean:
        leaked = {leak.document for leak in check.leaked}
        clean = (text for number, text in enumerate(valid) if number not in leaked)
        kept = write_texts(arguments.write_clean, clean, "--write-clean")
        console.print(f"{arguments.write_clean}: {kept:,} of {len(valid):,} documents", highlight=False)
    try:
        if arguments.json:
            check.save(arguments.json)
    finally:
        console.print(view(check))
    return int(check.fails(arguments.fail_on))


def check_evaluation(arguments: argparse.Namespace, tokenizer, documents: Iterable[Document]) -> DataCheck:
    """``ppl eval --train``: the evaluated documents beside a training text, cut as the evaluation cuts them."""
    options = with_separator(read_options(arguments), tokenizer, arguments.separator)
    unit = unit_of("auto", arguments.text, arguments.stdin)
    return check_data(
        read_texts(arguments.train, options, unit, tokenizer),
        cut((text_of(document, tokenizer) for document in documents), unit),
        tokenizer=tokenizer,
        embedding=embedding_size(arguments.model),
        progress=_progress(),
    )


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.train and (arguments.valid or not arguments.tokenizer):
        raise InputError("--train: expected training text, got none (--tokenizer alone prints its fingerprint)")
    if arguments.train and not arguments.valid and not arguments.write_split:
        raise InputError("--valid: expected validation text, got none (--write-split cuts one from --train)")
    if arguments.write_split and arguments.valid:
        raise InputError("--write-split: expected --train alone to be cut, got --valid as well")
    if STANDARD_INPUT in (arguments.train or []) and (
        arguments.write_split or STANDARD_INPUT in (arguments.valid or [])
    ):
        raise InputError("-: expected a file, standard input cannot be read twice")
    for name in ("valid_fraction", "near", "interval"):
        value = getattr(arguments, name)
        if not 0 < value < 1 and not (name == "near" and value == 1):
            raise InputError(f"--{name.replace('_', '-')}: expected a share above 0 and below 1, got {value:g}")
    for name in ("workers", "memory_limit"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.embedding_size is not None and arguments.embedding_size < 1:
        raise InputError(f"--embedding-size: expected at least 1, got {arguments.embedding_size}")
    if STANDARD_INPUT in (arguments.train or []) and arguments.journal:
        raise InputError("-: expected a file with --journal, standard input cannot be read again")
    outputs = ("json", "write_clean", "journal", "fail_on")
    given = [f"--{name.replace('_', '-')}" for name in outputs if getattr(arguments, name)]
    if given and (arguments.write_split or not arguments.train):
        what = "--write-split" if arguments.write_split else "--train and --valid"
        raise InputError(
            f"{given[0]}: expected {'no' if arguments.write_split else ''} {what}".replace("  ", " ") + " with it"
        )
    texts = [*(arguments.train or []), *(arguments.valid or [])]
    check_outputs(
        options(arguments, "json", "write_clean"),
        [*texts, arguments.tokenizer],
        folders=options(arguments, "journal", "write_split"),
    )
    if arguments.write_clean and not arguments.write_clean.endswith((".jsonl", ".txt")):
        raise InputError(f"--write-clean: expected a name that ends in .jsonl or .txt, got {arguments.write_clean}")
    if arguments.write_split:
        inputs = {os.path.realpath(path) for path in texts}
        names = {os.path.realpath(os.path.join(arguments.write_split, f"{side}.jsonl")) for side in ("train", "valid")}
        if names & inputs:
            raise InputError(f"--write-split: expected a folder without the inputs, got {arguments.write_split}")


def _read(paths: list[str], arguments: argparse.Namespace, tokenizer, unit: str) -> Iterator[Text]:
    options = read_options(arguments)
    if tokenizer is not None:
        options = with_separator(options, tokenizer, arguments.separator)
    return read_texts(paths, options, unit, tokenizer)


def _identity(arguments: argparse.Namespace, unit: str) -> dict:
    """What a journal is of: the same files, read the same way."""
    paths = [Path(path) for path in arguments.train]
    files = [
        file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()
    ]
    stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return dict(train=stamps, unit=unit, tokenizer=arguments.tokenizer, separator=arguments.separator) | vars(
        read_options(arguments)
    )


def _progress():
    """A line every ``LOG_EVERY`` seconds on stderr."""
    started = said = time.monotonic()

    def tell(scan: Scan) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= LOG_EVERY:
            said = now
            speed = scan.bytes / 1e6 / (now - started)
            line = f"{scan.documents:,} documents  {scan.bytes / 1e6:,.0f} MB  {speed:,.0f} MB/s  {len(scan.exact):,} exact"
            print(line, file=sys.stderr, flush=True)

    return tell


def _write_split(arguments: argparse.Namespace, tokenizer, unit: str, console: Console) -> int:
    folder = Path(arguments.write_split)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--write-split: {folder} cannot be made ({error.strerror})")

    def train() -> Iterator[Text]:
        for text in whole(_read(arguments.train, arguments, tokenizer, unit)):
            if not goes_to_validation(text.text, arguments.valid_fraction):
                yield text

    valid, total = [], 0
    for text in whole(_read(arguments.train, arguments, tokenizer, unit)):
        if goes_to_validation(text.text, arguments.valid_fraction):
            valid.append(text)
        else:
            total += 1
    if not valid or not total:
        raise InputError(
            f"--valid-fraction: expected both sides to have a document, got {len(valid)} for validation and {total} for training "
            f"at {arguments.valid_fraction:g}; a smaller --unit makes more of them"
        )
    index = Index(valid, arguments.memory_limit << 20, arguments.near)
    write_texts(folder / "valid.jsonl", valid)
    kept = write_texts(folder / "train.jsonl", without_leaks(train, index))
    console.print(
        f"{folder}: {len(valid):,} {unit}s for validation, {kept:,} for training; {total - kept:,} dropped that would leak",
        highlight=False,
    )
    return 0


def view(check: DataCheck) -> Group:
    """Numbers, findings and what leaked, for a terminal."""
    numbers = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    numbers.add_column()
    numbers.add_column(justify="right")
    for name, value in summary(check):
        numbers.add_row(name, value)
    parts: list = [numbers]
    parts.append(findings_table(check.findings))
    if check.leaked:
        table = Table(title="leaked", title_justify="left", title_style="bold")
        for heading in ("validation", "training", "how", "what they share"):
            table.add_column(heading, overflow="fold")
        for leak in check.leaked[:LISTED]:
            how = {"near": f"near {leak.similarity:.2f}", "contained": f"contained {leak.overlap:.0%}"}
            table.add_row(*map(Line, (leak.id, leak.train_id, how.get(leak.kind, leak.kind), leak.passage[:160])))
        parts.append(table)
        if len(check.leaked) > LISTED:
            parts.append(Line(f"and {len(check.leaked) - LISTED:,} more, all in --json"))
    parts += [Line(f"note: {note}") for note in check.notes]
    return Group(*parts)


def summary(check: DataCheck) -> list[tuple[str, str]]:
    """The numbers that a reader wants first, by name."""
    rows = [
        ("documents", f"{check.documents['train']:,} training, {check.documents['valid']:,} validation"),
        ("validation, of all words", "" if check.valid_fraction is None else f"{check.valid_fraction:.2%}"),
        ("leaked documents", f"{check.leaked_fraction:.2%}"),
        (f"leaked {check.token_unit}", f"{check.leaked_token_fraction:.2%}"),
        ("exact, near or contained", f"{check.exact_duplicates:,}, {check.near_duplicates:,}"),
    ]
    if check.ngram_overlap is not None:
        rows.append((f"{check.settings['ngram']}-grams in training", f"{check.ngram_overlap:.2%}"))
    if check.unknown_token_rate is not None:
        rows.append(("unknown tokens", f"{check.unknown_token_rate:.3%}"))
    return rows
