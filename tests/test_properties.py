"""Invariances, signs and sums for drawn inputs: shapes, dtypes, strides and magnitudes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import perplexity
from perplexity.kernels import reference

BACKENDS = ("torch", "triton")
# Interpreted, an example takes a second of processor time. `make test-slow` has many.
FEW = {"torch": settings(max_examples=9), "triton": settings(max_examples=5)}
MANY = settings(max_examples=90)


@st.composite
def problems(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    N, V, D = draw(st.integers(1, 25)), draw(st.integers(1, 300)), draw(st.integers(1, 70))
    dtype, scale = draw(st.sampled_from(dtypes)), draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = torch.randn(N, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) * scale / D**0.5).to(dtype)
    target = torch.randint(0, V, (N,), generator=generator)
    target[torch.rand(N, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = -100
    bias = torch.randn(V, generator=generator).to(dtype)
    if draw(st.booleans()):
        weight = torch.stack([weight, weight], 1)[:, 0]  # rows apart
    if draw(st.booleans()):
        hidden = hidden.T.contiguous().T
    rule = {
        "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, -1.0])),
    }
    return hidden, weight, target, bias, rule, generator


def on(device, problem):
    return tuple(part.to(device) if isinstance(part, torch.Tensor) else part for part in problem)


def magnitude(weight, hidden):
    """About the largest logit: float32 sums are exact to 1e-7 of it or so."""
    return 1.0 + float(weight.float().norm(dim=1).max() * hidden.float().norm(dim=1).max())


def a_token_is_not_negative_and_gradients_cancel(problem, backend):
    hidden, weight, target, bias, rule, _ = problem
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias.float())]
    loss = perplexity.linear_cross_entropy(
        *leaves[:2], target, linear_bias=leaves[2], reduction="none", backend=backend, **rule
    )
    assert (loss >= 0).all() and (loss[target == -100] == 0).all()
    loss.sum().backward()
    # Without a cap Σ_v ∂loss/∂logit is 0 a token, and the bias's gradient is its sum over tokens.
    if rule["softcap"] is None and hidden.dtype == torch.float32:
        assert leaves[2].grad.sum().abs() <= 1e-5 * (1 + leaves[2].grad.abs().sum())
    assert (leaves[0].grad[target == -100] == 0).all()
    logits = (hidden @ weight.T).detach().requires_grad_()
    rows = perplexity.cross_entropy(logits, target, reduction="none", backend=backend)
    assert (rows >= 0).all()
    rows.sum().backward()
    rounding = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[hidden.dtype]
    assert (
        logits.grad.float().sum(1).abs() <= rounding * (1 + logits.grad.float().abs().sum(1))
    ).all()


def a_constant_in_the_bias_changes_nothing(problem, backend):
    hidden, weight, target, bias, rule, _ = problem
    rule = rule | {"softcap": None}
    plain = perplexity.token_statistics(
        hidden, weight, target, linear_bias=bias.float(), backend=backend, **rule
    )
    moved = perplexity.token_statistics(
        hidden, weight, target, linear_bias=bias.float() + 8.0, backend=backend, **rule
    )
    tolerance = 1e-6 * magnitude(weight, hidden)
    for name in ("nll", "entropy"):
        torch.testing.assert_close(
            getattr(moved, name), getattr(plain, name), rtol=1e-5, atol=10 * tolerance
        )
    shift = torch.where(target == -100, 0.0, 8.0 * rule["logit_scale"])
    torch.testing.assert_close(
        moved.logsumexp, plain.logsumexp + shift, rtol=1e-5, atol=10 * tolerance
    )


def the_order_of_the_vocabulary_does_not_matter(problem, backend):
    hidden, weight, target, bias, rule, generator = problem
    order = torch.randperm(weight.shape[0], generator=generator).to(hidden.device)
    place = torch.argsort(order)
    moved_target = torch.where(target == -100, target, place[target.clamp(min=0)])
    plain = perplexity.token_statistics(
        hidden, weight, target, linear_bias=bias, backend=backend, **rule
    )
    moved = perplexity.token_statistics(
        hidden, weight[order], moved_target, linear_bias=bias[order], backend=backend, **rule
    )
    tolerance = 1e-6 * magnitude(weight, hidden)
    for name in ("nll", "entropy", "logsumexp"):
        torch.testing.assert_close(
            getattr(moved, name), getattr(plain, name), rtol=1e-5, atol=10 * tolerance
        )


def neither_batch_nor_cap_matter(problem, backend):
    hidden, weight, target, bias, rule, _ = problem
    options = dict(linear_bias=bias, backend=backend, **rule)
    whole = perplexity.token_statistics(hidden, weight, target, **options)
    half = len(hidden) // 2
    halves = [
        perplexity.token_statistics(hidden[part], weight, target[part], **options)
        for part in (slice(half), slice(half, None))
    ]
    capped = perplexity.token_statistics(hidden, weight, target, memory_limit=1 << 14, **options)
    tolerance = 1e-6 * magnitude(weight, hidden)
    for name in ("nll", "entropy", "logsumexp"):
        expected = getattr(whole, name)
        split = torch.cat([getattr(part, name) for part in halves])
        torch.testing.assert_close(split, expected, rtol=1e-5, atol=tolerance)
        torch.testing.assert_close(getattr(capped, name), expected, rtol=1e-5, atol=tolerance)


def a_divergence_is_not_negative(problem, backend):
    hidden, weight, _, bias, rule, _ = problem
    rule = {f"{name}_{side}": value for name, value in rule.items() for side in "pq"}
    same = perplexity.linear_kl_divergence(
        hidden, weight, hidden, weight, bias_p=bias, bias_q=bias, backend=backend, **rule
    )
    assert (same == 0).all()
    other = perplexity.linear_kl_divergence(
        hidden, weight, hidden.flip(0), weight, bias_p=bias, backend=backend, **rule
    )
    assert (other >= 0).all()


def runs_are_equal(problem, backend):
    hidden, weight, target, bias, rule, _ = problem
    results = []
    for _ in range(2):
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
        loss = perplexity.linear_cross_entropy(
            *leaves[:2], target, linear_bias=leaves[2], reduction="sum", backend=backend, **rule
        )
        divergence = perplexity.linear_kl_divergence(
            *leaves[:2], hidden.flip(0), weight, backend=backend
        )
        statistics = perplexity.token_statistics(hidden, weight, target, backend=backend)
        results.append(
            [loss, divergence, *torch.autograd.grad(loss + divergence.sum(), leaves), *statistics]
        )
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second), "bit for bit"


PROPERTIES = [
    a_token_is_not_negative_and_gradients_cancel,
    a_constant_in_the_bias_changes_nothing,
    the_order_of_the_vocabulary_does_not_matter,
    neither_batch_nor_cap_matter,
    a_divergence_is_not_negative,
    runs_are_equal,
]
each = pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)


@pytest.mark.parametrize("backend", BACKENDS)
@each
def test_property(check, backend, device):
    FEW[backend](given(problems())(lambda problem: check(on(device, problem), backend)))()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@each
def test_property_at_length(check, backend, device):
    MANY(given(problems())(lambda problem: check(on(device, problem), backend)))()


@st.composite
def rows_with_an_offset(draw):
    """One row of float32 logits around an offset, ties among them, and targets."""
    V = draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    offset = draw(st.sampled_from([0.0, 1.0, 1e3, 1e5, 1e6]) | st.floats(-1e6, 1e6, width=32))
    z = torch.randn(V, generator=generator) * draw(st.sampled_from([0.0, 0.5, 4.0, 40.0]))
    z = (z.round() if draw(st.booleans()) else z) + offset
    target = torch.randint(0, V, (5,), generator=generator)
    target[2] = -100
    return z, target, draw(st.sampled_from([1.0, 0.5, -2.0, 0.7]))


def no_worse_than_torch(name, ours, plain, exact, terms=0.0):
    """Assert an error of at most torch's and 2e-6, relative, for float32's logarithm and sums.

    terms: the size of what cancels in the result, each rounded twice at most.
    """
    allowed = (plain.double() - exact).abs().max() + 2e-6 * exact.abs().clamp(min=1.0)
    allowed = allowed + 2 * torch.finfo(torch.float32).eps * terms
    assert ((ours.double() - exact).abs() <= allowed).all(), (name, ours, plain, exact)


def an_offset_costs_no_precision(problem, backend):
    """Compare float32 logits with an offset, rounded after the scale, with float64 of the same."""
    row, target, scale = problem
    counted = target != -100
    N, V = len(target), len(row)
    hidden, weight = row.new_zeros(N, 3), row.new_zeros(V, 3)  # the logits are the bias, exactly
    scaled = row * scale

    def formulas(z):
        log_p = z.log_softmax(1)
        nll, smoothed = (
            F.cross_entropy(z, target, reduction="none", label_smoothing=smoothing)
            for smoothing in (0.0, 0.1)
        )
        entropy = -(log_p.exp() * log_p).sum(1) * counted
        divergence = reference.kl_divergence(z, z.flip(1))
        return {"nll": nll, "smoothed": smoothed, "entropy": entropy, "divergence": divergence}

    def ours(bias):
        head = dict(linear_bias=bias, backend=backend, logit_scale=scale)
        log_p, entropy = perplexity.token_log_probabilities(
            hidden, weight, target, with_entropy=True, **head
        )
        smoothed = perplexity.linear_cross_entropy(
            hidden, weight, target, reduction="none", label_smoothing=0.1, **head
        )
        divergence = perplexity.linear_kl_divergence(
            hidden, weight, hidden, weight, bias_p=bias, bias_q=bias.flip(0), backend=backend,
            logit_scale_p=scale, logit_scale_q=scale,
        )  # fmt: skip
        return {"nll": -log_p, "smoothed": smoothed, "entropy": entropy, "divergence": divergence}

    # The divergence's gradient is of p (log p − log q − KL), summed over tokens: with a KL of 18
    # the terms are a hundred times what is left.
    log_p = scaled.double().log_softmax(0)
    difference = (log_p - log_p.flip(0)).abs()
    of_divergence = N * log_p.exp() * (difference + (log_p.exp() * difference).sum())
    # In ours the derivative is of the bias: ``scale`` times that of the scaled logits.
    leaves = [leaf.clone().requires_grad_() for leaf in (row, scaled, scaled.double())]
    results = [ours(leaves[0]), *(formulas(leaf.expand(N, V)) for leaf in leaves[1:])]
    for name in results[0]:
        values = [result[name] for result in results]
        no_worse_than_torch(name, *(value.detach() for value in values))
        gradients = [
            torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0]
            for value, leaf in zip(values, leaves, strict=True)
        ]
        terms = of_divergence if name == "divergence" else 0.0
        no_worse_than_torch(f"gradient of {name}", gradients[0] / scale, *gradients[1:], terms)
    logits = scaled.expand(N, V)
    loss = perplexity.cross_entropy(
        row.expand(N, V), target, logit_scale=scale, reduction="none", backend=backend
    )
    no_worse_than_torch("cross_entropy", loss, *(result["nll"].detach() for result in results[1:]))
    statistics = perplexity.token_statistics(
        hidden, weight, target, linear_bias=row, logit_scale=scale, backend=backend
    )
    for nll in (loss, statistics.nll):
        assert not nll.signbit().any() and (nll[~counted] == 0).all()
        if (row == row[0]).all():
            assert torch.equal(nll[counted], torch.full_like(nll, V).log()[counted]), (
                "log V, no offset in it"
            )
    above = (logits > logits.gather(1, target.clamp(min=0)[:, None])).sum(1)
    assert torch.equal(statistics.rank, above.masked_fill(~counted, -1)), "ties are not above"
    first = (scaled == scaled.max()).nonzero()[0, 0]
    assert (statistics.predicted[counted] == first).all(), "the first of equal ones"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset(backend, device):
    FEW[backend](
        given(rows_with_an_offset())(
            lambda problem: an_offset_costs_no_precision(on(device, problem), backend)
        )
    )()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_at_length(backend, device):
    MANY(
        given(rows_with_an_offset())(
            lambda problem: an_offset_costs_no_precision(on(device, problem), backend)
        )
    )()
