"""The metric: one division, exact merging."""

import math

import pytest
import torch
from without_float64 import WithoutFloat64

from perplexity import Perplexity, token_nll
from perplexity.errors import InputError
from perplexity.nats import logged_perplexity


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
    """torcheval's documented example: 4.5051 and 2.7593 over equal counts merge to 3.5257."""
    a, b = Perplexity(), Perplexity()
    a.update(torch.full((2,), math.log(4.5051), dtype=torch.float64))
    b.update(torch.full((2,), math.log(2.7593), dtype=torch.float64))
    assert a.merge_state([b]).compute()["perplexity"] == pytest.approx(3.5257, abs=1e-4)


def test_mask_state_and_reset():
    metric = Perplexity()
    metric.update(
        torch.tensor([[1.0, 9.0], [3.0, math.inf]]),
        mask=torch.tensor([[True, False], [True, False]]),
    )
    other = Perplexity()
    other.load_state_dict(metric.state_dict())
    assert other.compute() == metric.compute() and other.compute()["loss"] == 2.0
    metric.reset()
    assert metric.compute()["loss"] is None
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


NLL = torch.tensor([[2.0, 0.0, 6.0], [0.0, 4.0, math.nan]])
TARGET = torch.tensor([[5, -100, 1], [-100, 3, -100]])
KEEP = torch.tensor([[True, True, False], [True, True, False]])


@pytest.mark.parametrize(
    ("given", "nll", "tokens"),
    [
        pytest.param(dict(target=TARGET), 12.0, 3, id="target"),
        pytest.param(dict(target=TARGET, ignore_index=None), 12.0, 3, id="torch's default"),
        pytest.param(dict(target=TARGET, ignore_index=3), math.nan, 5, id="another ignored label"),
        pytest.param(dict(target=TARGET.int(), mask=KEEP), 6.0, 2, id="both have to keep a token"),
        pytest.param(dict(target=TARGET, mask=True), 12.0, 3, id="all that the target keeps"),
        pytest.param(dict(mask=KEEP), 6.0, 4, id="mask"),
        pytest.param(dict(mask=KEEP.int()), 6.0, 4, id="attention mask"),
        pytest.param(dict(mask=True), math.nan, 6, id="all, and NaN stays NaN"),
    ],
)
def test_what_counts(given, nll, tokens):
    """Ignored labels have NLL 0 and were counted: the loss of a half-masked text was halved."""
    metric = Perplexity()
    metric.update(NLL, **given)
    assert metric.tokens == tokens and metric.nll == pytest.approx(nll, abs=0, nan_ok=True)


def test_the_pair_with_token_nll():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator)
    target = torch.tensor([3, -100, 7, -100, 11, -100])
    nll = token_nll(hidden, weight, target)
    metric = Perplexity()
    metric.update(nll, target=target)
    exact = torch.nn.functional.cross_entropy((hidden.double() @ weight.double().T), target).item()
    assert metric.compute()["loss"] == pytest.approx(exact, rel=1e-6)  # the NLL is float32
    with pytest.raises(InputError, match="target= or mask="):
        metric.update(nll)
    assert metric.tokens == 3, "a refused update leaves nothing"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "token_nll: expected target= or mask= .* mask=True"),
        (dict(target=TARGET[0]), r"target: expected the shape of token_nll, \(2, 3\), got \(3,\)"),
        (dict(target=TARGET.double()), "target: expected int64 labels, got torch.float64"),
        (dict(target=KEEP), "target: expected int64 labels, got torch.bool"),
        (dict(target=[1]), "target: expected int64 labels, got"),
        (dict(mask=KEEP[:, :1]), r"mask: expected the shape of token_nll, \(2, 3\), got \(2, 1\)"),
        (dict(mask=KEEP.float()), "mask: expected True or a bool tensor, got torch.float32"),
        (dict(mask=False), "mask: expected True or a bool tensor, got False"),
    ],
    ids=[
        "neither",
        "target's shape",
        "floating target",
        "bool target",
        "list",
        "mask's shape",
        "floating mask",
        "False",
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Perplexity().update(NLL, **given)


def test_token_nll_has_to_be_a_floating_tensor():
    for wrong in (TARGET, 1.0):
        with pytest.raises(InputError, match="token_nll: expected a floating tensor"):
            Perplexity().update(wrong, mask=True)


def test_a_device_without_float64():
    """Apple's MPS raises TypeError for float64: the sums are the CPU's."""
    metric = Perplexity()
    nll, mask = WithoutFloat64.hold([1.0, 0.0, 3.0]), WithoutFloat64.hold([True, False, True])
    metric.update(nll, mask=mask)
    assert metric.compute()["loss"] == 2.0


@pytest.mark.parametrize(
    ("loss", "perplexity"),
    [(0.0, None), (None, None), (1.0, math.e), (1e4, math.inf)],
)
def test_a_logged_loss_of_exactly_0_has_no_perplexity(loss, perplexity):
    """transformers logs 0.0 where a loss was NaN; exp would call the dead model perfect."""
    assert logged_perplexity(loss) == perplexity
