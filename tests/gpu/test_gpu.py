"""The kernel tables compiled, on CUDA tensors; skipped without a GPU."""

import pytest
import torch
from tables import (
    KL,
    LINEAR,
    ROWS,
    STATISTICS,
    Case,
    build,
    check_kl,
    check_linear,
    check_rows,
    check_statistics,
    implementation,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_nll(case):
    check_linear(case, "triton", "cuda")


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_nll(case):
    check_rows(case, "triton", "cuda")


@pytest.mark.parametrize("case", STATISTICS, ids=str)
def test_linear_statistics(case):
    check_statistics(case, "triton", "cuda")


@pytest.mark.parametrize("case", KL, ids=str)
def test_linear_kl(case):
    check_kl(case, "triton", "cuda")


def test_two_runs_give_the_same_bits():
    inputs = build(Case(shape=(4096, 50257, 512), dtype=torch.bfloat16), "cuda")
    arguments = inputs.hidden, inputs.weight, inputs.bias, inputs.target
    forward, backward = implementation("triton")
    first, second = forward(*arguments), forward(*arguments)
    assert torch.equal(first, second)
    gradients = [backward(inputs.upstream, first[0].clone(), *arguments)[:2] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
