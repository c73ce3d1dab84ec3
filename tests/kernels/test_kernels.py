"""Both implementations of every kernel against float64; the tables are tests/tables.py's."""

import pytest
import torch
from tables import LINEAR, ROWS, Case, build, check_linear, check_rows, implementation

from perplexity.kernels import SUM_EXP, TARGET

BACKENDS = ("torch", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_nll(case, backend, device):
    check_linear(case, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_nll(case, backend, device):
    check_rows(case, backend, device)


@pytest.mark.parametrize(
    "case", [Case(dtype=torch.float64, bias=True, softcap=9.0), Case(dtype=torch.float64, scale=1e4)], ids=str
)
def test_the_fallback_in_float64(case, device):
    check_linear(case, "torch", device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, device):
    inputs = build(Case(shape=(70, 9001, 40)), device)
    arguments = inputs.hidden, inputs.weight, inputs.bias, inputs.target
    forward, backward = implementation(backend)
    first, second = forward(*arguments), forward(*arguments)
    assert torch.equal(first, second)
    gradients = [backward(inputs.upstream, first[0].clone(), *arguments)[:2] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_token_does_not_depend_on_its_batch(device):
    """The kernel's spans are a constant: the same bits alone as among others."""
    inputs = build(Case(shape=(70, 9001, 40)), device)
    forward, _ = implementation("triton")
    together = forward(inputs.hidden, inputs.weight, None, inputs.target)
    alone = forward(inputs.hidden[64:65], inputs.weight, None, inputs.target[64:65])
    # Interpreted, a product is numpy's, which rounds by shape of the batch of tiles: equal tiles, equal bits.
    assert torch.equal(alone[:, 0], together[:, 64])


@pytest.mark.parametrize("label", [-1, 517, 2**31, -(2**40), 2**32 + 3])
def test_a_label_outside_the_vocabulary_never_gives_a_finite_loss(label, device):
    """axolotl 3767, DeepSpeed 8540; 2³² + 3 is 3 in 32 bits."""
    inputs = build(Case(ignored="none"), device)
    inputs.target[7] = label
    for backend in BACKENDS:
        sums = implementation(backend)[0](inputs.hidden, inputs.weight, None, inputs.target)
        assert sums[TARGET].isnan().nonzero().tolist() == [[7]]
        assert sums[SUM_EXP].isfinite().all()


def test_nan_and_inf_reach_the_loss(device):
    """tl.max and torch.amax treat NaN differently: the sum must carry it either way."""
    inputs = build(Case(ignored="none"), device)
    inputs.hidden[3, 5], inputs.hidden[9, 0] = torch.nan, torch.inf
    for backend in BACKENDS:
        sums = implementation(backend)[0](inputs.hidden, inputs.weight, None, inputs.target)
        nll = (sums[0] - sums[TARGET]) + sums[SUM_EXP].log()
        assert nll.isfinite().logical_not().nonzero().flatten().tolist() == [3, 9]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(backend, needs, device):
    inputs = build(Case(bias=True), device)
    arguments = inputs.hidden, inputs.weight, inputs.bias, inputs.target
    forward, backward = implementation(backend)
    maximum = forward(*arguments)[0].clone()
    every = backward(inputs.upstream, maximum, *arguments)
    some = backward(inputs.upstream, maximum, *arguments, needs=needs)
    for asked, one, full in zip(needs, some, every, strict=True):
        assert torch.equal(one, full) if asked else one is None
