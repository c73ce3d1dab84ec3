"""Options that several commands share.

``TextReading`` and ``Reading`` (how text is read, and which part is scored), ``Running`` (where a
model runs), ``Scoring`` (windows and journal:
``--protocol``, ``--context-length``, ``--stride``, ``--journal``), ``Question`` (what a judge is
asked) and ``Curves`` (how a training history is read).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import InputError, visible
from ..files import other_than_file
from .options import option

if TYPE_CHECKING:
    from ..monitor.digest import Digest
    from ..monitor.health import Diagnosis
    from ..monitor.history import History
    from ..text.readers import ReadOptions

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES = ("auto", "float32", "bfloat16", "float16", *SHORT_DTYPES)
TEXT_HELP = (
    ".txt (a file is a document), .jsonl, .json, .csv, .tsv, .parquet (a row is one), a folder of "
    "these or of datasets, token ids in .bin or .npy; text also with .gz or .zst; - is standard "
    "input"
)
JOURNAL_HELP = "the same command again goes on where a killed one stopped"
FAIL_ON_HELP = "exit with status 1 if a finding is at least this severe"


def expect_ending(option: str, path: str | None, *endings: str) -> None:
    """Raise InputError where the name of an output file ends in another format.

    Names of devices and pipes may end in anything.

    Args:
        option: The option as it is typed, for the message.
        path: Name of the file; None where the option is absent.
        endings: The endings of the formats that can be written.

    Example:
        >>> expect_ending("--png", "loss.svg", ".png")
        Traceback (most recent call last):
        perplexity.errors.InputError: --png: expected a name that ends in .png, got loss.svg
    """
    if path is None or path.endswith(endings):
        return
    if other_than_file(path) in (None, "no such file"):
        raise InputError(
            f"{option}: expected a name that ends in {' or '.join(endings)}, got {path}"
        )


@dataclass(frozen=True, kw_only=True)
class TextReading:
    """Options that say how text files are read."""

    text_column: str = option("of .jsonl, .parquet, datasets (%(default)s)", "text", metavar="NAME")
    domain_column: str = option("for a table by domain (%(default)s)", "domain", metavar="NAME")
    id_column: str = option("names documents (%(default)s)", "id", metavar="NAME")
    split: str | None = option("of a datasets folder that has several", metavar="NAME")
    token_dtype: str = option("of .bin files (%(default)s)", "uint16", choices=("uint16", "uint32"))
    separator: int | None = option("ends a document in .bin and .npy (BOS, else EOS)", metavar="ID")
    stdin: str = option("what - is (%(default)s)", "txt", choices=("txt", "jsonl"))

    def options(self) -> ReadOptions:
        """Return the readers' options that need no tokenizer."""
        from ..text.readers import ReadOptions

        return ReadOptions(
            self.text_column,
            self.domain_column,
            self.id_column,
            self.split,
            self.token_dtype,
            standard_input=self.stdin,
        )

    def options_with(self, tokenizer) -> ReadOptions:
        """Return the readers' options, with the token at which token files are cut.

        The token is ``--separator``, else the tokenizer's BOS, else its EOS.

        Raises:
            InputError: ``--separator`` is no token id of the tokenizer.
        """
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        before, after = (bos, None) if bos is not None else (None, eos)
        if self.separator is not None:
            if not 0 <= self.separator < len(tokenizer):
                raise InputError(
                    f"--separator: expected a token id below {len(tokenizer)}, got {self.separator}"
                )
            before, after = (None, self.separator) if self.separator != bos else (bos, None)
        return replace(self.options(), split_before=before, split_after=after)


@dataclass(frozen=True, kw_only=True)
class Reading(TextReading):
    """Options that say how text files are read, and which part of a row is scored."""

    score: str = option(
        "part of a row to score (%(default)s: its spans, else its text, completion or turns)",
        "auto",
        choices=("auto", "all", "spans", "completion", "assistant"),
    )
    prompt_column: str = option(
        "context of a completion, not scored (%(default)s)", "prompt", metavar="NAME"
    )
    completion_column: str = option(
        "scored after its prompt (%(default)s)", "completion", metavar="NAME"
    )
    messages_column: str = option(
        "a conversation; the assistant's turns are scored (%(default)s)", "messages", metavar="NAME"
    )
    spans_column: str = option(
        "parts of the text to score, [begin, end) in characters (%(default)s)",
        "spans",
        metavar="NAME",
    )

    limit: int | None = option("read this many documents, the first ones", metavar="N")
    sample: int | None = option("read this many documents, chosen by hash", metavar="N")

    def options(self) -> ReadOptions:
        """Return the readers' options that need no tokenizer."""
        return replace(
            super().options(),
            score=self.score,
            prompt_column=self.prompt_column,
            completion_column=self.completion_column,
            messages_column=self.messages_column,
            spans_column=self.spans_column,
            limit=self.limit,
            sample=self.sample,
        )


@dataclass(frozen=True, kw_only=True)
class Running:
    """Options that say where and how a model runs."""

    device: str | None = option("cpu, cuda, cuda:1, ... (a GPU if there is one)")
    device_map: str | None = option(
        "auto: spread the model over all devices by their memory (accelerate)", choices=("auto",)
    )
    revision: str | None = option("branch, tag or commit of the model on the hub", metavar="REV")
    dtype: str = option(default="auto", choices=DTYPES)
    trust_remote_code: bool = option("run code that comes with the model", False)
    backend: str | None = option("of the loss (by device)", choices=("triton", "torch"))

    def load(
        self,
        name: str,
        *,
        device: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        tokenizer: str | None = None,
    ):
        """Load a model and its tokenizer, without transformers' progress bars and warnings.

        Args:
            name: Folder, or name on the Hugging Face hub.
            device: This process's device; None stands for ``--device``, else a GPU if there is one.
            revision: Branch, tag or commit of ``name`` on the hub.
            dtype: Dtype of the weights; None stands for ``--dtype``.
            tokenizer: Folder, file or name of the tokenizer; None stands for the model's.

        Raises:
            InputError: The model cannot be loaded, or several processes use ``--device-map``.
        """
        import transformers

        from .. import models
        from .ranks import device_of, world_size

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        placed = self.device_map is not None
        if placed and world_size() > 1:
            raise InputError(
                "--device-map: expected one process, which has all devices, got several"
            )
        return models.load(
            name,
            device=self.device if placed else device or device_of(self.device),
            dtype=SHORT_DTYPES.get(dtype or self.dtype, dtype or self.dtype),
            trust_remote_code=self.trust_remote_code,
            unchanged=True,
            revision=revision,
            device_map=self.device_map,
            tokenizer=tokenizer,
        )


TOKENIZER_HELP = "folder, tokenizer.json or sentencepiece .model (the model's)"


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Options that say how text is cut into windows and scored."""

    protocol: str = option(
        "how text is windowed (%(default)s)", "sliding", choices=("sliding", "lm-eval", "llama.cpp")
    )
    context_length: int | None = option(
        "tokens a window shows (by protocol and model)", metavar="N"
    )
    stride: int | None = option("tokens a sliding window moves on (half the context)", metavar="N")
    bos: str = option(
        "BOS before a document, never two (%(default)s)",
        "auto",
        choices=("auto", "always", "never"),
    )
    special_text: str | None = option(
        "how special tokens in the text are read (by protocol; sliding: tokens)",
        choices=("tokens", "text"),
    )
    batch_size: int | None = option("windows at a time (by their length)", metavar="N")
    journal: str | None = option(JOURNAL_HELP, metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class Question:
    """Options that say what a judge is asked, and which words are its answers."""

    template: str | None = option("the question, with {text} where the text goes", metavar="FILE")
    yes: str = option(
        "the answer that counts, by its first token (%(default)s)", "yes", metavar="WORD"
    )
    no: str = option("the other one (%(default)s)", "no", metavar="WORD")

    def template_or(self, default: str) -> str:
        """Return the text in the file of ``--template``, or ``default`` without that option.

        Raises:
            InputError: The file cannot be read, or its text is no template.
        """
        from ..probe.ask import check_template

        if self.template is None:
            return default
        if (other := other_than_file(self.template)) is not None:
            raise InputError(f"--template: expected a text file, got {other}, {self.template}")
        try:
            with open(self.template, encoding="utf-8") as file:
                template = file.read()
        except (OSError, UnicodeError) as error:
            raise InputError(f"--template: expected a text file, got {self.template} ({error})")
        check_template(f"--template {self.template}", template)
        return template


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Options that say how a training history is read and judged."""

    vocabulary_size: int | None = option(
        "entries of the vocabulary, to know the uniform loss", metavar="V"
    )
    total_steps: int | None = option("the run's budget, for projections and time left", metavar="N")
    unit: str = option(
        "of the losses (%(default)s)", "nats", choices=("nats", "bits", "perplexity")
    )
    tag: list[str] | None = option(
        "what a measure was logged as, e.g. val_loss=dev/ce", metavar="MEASURE=NAME", repeated=True
    )

    pattern: list[str] | None = option(
        "how a line of console text is read, e.g. 'step (?P<step>\\d+) .* loss (?P<train_loss>\\S+)'",
        metavar="REGEX",
        repeated=True,
    )
    bytes_per_token: float | None = option(
        "of the validation text, for losses in bits per byte", metavar="B"
    )
    run: str | None = option("which of several runs in the file or folder", metavar="NAME")
    by: str | None = option(
        "axis on which runs of several files are compared (tokens where all logged them, else step)",
        choices=("tokens", "step"),
    )

    def how(self) -> dict[str, Any]:
        """Return the keywords of ``read_history``: tags by measure, unit, run and so on.

        Raises:
            InputError: A ``--tag`` is not MEASURE=NAME.
        """
        tags = {}
        for tag in self.tag or []:
            measure, equals, name = tag.partition("=")
            if not equals or not name:
                raise InputError(f"--tag: expected MEASURE=NAME, got {tag!r}")
            tags[measure] = name
        return {
            "tags": tags,
            "unit": self.unit,
            "run": self.run,
            "patterns": tuple(self.pattern or ()),
            "bytes_per_token": self.bytes_per_token,
        }

    def read(self, path: str) -> History:
        """Read the history in a file or folder."""
        from ..monitor.readers import read_history

        return read_history(path, **self.how())

    def read_all(self, path: str) -> dict[str, History]:
        """Return every run's history in a file or folder by the run's name."""
        from ..monitor.readers import read_histories

        return read_histories(path, **self.how())

    def judge(self, history: History) -> tuple[Digest, Diagnosis]:
        """Return a history's state for the signals, and what it means."""
        from ..monitor import diagnose

        digest = history.digest()
        return digest, diagnose(digest, **self.judged(), notes=history.notes)

    def judged(self) -> dict[str, Any]:
        """Return the keywords of ``monitor.diagnose``."""
        return {"vocabulary_size": self.vocabulary_size, "total_steps": self.total_steps}


def shortened(paths: list[str]) -> list[str]:
    """Return paths without the folders that all share, for a table.

    Example:
        >>> shortened(["runs/a/log.csv", "runs/b/log.csv"])
        ['a/log.csv', 'b/log.csv']
    """
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [visible(os.path.relpath(path, folder)) for path in paths]
