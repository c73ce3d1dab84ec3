"""Both implementations of every kernel against float64; the tables are tests/tables.py's."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from tables import (
    FORWARD,
    KL,
    LINEAR,
    ROWS,
    STATISTICS,
    Case,
    assert_close,
    build,
    check_kl,
    check_linear,
    check_rows,
    check_statistics,
    derived,
    implementation,
    oracle,
)

from perplexity import linear_kl_divergence
from perplexity.kernels import dispatch, operators
from perplexity.kernels.dispatch import Plan, Rule
from perplexity.kernels.gpu.linear_nll import GROUP, span_and_row
from perplexity.kernels.sums import MAX, SUM_EXP, TARGET, divergence

BACKENDS = ("torch", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_nll(case, backend, device):
    check_linear(case, backend, device)


@pytest.mark.parametrize("case", [case for case in LINEAR if case.dtype != torch.float16], ids=str)
def test_products_kept_where_the_gradient_will_be(case, device):
    """Whatever was not written is NaN: nothing else may be read. 16-bit products are rounded, as
    they are where kept.
    """
    rounded = case.dtype != torch.float32
    kept = torch.full(case.shape[1:], torch.nan, dtype=case.dtype, device=device)
    hidden = torch.empty((case.shape[0], case.shape[2]), dtype=case.dtype, device=device)
    rule = Rule(softcap=case.softcap, with_exp_shift=True)
    plan = dispatch.plan(
        rule,
        hidden,
        kept.clone().requires_grad_(),
        backend="torch",
        rounded=rounded,
        **case.options,
    )
    if plan.way != dispatch.KEPT:
        pytest.skip(f"no products of {case.dtype} on this CPU")
    check_linear(case, "torch", device, kept, way=plan.way, rounded=rounded, block=plan.block)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_nll(case, backend, device):
    check_rows(case, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STATISTICS, ids=str)
def test_linear_statistics(case, backend, device):
    check_statistics(case, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", KL, ids=str)
def test_linear_kl(case, backend, device):
    check_kl(case, backend, device)


@pytest.mark.parametrize(
    "case",
    [Case(dtype=torch.float64, bias=True, softcap=9.0), Case(dtype=torch.float64, scale=1e4)],
    ids=str,
)
def test_the_fallback_in_float64(case, device):
    check_linear(case, "torch", device)


def test_divergence_in_float64(device):
    check_kl(Case(dtype=torch.float64, bias=True, softcap=9.0, scale=10.0), "torch", device)


def test_tiles_are_widened_by_the_interpreter_alone():
    """On a device a 16-bit tile cast to float32 would leave the matrix unit's own 16-bit
    products.
    """
    from perplexity.kernels.gpu.launch import Target, widen_products

    assert widen_products(Target("interpreter", 0), torch.bfloat16)
    assert not widen_products(Target("interpreter", 0), torch.float32)
    assert not widen_products(Target("cuda", 90), torch.bfloat16)
    assert not widen_products(Target("hip", "gfx942"), torch.float16)


NARROW = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("q", NARROW, ids=str)
@pytest.mark.parametrize("p", NARROW, ids=str)
def test_divergence_of_heads_in_two_dtypes(p, q, device):
    """The narrower side's backward raised: its gradient came in the other's dtype."""
    generator = torch.Generator().manual_seed(2)
    shapes, dtypes = ((7, 6), (19, 6), (19,), (7, 5), (19, 5), (19,)), (p,) * 3 + (q,) * 3
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]

    def divergence(a, b, c, d, e, f):
        kl = linear_kl_divergence(a, b, d, e, bias_p=c, bias_q=f, softcap_p=4.0, backend="torch")
        return kl * torch.linspace(0.5, 1.5, 7, device=device)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    log_p = (4 * ((exact[0] @ exact[1].T + exact[2]) / 4).tanh()).log_softmax(1)
    log_q = (exact[3] @ exact[4].T + exact[5]).log_softmax(1)
    expected = (log_p.exp() * (log_p - log_q)).sum(1) * torch.linspace(0.5, 1.5, 7, device=device)
    got = divergence(*leaves)
    # Of each side its own inputs' rounding: products are float32 at least, gradients in the leaf's
    # dtype.
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(got.sum(), leaves)
    for one, exactly, dtype in zip(
        gradients, torch.autograd.grad(expected.sum(), exact), dtypes, strict=True
    ):
        assert one.dtype == dtype
        # The other side's products may be float32 where this side's are float64.
        bound = max(NARROW[dtype], 0.0 if p == q else NARROW[torch.float32])
        assert (one.double() - exactly).abs().max() <= bound * exactly.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_equal_rows_of_the_vocabulary_tie(tokens, dtype, backend, device):
    """Untrained rows are copies of each other: a target among them, summed in another order, would
    rank behind them all.
    """
    inputs = build(Case(shape=(tokens, 900, 123), dtype=dtype, ignored="none"), device)
    module = operators.implementation(backend)
    hidden, weight = inputs.hidden, inputs.weight[1:2].repeat(900, 1)
    weight[::7] = inputs.weight[::7]
    if backend == "triton" and device == "cpu":
        # Interpreted, products are numpy's: in some of its BLAS kernels the order of a sum depends
        # on the column. Sixteenths have exact sums in any order; compiled, the order itself is
        # under test.
        hidden, weight = ((16 * tensor).round().clamp(-64, 64) / 16 for tensor in (hidden, weight))
    head = hidden, weight, None, inputs.target
    _, above, best = module.linear_statistics(*head, module.target_logit(*head))
    z = hidden.double() @ weight.double().T
    slack = 1e-5
    own = z.gather(1, inputs.target[:, None])
    copy = inputs.target % 7 != 0
    assert copy.any() or tokens == 1
    assert torch.equal(above[copy], (z > own + slack).sum(1)[copy])
    largest_is_copied = (z.amax(1) - z[:, 1]).abs() < slack
    assert (best[largest_is_copied] == 1).all(), "of equal largest logits the first"


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_heads_have_no_divergence(backend, device):
    module = operators.implementation(backend)
    for case in (Case(), Case(shape=(7, 2181, 40), dtype=torch.bfloat16, scale=20.0)):
        inputs = build(case, device)
        head = inputs.hidden, inputs.weight, inputs.bias
        rows = module.linear_kl(head, head)
        assert (divergence(rows) == 0).all()
        gradients = module.linear_kl_grad(
            torch.ones(case.shape[0], device=device), rows, head, head
        )
        # p · (log p − log q − KL) and q − p are exact zeros.
        assert all((gradient == 0).all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, device):
    inputs = build(Case(shape=(70, 2181, 40)), device)
    arguments = inputs.hidden, inputs.weight, inputs.bias, inputs.target
    forward, backward = implementation(backend)
    first, second = forward(*arguments), forward(*arguments)
    assert torch.equal(first, second)
    gradients = [backward(inputs.upstream, first[0].clone(), *arguments)[:2] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_token_does_not_depend_on_its_batch(device):
    """The kernel's spans are a constant: the same bits alone as among others."""
    inputs = build(Case(shape=(70, 2181, 40)), device)
    forward, _ = implementation("triton")
    together = forward(inputs.hidden, inputs.weight, None, inputs.target)
    alone = forward(inputs.hidden[64:65], inputs.weight, None, inputs.target[64:65])
    # Interpreted, a product is numpy's, which rounds by shape of the batch of tiles: equal tiles,
    # equal bits.
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
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_the_gradients_asked_for(backend, needs, device):
    inputs = build(Case(bias=True), device)
    arguments = inputs.hidden, inputs.weight, inputs.bias, inputs.target
    forward, backward = implementation(backend)
    maximum = forward(*arguments)[0].clone()
    every = backward(inputs.upstream, maximum, *arguments)
    some = backward(inputs.upstream, maximum, *arguments, needs=needs)
    for asked, one, full in zip(needs, some, every, strict=True):
        assert torch.equal(one, full) if asked else one is None


@pytest.mark.parametrize(
    "case",
    [
        # A row costs the interpreter the same whichever chunk has it: 25 make three chunks.
        replace(case, shape=(min(case.shape[0], 25), *case.shape[1:]))
        for case in LINEAR
        if not (case.bias or case.masked_bias or case.options)
    ],
    ids=str,
)
def test_linear_nll_by_chunks_of_logits(case, device):
    """The vendor's products and a row kernel: the same contract, several chunks of tokens, the last
    one shorter.
    """
    from perplexity.kernels.gpu.linear_nll_chunked import linear_nll_chunked

    inputs = build(case, device)
    rule = Rule(
        softcap=case.softcap, logit_scale=case.logit_scale, with_logit_sum=True, with_exp_shift=True
    )
    plan = Plan("triton", memory_limit=4 * case.shape[1] * 12)
    sums = linear_nll_chunked(
        inputs.hidden, inputs.weight, inputs.target, inputs.class_weight, rule, plan
    )
    exact, _ = oracle(case, inputs, torch.float64)
    plain, _ = oracle(case, inputs, case.dtype)
    for name, value in derived(sums, True).items():
        assert_close(name, value, plain[name], exact[name], FORWARD[case.dtype])


@pytest.mark.parametrize(
    ("target", "dtype", "bias", "limit", "expected"),
    [
        (("cuda", 80), torch.bfloat16, False, 256 << 20, True),
        (("hip", "gfx942"), torch.float16, False, 256 << 20, True),
        (("cuda", 90), torch.bfloat16, False, 256 << 20, False),  # has the copy engine
        (("cuda", 80), torch.float32, False, 256 << 20, False),  # its products may be anything
        (("cuda", 80), torch.bfloat16, True, 256 << 20, False),
        (("cuda", 80), torch.bfloat16, False, 8 << 20, False),  # too few tokens fit
        (("interpreter", 0), torch.bfloat16, False, 256 << 20, False),
    ],
)
def test_which_way_a_gpu_takes(target, dtype, bias, limit, expected):
    from perplexity.kernels.dispatch import chunks_pay
    from perplexity.kernels.gpu.launch import Target

    hidden, weight = (
        torch.empty(8192, 64, dtype=dtype, device="meta"),
        torch.empty(50_304, 64, dtype=dtype, device="meta"),
    )
    assert (
        chunks_pay(Target(*target), hidden, weight, weight[:, 0] if bias else None, limit)
        == expected
    )


def test_the_policy_keeps_the_contract(device, monkeypatch):
    """Whichever way is taken, a bias or not: what the operator returns is the same to rounding."""
    inputs = build(Case(), device)
    arguments = (
        inputs.hidden,
        inputs.weight,
        None,
        inputs.target,
        None,
        Rule(),
        Plan("triton", dispatch.OPEN),
    )
    forward, _ = implementation("triton")
    fused = forward(*arguments)
    monkeypatch.setattr(dispatch, "chunks_pay", lambda *_: True)
    chunked = forward(*arguments)
    assert fused.shape == chunked.shape
    for name in ("nll", "logsumexp"):
        pair = [
            (row[MAX] - row[TARGET] if name == "nll" else row[MAX]) + row[SUM_EXP].log()
            for row in (fused, chunked)
        ]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("layout", ["described", "pointers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nll_alone_writes_three_planes_and_the_same_bits(layout, dtype, device):
    """With and without the sums it does not need, from tensor descriptors and from pointers."""
    from perplexity.kernels.gpu import linear_nll
    from perplexity.kernels.gpu.logit_tile import logit_arguments

    generator = torch.Generator(device).manual_seed(0)
    width = 80 if layout == "described" else 81  # 162 bytes a row: no descriptor starts there
    options = dict(generator=generator, device=device)
    hidden, weight = (torch.randn(rows, width, **options).to(dtype)[:, :79] for rows in (37, 2181))
    target = torch.randint(2181, (37,), **options)
    _, constants, _ = logit_arguments(hidden, weight, None, Rule(), "nll", may_describe=True)
    if device == "cpu":
        assert constants["DESCRIBED"] == (layout == "described")
    rules = [Rule(with_logit_sum=value, with_exp_shift=value) for value in (False, True)]
    few, all_sums = (
        linear_nll.partials(hidden, weight, None, target, None, rule)[0] for rule in rules
    )
    assert few.shape[0] == 3 and all_sums.shape[0] == 5
    if device == "cpu":  # tiles of one size; compiled, more sums have smaller tiles
        assert torch.equal(few, all_sums[:3])
    exact = (hidden.double() @ weight.double().T).logsumexp(1)
    sums = linear_nll.merge(few, target, vocabulary=2181, ignore_index=-100)
    torch.testing.assert_close(sums[MAX] + sums[SUM_EXP].log(), exact.float(), rtol=1e-5, atol=1e-4)


@triton.jit
def places_kernel(places_ptr, N, spans, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    span, row = span_and_row(N, spans, GROUP, BLOCK_N)
    tl.static_assert(row.dtype == tl.int64, "offsets of rows pass 2³¹")
    tl.store(places_ptr + 2 * tl.program_id(0), span.to(tl.int64))
    tl.store(places_ptr + 2 * tl.program_id(0) + 1, row)


@pytest.mark.parametrize(
    ("blocks", "spans", "short"), [(1, 1, 0), (1, 3, 31), (16, 2, 0), (17, 5, 31), (33, 3, 1)]
)
def test_programs_cover_every_block_and_span_once(blocks, spans, short, device):
    """A group of 16 blocks goes over one span after the other; the last group is smaller, and its
    last block may be.
    """
    places = torch.full((blocks * spans, 2), -1, device=device)
    places_kernel[(blocks * spans,)](places, 32 * blocks - short, spans, GROUP, 32)
    in_order = [
        [span, 32 * block]
        for first in range(0, blocks, 16)
        for span in range(spans)
        for block in range(first, min(first + 16, blocks))
    ]
    assert places.tolist() == in_order


@pytest.mark.parametrize("limit", [1, 1000, 40_000, 10**9])
def test_chunks_of_tokens_cover_all_within_the_limit(limit):
    from perplexity.kernels.gpu.linear_nll import SPAN, token_chunks

    for tokens in (0, 1, 127, 128, 1000, 5000):
        chunks = token_chunks(tokens, 3 * SPAN, 12, limit)
        assert [place for chunk in chunks for place in range(chunk.start, chunk.stop)] == list(
            range(tokens)
        )
        assert all((chunk.stop - chunk.start) * 36 <= max(limit, 36) for chunk in chunks)


@pytest.mark.parametrize(
    ("block", "limit", "expected"),
    [
        ((128, 4096), 1 << 30, ((128, 4096), 4096)),
        ((128, 50_257), 1 << 30, ((128, 50_257), 50_272)),  # followed by 15 that nobody reads
        ((128, 50_257), 2 * 128 * 50_257, ((128, 50_256), 50_256)),  # no room for them
        ((128, 1000), 2 * 128 * 1000, ((128, 992), 992)),
        ((3, 7), 42, ((3, 7), 7)),  # a limit for less than 16 columns
        ((3, 7), 96, ((3, 7), 16)),
    ],
)
def test_rows_of_logit_gradients_are_written_whole(block, limit, expected):
    from perplexity.kernels.chunks import WHOLE, written_whole

    found, stride = written_whole(block, 2, limit)
    assert (found, stride) == expected
    assert 2 * found[0] * stride <= limit and (stride % WHOLE == 0 or found[1] < WHOLE)
