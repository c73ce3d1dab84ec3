"""``ppl probe`` and ``ppl ask``."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text as Line

from ..errors import InputError, theirs
from ..evaluation.collect import ParquetTable
from ..evaluation.commands import device_of, load_model, options, read_options, with_separator
from ..evaluation.documents import Document
from ..evaluation.models import described
from ..evaluation.readers import STANDARD_INPUT, read_documents
from ..evaluation.results import read_result, to_json
from ..evaluation.tables import findings_table
from ..evaluation.tables import notes as print_notes
from ..files import Output, check_outputs, other_than_file, write_text
from ..findings import VERDICT_COLOURS
from ..monitor.readers import history_files
from ..terminal import Console
from .ask import PROBE_TEMPLATE, PROMPT, TEMPLATE, Answer, Questioner, Tally, check_template
from .findings import unanswered
from .prompts import read_prompts, spread
from .scores import Scorer
from .settings import GenerationSettings
from .summary import examples, rows

if TYPE_CHECKING:
    from .prober import Probe

SHOWN = 400  # characters of an example
LOG_EVERY = 10.0  # seconds between lines of progress
ANSWER_COLUMNS = {"id": "string", "p_yes": "float64", "p_no": "float64", "yes_of_two": "float64", "first": "string"}
CHECKPOINT = re.compile(r"(?:checkpoint|step)[-_]?(\d+)$")


def run_probe(arguments: argparse.Namespace) -> int:
    from .prober import probe

    names = ("model", "prompts", "judge", "template", "embeddings", "eval")
    given = [getattr(arguments, name) for name in names]
    check_outputs(options(arguments, "json"), [*given, *history_files(arguments.history)])
    samples = arguments.samples if arguments.samples is not None else 1 if arguments.temperature == 0 else 4
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "prompt_tokens", "chat", "batch_size")
    settings = GenerationSettings(samples=samples, **{name: getattr(arguments, name) for name in names})
    if arguments.limit < 1:
        raise InputError(f"--limit: expected at least 1, got {arguments.limit}")
    weights = _weights(arguments.weight)
    scorers = [_scorer(name) for name in arguments.scorer or []]
    evaluation = None if arguments.eval is None else read_result(arguments.eval)
    diagnosis = None if arguments.history is None else _diagnosis(arguments.history)
    template = _template(arguments.template, PROBE_TEMPLATE)
    every = list(
        read_prompts(
            arguments.prompts,
            read_options(arguments),
            prompt_column=arguments.prompt_column,
            reference_column=arguments.reference_column,
        )
    )
    prompts = spread(every, arguments.limit)
    device = device_of(arguments.device)
    model, tokenizer = load_model(arguments.model, arguments, device, revision=arguments.revision)
    judge = None
    if arguments.judge is not None:
        judging = (model, tokenizer)
        if arguments.judge != arguments.model:
            judging = load_model(arguments.judge, arguments, device)
        judge = Questioner(*judging, template=template, yes=arguments.yes, no=arguments.no, backend=arguments.backend)
    found = probe(
        model,
        tokenizer,
        prompts,
        settings=settings,
        judge=judge,
        embeddings=arguments.embeddings,
        evaluation=evaluation,
        diagnosis=diagnosis,
        scorers=scorers,
        weights=weights,
        backend=arguments.backend,
        name=arguments.model,
        step=arguments.step if arguments.step is not None else _step(arguments.model),
        progress=_progress(),
    )
    try:
        if arguments.json:
            found.save(arguments.json)
    finally:
        console = Console()
        if len(prompts) < len(every):
            console.print(f"{len(prompts):,} of {len(every):,} prompts, evenly over the file", highlight=False)
        console.print(view(found))
    return int(found.fails(arguments.fail_on))


def run_ask(arguments: argparse.Namespace) -> int:
    inputs = [arguments.model, *arguments.text, arguments.template]
    check_outputs(options(arguments, "json", "out"), inputs, folders=options(arguments, "journal"))
    if arguments.out and not arguments.out.endswith((".jsonl", ".parquet")):
        raise InputError(f"--out: expected a name that ends in .jsonl or .parquet, got {arguments.out}")
    if STANDARD_INPUT in arguments.text and arguments.journal:
        raise InputError("-: expected a file with --journal, standard input cannot be read again")
    template = _template(arguments.template, TEMPLATE)
    if PROMPT in template:
        raise InputError(f"--template: expected one without {PROMPT}, which texts have not here")
    for _ in read_documents([path for path in arguments.text if path != STANDARD_INPUT], read_options(arguments)):
        pass  # what is broken is told before the model is loaded
    device = device_of(arguments.device)
    model, tokenizer = load_model(arguments.model, arguments, device, revision=arguments.revision)
    judge = Questioner(
        model,
        tokenizer,
        template=template,
        yes=arguments.yes,
        no=arguments.no,
        chat=False if arguments.plain else None,
        backend=arguments.backend,
    )
    documents: Iterable[Document] = read_documents(
        arguments.text, with_separator(read_options(arguments), tokenizer, arguments.separator)
    )
    tell, tally = _progress(), Tally(judge)
    with _written(arguments.out) as write:
        for answer in judge.ask(documents, batch_size=arguments.batch_size, journal=arguments.journal):
            tally.add(answer)
            write(answer)
            tell("asking", len(tally), 0)
    found = tally.summary()
    if found is None:
        raise InputError("text: expected at least one document, got none")
    notes = judge.notes
    if arguments.json:
        record = found | {"model": described(judge.network, arguments.model), "template": template, "notes": notes}
        write_text(arguments.json, to_json(record) + "\n", "--json")
    console = Console()
    console.print(_answers_table(found))
    print_notes(notes, console)
    for finding in unanswered(found):
        console.print(f"note: {finding.evidence}; {finding.advice}", markup=False, highlight=False)
    for word, token in zip((arguments.yes, arguments.no), found["answers"], strict=True):
        if token.strip() != word.strip():
            console.print(
                f"note: {word!r} is scored by its first token, {token!r}, which begins other words, too",
                markup=False,
                highlight=False,
            )
    if found["shortened"]:
        console.print(
            f"note: {found['shortened']:,} texts are too long for the model's context: their ends were not read",
            highlight=False,
        )
    return 0


@contextmanager
def _written(path: str | None) -> Iterator[Callable[[Answer], None]]:
    """Takes answers as they come: JSON lines or Parquet; the file has its name once it is whole."""
    row = lambda answer: {name: getattr(answer, name) for name in ANSWER_COLUMNS}  # noqa: E731
    if path is None:
        yield lambda answer: None
    elif path.endswith(".jsonl"):
        with Output(path, "--out") as file:
            yield lambda answer: file.write(json.dumps(row(answer)).encode() + b"\n")
    else:
        table = ParquetTable(path, ANSWER_COLUMNS, "--out")
        try:
            yield lambda answer: table.add(1, **{name: [value] for name, value in row(answer).items()})
            table.finish()
        finally:
            table.discard()


def _template(path: str | None, default: str) -> str:
    if path is None:
        return default
    if (other := other_than_file(path)) is not None:
        raise InputError(f"--template: expected a text file, got {other}, {path}")
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"--template: expected a text file, got {path} ({error})")
    check_template(f"--template {path}", template)
    return template


def _weights(given: list[str] | None) -> dict[str, float]:
    weights = {}
    for pair in given or []:
        name, equals, value = pair.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not 0 <= weights[name] < math.inf:
            raise InputError(f"--weight: expected PART=W with a number of 0 or more, got {pair!r}")
    return weights


def _scorer(name: str) -> Scorer:
    """An object of the class that ``MODULE:CLASS`` names, made without arguments; the working folder is looked in, too."""
    module, _, made = name.partition(":")
    sys.path.insert(0, "")
    try:
        with theirs(f"--scorer: expected MODULE:CLASS that can be made, got {name!r}"):
            return getattr(importlib.import_module(module), made)()
    except SystemExit as error:
        raise InputError(f"--scorer: expected MODULE:CLASS that can be made, got {name!r}, which exits") from error
    finally:
        if "" in sys.path:  # unless the module changed it
            sys.path.remove("")


def _diagnosis(path: str) -> dict:
    from ..monitor.health import diagnose
    from ..monitor.readers import read_history

    history = read_history(path)
    return diagnose(history.digest(), notes=history.notes).to_dict()


def _step(model: str) -> int | None:
    found = CHECKPOINT.search(Path(model).name)
    return int(found[1]) if found else None


def _progress() -> Callable[[str, int, int], None]:
    """A line every ``LOG_EVERY`` seconds on stderr."""
    said = time.monotonic()

    def tell(what: str, done: int, of: int) -> None:
        nonlocal said
        if time.monotonic() - said >= LOG_EVERY:
            said = time.monotonic()
            print(f"{what}: {done:,}{f' of {of:,}' if of else ''} texts", file=sys.stderr, flush=True)

    return tell


def view(found: Probe) -> Group:
    """Verdict, measures beside the references', health, findings and two texts, for a terminal."""
    head = Line(found.verdict, style=f"bold {VERDICT_COLOURS[found.verdict]}")
    if found.health_score is not None:
        head.append(f"  health {found.health_score:.0f} of 100", style="default")
        head.append(f", from {found.health['coverage']:.0%} of its weight", style="dim")
    told = Line(
        f"{found.generation['texts']:,} texts to {found.prompts:,} prompts: {found.settings['in_words']}", style="dim"
    )
    parts: list = [head, told, _measures_table(found.to_dict()), _health_table(found), findings_table(found.findings)]
    for title, text in examples(found.to_dict()):
        parts.append(Line(f"{title}:", style="dim"))
        parts.append(Line("  " + _shortened(text)))
    parts += [Line(f"note: {note}") for note in found.notes]
    return Group(*parts)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"


def _measures_table(record: dict) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in (("", "left"), ("its own", "right"), ("references", "right"), ("", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows(record):
        table.add_row(*map(Line, row))
    return table


def _health_table(found: Probe) -> Table:
    table = Table(title="health", title_justify="left", title_style="bold")
    for name, justify in (("part", "left"), ("weight", "right"), ("score", "right"), ("from", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    for name, part in found.health["parts"].items():
        score = "missing" if part["score"] is None else f"{100 * part['score']:.0f}"
        table.add_row(Line(name), f"{part['weight']:g}", score, Line(part["evidence"]))
    return table


def _answers_table(found: dict) -> Table:
    table = Table(title=f"{found['texts']:,} texts asked about", title_justify="left", title_style="bold")
    for name, justify in (("measure", "left"), ("value", "right"), ("meaning", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    table.add_row("P(yes)", f"{found['p_yes']:.4f}", "mean over texts, among the whole vocabulary: the Ask-LLM score")
    spread = ", ".join(f"{at} %: {value:.4f}" for at, value in found["percentiles"].items())
    table.add_row("  percentiles", "", spread)
    two = "–" if found["yes_of_two"] is None else f"{found['yes_of_two']:.4f}"
    table.add_row("yes of the two", two, "P(yes) / (P(yes) + P(no))")
    first = ", ".join(f"{word!r} {count:,}" for word, count in found["first_choices"].items())
    table.add_row(
        "answered", f"{found['answered']:.1%}", Line(f"of the probability is on the two; first choices: {first}")
    )
    return table
