"""The table of ``kernels/dispatch.py``, row by row: which way a call takes."""

import pytest
import torch

pytest.importorskip("triton")
from perplexity.kernels import dispatch
from perplexity.kernels.dispatch import AHEAD, CHUNKED, FUSED, KEPT, OPEN, Rule
from perplexity.kernels.gpu import launch
from perplexity.kernels.gpu.launch import Target

AMPERE, HOPPER, AMD = Target("cuda", 80), Target("cuda", 90), Target("hip", "gfx942", 64)
INTERPRETER = Target("interpreter", 0)
TOKENS, VOCABULARY, DIMENSION = 8, 64, 16
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
STEP = dict(trains=True, rounded=True, total=True)  # a training step whose loss is one number
ONE_TOKEN = dict(memory_limit=4 * VOCABULARY)


def plan(backend, dtype, *, trains=False, bias=False, device="cpu", **options):
    hidden = torch.zeros(TOKENS, DIMENSION, dtype=dtype, device=device)
    weight = torch.zeros(VOCABULARY, DIMENSION, dtype=dtype, device=device, requires_grad=trains)
    return dispatch.plan(
        Rule(),
        hidden,
        weight,
        hidden.new_zeros(VOCABULARY) if bias else None,
        backend=backend,
        **options,
    )


@pytest.mark.parametrize(
    ("dtype", "options", "way"),
    [
        (F32, {}, FUSED),  # the weight needs no gradient
        (F32, dict(trains=True), KEPT),
        (F64, dict(trains=True), KEPT),
        (BF16, dict(trains=True), FUSED),  # float32 products would not fit into a 16-bit gradient
        (F16, dict(trains=True, rounded=True), FUSED),  # a CPU has no products of float16
    ],
)
def test_the_ways_of_the_torch_backend(dtype, options, way):
    chosen = plan("torch", dtype, **options)
    assert (chosen.way, len(chosen.block)) == (way, 2 if way == KEPT else 0)


@pytest.mark.parametrize(
    ("target", "dtype", "options", "way"),
    [
        (AMPERE, BF16, STEP, AHEAD),
        (HOPPER, BF16, STEP, AHEAD),
        (HOPPER, BF16, STEP | dict(bias=True), AHEAD),
        (AMPERE, BF16, STEP | dict(rounded=False), CHUNKED),
        # one value a token: the backward says what it is worth
        (AMPERE, BF16, STEP | dict(total=False), CHUNKED),
        (AMPERE, BF16, STEP | dict(trains=False), CHUNKED),
        (AMPERE, F16, STEP, CHUNKED),  # a loss scale comes with the backward
        (AMD, BF16, STEP, CHUNKED),
        (AMPERE, BF16, dict(bias=True), FUSED),
        (AMPERE, F32, STEP, FUSED),
        (AMPERE, BF16, STEP | ONE_TOKEN, FUSED),  # neither all logits nor those of 128 tokens fit
        (HOPPER, BF16, {}, FUSED),  # has the copy engine
        (HOPPER, F16, STEP, FUSED),
        (INTERPRETER, BF16, STEP, FUSED),
    ],
)
def test_the_ways_of_the_triton_backend(target, dtype, options, way, monkeypatch):
    monkeypatch.setattr(launch, "target_of", lambda tensor: target)
    chosen = plan("triton", dtype, **options)
    assert (chosen.way, chosen.block) == (way, (128,) if way == AHEAD else ())


@pytest.mark.parametrize(("backend", "way"), [("torch", FUSED), ("triton", OPEN)])
def test_what_is_traced_or_has_no_data_is_left_open(backend, way):
    """No device is asked for, and no product is kept for a backward that nobody can see."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    ways = []

    def transformed(x):
        ways.append(plan(backend, F32, trains=True).way)
        return x

    torch.func.vmap(transformed)(torch.zeros(2))
    assert ways == [way]
    if backend == "triton":
        assert plan(backend, F32, device="meta").way == OPEN
        with FakeTensorMode():
            assert plan(backend, F32).way == OPEN


@pytest.mark.parametrize(("target", "way"), [(AMPERE, CHUNKED), (HOPPER, FUSED)])
def test_an_open_plan_is_settled_by_the_operator(target, way):
    hidden, weight = (torch.zeros(rows, DIMENSION, dtype=BF16) for rows in (TOKENS, VOCABULARY))
    plan = dispatch.Plan("triton", OPEN)
    assert dispatch.settled(plan, target, hidden, weight, None) == plan._replace(way=way)
