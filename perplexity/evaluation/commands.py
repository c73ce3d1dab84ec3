"""``ppl eval`` and ``ppl compare``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from ..errors import InputError, theirs
from ..files import check_outputs, write_text
from ..metric import exp
from ..terminal import Console
from . import models, tables
from .comparison import Comparison, compare
from .documents import Document
from .evaluator import Progress, evaluate
from .model_comparison import ModelComparison, compare_models
from .readers import STANDARD_INPUT, ReadOptions, read_documents
from .results import read_result, to_json

LOG_EVERY = 30.0  # seconds between lines of progress where there is no terminal


def run_eval(arguments: argparse.Namespace) -> int:
    inputs = [arguments.model, arguments.baseline, *arguments.text, *(arguments.train or [])]
    check_outputs(
        options(arguments, "json", "per_token", "per_document", "reliability"),
        inputs,
        folders=options(arguments, "journal"),
    )
    if arguments.reliability and not arguments.reliability.endswith((".png", ".svg")):
        raise InputError(f"--reliability: expected a name that ends in .png or .svg, got {arguments.reliability}")
    if STANDARD_INPUT in arguments.text and _world_size() > 1:
        raise InputError("-: expected a file, standard input cannot be read by several processes")
    baseline = None if arguments.baseline is None else read_result(arguments.baseline)
    texts = _Texts(arguments)
    with _ranks(arguments.device) as (rank, ranks, device):
        model, tokenizer = load_model(arguments.model, arguments, device, revision=arguments.revision)
        with _progress(texts, rank == 0) as progress:
            evaluation = evaluate(
                model,
                tokenizer,
                texts.documents(tokenizer),
                **_scoring(arguments),
                score_special=arguments.score_special,
                per_token=arguments.per_token,
                per_document=arguments.per_document,
                calibration=bool(arguments.calibration or arguments.reliability),
                distributed=ranks > 1,
                progress=progress,
            )
    if rank == 0:
        check = None
        if arguments.train:
            from ..data_checks.commands import check_evaluation

            check = check_evaluation(arguments, tokenizer, texts.documents(tokenizer))
            evaluation = replace(evaluation, data_check=check.to_dict())
        try:
            if arguments.json:
                evaluation.save(arguments.json)
            if arguments.reliability and evaluation.calibration:
                from ..report.plots import reliability

                reliability(evaluation.calibration, arguments.reliability, title=arguments.model)
        finally:  # a file that cannot be written must not take the numbers with it, nor a terminal the file
            tables.show(evaluation, Console(), baseline)
            if check is not None:
                from ..data_checks.commands import view

                Console().print(view(check))
    return 0 if evaluation.ok else 1


def run_compare(arguments: argparse.Namespace) -> int:
    inputs = [arguments.a, arguments.b, *arguments.text]
    check_outputs(options(arguments, "json"), inputs, folders=options(arguments, "journal"))
    found: Comparison | ModelComparison
    if not arguments.text:
        found = compare(arguments.a, arguments.b, measure=arguments.measure)
        table = tables.comparison(found)
    else:
        texts = _Texts(arguments)
        device = device_of(arguments.device)
        model_a, tokenizer = load_model(arguments.a, arguments, device, revision=arguments.revision)
        dtype_b = arguments.dtype_b or arguments.dtype
        model_b, tokenizer_b = load_model(arguments.b, arguments, device, dtype_b, revision=arguments.revision_b)
        with _progress(texts, True) as progress:
            found = compare_models(
                model_a,
                model_b,
                tokenizer,
                texts.documents(tokenizer),
                tokenizer_b=tokenizer_b,
                **_scoring(arguments),
                progress=progress,
            )
        table = tables.model_comparison(found)
    if arguments.json:
        write_text(arguments.json, to_json(found.to_dict()) + "\n", "--json")
    console = Console()
    console.print(table)
    tables.notes(found.notes, console)
    return 0 if found.ok else 1


def _scoring(arguments: argparse.Namespace) -> dict:
    """Keywords that ``evaluate`` and ``compare_models`` share."""
    names = ("protocol", "context_length", "stride", "bos", "special_text")
    names += ("batch_size", "backend", "journal")
    return {name: getattr(arguments, name) for name in names}


def options(arguments: argparse.Namespace, *names: str) -> dict[str, str | None]:
    """Return options' values by the options as they are typed."""
    return {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in names}


def device_of(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str, arguments: argparse.Namespace, device: str, dtype: str | None = None, *, revision: str | None = None
):
    """Return model and tokenizer as ``arguments`` say; ``revision`` is of this name alone."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    placed = arguments.device_map is not None
    if placed and _world_size() > 1:
        raise InputError("--device-map: expected one process, which has all devices, got several")
    return models.load(
        name,
        device=arguments.device if placed else device,
        dtype=dtype or arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        unchanged=True,
        revision=revision,
        device_map=arguments.device_map,
    )


def read_options(arguments: argparse.Namespace) -> ReadOptions:
    return ReadOptions(
        arguments.text_column,
        arguments.domain_column,
        arguments.id_column,
        arguments.split,
        arguments.token_dtype,
        standard_input=arguments.stdin,
    )


def with_separator(options: ReadOptions, tokenizer, separator: int | None) -> ReadOptions:
    """``options`` with the token that cuts token files into documents: --separator, else what the tokenizer has."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, after = (bos, None) if bos is not None else (None, eos)
    if separator is not None:
        if not 0 <= separator < len(tokenizer):
            raise InputError(f"--separator: expected a token id below {len(tokenizer)}, got {separator}")
        before, after = (None, separator) if separator != bos else (bos, None)
    return replace(options, split_before=before, split_after=after)


class _Texts:
    """The documents of a command, read once to the end before the model is loaded, so that bad input is told first."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.paths, self.separator = arguments.text, arguments.separator
        self.options = read_options(arguments)
        documents: Iterable[Document] = read_documents(self.paths, self.options)
        self.held = list(documents) if STANDARD_INPUT in self.paths else None
        self.count: int | None = 0
        self.size = 0
        for document in self.held or documents:
            self.size += document.size
            # Token files are cut into documents by their separator, which the tokenizer knows.
            self.count = None if self.count is None or document.ids is not None else self.count + 1

    def documents(self, tokenizer) -> Iterable[Document]:
        if self.held is not None:
            return self.held
        return read_documents(self.paths, with_separator(self.options, tokenizer, self.separator))


def _world_size() -> int:
    return _environment("WORLD_SIZE", 1)


def _environment(name: str, default: int) -> int:
    """A whole number that torchrun puts into the environment."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(f"{name}: expected a whole number in the environment, as of torchrun, got {value!r}")
    return int(value)


@contextmanager
def _ranks(device: str | None) -> Iterator[tuple[int, int, str]]:
    """(rank, ranks, device) as torchrun's environment says, with a process group where there is more than one."""
    ranks = _world_size()
    if ranks < 2:
        yield 0, 1, device_of(device)
        return
    device = device_of(device)
    if device == "cuda":
        device = f"cuda:{_environment('LOCAL_RANK', 0)}"
    with theirs(f"distributed: expected the environment of torchrun for {ranks} processes, got another"):
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield torch.distributed.get_rank(), ranks, device
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _progress(texts: _Texts, visible: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A line that says how far it is: redrawn in a terminal, else one every ``LOG_EVERY`` seconds on stderr."""
    if not visible:
        yield None
        return
    started = time.monotonic()
    of = "" if texts.count is None else f"/{texts.count:,}"

    def described(now: Progress) -> str:
        seconds = max(time.monotonic() - started, 1e-9)
        left = seconds * (texts.size - now.done) / now.done if now.done else None
        speed = f"{now.tokens / seconds:,.0f} tokens/s"
        return (
            f"{now.documents:,}{of} documents  {speed}  perplexity {exp(now.loss):,.2f}"
            f"  {'' if left is None else f'{_clock(left)} left'}"
        )

    if not sys.stderr.isatty():
        said = started

        def log(now: Progress) -> None:
            nonlocal said
            if time.monotonic() - said >= LOG_EVERY:
                said = time.monotonic()
                print(described(now), file=sys.stderr, flush=True)

        yield log
        return
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=texts.size)
        yield lambda now: bar.update(task, completed=now.done, description=described(now))


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
