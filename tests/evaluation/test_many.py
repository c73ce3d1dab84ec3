"""Several results in one table: averages, domains, pairwise tests with Holm's correction, plans."""

import csv
import io
import itertools
import json
import math
import sys

import numpy as np
import pytest
import scipy.stats

from perplexity import compare
from perplexity.errors import InputError
from perplexity.evaluation import publish
from perplexity.evaluation.comparison import compare_several
from perplexity.evaluation.many import holm
from perplexity.evaluation.planning import plan_for
from perplexity.evaluation.text_tables import plain_table

DOMAINS = ("code", "news", "wiki")


def results(shifts=(0.1, 0.0, 0.004), *, noise=0.05, documents=60, domains=DOMAINS, seed=0):
    """JSON of results by name: document losses that differ by a shift and some noise."""
    rng = np.random.default_rng(seed)
    size = rng.integers(50, 300, documents)
    base = rng.normal(3, 0.4, documents)
    found = []
    for number, shift in enumerate(shifts):
        nll = size * (base + shift + rng.normal(0, noise, documents))
        rows = [
            {
                "id": str(place),
                "domain": domains[place % len(domains)],
                "nll": float(nll[place]),
                "tokens": int(size[place]),
                "bytes": int(4 * size[place]),
            }
            for place in range(documents)
        ]
        found.append(
            {
                "schema_version": 2,
                "loss": float(nll.sum() / size.sum()),
                "tokens": int(size.sum()),
                "per_document": rows,
                "tokenizer_fingerprint": "t",
                "text_fingerprint": "x",
                "model": {"name": f"model-{number}", "fingerprint": str(number)},
            }
        )
    return found


@pytest.fixture
def files(tmp_path):
    paths = []
    for number, record in enumerate(results()):
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
        paths.append(str(tmp_path / f"{number}.json"))
    return paths


def jackknife(a, b, kept):
    """Difference of two ratios with its jackknife standard error over documents."""
    nll = np.array([y["nll"] - x["nll"] for x, y in zip(a, b, strict=True)])[kept]
    tokens = np.array([row["tokens"] for row in a])[kept]
    count = len(nll)
    left_out = (nll.sum() - nll) / (tokens.sum() - tokens)
    error = math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    return nll.sum() / tokens.sum(), error


@pytest.mark.parametrize("kind", ["micro", "domain", "macro"])
def test_every_pair_against_the_jackknife(kind):
    """Linearisation and jackknife agree to first order: 6% at 20 documents."""
    sides = results()
    table = compare(*sides)
    assert [column.name for column in table.columns] == ["micro", "macro", *DOMAINS]
    rows = [side["per_document"] for side in sides]
    places = np.arange(60)
    for column in table.columns:
        if column.kind != kind:
            continue
        for test, (a, b) in zip(column.tests, itertools.combinations(range(3), 2), strict=True):
            parts = [places % 3 == n for n in range(3)]
            if kind == "micro":
                parts = [places >= 0]
            elif kind == "domain":
                parts = [places % 3 == DOMAINS.index(column.name)]
            found = [jackknife(rows[a], rows[b], part) for part in parts]
            expected = np.mean([difference for difference, _ in found])
            error = math.sqrt(sum(error**2 for _, error in found)) / len(found)
            assert (test.a, test.b) == (f"model-{a}", f"model-{b}")
            assert test.difference == pytest.approx(expected, rel=1e-9)
            assert test.stderr == pytest.approx(error, rel=0.06)
            if kind != "macro":
                p = 2 * scipy.stats.t.sf(abs(test.difference) / test.stderr, parts[0].sum() - 1)
                assert test.p_value == pytest.approx(p)


def test_estimates_are_the_ratios_of_sums():
    sides = results()
    table = compare(*sides)
    micro, macro, *by_domain = table.columns
    for place, side in enumerate(sides):
        assert micro.estimates[place].value == pytest.approx(side["loss"])
        losses = []
        for name, column in zip(DOMAINS, by_domain, strict=True):
            own = [row for row in side["per_document"] if row["domain"] == name]
            losses.append(sum(r["nll"] for r in own) / sum(r["tokens"] for r in own))
            assert column.estimates[place].value == pytest.approx(losses[-1])
            assert (column.pairs, column.size) == (20, sum(r["tokens"] for r in own))
        assert macro.estimates[place].value == pytest.approx(np.mean(losses))
        assert table.perplexity(place) == pytest.approx(math.exp(side["loss"]))


def test_the_macro_average_has_satterthwaites_degrees_of_freedom():
    """Where one domain has all the variance, its degrees of freedom are those of the average."""
    sides = results((0.0, 0.1, 0.2))
    for side in sides[1:]:
        for first, row in zip(sides[0]["per_document"], side["per_document"], strict=True):
            if row["domain"] != "code":
                row["nll"] = first["nll"] + 0.1 * row["tokens"]
    macro = compare(*sides).columns[1]
    for test in macro.tests[:2]:
        half = (test.interval[1] - test.interval[0]) / 2
        assert half / test.stderr == pytest.approx(scipy.stats.t.ppf(0.975, 19))


def from_its_definition(p_values):
    """Holm's adjusted p-value: the least level at which the step-down procedure rejects."""
    found = []
    for place in range(len(p_values)):

        def rejects(level, place=place):
            order = sorted(range(len(p_values)), key=p_values.__getitem__)
            for step, each in enumerate(order):
                if p_values[each] > level / (len(p_values) - step):
                    return False
                if each == place:
                    return True

        low, high = 0.0, float(len(p_values))
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if rejects(middle) else (middle, high)
        found.append(min(1.0, high))
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_holm_from_its_definition(count):
    for p_values in np.random.default_rng(count).uniform(0, 0.3, (20, count)).tolist():
        assert holm(p_values) == pytest.approx(from_its_definition(p_values), abs=1e-12)
    assert holm([None] * count) == [None] * count
    assert holm([0.5, None, *[0.01] * count])[1] is None


def test_holm_holds_the_familywise_level():
    """Of 400 tables of four equal models about 5% have a false winner; uncorrected, over 10%."""
    wrong = uncorrected = 0
    for seed in range(400):
        tests = (
            compare(*results((0.0,) * 4, documents=24, domains=("x",), seed=seed)).columns[0].tests
        )
        wrong += any(test.verdict != "tie" for test in tests)
        uncorrected += any(test.p_value < 0.05 for test in tests)
    # Three standard deviations of a binomial of 400 at 5% are 13.
    assert wrong <= 33 and uncorrected > 40


def test_ties_are_marked():
    table = compare(*results())
    assert [estimate.best for estimate in table.columns[0].estimates] == [False, True, True]
    assert [test.verdict for test in table.columns[0].tests] == ["model-1", "model-2", "tie"]
    lines = str(table).splitlines()
    assert sum("model-1" in line and line.endswith("*") for line in lines) == 1
    assert max(map(len, lines)) <= 80


def test_two_results_keep_their_comparison():
    a, b, c = results()
    assert compare(a, b).difference == pytest.approx(b["loss"] - a["loss"])
    assert compare_several([a, b]).columns[0].tests[0].p_value == compare(a, b).p_value
    (test, *_) = compare(a, b, c).columns[0].tests
    assert (test.difference, test.stderr) == (compare(a, b).difference, compare(a, b).stderr)


def test_names_are_told_apart(files):
    records = results()
    for record in records:
        record["model"] = {"name": "m", "fingerprint": "f"}
    assert compare(*records).names == ["m 1", "m 2", "m 3"]
    for path, record in zip(files, records, strict=True):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file)
    table = compare(*files)
    assert table.names == ["m (0.json)", "m (1.json)", "m (2.json)"]
    assert any("m (0.json) and m (1.json) are the same model" in note for note in table.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_fingerprint": "y"}, "text: expected one text for model-0 and model-2"),
        ({"tokenizer_fingerprint": "u"}, "tokenizer: .* do not compare"),
        ({"non_finite": {"tokens": 3}}, "got 3 of model-2 that are NaN"),
    ],
)
def test_a_third_result_that_does_not_compare(change, message):
    a, b, c = results()
    with pytest.raises(InputError, match=message):
        compare(a, b, c | change)


def test_another_tokenizer_among_several_by_bytes():
    a, b, c = results()
    table = compare(a, b, c | {"tokenizer_fingerprint": "u"}, measure="bits-per-byte")
    tokens = sum(row["bytes"] for row in a["per_document"])
    nll = sum(row["nll"] for row in a["per_document"])
    assert table.columns[0].estimates[0].value == pytest.approx(nll / tokens / math.log(2))
    assert table.perplexity(0) is None


def test_two_results_by_domain():
    """Losses by domain stood in neither result of ``compare`` of two."""
    a, b = results((0.1, 0.0))
    found = compare(a, b)
    names = [column.name for column in found.columns]
    assert names == ["micro", "macro", *DOMAINS]
    for column in found.columns[2:]:
        rows = [
            (x["nll"], y["nll"], x["tokens"])
            for x, y in zip(a["per_document"], b["per_document"], strict=True)
            if x["domain"] == column.name
        ]
        nll_a, nll_b, tokens = map(sum, zip(*rows, strict=True))
        (test,) = column.tests
        assert [estimate.value for estimate in column.estimates] == pytest.approx(
            [nll_a / tokens, nll_b / tokens]
        )
        assert test.difference == pytest.approx((nll_b - nll_a) / tokens)
        # The documents' weights differ little, so the plain paired t-test is close.
        plain = scipy.stats.ttest_1samp([(y - x) / size for x, y, size in rows], 0)
        low, high = plain.confidence_interval()
        assert test.interval == pytest.approx((low, high), abs=0.02)
    assert (found.columns[0].tests[0].difference, found.columns[0].tests[0].p_value) == (
        pytest.approx(found.difference),
        pytest.approx(found.p_value),
    )
    rows = found.domain_rows()
    assert [row[0] for row in rows[:2]] == ["micro", "macro"]
    assert sorted(row[0] for row in rows[2:]) == sorted(DOMAINS)
    assert "by domain" in str(found) and str(rows[2][1]) in str(found)
    assert found.to_dict()["columns"][2]["name"] == DOMAINS[0]
    assert compare(*results((0.1, 0.0), domains=("one",))).columns == []


def test_a_domain_of_one_document_has_no_interval():
    sides = results(documents=4)
    table = compare(*sides)
    one = table.columns[3]
    assert one.pairs == 1 and one.estimates[0].interval is None and one.tests[0].p_holm is None
    assert table.columns[1].estimates[0].interval is None
    assert all(estimate.best for estimate in one.estimates)
    assert "too few" in " ".join(table.notes)
    assert publish.to_csv(table) and publish.to_markdown(table)


@pytest.mark.parametrize(("spread", "difference"), [(0.1, 0.1), (0.2, 0.1), (0.3, 0.1), (1.0, 0.2)])
@pytest.mark.parametrize("power", [0.8, 0.9])
def test_the_plan_against_the_noncentral_t(spread, difference, power):
    """The least n whose t-test has the power, by its exact distribution: Guenther is within 1."""
    count = 2
    while True:
        critical = scipy.stats.t.ppf(0.975, count - 1)
        shift = difference * math.sqrt(count) / spread
        if scipy.stats.nct.sf(critical, count - 1, shift) >= power:
            break
        count += 1
    found = plan_for(difference, spread / math.sqrt(50), 50, power=power)
    assert abs(found.documents - count) <= 1
    assert found.spread == pytest.approx(spread)
    # What the documents seen detect needs as many as were seen.
    assert plan_for(found.detectable, spread / math.sqrt(50), 50, power=power).documents in (50, 51)


def test_the_plan_against_simulation():
    """So many documents find a true difference in 80% of 1,000 comparisons, by scipy's t-test."""
    rng = np.random.default_rng(0)
    documents = plan_for(0.05, 0.2 / math.sqrt(40), 40).documents
    assert documents > 100
    drawn = rng.normal(0.05, 0.2, (1000, documents))
    found = (scipy.stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean()
    assert 0.76 < found < 0.84  # three standard deviations


def test_every_comparison_says_what_a_difference_takes():
    a, b, c = results()
    two = compare(a, b, plan=0.02)
    needed = two.plan.documents
    (note,) = [note for note in two.notes if note.startswith("plan: ")]
    assert f"{needed:,} documents like these detect a difference of 0.02 nats a token" in note
    assert "80% power at the two-sided 5% level" in note and "the 60 documents here detect" in note
    assert two.plan.spread == pytest.approx(two.stderr * math.sqrt(60))
    several = compare(a, b, c)
    assert several.plan.level == pytest.approx(0.05 / 3) and several.plan.difference == 0.01
    assert any("(5% over 3 pairs)" in note for note in several.notes)
    with pytest.raises(InputError, match="plan: expected a number above 0, got 0"):
        compare(a, b, plan=0)


def test_markdown_and_csv(files, ppl_here):
    table = compare(*files)
    done = ppl_here("compare", *files, "--csv")
    assert done.returncode == 0 and "note: plan: " in done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["model"] for row in rows] == ["model-1", "model-2", "model-0"]
    for row in rows:
        place = table.names.index(row["model"])
        for column in table.columns:
            estimate = column.estimates[place]
            assert float(row[column.name]) == estimate.value
            assert (float(row[f"{column.name} low"]), float(row[f"{column.name} high"])) == (
                estimate.interval
            )
            assert row[f"{column.name} best"] == str(int(estimate.best))
    done = ppl_here("compare", *files, "--markdown")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "| model | perplexity | micro | macro | code | news | wiki |"
    assert lines[2].startswith("| model-1 |") and lines[2].count("**") == 2 * 5
    assert {line.count("|") for line in lines[:5]} == {8}
    best = table.columns[0].estimates[1]
    assert f"| **{best.value:.4f}** ± " in lines[2]


@pytest.mark.parametrize("count", [2, 12, 30])
def test_the_terminal_at_80_columns(count, ppl_here, tmp_path, monkeypatch):
    """Every domain is shown, in as many tables as the width asks for; 20 domains at most."""
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"a domain {n}" for n in range(count)]
    paths = []
    for n, record in enumerate(results(domains=names)):
        (tmp_path / f"{n}.json").write_text(json.dumps(record))
        paths.append(str(tmp_path / f"{n}.json"))
    done = ppl_here("compare", *paths)
    assert done.returncode == 0
    tables = [line for line in done.stdout.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, tables)) <= 80
    joined = "".join(done.stdout.split())
    micro = compare(*paths).columns[0]
    assert all(f"{estimate.value:.4f}" in joined for estimate in micro.estimates)
    assert ("10moredomains" in joined) == (count == 30)
    assert joined.count("±") >= 3 * min(count, 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "0"], "--plan: expected a difference above 0, got 0"),
        (["--markdown", "--csv"], "expected one of --markdown and --csv, got both"),
    ],
)
def test_options_that_do_not_go(files, ppl_here, words, message):
    done = ppl_here("compare", *files, *words)
    assert done.returncode == 2 and message in done.stderr
    done = ppl_here("compare", "folder", "folder", "text.txt", "--csv")
    assert done.returncode == 2 and "--csv: expected results of ppl eval --json" in done.stderr


def test_result_files_are_compared_without_transformers(files, ppl_here, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it raises
    assert ppl_here("compare", *files).returncode == 0
    assert ppl_here("compare", *files[:2]).returncode == 0
    done = ppl_here("compare", "folder", "folder", "text.txt")
    assert done.returncode == 2 and "needs transformers" in done.stderr


def test_json_of_several(files, ppl_here, tmp_path):
    done = ppl_here("compare", *files, "--json", tmp_path / "out.json")
    assert done.returncode == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert [column["kind"] for column in record["columns"]] == ["micro", "macro", *["domain"] * 3]
    assert record["names"] == ["model-0", "model-1", "model-2"]
    assert record["plan"]["documents"] == compare(*files).plan.documents


def test_a_plain_table_wraps_its_last_column():
    text = plain_table(None, ("a", "b", "c"), [("one", "2", "w " * 60)], width=40)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 40 and lines[1].startswith("one  2  w w")
    assert text.split().count("w") == 60
