"""What must hold for any input: invariances, signs, sums; shapes, dtypes, strides and magnitudes drawn by hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import perplexity

BACKENDS = ("torch", "triton")
FEW, MANY = settings(max_examples=12), settings(max_examples=120)  # many in `make test-slow`


@st.composite
def problems(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    N, V, D = draw(st.integers(1, 40)), draw(st.integers(1, 300)), draw(st.integers(1, 70))
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
    assert (logits.grad.float().sum(1).abs() <= rounding * (1 + logits.grad.float().abs().sum(1))).all()


def a_constant_in_the_bias_changes_nothing(problem, backend):
    hidden, weight, target, bias, rule, _ = problem
    rule = rule | {"softcap": None}
    plain = perplexity.token_statistics(hidden, weight, target, linear_bias=bias.float(), backend=backend, **rule)
    moved = perplexity.token_statistics(hidden, weight, target, linear_bias=bias.float() + 8.0, backend=backend, **rule)
    tolerance = 1e-6 * magnitude(weight, hidden)
    for name in ("nll", "entropy"):
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), rtol=1e-5, atol=10 * tolerance)
    shift = torch.where(target == -100, 0.0, 8.0 * rule["logit_scale"])
    torch.testing.assert_close(moved.logsumexp, plain.logsumexp + shift, rtol=1e-5, atol=10 * tolerance)


def the_order_of_the_vocabulary_does_not_matter(problem, backend):
    hidden, weight, target, bias, rule, generator = problem
    order = torch.randperm(weight.shape[0], generator=generator).to(hidden.device)
    place = torch.argsort(order)
    moved_target = torch.where(target == -100, target, place[target.clamp(min=0)])
    plain = perplexity.token_statistics(hidden, weight, target, linear_bias=bias, backend=backend, **rule)
    moved = perplexity.token_statistics(
        hidden, weight[order], moved_target, linear_bias=bias[order], backend=backend, **rule
    )
    tolerance = 1e-6 * magnitude(weight, hidden)
    for name in ("nll", "entropy", "logsumexp"):
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), rtol=1e-5, atol=10 * tolerance)


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
        divergence = perplexity.linear_kl_divergence(*leaves[:2], hidden.flip(0), weight, backend=backend)
        statistics = perplexity.token_statistics(hidden, weight, target, backend=backend)
        results.append([loss, divergence, *torch.autograd.grad(loss + divergence.sum(), leaves), *statistics])
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
    FEW(given(problems())(lambda problem: check(on(device, problem), backend)))()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@each
def test_property_at_length(check, backend, device):
    MANY(given(problems())(lambda problem: check(on(device, problem), backend)))()
