"""``compare``: the paired difference of two evaluations of one text, or a table of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import overload

from .. import checks
from ..nats import exp
from ..wording import by_number, counted
from .many import DOMAIN, Column, ManyComparison, columns_of, several
from .pairing import MEASURES, comparison_notes, pair, record_of
from .planning import PLANNED, Plan, plan_for
from .results import Evaluation
from .text_tables import plain_table, with_notes
from .uncertainty import CONFIDENCE, TRUSTED_CLUSTERS, half_width, p_value_of, ratio_stderr

Side = Evaluation | dict | str | Path


@dataclass(frozen=True)
class Comparison:
    """The difference of two evaluations, B against A, paired by document.

    Args:
        measure: "loss" or "bits-per-byte".
        a: the measure of A, nats a token or bits a byte.
        b: the measure of B, likewise.
        difference: b - a; negative where B is better.
        stderr: standard error of the difference; None of a single pair.
        interval: 95% interval of the difference; None of a single pair.
        p_value: probability of so large a difference between equals, two-sided.
        perplexity_ratio: exp(difference); None of bits per byte.
        perplexity_ratio_interval: exp of ``interval``; None of bits per byte.
        unit: of the pairs, "document", or "block" of the only document.
        pairs: number of them.
        tokens: tokens scored in both.
        effective_tokens: tokens that an unpaired comparison needs for the same standard error.
        better_in: pairs in which B's loss is the lower one.
        trusted: whether there are enough pairs for the interval.
        notes: what to know before the numbers are believed.
        model_a: model of A, where the result names it; default None.
        model_b: model of B, likewise.
        plan: documents that a difference takes to be detected; default None.
        columns: of several domains the micro and the macro average and each domain, as in
            ``ManyComparison``; default empty.

    Example:
        >>> comparison = Comparison(
        ...     "loss", 3.1, 3.0, -0.1, 0.02, (-0.14, -0.06), 1e-4, 0.9, (0.87, 0.94),
        ...     "document", 30, 900, 1200.0, 25, True, [],
        ... )
        >>> comparison.verdict == comparison.to_dict()["verdict"] == "B is better"
        True
        >>> comparison.title, comparison.rows()[1]
        ('B against A: B is better', ('B', '3.0000', 'nats a token'))
        >>> comparison.by_domain()[1][:2], comparison.domain_rows()  # without domains
        (('domain', 'documents'), [])
    """

    measure: str
    a: float
    b: float
    difference: float
    stderr: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    perplexity_ratio: float | None
    perplexity_ratio_interval: tuple[float, float] | None
    unit: str
    pairs: int
    tokens: int
    effective_tokens: float | None
    better_in: int
    trusted: bool
    notes: list[str]
    model_a: dict | None = None
    model_b: dict | None = None
    plan: Plan | None = None
    columns: list[Column] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Return which of the two is better, if that is more than chance."""
        if self.p_value is None:
            return "one pair: no telling whether the difference is more than chance"
        if self.p_value >= 1 - CONFIDENCE:
            return "no difference beyond chance"
        return f"{'B' if self.difference < 0 else 'A'} is better"

    ok = True  # values that are not finite have failed the evaluation itself

    def __str__(self) -> str:
        """Return the table of ``ppl compare`` and the notes as plain text."""
        table = plain_table(self.title, ("measure", "value", "meaning"), self.rows())
        if self.columns:
            table += "\n" + plain_table(*self.by_domain(), self.domain_rows())
        return with_notes(table, self.notes)

    @property
    def title(self) -> str:
        """Return the heading of the table.

        Returns:
            What the difference is, such as "B against A: B is better".
        """
        return f"B against A: {self.verdict}"

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the rows of the table.

        Returns:
            Measure, value and meaning of each row, as they are printed.
        """
        unit = MEASURES[self.measure]
        spread = (
            ""
            if self.stderr is None
            else f", ± {self.stderr:.4f} (standard error, {counted(self.pairs, self.unit)} paired)"
        )
        a, b = (
            f", {model['name']}" if model and model.get("name") else ""
            for model in (self.model_a, self.model_b)
        )
        rows = [
            ("A", f"{self.a:.4f}", unit + a),
            ("B", f"{self.b:.4f}", unit + b),
            ("difference", f"{self.difference:+.4f}", f"B − A{spread}"),
        ]
        if self.interval is not None:
            low, high = self.interval
            rows.append(("  95 % interval", "", f"{low:+.4f} to {high:+.4f}"))
            meaning = "of a difference as large by chance, if there were none"
            rows.append(("  p-value", f"{self.p_value:.2g}", meaning))
        if self.perplexity_ratio is not None:
            interval = self.perplexity_ratio_interval
            meaning = "perplexity of B over A's" + (
                "" if interval is None else f"; 95 % {interval[0]:.4f} to {interval[1]:.4f}"
            )
            rows.append(("perplexity ratio", f"{self.perplexity_ratio:.4f}", meaning))
        better = f"{self.better_in:,} of {self.pairs:,}"
        rows.append(("better", better, f"{self.unit}s in which B's loss is the lower"))
        if self.effective_tokens is not None:
            meaning = (
                "an unpaired comparison would need as many to be as sure; "
                f"{self.tokens:,} {by_number(self.tokens, 'was', 'were')} scored"
            )
            rows.append(("effective tokens", f"{self.effective_tokens:,.0f}", meaning))
        return rows

    def by_domain(self) -> tuple[str, tuple[str, ...]]:
        """Return the heading and the columns' names of the table by domain.

        Returns:
            Heading; name of each column.
        """
        title = f"by domain: {MEASURES[self.measure]}; ± is half of the 95% interval"
        return title, ("domain", f"{self.unit}s", "A", "B", "B − A", "±", "p", "better")

    def domain_rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table by domain: both averages, then the largest domain first.

        Returns:
            The cells of each row, in the order of ``by_domain``'s columns.
        """
        averages = [column for column in self.columns if column.kind != DOMAIN]
        domains = [column for column in self.columns if column.kind == DOMAIN]
        rows: list[tuple[str, ...]] = []
        for column in averages + sorted(domains, key=lambda column: -column.size):
            (test,), (a, b) = column.tests, column.estimates
            low, high = test.interval or (math.nan, math.nan)
            rows.append(
                (
                    column.name,
                    f"{column.pairs:,}",
                    f"{a.value:.4f}",
                    f"{b.value:.4f}",
                    f"{test.difference:+.4f}",
                    "" if test.interval is None else f"{(high - low) / 2:.4f}",
                    "" if test.p_value is None else f"{test.p_value:.2g}",
                    "" if test.p_value is None else test.verdict,
                )
            )
        return rows

    def to_dict(self) -> dict:
        """Return the fields and the verdict.

        Returns:
            Dicts, lists and scalars: the keys of ``ppl compare --json``.
        """
        return {**asdict(self), "verdict": self.verdict}


@overload
def compare(a: Side, b: Side, *, measure: str = "loss", plan: float = PLANNED) -> Comparison: ...
@overload
def compare(
    a: Side, b: Side, c: Side, /, *more: Side, measure: str = "loss", plan: float = PLANNED
) -> ManyComparison: ...
def compare(
    a: Side, b: Side, *more: Side, measure: str = "loss", plan: float = PLANNED
) -> Comparison | ManyComparison:
    """Return the paired difference of two evaluations of one text, or a table of several.

    Args:
        a: the baseline: an Evaluation, its JSON as a dict, or a file of it.
        b: the evaluation to compare with it, likewise.
        more: further evaluations, likewise: all are compared with each other.
        measure: "loss" (default), nats a token, refuses different tokenizers: a token is not the
            same unit for both. "bits-per-byte" compares over the bytes that all scored: where one
            has no loss for a document's first token, all leave its bytes out.
        plan: a difference in the measure's unit, above 0: the result says how many documents it
            takes to detect; default 0.01.

    Returns:
        A Comparison of B against A, or with ``more`` a ManyComparison.

    Raises:
        InputError: texts, documents or, for the loss, tokens differ; a loss is not finite.

    Example:
        >>> rows = [{"nll": 6.0, "tokens": 3, "bytes": 9}, {"nll": 4.0, "tokens": 2, "bytes": 5}]
        >>> a = {"loss": 2.0, "tokens": 5, "per_document": rows}
        >>> a |= {"tokenizer_fingerprint": "t", "text_fingerprint": "x"}
        >>> b = a | {"loss": 1.0, "per_document": [row | {"nll": row["tokens"]} for row in rows]}
        >>> compare(a, b).difference
        -1.0
        >>> [estimate.value for estimate in compare(a, b, a).columns[0].estimates]
        [2.0, 1.0, 2.0]
    """
    if more:
        return compare_several((a, b, *more), measure=measure, plan=plan)
    sides = _records((a, b), measure, plan)
    names = ("A", "B")
    paired = pair(sides, names, measure)
    (nll_a, nll_b), size = paired.sums, paired.sizes
    total = size.sum()
    difference = float((nll_b - nll_a).sum() / total)
    stderr = ratio_stderr(nll_b - nll_a, size)
    interval = p_value = effective = planned = None
    if stderr is not None:
        width = half_width(stderr, len(size))
        interval = difference - width, difference + width
        p_value = p_value_of(difference, stderr, len(size) - 1)
        alone = [ratio_stderr(nll, size) for nll in (nll_a, nll_b)]
        if stderr > 0:
            effective = (
                paired.tokens * sum(error**2 for error in alone if error is not None) / stderr**2
            )
        planned = plan_for(plan, stderr, len(size), paired.unit)
    of_loss = measure == "loss"
    notes = comparison_notes(sides, names, paired)
    columns = columns_of(paired, names)
    return Comparison(
        measure,
        float(nll_a.sum() / total),
        float(nll_b.sum() / total),
        difference,
        stderr,
        interval,
        p_value,
        exp(difference) if of_loss else None,
        (exp(interval[0]), exp(interval[1])) if of_loss and interval else None,
        paired.unit,
        len(size),
        paired.tokens,
        effective,
        int((nll_b < nll_a).sum()),
        len(size) >= TRUSTED_CLUSTERS,
        notes if planned is None else [*notes, planned.note(MEASURES[measure])],
        model_a=_model(sides[0]),
        model_b=_model(sides[1]),
        plan=planned,
        columns=columns if len(columns) > 1 else [],
    )


def _model(side: dict) -> dict | None:
    """Return what a result says of its model, None in a result of schema version 1."""
    return side["model"] if isinstance(side.get("model"), dict) else None


def compare_several(
    given: Sequence[Side], *, measure: str = "loss", plan: float = PLANNED
) -> ManyComparison:
    """Return the table of at least two evaluations of one text, as ``compare`` of several does.

    Args:
        given: evaluations, their JSON as dicts, or files of them.
        measure: "loss" (default) or "bits-per-byte".
        plan: the difference to plan for; default 0.01.

    Raises:
        InputError: the evaluations do not compare.
    """
    sides = _records(given, measure, plan)
    files = [Path(side).name if isinstance(side, str | Path) else None for side in given]
    return several(sides, files=files, measure=measure, plan=plan)


def _records(given: Sequence[Side], measure: str, plan: float) -> list[dict]:
    """Return the results of ``given``, once the other arguments are checked."""
    checks.choice("measure", measure, [*MEASURES])
    checks.number("plan", plan, "a number above 0", above=0)
    names = ["ab"[n] if n < 2 else f"more[{n - 2}]" for n in range(len(given))]
    return [record_of(side, name) for side, name in zip(given, names, strict=True)]
