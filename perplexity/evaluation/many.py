"""Several evaluations of one text: a table by domain, with averages and pairwise tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from ..json_files import model_name
from ..nats import exp
from ..wording import counted
from .pairing import MEASURES, Paired, comparison_notes, pair
from .planning import LEVEL, PLANNED, Plan, plan_for
from .text_tables import plain_table, with_notes
from .uncertainty import TRUSTED_CLUSTERS, half_width, p_value_of, ratio_stderr

MICRO, MACRO, DOMAIN = "micro", "macro", "domain"
LEGEND = (
    "best of its column, or not distinguishable from the best: paired t-tests over documents, "
    "Holm-corrected over the pairs of a column, 5% level. ± is half of the 95% interval. micro "
    "weighs every token or byte alike, macro every domain"
)


@dataclass(frozen=True)
class Estimate:
    """A model's measure in one column.

    Args:
        value: nats a token or bits a byte.
        stderr: standard error; None where a domain has a single document.
        interval: 95% interval; None likewise.
        best: whether no model of the column is better beyond chance.
    """

    value: float
    stderr: float | None
    interval: tuple[float, float] | None
    best: bool


@dataclass(frozen=True)
class PairTest:
    """The paired difference of two models in one column.

    Args:
        a: name of the first model.
        b: name of the second.
        difference: the measure of B minus that of A.
        stderr: its standard error; None where a domain has a single document.
        interval: 95% interval of this difference alone; None likewise.
        p_value: two-sided, of this pair alone; None likewise.
        p_holm: corrected by Holm's procedure over the pairs of the column.
        verdict: name of the better model, or "tie".
    """

    a: str
    b: str
    difference: float
    stderr: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    p_holm: float | None
    verdict: str


@dataclass(frozen=True)
class Column:
    """A domain, or an average over all of them.

    Args:
        name: of the domain, "micro" or "macro".
        kind: "micro", "macro" or "domain".
        pairs: documents, or blocks of the only document.
        size: tokens or bytes.
        estimates: of each model, in order.
        tests: of each pair of models.
    """

    name: str
    kind: str
    pairs: int
    size: int
    estimates: list[Estimate]
    tests: list[PairTest]


@dataclass(frozen=True)
class ManyComparison:
    """Evaluations of one text side by side, by domain and on average, paired by document.

    Args:
        measure: "loss" or "bits-per-byte".
        names: of the models, each once.
        columns: the micro average, with several domains the macro average, and each domain.
        unit: of the pairs, "document", or "block" of the only document.
        pairs: number of them.
        tokens: tokens scored in all; of the first where tokenizers differ.
        trusted: whether there are enough pairs for the intervals.
        notes: what to know before the numbers are believed.
        models: of each result, where the result names it.
        plan: documents that a difference takes to be detected for every pair, in the micro average.
    """

    measure: str
    names: list[str]
    columns: list[Column]
    unit: str
    pairs: int
    tokens: int
    trusted: bool
    notes: list[str]
    models: list[dict | None]
    plan: Plan | None

    ok = True  # values that are not finite have failed the evaluation itself

    @property
    def order(self) -> list[int]:
        """Return the places of the models, the best micro average first."""
        micro = self.columns[0].estimates
        return sorted(range(len(micro)), key=lambda place: micro[place].value)

    @property
    def title(self) -> str:
        """Return the heading of the table."""
        count = counted(self.pairs, self.unit)
        return f"{len(self.names)} results on {count}: {MEASURES[self.measure]}, lower is better"

    def perplexity(self, place: int) -> float | None:
        """Return the perplexity of the model at a place; None of bits per byte."""
        return exp(self.columns[0].estimates[place].value) if self.measure == "loss" else None

    def cells(
        self, columns: Sequence[Column], cell: Callable[[Estimate], str]
    ) -> list[tuple[str, ...]]:
        """Return the rows of a table, the best model first: its name and a cell for each column.

        Args:
            columns: some of ``columns``.
            cell: makes the text of an estimate.
        """
        return [
            (self.names[place], *(cell(column.estimates[place]) for column in columns))
            for place in self.order
        ]

    def tests(self) -> list[tuple[str, ...]]:
        """Return rows of the micro average's tests: A, B, B − A, ±, Holm's p-value, better."""
        return [
            (
                test.a,
                test.b,
                f"{test.difference:+.4f}",
                "" if test.interval is None else f"{_half(test.interval):.4f}",
                "" if test.p_holm is None else f"{test.p_holm:.2g}",
                test.verdict,
            )
            for test in self.columns[0].tests
        ]

    def __str__(self) -> str:
        """Return the averages, the pairwise tests and the notes as plain text."""
        averages = [column for column in self.columns if column.kind != DOMAIN]
        first = plain_table(
            self.title,
            ("model", *(column.name for column in averages)),
            self.cells(averages, shown),
        )
        second = plain_table(
            "pairs, micro average", ("A", "B", "B − A", "±", "p (Holm)", "better"), self.tests()
        )
        return with_notes(f"{first}\n{second}", [f"* {LEGEND}", *self.notes])

    def to_dict(self) -> dict:
        """Return the fields as dicts, lists and scalars: the keys of ``ppl compare --json``."""
        return asdict(self)


def shown(estimate: Estimate) -> str:
    """Return an estimate as text, with its interval and the mark of the best.

    Example:
        >>> shown(Estimate(2.0, 0.1, (1.75, 2.25), True))
        '2.0000 ± 0.2500 *'
    """
    text = f"{estimate.value:.4f}"
    if estimate.interval is not None:
        text += f" ± {_half(estimate.interval):.4f}"
    return text + (" *" if estimate.best else "")


def _half(interval: tuple[float, float]) -> float:
    return (interval[1] - interval[0]) / 2


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for their number by Holm's step-down procedure.

    The smallest of m is multiplied by m, the next by m − 1, and so on; none is smaller than the one
    before, or above 1 (Holm, A simple sequentially rejective multiple test procedure, Scandinavian
    Journal of Statistics 6, 1979). The probability of any false rejection stays below the level.

    Args:
        p_values: of each test; None where there is no test.

    Example:
        >>> holm([0.04, None, 0.01, 0.03])
        [0.06, None, 0.03, 0.06]
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for step, (p, place) in enumerate(known):
        least = corrected[place] = max(least, min(1.0, (len(known) - step) * p))
    return corrected


@dataclass(frozen=True)
class _Mean:
    """A mean with its standard error and degrees of freedom; None where they are not known."""

    value: float
    stderr: float | None
    degrees: float

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.stderr is None:
            return None
        width = half_width(self.stderr, self.degrees + 1)
        return self.value - width, self.value + width

    @property
    def p_value(self) -> float | None:
        if self.stderr is None:
            return None
        return p_value_of(self.value, self.stderr, self.degrees)


def _ratio(sums: np.ndarray, sizes: np.ndarray) -> _Mean:
    return _Mean(float(sums.sum() / sizes.sum()), ratio_stderr(sums, sizes), len(sizes) - 1)


def _mean_of(means: Sequence[_Mean]) -> _Mean:
    """Return the mean of independent means, with Welch and Satterthwaite's degrees of freedom."""
    count = len(means)
    value = sum(mean.value for mean in means) / count
    known = [(mean.stderr**2, mean.degrees) for mean in means if mean.stderr is not None]
    if len(known) < count:
        return _Mean(value, None, 0)
    total = sum(variance for variance, _ in known)
    squares = sum(variance**2 / degrees for variance, degrees in known)
    degrees = total**2 / squares if squares else sum(degrees for _, degrees in known)
    return _Mean(value, math.sqrt(total) / count, degrees)


def several(
    sides: Sequence[dict],
    *,
    measure: str = "loss",
    plan: float = PLANNED,
    files: Sequence[str | None] | None = None,
    names: Sequence[str] | None = None,
) -> ManyComparison:
    """Return the table of several results of one text.

    Args:
        sides: at least two results, as ``record_of`` returns them.
        measure: "loss" (default) or "bits-per-byte".
        plan: the difference to plan for; default 0.01.
        files: of the results, which tell models of one name apart; default None.
        names: of the results, which are of one model; default by their models.

    Raises:
        InputError: the results do not compare.
    """
    given = names is not None
    names = list(names) if names is not None else _names(sides, files or [None] * len(sides))
    paired = pair(sides, names, measure)
    columns = columns_of(paired, names)
    notes = comparison_notes(sides, names, paired, same=not given)
    errors = [test.stderr for test in columns[0].tests]
    planned = None
    if (largest := max((error for error in errors if error is not None), default=None)) is not None:
        planned = plan_for(plan, largest, len(paired.sizes), paired.unit, level=LEVEL / len(errors))
        notes.append(planned.note(MEASURES[measure], len(errors)))
    return ManyComparison(
        measure,
        names,
        columns,
        paired.unit,
        len(paired.sizes),
        paired.tokens,
        len(paired.sizes) >= TRUSTED_CLUSTERS,
        notes,
        [side["model"] if isinstance(side.get("model"), dict) else None for side in sides],
        planned,
    )


def columns_of(paired: Paired, names: Sequence[str]) -> list[Column]:
    """Return the micro average, and of several domains the macro average and each domain.

    Args:
        paired: the sums of the results.
        names: of the results.
    """
    by_domain: dict[str, list[int]] = {}
    for place, domain in enumerate(paired.domains):
        by_domain.setdefault(domain, []).append(place)
    columns = [_column("micro", MICRO, paired, names, [range(len(paired.sizes))])]
    if len(by_domain) > 1:
        columns.append(_column("macro", MACRO, paired, names, list(by_domain.values())))
        columns += [
            _column(domain, DOMAIN, paired, names, [by_domain[domain]])
            for domain in sorted(by_domain)
        ]
    return columns


def _column(
    name: str, kind: str, paired: Paired, names: Sequence[str], parts: Sequence[Sequence[int]]
) -> Column:
    """Return the column of an average over parts, each of which is the places of its documents."""

    def mean(sums: np.ndarray) -> _Mean:
        ratios = [_ratio(sums[part], paired.sizes[part]) for part in map(list, parts)]
        return ratios[0] if len(ratios) == 1 else _mean_of(ratios)

    means = [mean(sums) for sums in paired.sums]
    pairs = list(combinations(range(len(names)), 2))
    differences = [mean(paired.sums[b] - paired.sums[a]) for a, b in pairs]
    corrected = holm([difference.p_value for difference in differences])
    best = min(range(len(names)), key=lambda place: means[place].value)
    tests, worse = [], set()
    for (a, b), difference, p_holm in zip(pairs, differences, corrected, strict=True):
        verdict = "tie"
        if p_holm is not None and p_holm < LEVEL:
            verdict = names[b] if difference.value < 0 else names[a]
            if best in (a, b):
                worse.add(b if best == a else a)
        tests.append(
            PairTest(
                names[a],
                names[b],
                difference.value,
                difference.stderr,
                difference.interval,
                difference.p_value,
                p_holm,
                verdict,
            )
        )
    documents = [place for part in parts for place in part]
    return Column(
        name,
        kind,
        len(documents),
        int(paired.sizes[documents].sum()),
        [
            Estimate(each.value, each.stderr, each.interval, place not in worse)
            for place, each in enumerate(means)
        ],
        tests,
    )


def _names(sides: Sequence[dict], files: Sequence[str | None]) -> list[str]:
    """Return a name for each result: its model's, with its file or number where that is needed."""
    names = [model_name(side.get("model")) for side in sides]
    if len(set(names)) < len(names) or "" in names:
        count = Counter(names)
        names = [
            name
            if name and count[name] == 1
            else f"{name} ({file})"
            if name and file
            else file or f"{name} {place + 1}".strip()
            for place, (name, file) in enumerate(zip(names, files, strict=True))
        ]
    if len(set(names)) < len(names):  # files of one name in several folders
        names = [f"{name} {place + 1}" for place, name in enumerate(names)]
    return names
