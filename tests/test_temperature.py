"""``temperature`` divides the logits after the softcap; log-probabilities of logits that exist."""

import pytest
import torch
import torch.nn.functional as F

import perplexity
from perplexity.errors import InputError, InputTypeError
from perplexity.kernels import reference

BACKENDS = ("torch", "triton")
N, V, D, T = 7, 61, 12, 0.6


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    target = torch.randint(V, (N,), generator=generator)
    target[2] = -100
    return hidden, weight, target


def exact_logits(hidden, weight, softcap=None, logit_scale=1.0):
    z = reference.logits(hidden.double(), weight.double(), softcap=softcap, logit_scale=logit_scale)
    return z / T


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [{}, {"softcap": 2.0, "logit_scale": 0.7}], ids=str)
def test_every_function_divides_by_it(rule, backend, device):
    hidden, weight, target = problem()
    options = rule | dict(temperature=T, backend=backend)
    z = exact_logits(hidden, weight, **rule)
    log_p, counted = z.log_softmax(-1), target != -100
    own = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0].where(counted, 0)
    entropy = -(log_p.exp() * log_p).sum(-1).where(counted, 0)

    loss = perplexity.linear_cross_entropy(hidden, weight, target, **options)
    expected = -own.sum() / counted.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight), retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    nll = perplexity.token_nll(hidden, weight, target, **options)
    torch.testing.assert_close(nll.double(), -own.detach(), rtol=1e-5, atol=1e-6)
    statistics = perplexity.token_statistics(hidden, weight, target, **options)
    torch.testing.assert_close(statistics.entropy.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    found = perplexity.token_log_probabilities(hidden, weight, target, with_entropy=True, **options)
    torch.testing.assert_close(found[0].double(), own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), entropy, rtol=1e-5, atol=1e-5)
    module = perplexity.LinearCrossEntropyLoss(D, V, **options)
    module.linear.weight = torch.nn.Parameter(weight.detach())
    torch.testing.assert_close(module(hidden, target), loss)
    existing = perplexity.cross_entropy(hidden @ weight.T, target, **options)
    torch.testing.assert_close(existing.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_a_divergence(backend, device):
    (p, p_weight, _), (q, q_weight) = problem(), (torch.randn(N, 5), torch.randn(V, 5))
    found = perplexity.linear_kl_divergence(
        p, p_weight, q, q_weight, softcap_q=3.0, temperature=T, backend=backend
    )
    log_p = exact_logits(p, p_weight).log_softmax(-1)
    log_q = exact_logits(q, q_weight, softcap=3.0).log_softmax(-1)
    torch.testing.assert_close(
        found.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_log_probabilities_of_logits(shift, dtype, backend, device):
    generator = torch.Generator().manual_seed(12)
    logits = (4 * torch.randn(2, 5, V, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(V, (2, 5), generator=generator)
    target[0, 3] = -100
    log_p, entropy = perplexity.token_log_probabilities_of_logits(
        logits, target, with_entropy=True, temperature=T, shift=shift, backend=backend
    )
    z = (logits.double() / T)[:, : 5 - shift].log_softmax(-1)
    labels, counted = target[:, shift:], target[:, shift:] != -100
    own = z.gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(counted, 0)
    exact_entropy = -(z.exp() * z).sum(-1).where(counted, 0)
    torch.testing.assert_close(log_p.double(), own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-5)
    upstream = torch.rand(2, *log_p.shape, generator=generator)
    (ours,) = torch.autograd.grad((log_p * upstream[0] + entropy * upstream[1]).sum(), logits)
    exact = (own * upstream[0] + exact_entropy * upstream[1]).sum()
    (theirs,) = torch.autograd.grad(exact, logits)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", None])
def test_a_temperature_that_is_none(value):
    hidden, weight, target = problem()
    for call in (
        lambda: perplexity.linear_cross_entropy(hidden, weight, target, temperature=value),
        lambda: perplexity.token_log_probabilities_of_logits(
            hidden @ weight.T, target, temperature=value
        ),
        lambda: perplexity.linear_kl_divergence(hidden, weight, hidden, weight, temperature=value),
        lambda: perplexity.LinearCrossEntropyLoss(D, V, temperature=value),
    ):
        with pytest.raises((InputError, InputTypeError), match="temperature: expected a positive"):
            call()


def test_what_logits_have_to_be():
    target = torch.tensor([1, 2])
    function = perplexity.token_log_probabilities_of_logits
    with pytest.raises(InputError, match=r"input: expected shape \[..., V\] with at least one"):
        function(torch.zeros(2, 0), target)
    with pytest.raises(InputTypeError, match="target: expected class indices"):
        function(torch.zeros(2, 5), torch.full((2, 5), 0.2))
    with pytest.raises(InputError, match="target: expected shape"):
        function(torch.zeros(2, 3, 5), target)
    with pytest.raises(IndexError, match="got 7 at position 1"):
        function(torch.zeros(2, 5), torch.tensor([1, 7]))
    single = function(torch.tensor([0.0, 0.0]), torch.tensor(1))
    torch.testing.assert_close(single, F.log_softmax(torch.zeros(2), 0)[1])
