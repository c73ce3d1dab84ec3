"""``Monitor``: in a training loop, from the first step on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from .. import checks
from ..errors import InputError, InputTypeError
from ..findings import SEVERITIES
from .digest import LARGEST, Digest
from .findings import SIGNALS, Finding
from .health import Diagnosis, diagnose
from .names import MEASURES, UNITS
from .settings import Settings

OTHERS = ("lr", "grad_norm", "tokens", "seconds")  # measures beside the losses


class Monitor:
    """A judge of a training run that reads its losses as they are logged.

    A call of ``log`` costs a few microseconds.

    Args:
        vocabulary_size: V, for losses worse than uniform; None leaves that signal out.
        total_steps: the steps of the whole run, for projections and the last evaluation.
        unit: of the losses: "nats" a token, "bits" a token or "perplexity".
        path: a file in JSON lines that the history is written to, and that ``ppl monitor`` reads.
            Where it exists it is read first, so that a run that restarts goes on with it.
        stop_on: severities or signals of findings that make ``should_stop`` true.
        on_finding: called with each new ``Finding``; ``print`` shows one line.
        check_every: calls of ``log`` between two diagnoses, where ``stop_on`` or ``on_finding``
            asks for them; each validation loss is followed by one, too.
        settings: every threshold of the signals; None is the tested ones.

    Raises:
        InputError: an argument that is not one of these, or a path that cannot be written.
        InputTypeError: an argument of another type.

    >>> monitor = Monitor(vocabulary_size=50_257)
    >>> for step in range(3):
    ...     monitor.log(step, train_loss=4.0 - step)
    >>> monitor.diagnose().verdict
    'insufficient-data'
    """

    def __init__(
        self,
        vocabulary_size: int | None = None,
        *,
        total_steps: int | None = None,
        unit: str = "nats",
        path: str | Path | None = None,
        stop_on: str | tuple[str, ...] = (),
        on_finding: Callable[[Finding], None] | None = None,
        check_every: int = 1000,
        settings: Settings | None = None,
    ) -> None:
        integer, optional = checks.integer, checks.optional
        self.vocabulary_size = optional(integer, "vocabulary_size", vocabulary_size, least=2)
        self.total_steps = optional(integer, "total_steps", total_steps, least=1)
        checks.choice("unit", unit, UNITS)
        check_every = integer("check_every", check_every, least=1)
        rules = (*SEVERITIES, *SIGNALS)
        self.stop_on = (stop_on,) if isinstance(stop_on, str) else stop_on
        checks.several("stop_on", self.stop_on, "severities or signals")
        self.stop_on = tuple(self.stop_on)
        for rule in self.stop_on:
            checks.choice("stop_on", rule, rules, ", ".join(rules))
        checks.function("on_finding", on_finding)
        optional(checks.instance, "settings", settings, Settings, "monitor Settings or None")
        self.on_finding, self.check_every = on_finding, check_every
        self.digest = Digest(settings)
        self.should_stop = False
        self.stopped_by: Finding | None = None
        self._convert = None if unit == "nats" else UNITS[unit]
        self._told: set[tuple] = set()
        self._calls = 0
        self._broken = False  # a loss that is no number has been told at once
        self._started = time.perf_counter()
        self._evaluation_seconds = 0.0
        self.notes: list[str] = []  # of the file gone on with
        self._file: TextIO | None = None
        if path is not None:
            self._open(checks.path("path", path))

    def _open(self, path: Path) -> None:
        from .history import History, Names
        from .readers import add_json_lines

        if path.suffix != ".jsonl":
            raise InputError(f"path: expected a name that ends in .jsonl, got {path}")
        try:
            if path.exists():
                raw = path.read_bytes()
                whole = raw[: raw.rfind(b"\n") + 1]
                history = History(str(path))
                add_json_lines(history, whole, Names(), str(path))
                self.digest.feed(history)
                self.notes = history.notes
                if len(whole) < len(raw):  # a line that a crash cut off must not be gone on with
                    with path.open("r+b") as file:
                        file.truncate(len(whole))
            self._file = path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"path: expected a file that can be written, got {path} ({error.strerror})"
            )

    def log(
        self,
        step: float,
        *,
        train_loss: float | None = None,
        val_loss: float | Mapping[str, float] | None = None,
        lr: float | None = None,
        grad_norm: float | None = None,
        tokens: float | None = None,
        seconds: float | None = None,
        train_eval_loss: float | None = None,
        eval_seconds: float | None = None,
    ) -> None:
        """Take one step's measures; what is left out was not measured.

        Args:
            step: the step, a finite number; a step that goes back is a restart.
            train_loss: the loss of one batch, in the monitor's unit.
            val_loss: the loss of one evaluation; of several validation sets a dict of losses by
                name, each of which is judged.
            lr: the learning rate.
            grad_norm: the norm of the gradient; a loss of exactly 0.0 beside a norm of NaN is how
                transformers logs a run whose weights are NaN.
            tokens: tokens trained on so far.
            seconds: seconds since the run began.
            train_eval_loss: the loss of training text in evaluation mode, beside ``val_loss``.
            eval_seconds: what the evaluation took.

        Each is a number or a tensor with one element; a tensor waits for its device.

        Raises:
            InputError: a step that is not finite, or a monitor that was closed.
            InputTypeError: a measure that is no number.

        >>> monitor = Monitor()
        >>> monitor.log(1, train_loss=4.2, val_loss={"wiki": 4.3, "code": 2.1})
        """
        digest = self.digest
        if self._file is not None and self._file.closed:
            raise InputError("log: expected a monitor whose file is open, got one after close()")
        step = _finite_step(step)
        if val_loss is None and (train_eval_loss is not None or eval_seconds is not None):
            raise InputError(
                "train_eval_loss, eval_seconds: expected beside a val_loss of the same step, got none"
            )
        # All are numbers before the first is counted: a call that raises leaves no trace.
        nats = self._nats
        train_loss = None if train_loss is None else nats("train_loss", train_loss)
        sets: dict[str, float] = {}
        if val_loss is not None and isinstance(val_loss, Mapping):
            for name in val_loss:
                checks.text("val_loss's names", name)
            sets = {name: nats(f"val_loss[{name!r}]", of) for name, of in val_loss.items()}
            # As in a file that is read: the first set is the main one.
            if digest.main_set is None and not digest.evaluations:
                digest.main_set = next(iter(sets), None)
            val_loss = None
        main_loss: float | None = None if val_loss is None else nats("val_loss", val_loss)
        if train_eval_loss is not None:
            train_eval_loss = nats("train_eval_loss", train_eval_loss)
        others = []
        if not (lr is grad_norm is tokens is seconds is None):
            for name, value in zip(OTHERS, (lr, grad_norm, tokens, seconds), strict=True):
                if value is not None:
                    others.append((name, checks.measured(name, value)))
        eval_seconds = checks.optional(checks.measured, "eval_seconds", eval_seconds)
        if train_loss is not None:
            digest.train(step, train_loss)
        for name, value in others:
            digest.other(step, name, value)
        if main_loss is not None:
            digest.validation(step, main_loss, train_eval_loss, eval_seconds)
        for name, loss in sets.items():
            digest.validation(step, loss, name=name)
        if self._file is not None:
            self._write(
                self._file,
                step,
                train_loss,
                main_loss,
                lr,
                grad_norm,
                tokens,
                seconds,
                train_eval_loss,
                eval_seconds,
                sets=sets,
            )
        self._calls += 1
        if self.stop_on or self.on_finding:
            lost = train_loss is not None and not abs(train_loss) < LARGEST
            lost = lost or not math.isnan(digest.zero_from) or digest.lost_gradients() is not None
            broken = lost and not self._broken
            self._broken = self._broken or broken
            if broken or main_loss is not None or sets or self._calls % self.check_every == 0:
                self.check()

    def _nats(self, name: str, loss: float) -> float:
        loss = checks.measured(name, loss)
        return loss if self._convert is None else self._convert(loss)

    def _write(self, file: TextIO, *values, sets: dict[str, float]) -> None:
        """Write a row of ``values``, which are in the order of ``MEASURES``."""
        row = {
            name: float(value)
            for name, value in zip(MEASURES, values, strict=True)
            if value is not None
        }
        row |= {f"val_loss/{name}": loss for name, loss in sets.items()}
        file.write(json.dumps(row) + "\n")

    def check(self) -> Diagnosis:
        """Return the diagnosis of now; report what is new to ``on_finding``, set ``should_stop``.

        ``log`` does it every ``check_every`` calls, after each validation loss, and at the first
        loss that is no number.

        Returns:
            The verdict, the score and the findings.

        >>> Monitor(stop_on="danger").check().findings
        []
        """
        diagnosis = self.diagnose()
        for finding in diagnosis.findings:
            # By its name a spike stops a run where it is one, not at an odd batch; so do losses
            # that are no numbers.
            harmless = finding.severity == "info" and finding.signal in ("spike", "non-finite")
            if (finding.signal in self.stop_on and not harmless) or _at_least(
                finding.severity, self.stop_on
            ):
                self.should_stop, self.stopped_by = True, self.stopped_by or finding
            key = finding.signal, finding.severity
            if key not in self._told:
                self._told.add(key)
                if self.on_finding is not None:
                    self.on_finding(finding)
        return diagnosis

    def diagnose(self) -> Diagnosis:
        """Return what the curves say so far.

        Returns:
            The verdict, the score and the findings.

        >>> Monitor().diagnose().evaluations
        0
        """
        return diagnose(
            self.digest,
            vocabulary_size=self.vocabulary_size,
            total_steps=self.total_steps,
            notes=self.notes,
        )

    def evaluate_every(
        self, steps: int, fn: Callable[[], float | dict]
    ) -> Callable[[float], float | None]:
        """Return a function to call with each step, which evaluates by ``fn`` and logs the loss.

        It does so past every multiple of ``steps``, and at the last step where ``total_steps`` is
        known. A NaN is logged as one. ``evaluation_share`` is the share of the time it took.

        Args:
            steps: steps between two evaluations, at least 1.
            fn: returns a validation loss in the monitor's unit, or a dict of ``log``'s measures.

        Returns:
            A function of the step that returns the validation loss, or None where none was due.

        Raises:
            InputError: ``steps`` below 1, or, when called, a result of ``fn`` without a loss; what
                ``fn`` raises is raised.
            InputTypeError: ``fn`` is no function.

        >>> validate = Monitor().evaluate_every(2, lambda: 3.0)
        >>> [validate(step) for step in (1, 2, 3)]
        [None, 3.0, None]
        """
        steps = checks.integer("steps", steps, least=1)
        if not callable(fn):
            raise checks.wrong("fn", "a function", checks.shown(fn), InputTypeError)
        done: int | None = None  # the last multiple that was evaluated
        evaluated = math.nan  # the last step that was

        def at(step: float) -> float | None:
            nonlocal done, evaluated
            step = _finite_step(step)
            multiple = int(step // steps)
            if done is None:
                done = int((step - 1) // steps) if step else 0
            last = self.total_steps is not None and step >= self.total_steps and step != evaluated
            if multiple <= done and not last:
                done = min(done, multiple)  # steps went back: a restart
                return None
            done, evaluated = multiple, step
            begin = time.perf_counter()
            found = fn()
            cost = time.perf_counter() - begin
            self._evaluation_seconds += cost
            measures = found if isinstance(found, dict) else {"val_loss": found}
            if measures.get("val_loss") is None:
                raise InputError(
                    f"fn: expected a loss or a dict with a val_loss, got {found!r:.80}"
                )
            self.log(
                step,
                **{"eval_seconds": cost, "seconds": time.perf_counter() - self._started} | measures,
            )
            return measures.get("val_loss")

        return at

    @property
    def evaluation_share(self) -> float:
        """Return the share of the monitor's lifetime that ``evaluate_every``'s evaluations took.

        >>> Monitor().evaluation_share
        0.0
        """
        return self._evaluation_seconds / max(time.perf_counter() - self._started, 1e-9)

    def close(self) -> None:
        """Close the file of the history; the monitor takes no more.

        >>> Monitor().close()
        """
        if self._file is not None:
            self._file.close()


def _finite_step(step: float) -> float:
    step = checks.measured("step", step)
    if step - step != 0:
        raise InputError(f"step: expected a finite number, got {step}")
    return step


def _at_least(severity: str, rules: tuple[str, ...]) -> bool:
    limits = [SEVERITIES.index(rule) for rule in rules if rule in SEVERITIES]
    return bool(limits) and SEVERITIES.index(severity) >= min(limits)
