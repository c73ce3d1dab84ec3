"""A training history as bounded state: what the signals need of it, kept up to date point by point.

Training losses go into blocks of ``BLOCK`` points; a block keeps sums and medians, never its
points, and old blocks are merged in pairs when there are too many: an update costs the same at the
millionth point as at the first. Spikes are found on the way, against the last points that were
none.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np

from .names import SET, is_set
from .noise import MAD_TO_SIGMA
from .settings import Settings

if TYPE_CHECKING:
    from .history import History

BLOCK = 32  # points
BASELINE = 4  # blocks that a point is compared with
MOST_BLOCKS = 4096
MOST_EVALUATIONS = 4096
KEPT_EVENTS = 200
# A run of fewer points than this is kept whole, and looked at in PIECES instead of in blocks.
SHORT = 64 * BLOCK
PIECES = 48
# New training losses, of the NEAR that a validation loss is compared with, that change the mean.
NEW_NEAR = 16


@dataclass
class Block:
    """Consecutive training losses; sums without outliers and what is not finite."""

    first: float  # steps
    last: float
    count: int
    total: float
    squares: float
    lowest: float
    highest: float  # outliers included
    outliers: int

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def until(self, step: float) -> Block | None:
        """Return the part before a step: a share of the sums where the block holds both sides."""
        if self.last < step:
            return self
        share = (step - self.first) / (self.last - self.first + 1e-9)
        count = int(self.count * min(share, 1.0))
        if self.first >= step or count == 0:
            return None
        part = count / self.count
        outliers = int(self.outliers * part)
        return Block(
            self.first,
            step,
            count,
            self.total * part,
            self.squares * part,
            self.lowest,
            self.highest,
            outliers,
        )

    def merged(self, other: Block) -> Block:
        return Block(
            self.first,
            other.last,
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            self.outliers + other.outliers,
        )


def _piece(points: list[tuple[float, float]]) -> Block:
    """Return points as a block whose mean is their median."""
    losses = [loss for _, loss in points]
    middle, count = statistics.median(losses), len(losses)
    return Block(
        points[0][0],
        points[-1][0],
        count,
        middle * count,
        math.fsum(loss * loss for loss in losses),
        min(losses),
        max(losses),
        0,
    )


@dataclass
class Spike:
    """Outliers in a row, ``points`` of them, at most ``excess`` nats above the baseline."""

    first: float
    last: float
    points: int
    excess: float
    deviations: float
    ended: bool = False


@dataclass(frozen=True)
class Evaluated:
    """A validation loss with the training losses just before it.

    ``near`` is their mean, ``near_error`` its standard error, ``near_fall`` how far they fell.
    """

    step: float
    loss: float
    near: float = math.nan
    near_error: float = math.nan
    near_fall: float = 0.0
    near_smooth: bool = False  # they move together, as a running average's do
    rescored: bool = False  # near is the training text in evaluation mode


@dataclass(frozen=True)
class Restart:
    """Steps that went back from ``left`` to ``to``, with the training loss on both sides."""

    left: float
    to: float
    before: float
    before_error: float
    decline: float  # from the older half of those before to the newer
    after: list = field(default_factory=list)  # the first points after it, up to NEAR // 2

    @property
    def fall(self) -> float:
        return self.before - float(np.mean(self.after)) if self.after else math.nan


NEAR = BASELINE * BLOCK
LONG_CHANCE = 16  # outliers in a row that may still be chance, where single ones are common
SMOOTH = 0.5  # von Neumann ratio below which training losses are taken for a running average
LARGEST = 1e30  # a loss beyond it is taken for infinite: its square would be


class Digest:
    """State of one run; its methods take points in the order in which they were logged."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.points = 0  # finite training losses of the run as it stands
        self.first_step = self.last_step = math.nan
        self.blocks: list[Block] = []
        self.evaluations: list[Evaluated] = []
        self.main_set: str | None = None  # the name of the validation set of ``evaluations``
        self.sets: dict[str, list[Evaluated]] = {}  # further validation sets, by name
        # "train_loss" and the validation sets whose losses are nats but for an unknown factor.
        self.unscaled: set[str | None] = set()
        self.spikes: deque[Spike] = deque(maxlen=KEPT_EVENTS)
        self.spikes_seen = 0
        self.restarts: deque[Restart] = deque(maxlen=KEPT_EVENTS)
        self.restarts_seen = 0
        self.non_finite: dict[str, list] = {}  # measure -> [count, first step]
        # Step of the first training loss of exactly 0.0 that stands for one that is no number.
        self.zero_from = math.nan
        self.learning_rate: list[tuple[float, float]] = []  # thinned
        self.evaluation_seconds = self.seconds = 0.0
        self.tokens = math.nan
        self.negative = self.zeros = 0  # training losses below 0, and of exactly 0
        self.positive = 0
        self.single_outliers = 0  # points of spikes that were over before they counted as sustained
        # of earlier sessions, and the last of this one
        self._seconds_before, self._seconds_last = 0.0, 0.0
        self._open_block: list[float] = []
        self._open_first = math.nan
        # (step, loss) of every point, while the run is short
        self._whole: list[tuple[float, float]] = []
        self._last_loss = math.nan
        # training losses of exactly 0.0 in a row: the first step, their number, the loss before
        self._zeros = (math.nan, 0, math.nan)
        self._gradients = 0  # gradient norms that are numbers
        self._lost_gradients = (math.nan, 0)  # of NaN in a row: the first step, their number
        self._near_of: tuple[int, float, float, float, bool] | None = None
        # (step, loss), outliers left out
        self._recent: deque[tuple[float, float]] = deque(maxlen=NEAR)
        self._medians: deque[float] = deque(maxlen=BASELINE)
        self._deviations: deque[float] = deque(maxlen=BASELINE)
        # ``_thresholds`` until the next block is full; None where they have to be made anew.
        self._limits: tuple[float, float, float] | None = None
        self._spike: Spike | None = None
        self._below = 0  # points under the threshold since the spike's last
        self._outliers = 0  # of the open block
        self._highest = -math.inf

    # --- training losses ---------------------------------------------------------------------------------------------

    def threshold(self) -> tuple[float, float]:
        """Return the (baseline, deviation) that the next point is compared with; NaN without one."""
        if len(self._medians) < 2:
            return math.nan, math.nan
        centre = sum(self._medians) / len(self._medians)
        return centre, MAD_TO_SIGMA * sum(self._deviations) / len(self._deviations)

    def _thresholds(self) -> tuple[float, float, float]:
        """Return ``threshold`` and the loss above which a point is an outlier."""
        centre, deviation = self.threshold()
        least = max(self.settings.spike_floor, self.settings.spike_deviations * deviation)
        return centre, deviation, centre + least

    def train(self, step: float, loss: float) -> None:
        """Take one training loss, in nats."""
        if step < self.last_step:
            self._restart(step)
        if math.isnan(self.first_step):
            self.first_step = step
        self.last_step = step
        if not abs(loss) < LARGEST:
            self._note_non_finite("train_loss", step)
            return
        self.points += 1
        self._last_loss = loss
        if loss > 0:
            self.positive += 1
        elif loss < 0:
            self.negative += 1
        else:
            self.zeros += 1
            self._zero(step)
        if loss != 0:
            self._zeros = (math.nan, 0, math.nan)
        if len(self._whole) < SHORT:
            self._whole.append((step, loss))
        if self.restarts and len(self.restarts[-1].after) < NEAR // 2:
            self.restarts[-1].after.append(loss)
        if self._limits is None:
            self._limits = self._thresholds()
        centre, deviation, limit = self._limits
        if not self._open_block and not self._outliers:
            self._open_first = step
        self._highest = max(self._highest, loss)
        if loss > limit:  # never while the limit is NaN
            self._outlier(step, loss, centre, deviation)
        else:
            self._usual(step, loss)
        if len(self._open_block) + self._outliers >= BLOCK:
            self._close_block()

    def _zero(self, step: float) -> None:
        """Take a training loss of exactly 0.0; from a loss far above it, no run gets there at once."""
        first, count, before = self._zeros
        if not count:
            first, before = step, statistics.median([loss for _, loss in self._recent][-4:] or [0])
        self._zeros = first, count + 1, before
        enough = count + 1 >= self.settings.evaluations_in_a_row
        if enough and before >= self.settings.lost_level and math.isnan(self.zero_from):
            self.zero_from = first

    def lost_gradients(self) -> tuple[float, int] | None:
        """Return the first step and the number of the gradient norms of NaN that end the run.

        A few in a row are a loss scale that is being found, in particular at a run's start.
        """
        first, count = self._lost_gradients
        enough = self.settings.lost_gradients
        return (first, count) if count >= (enough if self._gradients else 4 * enough) else None

    def _outlier(self, step: float, loss: float, centre: float, deviation: float) -> None:
        self._outliers += 1
        self._below = 0
        excess = loss - centre
        size = excess / max(deviation, 1e-9)
        if self._spike is None:
            self._spike = Spike(step, step, 1, excess, size)
            self.spikes.append(self._spike)
            self.spikes_seen += 1
        else:
            spike = self._spike
            spike.last, spike.points = step, spike.points + 1
            spike.excess, spike.deviations = max(spike.excess, excess), max(spike.deviations, size)
        if self._spike.points >= self.settings.spike_sustained:
            self._recent.append((step, loss))  # no odd batch any more: this is the loss now

    def _usual(self, step: float, loss: float) -> None:
        self._open_block.append(loss)
        self._recent.append((step, loss))
        if self._spike is None:
            return
        self._below += 1
        # One point that is no outlier ends a short spike; a long one ends when most are none again.
        if self._below >= (1 if self._spike.points < self.settings.spike_sustained else 3):
            self._spike.ended = True
            if self._spike.points <= LONG_CHANCE:
                self.single_outliers += self._spike.points
            if (
                self._spike.points < self.settings.spike_sustained
                and len(self.spikes) > KEPT_EVENTS // 2
            ):
                self.spikes.remove(self._spike)  # single batches must not push long spikes out
            self._spike = None

    def _close_block(self) -> None:
        values = self._open_block
        if values:
            self.blocks.append(self._so_far())
            if len(self.blocks) > MOST_BLOCKS:
                self._merge_blocks()
        self._limits = None
        # A block of mostly outliers is no baseline.
        if len(values) > BLOCK // 2:
            ordered = sorted(values)
            median = ordered[len(ordered) // 2]
            self._medians.append(median)
            self._deviations.append(
                sorted(abs(value - median) for value in ordered)[len(ordered) // 2]
            )
        self._open_block, self._outliers, self._highest = [], 0, -math.inf

    def _merge_blocks(self) -> None:
        """Merge the older three quarters in pairs: the end of the run keeps its detail."""
        old = len(self.blocks) * 3 // 4 // 2 * 2
        pairs = [self.blocks[i].merged(self.blocks[i + 1]) for i in range(0, old, 2)]
        self.blocks = pairs + self.blocks[old:]

    def all_blocks(self) -> list[Block]:
        """Return the blocks with the one that is not full yet."""
        return [*self.blocks, self._so_far()] if self._open_block else self.blocks

    def _so_far(self) -> Block:
        """Return the block that is not full yet."""
        values = self._open_block
        return Block(
            self._open_first,
            self.last_step,
            len(values),
            math.fsum(values),
            sum(value * value for value in values),
            min(values),
            self._highest,
            self._outliers,
        )

    def pieces(self) -> list[Block]:
        """Return the run in equal parts, finer than blocks while it is short.

        The mean of such a part is the median of its points: a single batch must not move it.
        """
        points = self._whole
        if self.points >= SHORT or len(points) >= SHORT or not points:
            return [block for block in self.all_blocks() if block.count]
        size = max(1, len(points) // PIECES)
        starts = range(0, len(points) - size + 1, size)
        parts = [points[at : at + size] for at in starts]
        parts[-1] = points[starts[-1] :]  # the last takes what is left
        return [_piece(part) for part in parts]

    def with_evaluations(self, evaluations: list[Evaluated]) -> Digest:
        """Return the digest of the same run with another set's validation losses."""
        other = copy.copy(self)
        other.evaluations = evaluations
        return other

    # --- everything else ---------------------------------------------------------------------------------------------

    def validation(
        self,
        step: float,
        loss: float,
        rescored: float | None = None,
        seconds: float | None = None,
        name: str | None = None,
    ) -> None:
        """Take one validation loss, in nats.

        Args:
            step: the step it was measured at.
            loss: the validation loss.
            rescored: the loss of training text in evaluation mode, where it was measured.
            seconds: what the evaluation took.
            name: of the validation set; None is the main one.
        """
        if seconds is not None:
            self.evaluated_for(seconds)
        evaluations = self._evaluations_of(name)
        if evaluations and step < evaluations[-1].step and step < self.last_step:
            self._restart(step)
            evaluations = self._evaluations_of(name)
        elif evaluations and step < evaluations[-1].step:
            evaluations[:] = [e for e in evaluations if e.step < step]
        # a history of evaluations alone
        if not self.points and "train_loss" not in self.non_finite:
            self.first_step, self.last_step = (
                step if math.isnan(self.first_step) else self.first_step,
                step,
            )
        if not abs(loss) < LARGEST:
            self._note_non_finite("val_loss", step)
            return
        if rescored is not None and math.isfinite(rescored):
            evaluations.append(Evaluated(step, loss, rescored, 0.0, rescored=True))
        else:
            evaluations.append(Evaluated(step, loss, *self._near(step)))
        if len(evaluations) > MOST_EVALUATIONS:
            old = len(evaluations) // 2
            best = min(evaluations[:old], key=lambda e: e.loss)
            thinned = [e for i, e in enumerate(evaluations[:old]) if i % 2 == 0 or e is best]
            evaluations[:old] = thinned

    def _evaluations_of(self, name: str | None) -> list[Evaluated]:
        """Return the evaluations of a validation set, to append to."""
        return self.evaluations if name in (None, self.main_set) else self.sets.setdefault(name, [])

    def evaluated_for(self, seconds: float) -> None:
        """Add the seconds that an evaluation took."""
        if math.isfinite(seconds):
            self.evaluation_seconds += seconds

    def _near(self, step: float) -> tuple[float, float, float, bool]:
        """Return the training losses just before a step: mean, its error, their fall, smoothness.

        They are of the last tenth of the steps: further back the loss was another. The fall is from
        their older half to the newer. Where fewer than four were logged there, the last counts.
        """
        known = self._near_of
        if known is not None and len(self._recent) == NEAR and self.points - known[0] < NEW_NEAR:
            return known[1:]
        values = [loss for at, loss in self._recent if at >= 0.9 * step]
        if len(values) < 4:
            return self._last_before(step)
        count = len(values)
        half = count // 2
        older, newer = sum(values[:half]), sum(values[half:])
        mean = (older + newer) / count
        variance = max(0.0, sum([value * value for value in values]) - count * mean * mean) / (
            count - 1
        )
        # Von Neumann's ratio (1941) of the residuals of a straight line: near 2 where each loss is
        # its own batch's.
        middle, spread = (count - 1) / 2, (count**3 - count) / 12
        slope = sum([(place - middle) * value for place, value in enumerate(values)]) / spread
        rough = sum([(later - earlier - slope) ** 2 for earlier, later in pairwise(values)])
        smooth = rough < SMOOTH * max(0.0, variance * (count - 1) - slope * slope * spread)
        fall = max(0.0, older / half - newer / (count - half))
        error = math.sqrt(variance / count) * (1 + 4 / count)  # few show little of their spread
        near = mean, error, fall, smooth
        self._near_of = self.points, *near
        return near

    def _last_before(self, step: float) -> tuple[float, float, float, bool]:
        """Return as ``_near`` the last training loss, where it is as close as the one before it."""
        points = list(islice(reversed(self._recent), 16))
        if not points:
            return math.nan, math.nan, 0.0, False
        (at, loss), earlier = points[0], points[1:]
        reach = max(0.1 * step, at - earlier[0][0] if earlier else 0.0)
        if step - at > reach:
            return math.nan, math.nan, 0.0, False
        moves = [abs(before - after) for (_, after), (_, before) in pairwise(points)]
        error = MAD_TO_SIGMA * float(np.median(moves)) / math.sqrt(2) if moves else 0.0
        return loss, error, max(0.0, earlier[0][1] - loss) if earlier else 0.0, False

    def train_at(self, step: float) -> float:
        """Return about the training loss at a step: the median of three, else its block's mean."""
        values = sorted([loss for at, loss in self._recent if at <= step][-3:])
        if values:
            return values[len(values) // 2]
        blocks = [block for block in self.blocks if block.count and block.first <= step]
        return blocks[-1].mean if blocks else math.nan

    def height_before(self) -> float:
        """Return the step at which a cyclic learning rate was last as high as it is now, before it
        fell to half of that; NaN where it is not cyclic, or none was logged.
        """
        now = self.learning_rate[-1][1] if self.learning_rate else 0.0
        has_fallen = False
        for step, rate in reversed(self.learning_rate):
            has_fallen |= rate <= now / 2
            if has_fallen and rate >= now / 1.1:
                return step
        return math.nan

    def other(self, step: float, name: str, value: float) -> None:
        """Take one value of lr, tokens, seconds or grad_norm."""
        if name == "lr":
            if not self.learning_rate or self.learning_rate[-1][1] != value:
                self.learning_rate.append((step, value))
                if len(self.learning_rate) > 2 * MOST_BLOCKS:
                    self.learning_rate = self.learning_rate[::2]
        elif name == "seconds":
            if value < self._seconds_last:  # another session, whose clock began anew
                self._seconds_before += self._seconds_last
            self._seconds_last = value
            self.seconds = self._seconds_before + value
        elif name == "tokens":
            self.tokens = value
        elif name == "grad_norm":
            first, count = self._lost_gradients
            lost = math.isnan(value)
            self._lost_gradients = (first if count else step, count + 1) if lost else (math.nan, 0)
            if math.isfinite(value):
                self._gradients += 1
                return
            self._note_non_finite("grad_norm", step)
            # transformers' Trainer logs a loss that is no number so (logging_nan_inf_filter).
            zero = self._last_loss == 0.0 and step == self.last_step
            if lost and zero and math.isnan(self.zero_from):
                self.zero_from = step

    def _note_non_finite(self, name: str, step: float) -> None:
        self.non_finite.setdefault(name, [0, step])[0] += 1

    def _restart(self, step: float) -> None:
        """Go back to ``step``: what was logged from it on is replaced by what comes."""
        # The last points before it, replaced ones as well: they are of the same stage as those to
        # come. Unless they are what the run went back from, a spike or a divergence: then the last
        # blocks that stay.
        recent = [loss for _, loss in self._recent]
        older, newer = recent[: len(recent) // 2], recent[len(recent) // 2 :]
        mean, error, decline = math.nan, 0.0, 0.0
        if len(older) >= 8:
            mean, error = float(np.mean(newer)), float(np.std(newer)) / math.sqrt(len(newer))
            decline = max(0.0, float(np.mean(older)) - mean)
        stay = [block for block in self.blocks if block.last < step and block.count][-2:]
        if stay and not mean <= stay[-1].mean:
            mean = stay[-1].mean
            variance = max(0.0, stay[-1].squares / stay[-1].count - mean * mean)
            error, decline = math.sqrt(variance / stay[-1].count), max(0.0, stay[0].mean - mean)
        self.restarts.append(Restart(self.last_step, step, mean, error, decline))
        self.restarts_seen += 1
        self._close_block()
        self.spikes = deque((s for s in self.spikes if s.first < step), maxlen=KEPT_EVENTS)
        self.non_finite = {
            name: found for name, found in self.non_finite.items() if found[1] < step
        }
        self.blocks = [kept for block in self.blocks if (kept := block.until(step)) is not None]
        self.evaluations = [e for e in self.evaluations if e.step < step]
        self.sets = {
            name: [e for e in losses if e.step < step] for name, losses in self.sets.items()
        }
        self._whole = [(at, loss) for at, loss in self._whole if at < step]
        self._last_loss, self._near_of = math.nan, None
        self._zeros, self._lost_gradients = (math.nan, 0, math.nan), (math.nan, 0)
        if self.zero_from >= step:
            self.zero_from = math.nan
        self._recount()
        self.last_step = step
        if not self.blocks:
            self.first_step = step
        for part in (self._recent, self._medians, self._deviations):
            part.clear()
        self._limits = None
        if self._spike is not None:
            self._spike.ended, self._spike = True, None
        self._open_block, self._outliers, self._highest = [], 0, -math.inf

    def _recount(self) -> None:
        """Count the points that stay, by sign: an old run's signs by their share of all."""
        before = max(self.points, 1)
        self.points = sum(block.count for block in self.blocks)
        if len(self._whole) >= self.points:
            losses = [loss for _, loss in self._whole]
            self.positive = sum(loss > 0 for loss in losses)
            self.negative = sum(loss < 0 for loss in losses)
            self.zeros = len(losses) - self.positive - self.negative
        else:
            self.positive = self.positive * self.points // before
            self.negative = self.negative * self.points // before
            self.zeros = self.zeros * self.points // before

    # --- many points at once -----------------------------------------------------------------------------------------

    def feed(self, history: History, train_from: int = 0, events_from: int = 0) -> tuple[int, int]:
        """Take what the history holds beyond these counts.

        Args:
            history: A run that is read or followed.
            train_from: Training losses that were taken before.
            events_from: Events that were taken before.

        Returns:
            The new counts.
        """
        self.main_set = self.main_set or history.main_set or None
        for measure in history.unscaled:
            is_main = measure == "val_loss"
            self.unscaled.add(self.main_set if is_main else measure.removeprefix(SET))
        steps, losses = history.arrays()
        place = train_from
        events = history.events[events_from:]
        beside = _rescored_beside(events)
        measures = {measure for _, _, measure, _ in events}
        sets = {measure: measure.removeprefix(SET) for measure in measures if is_set(measure)}
        for number, (at, step, name, value) in enumerate(events):
            # A finite measure beside the losses changes nothing of theirs: blocks of these stay
            # whole.
            of_evaluation = name in sets or name in ("val_loss", "eval_seconds", "train_eval_loss")
            if at > place and (of_evaluation or not math.isfinite(value)):
                self.train_many(steps[place:at], losses[place:at])
                place = at
            if name == "val_loss":
                self.validation(step, value, beside.get(number))
            elif name == "eval_seconds":
                self.evaluated_for(value)
            elif name in sets:
                self.validation(step, value, name=sets[name])
            elif name != "train_eval_loss":
                self.other(step, name, value)
        self.train_many(steps[place:], losses[place:])
        return len(steps), len(history.events)

    def train_many(self, steps: np.ndarray, losses: np.ndarray) -> None:
        """Take training losses as ``train`` does, whole blocks at once where nothing stands out."""
        place = 0
        while place < len(steps):
            if (
                self._open_block
                or self._outliers
                or len(self._medians) < BASELINE
                or self._spike is not None
            ):
                self.train(float(steps[place]), float(losses[place]))
                place += 1
                continue
            place += self._plain_blocks(steps[place:], losses[place:])
            for step, loss in islice(
                zip(steps[place:].tolist(), losses[place:].tolist(), strict=True), BLOCK
            ):
                self.train(step, loss)
                place += 1

    def _plain_blocks(self, steps: np.ndarray, losses: np.ndarray) -> int:
        """Take whole blocks that hold nothing special, and return the number of their points.

        Special are an outlier, a loss that is not finite, and a step back.
        """
        count = min(len(steps) // BLOCK, 4096)
        if (
            not count
            or steps[0] < self.last_step
            or (self.restarts and len(self.restarts[-1].after) < NEAR // 2)
        ):
            return 0
        shape = (count, BLOCK)
        at, values = steps[: count * BLOCK].reshape(shape), losses[: count * BLOCK].reshape(shape)
        ordered = np.sort(values, axis=1)
        medians = ordered[:, BLOCK // 2]
        deviations = np.sort(np.abs(ordered - medians[:, None]), axis=1)[:, BLOCK // 2]
        all_medians = np.concatenate([list(self._medians), medians])
        all_deviations = np.concatenate([list(self._deviations), deviations])

        def baseline(of: np.ndarray) -> np.ndarray:
            """Return means over the ``BASELINE`` blocks before each."""
            sums = np.concatenate([[0.0], np.cumsum(of)])
            return (sums[BASELINE : BASELINE + count] - sums[:count]) / BASELINE

        with np.errstate(invalid="ignore"):
            centre, deviation = baseline(all_medians), MAD_TO_SIGMA * baseline(all_deviations)
            limit = centre + np.maximum(
                self.settings.spike_floor, self.settings.spike_deviations * deviation
            )
            steady = np.concatenate([[True], at[1:, 0] >= at[:-1, -1]]) & (
                np.diff(at, axis=1) >= 0
            ).all(axis=1)
            # A hair below the limit: sums in another order must not decide.
            plain = (
                (ordered[:, -1] < limit - 1e-9)
                & (np.abs(values) < LARGEST).all(axis=1)
                & (values != 0).all(axis=1)
                & steady
            )
        taken = count if plain.all() else int(np.argmin(plain))
        if not taken:
            return 0
        values, at = values[:taken], at[:taken]
        for row in zip(
            at[:, 0].tolist(),
            at[:, -1].tolist(),
            [BLOCK] * taken,
            values.sum(1).tolist(),
            (values * values).sum(1).tolist(),
            ordered[:taken, 0].tolist(),
            ordered[:taken, -1].tolist(),
            [0] * taken,
            strict=True,
        ):
            self.blocks.append(Block(*row))
            if len(self.blocks) > MOST_BLOCKS:
                self._merge_blocks()
        self._limits = None
        self._medians.extend(medians[:taken].tolist()[-BASELINE:])
        self._deviations.extend(deviations[:taken].tolist()[-BASELINE:])
        tail = slice(max(0, taken * BLOCK - NEAR), taken * BLOCK)
        self._recent.extend(zip(steps[tail].tolist(), losses[tail].tolist(), strict=True))
        self.points += taken * BLOCK
        self.positive += int((values > 0).sum())
        self.negative += int((values < 0).sum())
        room = max(0, SHORT - len(self._whole))
        self._whole.extend(
            zip(at.ravel()[:room].tolist(), values.ravel()[:room].tolist(), strict=True)
        )
        self._last_loss = float(values[-1, -1])
        if math.isnan(self.first_step):
            self.first_step = float(steps[0])
        self.last_step = float(at[-1, -1])
        return taken * BLOCK


def _rescored_beside(events: list[tuple]) -> dict[int, float]:
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
