"""What a measure may be called, by the programs that log it, and in which unit.

``TABLE`` is the one place that knows names. ``Names`` reads it, with the user's ``--tag``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ..errors import InputError

# How a loss becomes nats. Bits per byte also need the bytes of a token (`Names.nats`).
UNITS: dict[str, Callable[[float], float]] = {
    "nats": lambda value: value,
    "bits": lambda value: value * math.log(2),
    "perplexity": lambda value: math.log(value) if value > 0 else math.nan,
}
LOSSES = ("train_loss", "val_loss", "train_eval_loss")
MEASURES = (
    "step",
    "train_loss",
    "val_loss",
    "lr",
    "grad_norm",
    "tokens",
    "seconds",
    "train_eval_loss",
    "eval_seconds",
)
OF_RUN = (
    "\0"  # between a run's name and a column's, where the columns of several runs are in a table
)
SET = "val_loss/"  # before the name of a further validation set

# The spelling of a pattern: `_` stands for any blanks and _ / . : | - or for nothing, so that
# "train_loss" is also Train Loss, train/loss, trainLoss and TRAIN-LOSS. The words in braces stand
# below; {set} is the name of a validation set between separators.
SEPARATOR = r"[\s_/.:|-]"
WORDS = {
    "train": "train(?:ing)?",
    "val": "(?:valid(?:ation)?|val|eval(?:uation)?|dev|held_?out)",
    "loss": "(?:(?:lm_|ce_|xent_|token_)?loss(?:es)?|(?:language_)?cross_entropy(?:_loss)?|xent)",
    "nll": "nll(?:_loss)?",
    "ppl": "(?:language_)?(?:ppl|perplexity)",
    "bpb": "(?:bpb|bits_per_byte)",
    "set": rf"{SEPARATOR}+(?P<set>\w[\w.+@ /-]*?){SEPARATOR}+",
    "set_before": rf"(?P<set>\w[\w.+@ /-]*?){SEPARATOR}+",
    "set_behind": rf"{SEPARATOR}+(?P<set>\w[\w.+@ /-]*)",
    "any": ".*",
    "underscore": "_",
}

# (measure, unit, patterns). Of the names of one measure that a file holds, the line that stands
# first here is read, and within a line the pattern that stands first; a row without a value there
# takes the next pattern of the same line. `step` alone has an order over all of its lines.
TABLE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "step",
        "",
        (
            "step",
            "global_step",
            "{train}_global_step",
            "trainer_global_step",
            "current_steps?",  # LLaMA-Factory
            "global_step_max_steps",  # ms-swift: "10/6000"
            "{train}_step",
            "(?:optimi[sz]er|opt|update|training)_steps?",
            "num_updates",  # fairseq
            "steps",
            "(?:num|n|total|completed)_steps?",
            "iterations?",
            "{train}_iter(?:ation)?s?",
            "iters?(?:_num)?",
            "(?:num|n)_iter(?:ation)?s?",
            "it",
            "updates?",
            "{underscore}step",  # W&B's own count of calls
        ),
    ),
    # Where no row has a step: a progress bar's count, an epoch, an index without a name.
    ("step", "progress", ("progress_bar",)),
    ("step", "batch", ("batch(?:_idx|_num|_number)?", "{train}_batch(?:_idx)?")),
    ("step", "epoch", ("epochs?", "ep", "{train}_epoch", "trainer_epoch", "epoch_num")),
    ("step", "index", ("index", "unnamed_0")),
    (
        "train_loss",
        "nats",
        (
            "{train}_{nll}",  # beside a loss that label smoothing or a further term raises
            "{nll}",
            "{train}_{loss}",
            "{loss}_{train}",
            "{loss}_{train}_total",  # Composer
            "{train}_{loss}_total",
            "reduced_{train}_loss",  # NeMo
            "{train}_loss_step",  # Lightning
            "loss_step",
            "loss_metrics_global_avg_loss",  # torchtitan
            "global_avg_loss",
            "loss_mean",  # prime-rl
            "loss_out",  # lingua
            "learning_loss",  # MaxText
            "{loss}",
            "{train}_(?:batch|step|inner)_loss",
            "(?:batch|step|inner)_loss",
        ),
    ),
    (
        "train_loss",
        "nats",
        (
            "metrics_{train}_{loss}",  # Composer
            "{train}_(?:avg|mean|average|total)_{loss}",
            "{train}_{loss}_(?:avg|mean|average)",
            "(?:avg|mean|average|total)_{train}_{loss}",
            "(?:avg|mean|average|total|running)_{loss}",
            "{loss}_(?:avg|average|total)",
        ),
    ),
    (
        "train_loss",
        "nats",
        ("{train}_loss_epoch", "{train}_epoch_loss", "(?:epoch_loss|loss_epoch)"),
    ),
    ("train_loss", "perplexity", ("(?:metrics_)?{train}_{ppl}", "{ppl}_{train}", "{ppl}")),
    ("train_loss", "bits per byte", ("{train}_{bpb}", "{bpb}_{train}")),
    (
        "val_loss",
        "nats",
        (
            "{val}_{nll}",
            "{val}_{loss}",
            "{loss}_{val}",
            "{val}_{loss}_(?:total|mean|avg)",
            "{loss}_{val}_total",
            "{val}_(?:total|mean|avg|average|micro)_{loss}",
            "(?:avg|mean|average|total)_{val}_{loss}",
            "{val}_metrics_loss",  # torchtitan
            "metrics_{val}_{loss}",  # Composer
            "{val}_lm_{loss}",  # OLMo
            "{val}_validation_{loss}",
            "{val}_loss_epoch",  # Lightning
            "{val}_epoch_loss",  # Keras
        ),
    ),
    ("val_loss", "nats", ("{val}_macro_{loss}",)),  # Levanter's mean over sets
    # Sets by name, see `set_name` for what is none.
    (
        "val_loss",
        "nats",
        (
            "{val}_lm{set}{loss}",  # OLMo
            "metrics{set}{loss}",  # Composer
            "{val}{set}{loss}",  # transformers, Levanter
            "{val}_{loss}{set_behind}",
            "{loss}_{val}{set_behind}",
            "(?P<set>test)_{loss}",
            "{loss}_(?P<set>test)",
            "{set_before}{val}_{loss}",
        ),
    ),
    ("val_loss", "nats", ("{val}_loss_step",)),
    ("val_loss", "perplexity", ("(?:metrics_)?{val}_{ppl}", "{ppl}_{val}")),
    ("val_loss", "perplexity", ("{val}_lm{set}{ppl}", "metrics{set}{ppl}", "{val}{set}{ppl}")),
    ("val_loss", "bits per byte", ("{val}_{bpb}", "{bpb}_{val}")),
    ("val_loss", "bits per byte", ("{val}{set}{bpb}",)),
    (
        "lr",
        "",
        (
            "lr",
            "learning_rate",
            "{train}_(?:lr|learning_rate)",
            "optim(?:izer)?_(?:lr|learning_rate){any}",
            "lr_{any}",
            "learning_rate_{any}",
            r"{train}_lr\(1e-3\)",
        ),
    ),
    (
        "grad_norm",
        "",
        (
            "grad_norm",
            "{train}_grad_norm",
            "(?:optim_)?(?:total_|global_)?grad(?:ient)?_norm",
            "{train}_(?:total_|global_)?grad(?:ient)?_norm",
            "l2_norm_grad_global",  # Composer
            "norm",  # llm.c
        ),
    ),
    (
        "tokens",
        "",
        (
            "tokens",
            "num_input_tokens_seen",
            "{train}_num_input_tokens_seen",
            "{train}_tokens",
            "throughput_total_tokens",
            "(?:n_|num_|total_)?tokens_seen",
            "{train}_(?:n_|num_|total_)?tokens_seen",
            "(?:num|total|consumed|global|processed|cumulative)_tokens",
            "{train}_(?:num|total|consumed|global)_tokens",
            "time_token",  # Composer
        ),
    ),
    (
        "seconds",
        "",
        (
            "seconds",
            "elapsed",
            "elapsed_time",
            "elapsed_seconds",
            "{underscore}runtime",
            "wall_?clock",
        ),
    ),
    ("train_eval_loss", "nats", ("train_eval_loss", "{val}_train_loss")),
    ("eval_seconds", "", ("eval_seconds", "eval_runtime", "{val}_runtime")),
)
# Words that make another loss, no validation set.
NO_SET = re.compile(
    r"(?i)(?:^|[\W_])(?:aux|auxiliary|kl|kld|z|router|balanc\w*|moe|mtp|rewards?|value|vf|policy|pg|critic|"
    r"actor|entropy|regulari[sz]ation|reg|best|min|max|lowest|highest|smooth\w*|ema|std|var|delta|"
    r"downstream|step|scale|vs|samples|macro|micro|mean|avg|total|train|training|ppl|perplexity|"
    r"every|freq\w*|interval|steps|iters?|batch(?:es|_?size)?|size|patience|weight|coef\w*|tokens|"
    r"time|seconds|limit|threshold|improve\w*|dpo|sft|distill\w*|contrastive|commit\w*|recon\w*|mse|l1|l2|hinge|weighted)(?:$|[\W_])"
)
# Names that look like losses; those after `but` are no loss of their own.
LOOKS_LIKE = re.compile(
    r"(?i)loss|nll|ppl|perplexity|cross.?entropy|\bbpb\b|_bpb|\bxent|(?:^|[\W_])ce(?:$|[\W_])"
)
BUT = re.compile(r"(?i)__(?:min|max)$|loss.?scale|_weight$|_coef\w*$|skipped|nan_|best")
SAYS_TRAIN = re.compile(r"(?i)(?<![a-z])train")  # a name that says whose loss it is
NO_MEASUREMENT = {"", "none", "n/a", "na", "null", "no log", "-", "--", "?", "undefined", "<na>"}


@dataclass(frozen=True)
class Reading:
    """How a logged name is read: its measure (of a set: ``val_loss/SET``), unit, and rank.

    ``line`` is the line of ``TABLE``, ``place`` the pattern in it: the lower is preferred.
    """

    measure: str
    unit: str
    line: int
    place: int


def spelled_out(pattern: str) -> str:
    """Return a pattern of ``TABLE`` as a regular expression.

    Args:
        pattern: In the spelling that stands above ``TABLE``.

    Example:
        >>> bool(re.fullmatch(spelled_out("{train}_loss"), "Training Loss"))
        True
        >>> re.fullmatch(spelled_out("{val}{set}{loss}"), "eval/c4_en/loss")["set"]
        'c4_en'
    """
    words = {
        name: text if "set" in name or name == "underscore" else text.replace("_", f"{SEPARATOR}*")
        for name, text in WORDS.items()
    }
    parts = re.split(r"(\{\w+\})", pattern)
    made = (words[part[1:-1]] if part.startswith("{") else _separated(part) for part in parts)
    return "(?i)" + "".join(made)


def _separated(part: str) -> str:
    return part.replace("_", f"{SEPARATOR}*")


@lru_cache(maxsize=1)
def _compiled() -> list[tuple[int, int, re.Pattern[str]]]:
    return [
        (line, place, re.compile(spelled_out(pattern)))
        for line, (_, _, patterns) in enumerate(TABLE)
        for place, pattern in enumerate(patterns)
    ]


@lru_cache(maxsize=4096)
def reading_of(name: str) -> Reading | None:
    """Return how ``TABLE`` reads a logged name, or None.

    Args:
        name: As it was logged.

    Example:
        >>> reading_of("eval_wiki_loss").measure
        'val_loss/wiki'
        >>> reading_of("val/bpb").unit
        'bits per byte'
        >>> reading_of("aux_loss") is None
        True
    """
    if len(name) > 200:
        return None
    for line, place, pattern in _compiled():
        if (found := pattern.fullmatch(name.strip())) is None:
            continue
        measure, unit, _ = TABLE[line]
        if (of := found.groupdict().get("set")) is not None:
            if NO_SET.search(of):
                continue
            measure = SET + of
        return Reading(measure, unit, line, place)
    return None


def looks_like_loss(name: str) -> bool:
    """Return whether a name speaks of a loss, so that it is named where it was not read.

    Args:
        name: As it was logged.

    Example:
        >>> looks_like_loss("train_mean_nll"), looks_like_loss("loss_scale")
        (True, False)
    """
    return bool(LOOKS_LIKE.search(name)) and not BUT.search(name)


def is_set(measure: str) -> bool:
    """Return whether a measure is the loss of a validation set with a name.

    Args:
        measure: ``val_loss``, ``val_loss/wiki``, ``lr``, ...

    Example:
        >>> is_set("val_loss/wiki"), is_set("val_loss")
        (True, False)
    """
    return measure.startswith(SET)


def is_bare_perplexity(reading: Reading | None, name: str) -> bool:
    """Return whether a name is that of a perplexity and does not say of which text.

    It tells the unit of the loss beside it and is no loss itself, except on a line of console text.

    Args:
        reading: How the name is read.
        name: As it was logged.

    Example:
        >>> is_bare_perplexity(reading_of("ppl"), "ppl")
        True
        >>> is_bare_perplexity(reading_of("train/ppl"), "train/ppl")
        False
    """
    if reading is None or (reading.measure, reading.unit) != ("train_loss", "perplexity"):
        return False
    return not SAYS_TRAIN.search(name)


def is_loss(measure: str) -> bool:
    """Return whether a measure is a loss, of training or of any validation set.

    Args:
        measure: ``train_loss``, ``val_loss/wiki``, ``lr``, ...

    Example:
        >>> is_loss("val_loss/wiki"), is_loss("lr")
        (True, False)
    """
    return measure in LOSSES or is_set(measure)


@dataclass
class Memory:
    """What reading a part of a file that grows decided, for the parts to come.

    lines: by measure, the line of ``TABLE`` that is read. main_set: the main validation set. bits:
    the losses that are bits, by the perplexity beside them; None until one tells.
    repaired: the rows were changed by what only the whole file tells. stale: a later part wants
    another decision, so that the whole must be read again.
    """

    lines: dict[str, int] = field(default_factory=dict)
    main_set: str | None = None
    bits: set[str] | None = None
    repaired: bool = False
    stale: bool = False


class Names:
    """The names that a source is read by: ``TABLE``, the user's tags, and the losses' units.

    Args:
        tags: Measure to the name it was logged under, e.g. ``{"val_loss": "dev/ce"}``;
            ``val_loss/SET`` names a further validation set.
        unit: Of the losses: "nats", "bits" or "perplexity".
        bytes_per_token: Of the validation text, for losses in bits per byte.

    Raises:
        InputError: A measure, a unit or a number of bytes that there cannot be.

    Example:
        >>> Names({"train_loss": "ce"}).reading("ce").measure
        'train_loss'
    """

    def __init__(
        self,
        tags: dict[str, str] | None = None,
        unit: str = "nats",
        bytes_per_token: float | None = None,
    ) -> None:
        if unit not in UNITS:
            raise InputError(f"unit: expected one of {', '.join(UNITS)}, got {unit!r}")
        if bytes_per_token is not None and not 0 < bytes_per_token < 1e6:
            raise InputError(
                f"bytes_per_token: expected more than 0 and less than a million, got {bytes_per_token:g}"
            )
        self.unit, self.bytes_per_token = unit, bytes_per_token
        self.tags = dict(tags or {})
        for measure in self.tags:
            if measure not in MEASURES and not (is_set(measure) and measure != SET):
                raise InputError(
                    f"tag: expected one of {', '.join(MEASURES)} before =, got {measure!r}"
                )
        self.tagged = {name: measure for measure, name in self.tags.items()}
        # Nats that a set's bits per byte are multiplied by, where no bytes a token were given.
        self.scale: dict[str, float] = {}
        self.memory: Memory | None = None  # where a file is followed

    def reading(self, name: str) -> Reading | None:
        """Return how a name is read, or None.

        Args:
            name: As it was logged; a run's name may stand before it, with ``OF_RUN`` between.
        """
        name = name.rpartition(OF_RUN)[2]
        if name in self.tagged:
            return Reading(self.tagged[name], "nats", -1, 0)
        found = reading_of(name)
        return None if found is None or found.measure in self.tags else found

    def chosen(self, names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
        """Return the names to read by measure, the preferred first: (name, unit).

        Args:
            names: Those of the source that hold a number.

        Of one measure only names of the best line are read: a mean of an epoch, say, only where no
        step's own loss is there. Of steps all names are given.
        """
        found: dict[str, list[tuple[int, int, str, str]]] = {}
        for name in names:
            if (reading := self.reading(name)) is not None:
                entry = (reading.line, reading.place, name, reading.unit)
                found.setdefault(reading.measure, []).append(entry)
        chosen = {}
        for measure, entries in found.items():
            best = min(entries)[0]
            if self.memory is not None and measure != "step":
                before = self.memory.lines.setdefault(measure, best)
                self.memory.stale |= best < before
                best = before
            if kept := [
                (name, unit)
                for line, _, name, unit in sorted(entries)
                if measure == "step" or line == best
            ]:
                chosen[measure] = kept
        return chosen

    def unit_of(self, unit: str) -> str:
        """Return a loss's unit: the user's own where the table says nats.

        Args:
            unit: That of the name's line in ``TABLE``.
        """
        return self.unit if unit == "nats" else unit

    def nats(self, values: np.ndarray, unit: str, measure: str) -> np.ndarray:
        """Return losses in nats a token; a perplexity of 0 or less is NaN.

        Args:
            values: (N,) as they were logged.
            unit: That of their name's line in ``TABLE``; for "nats" the user's own unit holds.
            measure: For the scale of bits per byte.
        """
        unit = self.unit_of(unit)
        if unit == "bits":
            return values * math.log(2)
        if unit == "perplexity":
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.where(values > 0, np.log(values), math.nan)
        if unit == "bits per byte":
            factor = self.bytes_per_token or self.scale.get(measure) or 1.0
            return values * (math.log(2) * factor)
        return values
