"""Sizes, distributions, and splits that are the same everywhere."""

import random

import pytest
from corpus import documentation, sources

from perplexity.data_checks import Text, check_data
from perplexity.data_checks.splits import goes_to_validation, needed_tokens


def signals(check):
    return {finding.signal: finding for finding in check.findings}


def test_a_split_is_by_content():
    """The same text on the same side in every process and on every machine, copies with their
    originals.
    """
    texts = [f"document number {number} says {number * 7919 % 1000}" for number in range(20_000)]
    chosen = [text for text in texts if goes_to_validation(text, 0.05)]
    assert abs(len(chosen) - 1000) < 4 * 31  # four standard deviations of a binomial
    assert all(goes_to_validation(f"  {text.upper()}! ", 0.05) for text in chosen)
    assert {text for text in texts if goes_to_validation(text, 0.01)} < set(chosen)
    assert (
        goes_to_validation("the cat sat on the mat", 0.3) is False
        and goes_to_validation("a loss of three nats", 0.8) is True
    )


def test_needed_tokens():
    """(1.96 · 3 / log 1.01)², and a quarter of the tokens for twice the interval."""
    assert needed_tokens(0.01) == 349_205
    assert needed_tokens(0.0201) == pytest.approx(349_205 / 4, rel=1e-3)
    assert needed_tokens(0.01, deviation=6.0) == pytest.approx(4 * 349_205, rel=1e-5)


@pytest.mark.parametrize(("valid", "told"), [(2, True), (30, False), (300, True)])
def test_shares_out_of_the_usual_are_told(valid, told):
    train = [" ".join(f"t{number}x{word}" for word in range(100)) for number in range(1000)]
    texts = [" ".join(f"v{number}x{word}" for word in range(100)) for number in range(valid)]
    found = [
        f for f in check_data(train, texts, interval=0.9).findings if f.signal == "validation-size"
    ]
    assert [finding.severity for finding in found] == ["info"] * told


def test_too_few_tokens_for_the_interval_are_said_in_tokens():
    check = check_data(sources()[:5], documentation()[:20], interval=0.01)
    (finding,) = [
        f for f in check.findings if f.signal == "validation-size" and f.severity == "warning"
    ]
    assert "349,205" in finding.evidence and finding.numbers["tokens"] == check.words["valid"]


def texts(generator, count, domains, lengths):
    return [
        Text(
            str(number),
            " ".join(str(generator.random()) for _ in range(generator.choice(lengths))),
            generator.choice(domains),
        )
        for number in range(count)
    ]


def test_other_domains_and_lengths_are_told_and_chance_is_not():
    generator = random.Random(5)
    train = texts(generator, 3000, ["web", "web", "books"], [20, 50, 100])
    for seed in range(20):
        same = texts(random.Random(seed), 60, ["web", "web", "books"], [20, 50, 100])
        assert "distribution-shift" not in signals(check_data(train[:500], same))
    code = texts(generator, 60, ["books", "code"], [20, 50, 100])
    assert "domains" in signals(check_data(train[:500], code))["distribution-shift"].evidence
    short = texts(generator, 60, ["web", "web", "books"], [5, 7])
    assert "lengths" in signals(check_data(train[:500], short))["distribution-shift"].evidence
