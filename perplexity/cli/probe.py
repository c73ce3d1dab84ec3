"""``ppl probe``: repetition, reference metrics and a health score of generated text."""

from __future__ import annotations

import importlib
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, theirs
from ..files import check_outputs
from ..findings import SEVERITIES
from ..wording import counted
from . import tables
from .extras import needs
from .json_option import TO_STANDARD_OUTPUT, console_beside, json_file, write_json
from .options import argument, option, part
from .parts import FAIL_ON_HELP, Question, Running, TextReading

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from ..probe import GenerationSettings, Probe, Scorer

LOWER = "--batch-size or --max-new-tokens"  # the advice when memory runs out
SHOWN = 400  # characters of an example
CHECKPOINT = re.compile(r"(?:checkpoint|step)[-_]?(\d+)$")  # a folder's name, with its step


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """Options that say which prompts are read from a file."""

    limit: int = option("prompts, evenly over the file (%(default)s)", 64, metavar="N")
    prompt_column: str = option("of .jsonl (%(default)s)", "prompt", metavar="NAME")
    reference_column: str = option("of .jsonl (%(default)s)", "reference", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Options that say how texts are generated."""

    samples: int | None = option("texts a prompt (4; greedy 1)", metavar="N")
    max_new_tokens: int | None = option(
        "where a text is cut off (128, or half the context)", metavar="N"
    )
    temperature: float = option("of sampling; 0 is greedy (%(default)g)", 1.0, metavar="T")
    top_p: float = option("probability that is sampled from (%(default)g)", 1.0, metavar="P")
    top_k: int = option("tokens that are sampled from (%(default)s: all)", 0, metavar="K")
    seed: int = option("of sampling (%(default)s)", 0, metavar="N")
    prompt_tokens: int = option("of a document to cut (%(default)s)", 32, metavar="N")
    chat: bool = option("put prompts through the tokenizer's chat template", False)
    batch_size: int = option("texts generated at a time (%(default)s)", 64, metavar="N")

    def settings(self) -> GenerationSettings:
        """Return the settings that ``probe`` takes; ``samples`` is 4 by default, 1 where greedy."""
        from ..probe import GenerationSettings

        samples = self.samples if self.samples is not None else 1 if self.temperature == 0 else 4
        return GenerationSettings(**vars(self) | {"samples": samples})


@dataclass(frozen=True, kw_only=True)
class Comparing:
    """Options that bring more evidence about the model: a judge, results, scorers."""

    judge: str | None = option("a model that is asked yes or no about each text", metavar="MODEL")
    question: Question = part(Question)
    embeddings: str | None = option("a sentence-transformers folder, for coherence", metavar="DIR")
    eval: str | None = option(
        "this model's ppl eval --json, where prompts have no references", metavar="FILE"
    )
    history: str | None = option("of its training run, as for ppl monitor", metavar="FILE")
    scorer: list[str] | None = option(
        "a benchmark of your own, into the health score", metavar="MODULE:CLASS", repeated=True
    )
    weight: list[str] | None = option(
        "of the health score's parts", metavar="PART=W", repeated=True
    )
    step: int | None = option("of the checkpoint (from a folder's name, checkpoint-N)", metavar="N")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options of the result file and the exit status."""

    json: str | None = option(
        f"write every number and text to this file{TO_STANDARD_OUTPUT}", metavar="OUT"
    )
    fail_on: str | None = option(FAIL_ON_HELP, choices=SEVERITIES)


@dataclass(frozen=True, kw_only=True)
class Options:
    """what the model generates: repetition, reference metrics, one health score"""

    model: str = argument("Hugging Face model folder or name")
    prompts: str = argument(
        ".jsonl with prompt and, where known, reference (or a list); .txt, a line each; "
        "or text to cut prompts from, as ppl eval reads it; - is standard input"
    )
    prompting: Prompting = part(Prompting, "prompts")
    generation: Generation = part(Generation, "generation")
    comparing: Comparing = part(Comparing, "beside it")
    reading: TextReading = part(TextReading, "reading")
    running: Running = part(Running, "the models")
    output: Output = part(Output, "output")


def run(options: Options) -> int:
    """Generate and measure texts, write and print the result; return the exit status.

    It is 1 where a finding is at least as severe as ``--fail-on``.
    """
    needs(probe=("transformers", "rich", "scipy", "pyarrow", "xxhash", "sacrebleu", "rouge_score"))
    from ..evaluation import read_result
    from ..monitor.readers import history_files
    from ..probe.ask import PROBE_TEMPLATE, Questioner
    from ..probe.prober import probe
    from ..probe.prompts import read_prompts, spread
    from .progress import log_texts

    asked, other, running = options.prompting, options.comparing, options.running
    question = other.question
    inputs = [
        options.model,
        options.prompts,
        other.judge,
        question.template,
        other.embeddings,
        other.eval,
    ]
    check_outputs(json_file(options.output.json), [*inputs, *history_files(other.history)])
    settings = options.generation.settings()
    if asked.limit < 1:
        raise InputError(f"--limit: expected at least 1, got {asked.limit}")
    weights = _weights(other.weight)
    scorers = [_scorer(name) for name in other.scorer or []]
    evaluation = None if other.eval is None else read_result(other.eval)
    diagnosis = None if other.history is None else _diagnosis(other.history)
    template = question.template_or(PROBE_TEMPLATE)
    every = list(
        read_prompts(
            options.prompts,
            options.reading.options(),
            prompt_column=asked.prompt_column,
            reference_column=asked.reference_column,
        )
    )
    prompts = spread(every, asked.limit)
    model, tokenizer = running.load(options.model, revision=running.revision)
    judge = None
    if other.judge is not None:
        judging = (model, tokenizer) if other.judge == options.model else running.load(other.judge)
        judge = Questioner(
            *judging, template=template, yes=question.yes, no=question.no, backend=running.backend
        )
    result = probe(
        model,
        tokenizer,
        prompts,
        settings=settings,
        judge=judge,
        embeddings=other.embeddings,
        evaluation=evaluation,
        diagnosis=diagnosis,
        scorers=scorers,
        weights=weights,
        backend=running.backend,
        name=options.model,
        step=other.step if other.step is not None else _step(options.model),
        progress=log_texts(),
    )
    try:
        if options.output.json:
            write_json(options.output.json, result.to_json())
    finally:
        console = console_beside(options.output.json)
        if len(prompts) < len(every):
            console.print(
                f"{len(prompts):,} of {counted(len(every), 'prompt')}, evenly over the file",
                highlight=False,
            )
        console.print(view(result))
    return int(result.fails(options.output.fail_on))


def _weights(pairs: list[str] | None) -> dict[str, float]:
    """Return the weights of the health score's parts from ``--weight PART=W``."""
    weights = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not 0 <= weights[name] < math.inf:
            raise InputError(f"--weight: expected PART=W with a number of 0 or more, got {pair!r}")
    return weights


def _scorer(name: str) -> Scorer:
    """Return an instance of the class ``MODULE:CLASS``, also from the working folder."""
    module, _, kind = name.partition(":")
    sys.path.insert(0, "")
    try:
        with theirs(f"--scorer: expected MODULE:CLASS that can be made, got {name!r}"):
            return getattr(importlib.import_module(module), kind)()
    except SystemExit as error:
        raise InputError(
            f"--scorer: expected MODULE:CLASS that can be made, got {name!r}, which exits"
        ) from error
    finally:
        if "" in sys.path:  # unless the module changed it
            sys.path.remove("")


def _diagnosis(path: str) -> dict:
    """Read a training history and return its diagnosis."""
    from ..monitor.health import diagnose
    from ..monitor.readers import read_history

    history = read_history(path)
    return diagnose(history.digest(), notes=history.notes).to_dict()


def _step(model: str) -> int | None:
    """Return the step in the name of a checkpoint's folder; None where there is none."""
    match = CHECKPOINT.search(Path(model).name)
    return int(match[1]) if match else None


def view(probe: Probe) -> Group:
    """Return the verdict, measures, health, findings and two example texts, for a terminal."""
    from ..probe.scores import in_words
    from ..probe.summary import examples

    head = tables.verdict(probe.verdict, probe.health_score)
    if probe.health_score is not None:
        head.append(f", {in_words(probe.health)}", style="dim")
    settings = f"{counted(probe.generation['texts'], 'text')} to {counted(probe.prompts, 'prompt')}"
    parts: list = [
        head,
        tables.plain(f"{settings}: {probe.settings['in_words']}", "dim"),
        _measures(probe.to_dict()),
        _health(probe),
        tables.findings(probe.findings),
    ]
    for title, text in examples(probe.to_dict()):
        parts.append(tables.plain(f"{title}:", "dim"))
        parts.append(tables.plain("  " + _shortened(text)))
    parts += tables.notes(probe.notes)
    return tables.stacked(*parts)


def _shortened(text: str) -> str:
    """Return the beginning of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"


def _measures(record: dict) -> Table:
    """Return the table of the measures of the generated texts and of the references."""
    from ..probe.summary import rows

    table = tables.table(
        None, "", "its own", "references", "", right=("its own", "references"), boxed=False
    )
    for row in rows(record):
        table.add_row(*map(tables.plain, row))
    return table


def _health(probe: Probe) -> Table:
    """Return the table of the health score's parts."""
    from ..probe.scores import FACTOR, SHOWN

    table = tables.table("health", "part", "weight", "score", "from")
    for name, of in probe.health["parts"].items():
        score = "missing" if of["score"] is None else f"{100 * of['score']:.0f}"
        weight = "factor" if name == FACTOR else f"{of['weight']:g}"
        shown = tables.plain(SHOWN.get(name, name))
        table.add_row(shown, weight, score, tables.plain(of["evidence"]))
    return table
