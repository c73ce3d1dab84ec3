"""A training history as it was logged.

Losses are nats a token; an empty cell is no measurement, NaN is one. What was repaired while it was
read is said in ``notes``.
"""

from __future__ import annotations

from array import array

import numpy as np

from .digest import Digest
from .names import LOSSES, SET, UNITS, Names, is_set
from .settings import Settings

__all__ = ["EVENTS", "LOSSES", "UNITS", "History", "Names"]

# What is not a training loss, in the order in which a row's measures are told: a validation loss
# after what belongs to it.
EVENTS = ("lr", "grad_norm", "tokens", "seconds", "eval_seconds", "train_eval_loss", "val_loss")


class History:
    """Measures in the order they were logged; a step may hold any of them.

    train_step, train_loss: the training losses. Everything else is ``events``: (place, step,
    measure, value), where ``place`` is how many training losses came before.

    Of several validation sets one is the main set: the one without a name, else the first. Its
    losses are the measure ``val_loss``; those of a further set are the measure ``val_loss/SET``.
    main_set: the main set's name, "" where it has none. unscaled: the measures of validation losses
    that were logged in bits per byte while the bytes of a token are not known. These are scaled to
    the training loss of their first evaluations, so that their trend counts and their level does
    not. repaired: steps were made or rows moved by what only the whole source tells. numbered: no
    step was logged, and the steps are numbers of rows or of epochs.

    Args:
        source: The file or folder, for messages.

    Example:
        >>> history = History()
        >>> history.add(10, {"train_loss": 3.0, "val_loss": 3.1, "val_loss/wiki": 3.4})
        >>> history.sets()
        ['', 'wiki']
        >>> history.validation["wiki"][1].tolist()
        [3.4]
    """

    def __init__(self, source: str = "") -> None:
        self.source = source
        self.train_step, self.train_loss = array("d"), array("d")
        self.events: list[tuple[int, float, str, float]] = []
        self.notes: list[str] = []
        self.main_set = ""
        self.unscaled: set[str] = set()
        self.repaired = False
        self.numbered = False

    def add(self, step: float, measures: dict[str, float]) -> None:
        """Add one logged row.

        Args:
            step: Finite.
            measures: Measure to value, losses in nats.
        """
        step = float(step)
        if "train_loss" in measures:
            self.train_step.append(step)
            self.train_loss.append(measures["train_loss"])
        place = len(self.train_step)
        for name in EVENTS:
            if name in measures:
                self.events.append((place, step, name, measures[name]))
        for name, value in measures.items():
            if is_set(name):
                self.events.append((place, step, name, value))

    def sets(self) -> list[str]:
        """Return the names of the validation sets, the main set first.

        Returns:
            Names in the order in which their losses come; [] without a validation loss.
        """
        measures = dict.fromkeys(
            measure for _, _, measure, _ in self.events if measure == "val_loss" or is_set(measure)
        )
        names = [measure.removeprefix(SET) for measure in measures if measure != "val_loss"]
        return [self.main_set, *names] if "val_loss" in measures else names

    @property
    def validation(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Steps and losses of each validation set by its name, the main set first."""
        return {
            name: self.of("val_loss" if name == self.main_set else SET + name)
            for name in self.sets()
        }

    def for_set(self, name: str) -> History:
        """Return the history with another set's losses as its ``val_loss``, and no other set.

        Args:
            name: One of ``sets()``.

        Returns:
            A history that shares this one's training losses.

        Example:
            >>> history = History()
            >>> history.add(10, {"val_loss": 3.1, "val_loss/wiki": 3.4})
            >>> history.for_set("wiki").of("val_loss")[1].tolist()
            [3.4]
        """
        wanted = "val_loss" if name == self.main_set else SET + name
        made = History(self.source)
        made.train_step, made.train_loss, made.notes = self.train_step, self.train_loss, self.notes
        made.main_set = name
        made.unscaled = {"val_loss"} if wanted in self.unscaled else set()
        for place, step, measure, value in self.events:
            if measure == wanted:
                made.events.append((place, step, "val_loss", value))
            elif measure != "val_loss" and not is_set(measure):
                made.events.append((place, step, measure, value))
        return made

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
        digest.feed(self)
        return digest

    def __len__(self) -> int:
        return len(self.train_step) + len(self.events)
