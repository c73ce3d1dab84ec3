"""A training history as it was logged, and which logged names are which measure.

Losses become nats a token; an empty cell is no measurement, NaN is one. What is repaired on the way
is said in ``notes``.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable

import numpy as np

from ..errors import InputError
from .digest import Digest
from .settings import Settings

# What a measure is called by the programs that log it; of two in one row the first here is read.
# `--tag measure=name` puts another in their place.
NAMES = {
    "step": (
        "step",
        "global_step",
        "train/global_step",
        "trainer/global_step",
        "_step",
        "iteration",
        "iter",
    ),
    "train_loss": (
        *(
            "train_loss",
            "train/loss",
            "loss",
            "train/CrossEntropyLoss",
            "train/ce_loss",
            "training_loss",
            "Loss/train",
        ),
        *("train_loss_step", "train/lm_loss", "lm loss", "train_cross_entropy"),
    ),
    "val_loss": (
        *(
            "val_loss",
            "eval_loss",
            "valid_loss",
            "validation_loss",
            "eval/loss",
            "val/loss",
            "valid/loss",
            "Loss/val",
        ),
        *(
            "test/loss",
            "dev/loss",
            "validation/loss",
            "eval/lm/CE loss",
            "eval/validation/CrossEntropyLoss",
            "test_loss",
            "lm loss validation",
        ),
    ),
    "lr": (
        "lr",
        "learning_rate",
        "train/lr",
        "train/learning_rate",
        "optim/learning_rate_group0",
        "optim/LR (group 0)",
        "lr-AdamW",
    ),
    "grad_norm": (
        "grad_norm",
        "train/grad_norm",
        "optim/total_grad_norm",
        "optim/grad_norm",
        "total grad norm",
    ),
    "tokens": (
        "tokens",
        "num_input_tokens_seen",
        "train/tokens",
        "throughput/total_tokens",
        "tokens_seen",
    ),
    "seconds": ("seconds", "elapsed", "_runtime"),
    "train_eval_loss": ("train_eval_loss",),
    "eval_seconds": ("eval_seconds", "eval_runtime", "eval/runtime"),
}
UNITS: dict[str, Callable[[float], float]] = {
    "nats": lambda value: value,
    "bits": lambda value: value * math.log(2),
    "perplexity": lambda value: math.log(value) if value > 0 else math.nan,
}
LOSSES = ("train_loss", "val_loss", "train_eval_loss")
# What is not a training loss, in the order in which a row's measures are told: a validation loss
# after what belongs to it.
EVENTS = ("lr", "grad_norm", "tokens", "seconds", "eval_seconds", "train_eval_loss", "val_loss")


class History:
    """Measures in the order they were logged; a step may hold any of them.

    train_step, train_loss: the training losses. Everything else is ``events``: (place, step,
    measure, value), where ``place`` is how many training losses came before.
    """

    def __init__(self, source: str = "") -> None:
        self.source = source
        self.train_step, self.train_loss = array("d"), array("d")
        self.events: list[tuple[int, float, str, float]] = []
        self.notes: list[str] = []

    def add(self, step: float, measures: dict[str, float]) -> None:
        """One logged row, losses in nats."""
        step = float(step)
        if "train_loss" in measures:
            self.train_step.append(step)
            self.train_loss.append(measures["train_loss"])
        place = len(self.train_step)
        for name in EVENTS:
            if name in measures:
                self.events.append((place, step, name, measures[name]))

    def say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and losses of training."""
        return np.array(self.train_step), np.array(self.train_loss)

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of another measure."""
        found = [(step, value) for _, step, measure, value in self.events if measure == name]
        steps, values = np.array(found, dtype=float).reshape(-1, 2).T
        return steps, values

    def digest(self, settings: Settings | None = None) -> Digest:
        """The history's state for the signals."""
        digest = Digest(settings)
        feed(digest, self)
        return digest

    def __len__(self) -> int:
        return len(self.train_step) + len(self.events)


def feed(
    digest: Digest, history: History, train_from: int = 0, events_from: int = 0
) -> tuple[int, int]:
    """Give ``digest`` what the history holds beyond these counts; returns the new ones."""
    steps, losses = history.arrays()
    place = train_from
    events = history.events[events_from:]
    beside = _beside(events)
    for number, (at, step, name, value) in enumerate(events):
        if at > place:
            digest.train_many(steps[place:at], losses[place:at])
            place = at
        if name == "val_loss":
            digest.validation(step, value, beside.get(number))
        elif name == "eval_seconds":
            digest.evaluated_for(value)
        elif name != "train_eval_loss":
            digest.other(step, name, value)
    digest.train_many(steps[place:], losses[place:])
    return len(steps), len(history.events)


def _beside(events: list[tuple]) -> dict[int, float]:
    """By the number of a validation loss among the events, the re-scored training loss of the same
    step: logged before or after.
    """
    found: dict[int, float] = {}
    last: dict[float, int] = {}  # step to the validation loss there
    waiting: dict[float, float] = {}
    for number, (_, step, name, value) in enumerate(events):
        if name == "val_loss":
            last[step] = number
            if step in waiting:
                found[number] = waiting.pop(step)
        elif name == "train_eval_loss":
            if step in last and last[step] not in found:
                found[last[step]] = value
            else:
                waiting[step] = value
    return found


class Names:
    """Which logged names are which measure."""

    def __init__(self, tags: dict[str, str] | None = None, unit: str = "nats") -> None:
        if unit not in UNITS:
            raise InputError(f"unit: expected one of {', '.join(UNITS)}, got {unit!r}")
        self.unit, self.convert = unit, UNITS[unit]
        self.tags = dict(tags or {})
        # names that were there, to tell which of the tags is nowhere
        self.present: set[str] = set()
        self.doubled: set[str] = set()  # measures that a row held under two names
        self.measure = {name: measure for measure, names in NAMES.items() for name in names}
        for measure, name in (tags or {}).items():
            if measure not in NAMES:
                raise InputError(
                    f"tag: expected one of {', '.join(NAMES)} before =, got {measure!r}"
                )
            self.measure = {
                known: what for known, what in self.measure.items() if what != measure
            } | {name: measure}
        self.rank = {name: place for place, name in enumerate(self.measure)}

    def row(self, record: dict, where: str) -> tuple[float | None, dict[str, float]]:
        """Step and measures of a logged record; names that are unknown are passed over."""
        given = [
            name
            for name, value in record.items()
            if name in self.measure and value is not None and value != ""
        ]
        found: dict[str, float] = {}
        for measure, names in self.columns(given).items():
            found[measure] = self.number(record[names[0]], measure, where)
            if len(names) > 1:
                self.doubled.add(measure)
        return found.pop("step", None), found

    def columns(self, header: list[str]) -> dict[str, list[str]]:
        """Measures to the names of a header or a row that hold them, in order of preference."""
        found: dict[str, list[str]] = {}
        self.present.update(header)
        for name in sorted(
            {name for name in header if name in self.measure}, key=self.rank.__getitem__
        ):
            found.setdefault(self.measure[name], []).append(name)
        return found

    def tell(self, history: History) -> None:
        """Say which measures came under two names in one row; InputError for a name asked for that
        is nowhere.
        """
        for measure, name in self.tags.items():
            if name not in self.present:
                raise InputError(
                    f"tag: expected a name that {history.source} logs for {measure}, got {name!r}"
                )
        for measure in sorted(self.doubled - {"step"}):
            history.say(
                f"rows hold {measure} under more than one name: the first is read (--tag {measure}=NAME chooses)"
            )

    def number(self, value, measure: str, where: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{where}: expected a number for {measure}, got {value!r:.60}")
        if isinstance(value, bool):
            raise InputError(f"{where}: expected a number for {measure}, got {value}")
        return self.nats(number, measure, where) if measure in LOSSES else number

    def nats(self, loss: float, measure: str, where: str) -> float:
        if self.unit == "perplexity" and loss <= 0:
            raise InputError(f"{where}: expected perplexities above 0 for {measure}, got {loss:g}")
        return self.convert(loss)
