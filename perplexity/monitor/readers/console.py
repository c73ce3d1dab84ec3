"""Console text: what programs print while they train, by a table of patterns.

A line gives a row by the first pattern that it matches; else by its dict, as transformers prints
one, or by its pairs of a name and a number (``step: 10  loss: 3.2``). A step, an epoch or a progress
bar that stands alone holds for the lines below it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, check_encoding
from ..names import (
    MEASURES,
    SAYS_TRAIN,
    Names,
    Reading,
    is_bare_perplexity,
    is_loss,
    is_set,
    looks_like_loss,
)
from .cells import Log, Rows, Table, number
from .delimited import blocks_of_lines

N = (
    r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"|[-+]?(?:nan|inf(?:inity)?)\b"
)
# (logger, regular expression). A group is named by the measure that it holds; VALUE stands for a
# number. `set` is the validation set's name; a pattern without a group drops the line. What is not
# here is found by its names alone.
PATTERNS: tuple[tuple[str, str], ...] = (
    (
        "Megatron-LM, by set",
        r"validation loss at iteration (?P<step>\d+) on (?P<set>[\w -]+?) set.*?"
        r"lm loss value: (?P<val_loss>VALUE)",
    ),
    (
        "Megatron-LM, NeMo, GPT-NeoX",
        r"valid(?:ation)? (?:loss|results) at iteration (?P<step>\d+).*?"
        r"lm[ _]loss(?: value)?: (?P<val_loss>VALUE)",
    ),
    (
        "nanoGPT",
        r"step (?P<step>\d+): train loss (?P<train_eval_loss>VALUE), val loss (?P<val_loss>VALUE)",
    ),
    ("llm.c, main.log", r"\bs:(?P<step>\d+) tel:(?P<val_loss>VALUE)"),
    (
        "llm.c, main.log",
        r"\bs:(?P<step>\d+) trl:(?P<train_loss>VALUE)(?: lr:(?P<lr>VALUE))?"
        r"(?: norm:(?P<grad_norm>VALUE))?",
    ),
    ("llm.c, main.log", r"\bs:\d+ eval:"),
    ("build-nanogpt", r"^(?P<step>\d+) train (?P<train_loss>VALUE)$"),
    ("build-nanogpt", r"^(?P<step>\d+) val (?P<val_loss>VALUE)$"),
    ("torchtitan", r"\bvalidate step: *(?P<step>\d+) +loss: *(?P<val_loss>VALUE)"),
    ("nanochat", r"\bStep (?P<step>\d+) \| Validation bpb: (?P<val_bpb>VALUE)"),
    (
        "Levanter",
        r"Progress on: *train (?P<step>[\d.]+[kM]?)it/.*postfix: *loss=(?P<train_loss>VALUE)",
    ),
    (
        "Keras, at an epoch's end",
        r"^(\d+)/\1 .*- loss: (?P<train_loss>VALUE)(?:.* - val_loss: (?P<val_loss>VALUE))?",
    ),
    ("Keras, within an epoch", r"^\d+/\d+ +[\[━].*- loss: VALUE"),
    ("torchtune", r"\b(?P<epoch>\d+)\|(?P<step>\d+)\|Loss: (?P<train_loss>VALUE)"),
    (
        "Marian",
        r"\[valid\] Ep\. [\d.]+ : Up\. (?P<step>\d+) : ce-mean-words : (?P<val_loss>VALUE)",
    ),
    ("Marian", r"\[valid\] Ep\. [\d.]+ : Up\. (?P<step>\d+) : perplexity : (?P<val_ppl>VALUE)"),
    ("Marian, a sum over a sentence or a score", r"\[valid\] Ep\. [\d.]+ : Up\. \d+ : "),
    (
        "Marian",
        r"\bEp\. [\d.]+ : Up\. (?P<step>\d+) : Sen\. [\d,.]+\w? : Cost (?P<train_loss>VALUE)",
    ),
    (
        "TensorFlow's Estimator",
        r"Saving dict for global step (?P<step>\d+):.*?\bloss = (?P<val_loss>VALUE)",
    ),
)
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
BAR = re.compile(r"(\d+)/(\d+) \[[\d:?]+<")
# A count at the front of a line, or behind a bracket or a bar: 10/400, [ 10/400 (2%)], | 10/ 400 |.
# A date (11/27 10:00:00) is none.
OF_ALL = re.compile(r"(?:^(?:[\d.:-]+ )?|[\[|]\s*)(\d+)/ *(\d+)(?=[\s\]):,|])(?! \d+:\d\d:)")
# The same behind an epoch: Epoch 3, 10/400; epoch 003: 10 / 400; Epoch: [3] [10/400].
EPOCH_OF_ALL = re.compile(
    r"(?i)\bepoch(?:\(\w+\))?[\s:]*\[?(\d+)(?:/ ?\d+)?\]?(?:[,:;|\s]+\[?|[\[(])\s*(\d+) ?/ *(\d+)\b"
)
FRONT = re.compile(r"^(\d+) \| ")  # a step before everything else
DICT = re.compile(r"\{.*\}")
# Without one of these a line, in lower case, holds neither a step nor a loss; without one of the
# second kind, or a digit at its front, no pattern of the table. Looked for as text: a line costs
# a third of what it does with a regular expression.
SPEAKS = (
    *("loss", "entropy", "ppl", "perplexity", "bpb", "bits", "step", "iter", "epoch", "batch"),
    *("update", "train", "val", "trl:", "tel:", "it/s", "s/it", "nll", "xent", "up."),
)
SPECIAL = (
    "validation ",
    "valid loss",
    "train loss",
    " trl:",
    " tel:",
    " eval:",
    "validate step",
    "progress on",
    " : up. ",
    "|loss: ",
    "saving dict",
)
NUMBER = re.compile(rf"(?<![\w.(-])(?P<value>{N})(?:\s*/\s*\d+)?(?P<unit>[KMBTkm]\b|%|[A-Za-z]+)?")
BETWEEN = re.compile(r"\. |[|,;:\[\]{}\t<>]|  +| - ")
WORD = re.compile(r"[A-Za-z_(][\w/.()@-]*")
LONGEST = 4000  # characters of a line that are looked at for names and numbers
MOST_NAMES = 10_000
MOST_UNREAD = 50
DRAWN = "\0drawn"  # in a row: the title of its bar, which may be drawn again
AT = ("step", "progress_bar", "epoch")  # where a row is
NAME = 80  # characters before a number that may be its name
VALIDATES = re.compile(
    r"(?i)(?<![\w/])(?:val|valid|validat(?:ion|e|ing)|eval|evaluat(?:ion|e|ing))(?![\w/])"
    r"(?!\s*[:=]\s*(?:n/a|none|nan|-)\b)"
)
# A heading: the next loss without a step is that of the evaluation.
EVALUATES = re.compile(
    r"(?i)^\W*(?:(?:running|start\w*|begin\w*|doing)\s+)?(?:evaluat|validat)(?:ing|ion)\b"
    r"(?!.*[=:]\s*\w)"
)
FIRST_EVALUATION = re.compile(rf"(?i)^\W*(?:val|valid|validation|eval)[ _]loss:?\s+(?:{N})\W*$")
# A program that a log begins with: ``loss = 0``, ``loss: float = 0``.
# What changes in a bar's title as it is drawn again: its own picture, a clock, a loss.
OF_DRAWING = re.compile(r"\d+%\W*\|.*|\d+:\d\d(?::\d\d)?|\d+\.\d+(?:[eE][-+]?\d+)?")
LOSS = re.compile(r"(?i)loss|ppl|perplexity|entropy|xent|nll")
COUNT = re.compile(r"\b(\d+) ?/ *(\d+)\b")
ASIDE = re.compile(r"\s*\([^()]*\)")  # loss (curr), Epoch(train)
CODE = re.compile(r"^\s*[\w.]+\s*(?:[-+*/]?=\s|:\s*(?:int|float|str|bool|[A-Z]\w*)\s*=)")
COMPOSER = re.compile(r"^(?:Train|Eval) (?=\w+/)")
# A name's own words, which may not be dropped from its front.
CHANGES = re.compile(
    r"(?i)^(?:best|min|max|lowest|highest|last|prev(?:ious)?|initial|final|aux|target|moving|ema|smooth\w*|old|new|loss|kl|total|valid\w*|val|eval\w*|test|dev|reward|policy|value|mtp|z)$"
)
HEADING = re.compile(r"\[(?:step|batch)=(\d+)(?:/\d+)?")
BATCH_HEADING = re.compile(r"\[epoch=(\d+)\]\[batch=(\d+)")
PLAIN = {
    "train": "train_loss",
    "val": "val_loss",
    "valid": "val_loss",
    "trl": "train_loss",
    "tel": "val_loss",
}


class ConsoleReader:
    """Rows of console text, block by block.

    Args:
        names: What is read.
        log: Takes the tables.
        patterns: The user's own regular expressions, tried first; see ``compiled``.
    """

    def __init__(self, names: Names, log: Log, patterns: tuple[str, ...] = ()) -> None:
        self.names, self.log = names, log
        self.mine = [compiled(pattern) for pattern in patterns]
        self.table = [re.compile(pattern.replace("VALUE", f"(?:{N})")) for _, pattern in PATTERNS]
        self.line = 0
        self.step: float | None = None
        self.epoch: float | None = None
        self.bars: dict[str, int] = {}  # a bar's length to where it was last
        self.bar: int | None = None  # the count of the last line that was a bar and held a loss
        self.known: dict[str, str | None] = {}  # text before a number to the name in it
        self.own: set[str] = set()  # measures that came with a step on their line
        self.shown: dict[str, str] = {}  # the validation losses that a line of training repeats
        self.evaluates = False  # the last line without a loss was the heading of an evaluation
        self.unread: dict[str, bool] = {}  # what looks like a loss, on lines without one
        # A bar's row with its line, until what it was drawn with (title, names, count) changes.
        self.waiting: tuple[dict[str, Any], int, tuple] | None = None

    def add(self, raw: bytes) -> None:
        """Read whole lines.

        Args:
            raw: Ends with a line break.
        """
        rows = Rows(self.names)
        lines = raw.decode(errors="replace").split("\n")
        for line in lines[:-1] if raw.endswith(b"\n") else lines:
            self.line += 1
            if "\x1b" in line:
                line = ANSI.sub("", line)
            for part in line.split("\r") if "\r" in line else (line,):
                if part.strip() and len(part) < 100_000:
                    self._add_part(rows, part.strip())
        if self.waiting is not None:
            rows.add(*self.waiting[:2])
            self.waiting = None
        if rows.lines:
            self.log.tables.append(rows.table())

    def _add_part(self, rows: Rows, text: str) -> None:
        lower = text[:LONGEST].lower()
        if not self.mine and not any(word in lower for word in SPEAKS):
            return
        special = text[0].isdigit() or any(word in lower for word in SPECIAL)
        record = self._matched(text[:LONGEST]) if special or self.mine else None
        if record is None and "{" in text:
            record = self._of_dict(text)
        if record is None and not CODE.match(text):
            record = self._pairs(COMPOSER.sub("", text[:LONGEST]))
        if record:
            self._put(rows, record)

    def _put(self, rows: Rows, record: dict[str, Any]) -> None:
        """Add a row; of a bar that is drawn again at the same count the last drawing counts.

        A bar shows its new count before its new loss.
        """
        bar = record.pop(DRAWN, None)
        drawn = bar, record.keys(), [record.get(key) for key in AT]
        if self.waiting is not None and self.waiting[2] != drawn:
            rows.add(*self.waiting[:2])
        self.waiting = None if bar is None else (record, self.line, drawn)
        if bar is None:
            rows.add(record, self.line)

    def _matched(self, text: str) -> dict[str, Any] | None:
        """Return the row of the first pattern that matches; {} for a line that holds none."""
        for _mine, pattern in [*((True, p) for p in self.mine), *((False, p) for p in self.table)]:
            if (found := pattern.search(text)) is None:
                continue
            record: dict[str, Any] = {k: v for k, v in found.groupdict().items() if v is not None}
            of = record.pop("set", None)
            if of is not None and "val_loss" in record and of.strip().lower() != "validation":
                record[f"val_loss/{of}"] = record.pop("val_loss")
            if not record:
                return {}
            if "step" in record:
                self.step = _value(record["step"])
                self.own |= record.keys()
            elif self.step is not None:
                record["step"] = self.step
            elif self.epoch is not None:
                record["epoch"] = self.epoch
            if record and BAR.search(text):
                record[DRAWN] = ""
            return record
        return None

    def _of_dict(self, text: str) -> dict[str, Any] | None:
        """Return the row of a dict in the line, as transformers prints it, or of JSON."""
        if "{" not in text or (found := DICT.search(text)) is None or len(found[0]) > 20_000:
            return None
        inside = found[0]
        try:
            record = json.loads(inside)
        except (ValueError, RecursionError):
            try:
                record = ast.literal_eval(re.sub(r"\b(nan|inf)\b(?!['\"])", r"'\1'", inside))
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return None
        if not isinstance(record, dict) or not all(isinstance(name, str) for name in record):
            return None
        self._bar(text[: found.start()])
        record = dict(record)
        if not self._has_step(record):
            if (at := HEADING.search(text)) is not None:
                record["step"] = int(at[1])
            elif (longest := max(self.bars, key=lambda of: int(of), default=None)) is not None:
                record["progress_bar"] = self.bars[longest]
        return record if any(self.names.reading(name) for name in record) else None

    def _has_step(self, record: dict[str, Any]) -> bool:
        found = (self.names.reading(name) for name in record)
        return any(r is not None and r.measure == "step" and r.unit == "" for r in found)

    def _bar(self, text: str) -> bool:
        found = None
        for found in BAR.finditer(text):
            if len(found[2]) < 12:
                self.bars[found[2]] = int(found[1])
        return found is not None

    def _pairs(self, text: str) -> dict[str, Any] | None:
        """Return the row of a line's pairs of a name and a number, with a step from above."""
        is_bar = "<" in text and self._bar(text)
        self._headings(text)
        found: dict[str, Any] = {}
        kinds: dict[str, str] = {}  # measure and unit to the name
        losses: set[str] = set()
        pairs = [*self._named(text)]
        scored = any(bare and name == "train_loss" for name, _, _, bare in pairs) and any(
            not bare and is_train(self.names.reading(name)) for name, _, _, bare in pairs
        )
        if scored:  # loss: 1.9, train: 0.4, val: 0.3
            pairs = [pair for pair in pairs if not pair[3]]
        for name, shown, unit, _ in pairs:
            reading = self.names.reading(name)
            if reading is None:  # looks like a loss
                found.setdefault(name, shown)
                continue
            if is_loss(reading.measure) and unit and unit.lower() != "nats":
                continue  # a time, a share
            found.setdefault(name, shown + unit if reading.measure == "tokens" else shown)
            if is_loss(reading.measure):
                losses.add(reading.measure)
            kinds.setdefault(f"{reading.measure} {reading.unit}".strip(), name)
        step, epoch = kinds.get("step"), kinds.get("step epoch")
        if not losses:
            self.evaluates |= step is None and EVALUATES.match(text) is not None
            if len(self.unread) < MOST_UNREAD:
                self.unread |= {name: True for name in found if self.names.reading(name) is None}
            if epoch is not None:
                self.epoch = _value(found[epoch])
            if step is not None and not is_bar:
                self.step = _value(found[step])
            return None
        count = None if step is not None else _count(text, is_bar)
        plain = losses == {"train_loss"} and not any(map(SAYS_TRAIN.search, found)) and not scored
        if plain and (_validates(text) or (self.evaluates and step is None and count is None)):
            found, losses = self._of_validation(found), {"val_loss"}
            if step is None and (part := _progress(text)) is not None:
                if part[0] < part[1]:
                    return None  # a validation that goes on
                count, is_bar = None, False
        self.evaluates = False
        if step is not None:
            self.step = _value(found[step])
            self.own |= losses
        elif self.own & losses and count is None:
            return None  # a summary: the losses of this program have a step of their own
        elif count is not None:
            at, of_epoch = count
            if is_bar and epoch is None:
                found["progress_bar"] = self.bar = int(at)
            else:
                found["step"] = self.step = at
            if of_epoch is not None and epoch is None:
                found["epoch"] = self.epoch = of_epoch
            if is_bar and (bar := BAR.search(text)) is not None:
                found[DRAWN] = OF_DRAWING.sub("", text[: bar.start()])
            self.own |= losses
        elif self.step is not None:
            found["step"] = self.step
        elif self.bar is not None:
            found["progress_bar"] = self.bar
        elif FIRST_EVALUATION.match(text):
            found["step"] = 0
        if epoch is None and self.epoch is not None:
            found["epoch"] = self.epoch
        for name in [*found]:  # its line says that it is of training
            if is_bare_perplexity(self.names.reading(name), name):
                found[f"train/{name}"] = found.pop(name)
        return self._fresh(found)

    def _headings(self, text: str) -> None:
        """Take the step of a heading such as ``[step=10/400,epoch=1]`` or ``[epoch=1][batch=3]``."""
        if "[" not in text or "=" not in text:
            return
        if (heading := BATCH_HEADING.search(text)) is not None:
            self.epoch, self.step = float(heading[1]), float(heading[2])
        elif (heading := HEADING.search(text)) is not None:
            self.step = float(heading[1])

    def _of_validation(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return a row whose plain loss is one of validation, as its line says."""
        made = {}
        for name, value in found.items():
            reading = self.names.reading(name)
            plain = reading is not None and reading.measure == "train_loss"
            made[f"val/{name}" if plain else name] = value
        return made

    def _fresh(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return a row without the last evaluation's loss, which a line of training repeats."""
        readings = {name: self.names.reading(name) for name in found}
        measures = {reading.measure for reading in readings.values() if reading}
        counted = "step" in measures and ("epoch" not in found or "step" in found)
        if "train_loss" not in measures or not counted:
            return found
        for name, reading in readings.items():
            if reading is not None and reading.measure.startswith("val_loss"):
                repeated = self.shown.get(name) == found[name] and _value(found[name]) != 0
                self.shown[name] = found[name]
                if repeated:
                    del found[name]
        return found

    def _named(self, text: str) -> Iterator[tuple[str, str, str, bool]]:
        """Yield names that are a measure or look like a loss, with the number, its unit, and whether
        the name is bare: "train: 3.2".
        """
        end = 0
        for found in NUMBER.finditer(text):
            before, end = text[max(end, found.start() - NAME) : found.start()], found.end()
            before = before.rstrip(" :=\t[")
            if not before:
                continue
            if before not in self.known:
                if len(self.known) > MOST_NAMES:
                    self.known.clear()
                self.known[before] = self._name(before)
            name = self.known[before]
            bare = name in PLAIN
            if name in PLAIN and "." in found["value"]:  # a whole number is a count
                name = PLAIN[name]
            if name is not None and name not in PLAIN:
                yield name, found["value"], found["unit"] or "", bare

    def _name(self, before: str) -> str | None:
        """Return the name at the end of the text before a number."""
        words: list[str] = []
        for word in reversed(BETWEEN.split(before)[-1].split()):
            if WORD.fullmatch(word) is None or len(words) == 5:
                break
            words.insert(0, word)
        if len(words) > 1 and words[-1].lower() in ("is", "was"):
            words.pop()
        if not words:
            return None
        whole = " ".join(words)
        if "(" in whole and self.names.reading(whole) is None:
            whole = ASIDE.sub("", whole) or whole
        name = self._known(whole)
        return whole if name is None and looks_like_loss(whole) else name

    def _known(self, name: str) -> str | None:
        """Return the longest end of a name that is a measure: "INFO train loss" is "train loss"."""
        words = name.split(" ")
        for place in range(len(words)):
            end = " ".join(words[place:])
            if self.names.reading(end) is not None:
                return end
            if place == len(words) - 1 and end.lower() in PLAIN:
                return end.lower()
            if "/" in words[place] or any(map(CHANGES.match, words[place].split("_"))):
                return None
        return None


def is_whole(raw: bytes) -> bool:
    """Return whether a last line without a line break looks whole: as a line before it but for the
    digits, and with as many of these at its end.

    Args:
        raw: A file, or its end.

    Example:
        >>> is_whole(b"s:1 trl:3.51\\ns:2 trl:3.25"), is_whole(b"s:1 trl:3.51\\ns:2 trl:3.2")
        (True, False)
    """
    *before, last = raw[-65_536:].split(b"\n")
    if not last.strip():
        return False
    wanted = _shape(last)
    return any(_shape(line) == wanted for line in before[-200:])


def _shape(line: bytes) -> tuple[bytes, int]:
    end = len(line) - len(line.rstrip(b"0123456789"))
    return re.sub(rb"\d+", b"0", line), end


def is_train(reading: Reading | None) -> bool:
    """Return whether a name is read as a training loss.

    Args:
        reading: Of the name.
    """
    return reading is not None and reading.measure == "train_loss"


def _count(text: str, is_bar: bool) -> tuple[float, float | None] | None:
    """Return the count of a line that names no step, and the epoch before it; None without one."""
    if is_bar:
        found = BAR.search(text)
        return (float(found[1]), None) if found is not None else None
    if (found := EPOCH_OF_ALL.search(text)) is not None:
        return float(found[2]), float(found[1])
    found = OF_ALL.search(text) or FRONT.search(text)
    return (float(found[1]), None) if found is not None else None


def _progress(text: str) -> tuple[int, int] | None:
    """Return a validation's own count and its whole: what stands between the word and its loss."""
    word = VALIDATES.search(text)
    if word is None:
        return None
    loss = LOSS.search(text, word.end())
    found = COUNT.search(text, word.end(), loss.start() if loss is not None else len(text))
    return (int(found[1]), int(found[2])) if found is not None else None


def _validates(text: str) -> bool:
    return "val" in text.lower() and VALIDATES.search(text) is not None


def _value(text: Any) -> float | None:
    try:
        return number(text)
    except ValueError:
        return None


def compiled(pattern: str) -> re.Pattern[str]:
    r"""Return a user's pattern, checked.

    Args:
        pattern: A regular expression whose groups are named by measures: ``step``, ``train_loss``,
            ``val_loss``, ``lr``, ...; ``set`` is a validation set's name.

    Raises:
        InputError: It is none, or has no group of that kind.

    Example:
        >>> compiled(r"at (?P<step>\d+): (?P<train_loss>\S+)").groupindex["step"]
        1
    """
    allowed = (*MEASURES, "set", "epoch")
    try:
        made = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"--pattern: expected a regular expression, got {pattern!r:.80} ({error})")
    wrong = [name for name in made.groupindex if name not in allowed and not is_set(name)]
    if wrong or not set(made.groupindex) & {"train_loss", "val_loss", "train_eval_loss"}:
        got = ", ".join(wrong) or "none of a loss"
        raise InputError(
            f"--pattern: expected groups named (?P<train_loss>...), (?P<val_loss>...), (?P<step>...) "
            f"or another of {', '.join(allowed)}, got {got} in {pattern!r:.80}"
        )
    return made


def read_console(
    path: Path, names: Names, log: Log, patterns: tuple[str, ...] = ()
) -> ConsoleReader:
    """Read a file of console text.

    Args:
        path: The file.
        names: What is read.
        log: Takes what is found.
        patterns: The user's own, see ``compiled``.

    Returns:
        The reader, which can go on with what is added to the file.

    Raises:
        InputError: It is empty, no text, or a pattern is none.
    """
    reader = ConsoleReader(names, log, patterns)
    with path.open("rb") as file:
        for place, raw in enumerate(blocks_of_lines(file)):
            if place == 0:
                if not raw.strip():
                    raise InputError(f"{path}: expected a history, got an empty file")
                check_encoding(str(path), raw)
            if not raw.endswith(b"\n"):
                end = raw.rfind(b"\n") + 1
                if is_whole(raw):
                    raw += b"\n"
                else:
                    if raw[end:].strip():
                        log.say(
                            "the last line has no end (being written, or cut off) and is left out"
                        )
                    raw = raw[:end]
            if raw:
                reader.add(raw)
    if reader.unread and not log.tables:  # for the names in a message
        log.tables.append(Table({}, reader.unread, np.empty(0, dtype=np.int64)))
    return reader
