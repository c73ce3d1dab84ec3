"""The metric: one division, exact merging."""

import math

import pytest
import torch

from perplexity import Perplexity


def test_not_a_mean_of_batch_means():
    metric = Perplexity()
    metric.update(torch.tensor([1.0, 1.0, 1.0, 5.0]))
    metric.update(torch.tensor([2.0]), bytes=10, words=2)
    got = metric.compute()
    assert got["loss"] == 2.0 and got["perplexity"] == pytest.approx(math.exp(2.0))
    assert got["bits_per_byte"] == pytest.approx(10 / 10 / math.log(2))
    assert got["byte_perplexity"] == pytest.approx(math.e)
    assert got["word_perplexity"] == pytest.approx(math.exp(5.0))


def test_torchevals_docstring_merge():
    """torcheval's documented example: perplexities 4.5051 and 2.7593 over equal counts merge to 3.5257."""
    a, b = Perplexity(), Perplexity()
    a.update(torch.full((2,), math.log(4.5051), dtype=torch.float64))
    b.update(torch.full((2,), math.log(2.7593), dtype=torch.float64))
    assert a.merge_state([b]).compute()["perplexity"] == pytest.approx(3.5257, abs=1e-4)


def test_mask_state_and_reset():
    metric = Perplexity()
    metric.update(torch.tensor([[1.0, 9.0], [3.0, math.inf]]), mask=torch.tensor([[True, False], [True, False]]))
    other = Perplexity()
    other.load_state_dict(metric.state_dict())
    assert other.compute() == metric.compute() and other.compute()["loss"] == 2.0
    metric.reset()
    assert metric.compute()["loss"] is None
    with pytest.raises(ValueError, match="mask: expected the shape"):
        metric.update(torch.zeros(3), mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="state: expected the keys"):
        metric.load_state_dict({"nll": 1.0})


def test_sums_are_float64():
    metric = Perplexity()
    for _ in range(1000):
        metric.update(torch.full((1000,), 0.1))
    assert metric.compute()["loss"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_an_overflowing_perplexity_is_inf_with_a_finite_loss():
    metric = Perplexity()
    metric.update(torch.tensor([1e4]))
    assert metric.compute()["perplexity"] == math.inf and metric.compute()["loss"] == 1e4
