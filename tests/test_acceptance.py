"""Defects that users of other fused losses reported, a named test each; brackets have reports."""

import pytest
import torch
import torch.nn.functional as F

import perplexity
from perplexity.kernels import operators, reference
from perplexity.kernels.cpu import blockwise

BACKENDS = ("torch", "triton")
both = pytest.mark.parametrize("backend", BACKENDS)


def problem(N, V, D, device, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * scale / D**0.5
    target = torch.randint(0, V, (N,), generator=generator)
    return (
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        target.to(device),
    )


def exact(hidden, weight, target, bias=None, **rule):
    """NLL per token [N] in float64, with leaves of its own: (nll, leaves)."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    bias = None if bias is None else bias.double()
    return F.cross_entropy(
        reference.logits(*leaves, bias, **rule), target, reduction="none"
    ), leaves


@both
def test_01_none_with_a_gradient_that_differs_by_token(backend, device):
    """Everything was scaled by the first token's gradient (Liger 968, 678, 1298)."""
    hidden, weight, target = problem(40, 300, 20, device)
    upstream = torch.linspace(-1.0, 3.0, 40, device=device)
    loss = perplexity.linear_cross_entropy(
        hidden, weight, target, reduction="none", backend=backend
    )
    nll, leaves = exact(hidden, weight, target)
    ours = torch.autograd.grad(loss, (hidden, weight), upstream)
    for gradient, expected in zip(
        ours, torch.autograd.grad(nll, leaves, upstream.double()), strict=True
    ):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
    logits = (hidden @ weight.T).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(
        perplexity.cross_entropy(logits, target, reduction="none", backend=backend),
        logits,
        upstream,
    )
    (expected,) = torch.autograd.grad(
        F.cross_entropy(logits, target, reduction="none"), logits, upstream
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@both
def test_02_weight_gradients_in_16_bits_do_not_drift(backend, device):
    """Sums of chunks in bfloat16 lose small summands (Liger 512, 827, 830; OLMo-core 370)."""
    hidden, weight, target = problem(1024, 48, 16, device, torch.bfloat16)
    nll, leaves = exact(hidden, weight, target)
    expected = torch.autograd.grad(nll.sum(), leaves)
    plain = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    F.cross_entropy(F.linear(*plain).float(), target, reduction="sum").backward()
    for limit in (1 << 13, 1 << 20):  # dozens of chunks of tokens, and one
        loss = perplexity.linear_cross_entropy(
            hidden, weight, target, reduction="sum", backend=backend, memory_limit=limit
        )
        for ours, torchs, truth in zip(
            torch.autograd.grad(loss, (hidden, weight)),
            [p.grad for p in plain],
            expected,
            strict=True,
        ):
            scale = truth.abs().max()
            error, allowed = ((x.double() - truth).abs().max() / scale for x in (ours, torchs))
            assert error <= allowed + 1e-2, limit


@both
def test_03_compiled_with_an_ignored_label(backend, device):
    """Silently wrong (Liger 1338); all losses: test_torch_citizens.py."""
    hidden, weight, target = problem(12, 30, 8, device)
    target[::3] = -100

    def loss(hidden, weight, target):
        return perplexity.linear_cross_entropy(hidden, weight, target, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, target)
    torch.testing.assert_close(compiled, loss(hidden, weight, target))
    for ours, eager in zip(
        torch.autograd.grad(compiled, (hidden, weight)),
        torch.autograd.grad(loss(hidden, weight, target), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)


@both
@pytest.mark.parametrize("V", [127, 129, 4097, 5000])
def test_04_no_positive_log_probability_beside_a_block(V, backend, device):
    """Padded lanes entered the sum; only a peaked softmax shows it (verl 2899, 2656)."""
    hidden, weight, target = problem(9, V, 16, device)
    with torch.no_grad():
        weight[target] += 20.0 * hidden
    log_probability = perplexity.token_log_probabilities(hidden, weight, target, backend=backend)
    assert (log_probability <= 0).all() and (log_probability > -1e-3).all()
    nll, _ = exact(hidden, weight, target)
    torch.testing.assert_close(-log_probability.double(), nll, rtol=1e-4, atol=1e-5)


@both
def test_05_softcap_comes_before_the_mask(backend, device):
    """A padded lane capped to −softcap adds up to log1p(P / V) to the loss (unsloth 10616)."""
    hidden, weight, target = problem(9, 41, 7, device)
    ours = perplexity.token_nll(hidden, weight, target, softcap=0.5, backend=backend)
    nll, _ = exact(hidden, weight, target, softcap=0.5)
    torch.testing.assert_close(ours.double(), nll, rtol=1e-6, atol=1e-6)


@both
def test_05_bias_with_a_hidden_size_of_several_blocks(backend, device):
    """Counted once a block of the hidden size (CCE 52)."""
    hidden, weight, target = problem(9, 50, 700, device)
    bias = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(device) * 3
    ours = perplexity.token_nll(hidden, weight, target, linear_bias=bias, backend=backend)
    nll, _ = exact(hidden, weight, target, bias)
    torch.testing.assert_close(ours.double(), nll, rtol=1e-5, atol=1e-5)


@both
def test_05_few_classes_and_many_rows(backend, device):
    """CCE 14."""
    hidden, weight, target = problem(700, 3, 5, device)
    loss = perplexity.linear_cross_entropy(hidden, weight, target, backend=backend)
    nll, leaves = exact(hidden, weight, target)
    torch.testing.assert_close(loss.double(), nll.mean(), rtol=1e-6, atol=1e-6)
    for ours, expected in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(nll.mean(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-7)


def spread(matrix, row_stride):
    """Return the same values in rows ``row_stride`` elements apart; other pages stay untouched."""
    out = torch.empty(matrix.shape[0] * row_stride, dtype=matrix.dtype, device=matrix.device)
    out = out.as_strided(matrix.shape, (row_stride, 1))
    out.copy_(matrix)
    return out


@both
@pytest.mark.parametrize(
    "row_stride", [2**26 - 16, 2**26 + 8], ids=["within a tile", "past a tile"]
)
def test_06_offsets_past_2_to_the_31(row_stride, backend, device):
    """32-bit offsets wrap (CCE PR 39, flash-attention 714): rows lie 2.6 · 10⁹ elements apart."""
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.randn(n, 10, generator=generator).half().to(device) for n in (9, 40))
    target = torch.tensor([39, 38, 0, 5, 35, 33, 39, 1, 2], device=device)

    def results(hidden, weight, target):
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
        loss = perplexity.linear_cross_entropy(*leaves, target, reduction="none", backend=backend)
        statistics = perplexity.token_statistics(*leaves, target, backend=backend)
        return [loss, *torch.autograd.grad(loss.sum(), leaves), *statistics]

    far = spread(large, row_stride)
    assert 39 * far.stride(0) > 2**31
    for ours, expected in zip(
        results(small, far, target), results(small, large, target), strict=True
    ):
        assert torch.equal(ours, expected)
    many = torch.randint(0, 9, (40,), generator=generator).to(device)
    for ours, expected in zip(results(far, small, many), results(large, small, many), strict=True):
        assert torch.equal(ours, expected)
    for logits in (far, far.T):
        labels = (many if logits.shape[0] == 40 else target)[: logits.shape[0]] % logits.shape[1]
        labels = F.pad(labels, (0, logits.shape[0] - len(labels)))
        leaf, near = logits.detach().requires_grad_(), logits.contiguous().detach().requires_grad_()
        ours, expected = (
            perplexity.cross_entropy(leaf_, labels, backend=backend) for leaf_ in (leaf, near)
        )
        assert torch.equal(ours, expected)
        assert torch.equal(
            torch.autograd.grad(ours, leaf)[0], torch.autograd.grad(expected, near)[0]
        )


@both
def test_06_a_bias_past_2_to_the_31(backend, device):
    """A column of one fused [V, D + 1] matrix: its stride times a column wraps in 32 bits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 10, generator=generator).half().to(device) for n in (9, 40))
    near = torch.randn(40, generator=generator).half().to(device)
    far = spread(near[:, None], 2**26)[:, 0]
    target = torch.arange(9, device=device)
    ours, expected = (
        perplexity.token_nll(hidden, weight, target, linear_bias=b, backend=backend)
        for b in (far, near)
    )
    assert torch.equal(ours, expected)


@both
def test_06_labels_that_are_not_aligned(backend, device):
    hidden, weight, target = problem(33, 100, 8, device)
    shifted = F.pad(target, (1, 0))[1:]
    assert shifted.data_ptr() % 16
    for ours, expected in zip(
        perplexity.token_statistics(hidden, weight, shifted, backend=backend),
        perplexity.token_statistics(hidden, weight, target, backend=backend),
        strict=True,
    ):
        assert torch.equal(ours, expected)


@both
@pytest.mark.parametrize("label", [-1, 30, 2**31 + 3, 2**32 + 3])
def test_07_a_label_out_of_range_gives_no_finite_loss(label, backend, device):
    """axolotl 3767, DeepSpeed 8540."""
    hidden, weight, target = problem(12, 30, 8, device)
    target[7] = label
    with pytest.raises(
        IndexError, match=rf"target: expected values in \[0, 30\).*got {label} at position 7"
    ):
        perplexity.linear_cross_entropy(hidden, weight, target, backend=backend, validate=True)
    loss = perplexity.linear_cross_entropy(
        hidden,
        weight,
        target,
        reduction="none",
        backend=backend,
        validate=False,
        label_smoothing=0.1,
        z_loss=0.1,
    )
    assert loss.isnan().nonzero().flatten().tolist() == [7]
    rows = perplexity.cross_entropy(
        hidden, target.clamp(max=8), reduction="none", backend=backend, validate=False
    )
    assert rows.isnan()[7]
    statistics = perplexity.token_statistics(
        hidden, weight, target, backend=backend, validate=False
    )
    assert statistics.nll.isnan()[7] and statistics.rank[7] == -1 and statistics.predicted[7] == -1


@both
def test_08_all_ignored_and_only_the_last_turn(backend, device):
    """The mean of no token is NaN as torch's, and its gradient touches nothing else.

    (torchtune 2341, unsloth 5230)
    """
    hidden, weight, target = problem(2 * 30, 50, 8, device)
    labels = torch.full_like(target, -100)
    assert perplexity.linear_cross_entropy(hidden, weight, labels, backend=backend).isnan()
    total = perplexity.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", backend=backend
    )
    assert total == 0 and all((g == 0).all() for g in torch.autograd.grad(total, (hidden, weight)))
    labels[-5:] = target[-5:]
    loss = perplexity.linear_cross_entropy(hidden, weight, labels, backend=backend)
    nll, leaves = exact(hidden[-5:], weight, target[-5:])
    torch.testing.assert_close(loss.double(), nll.mean(), rtol=1e-5, atol=1e-6)
    gradient, _ = torch.autograd.grad(loss, (hidden, weight))
    assert (gradient[:-5] == 0).all()
    expected, _ = torch.autograd.grad(nll.mean(), leaves)
    torch.testing.assert_close(gradient[-5:].double(), expected, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_09_a_frozen_side_costs_nothing_and_loses_nothing(frozen, backend, device, monkeypatch):
    """Gradients are computed for each side that needs one (prime-rl 3011, verl 6913).

    Liger loses the weight's gradient where the input is frozen.
    """
    hidden, weight, target = problem(12, 30, 8, device)
    leaves = [hidden, weight, torch.randn(30, device=device, requires_grad=True)]

    def loss():
        return perplexity.linear_cross_entropy(
            *leaves[:2], target, linear_bias=leaves[2], backend=backend
        )

    everything = torch.autograd.grad(loss(), leaves)
    for index in frozen:
        leaves[index].requires_grad_(False)
    asked, module = [], operators.implementation(backend)
    original = module.linear_nll_grad
    monkeypatch.setattr(
        module,
        "linear_nll_grad",
        lambda *arguments, needs: asked.append(needs) or original(*arguments, needs=needs),
    )
    if len(frozen) == 3:
        assert not loss().requires_grad
    else:
        loss().backward()
        assert asked == [tuple(index not in frozen for index in range(3))]
    for index, (leaf, full) in enumerate(zip(leaves, everything, strict=True)):
        assert leaf.grad is None if index in frozen else torch.equal(leaf.grad, full)


@both
def test_10_a_second_backward(backend, device):
    """Gradients scaled in place are wrong the second time (Liger, quack).

    test_torch_citizens.py has more of such tests.
    """
    hidden, weight, target = problem(12, 30, 8, device)
    loss = perplexity.linear_cross_entropy(hidden, weight, target, backend=backend)
    first, second = (
        torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both
def test_11_the_caller_caps_temporaries(backend, device):
    """Temporaries of V × H could not be limited (Liger 1323, 1429, 1439).

    test_memory.py measures the peak itself.
    """
    hidden, weight, target = problem(5, 12, 4, device)
    results = []
    for limit in (1, 100, 1 << 10, None):  # one token and one row of the vocabulary at a time; ...
        loss = perplexity.linear_cross_entropy(
            hidden, weight, target, backend=backend, memory_limit=limit
        )
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for ours in results:
        for a, b in zip(ours, results[-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@both
def test_12_a_head_that_is_no_leaf(backend, device):
    """The head may be PEFT's merged adapter or a tied embedding (CCE PR 32, Liger 674, 826).

    test_parallel.py has DTensor, FSDP and shards.
    """
    hidden, weight, target = problem(12, 30, 8, device)
    a = torch.randn(30, 2, device=device, requires_grad=True)
    b = torch.randn(2, 8, device=device, requires_grad=True)

    def gradients(function):
        embedding = weight.detach().requires_grad_()
        tied = F.embedding(target, embedding) + hidden
        return torch.autograd.grad(
            function(tied, embedding + a @ b, target), (embedding, a, b, hidden)
        )

    ours = gradients(lambda *x: perplexity.linear_cross_entropy(*x, backend=backend))
    theirs = gradients(lambda h, w, t: F.cross_entropy(h @ w.T, t))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@both
@pytest.mark.parametrize("scale", [0.0625, 1 / 8.0, -1.5])
def test_13_scale_and_divisor_of_the_logits(scale, backend, device):
    """Cohere's logit_scale or Granite's divisor was forgotten (unsloth-zoo 930, TRL 5575)."""
    hidden, weight, target = problem(12, 30, 8, device, scale=20.0)
    loss = perplexity.linear_cross_entropy(
        hidden, weight, target, logit_scale=scale, backend=backend
    )
    nll, leaves = exact(hidden, weight, target, logit_scale=scale)
    torch.testing.assert_close(loss.double(), nll.mean(), rtol=1e-5, atol=1e-6)
    for ours, expected in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(nll.mean(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)


def test_14_a_token_does_not_depend_on_its_batch(device):
    """A token's loss has the same bits in every batch of the kernel (PyTorch 181574).

    On the plain path it is equal up to the rounding of the matrix product.
    """
    hidden, weight, target = problem(70, 2181, 40, device)
    for backend in BACKENDS:
        together = perplexity.token_statistics(hidden, weight, target, backend=backend)
        parts = [
            perplexity.token_statistics(hidden[part], weight, target[part], backend=backend)
            for part in (slice(0, 64), slice(64, 70))
        ]
        for whole, *split in zip(together, *parts, strict=True):
            if backend == "triton":
                assert torch.equal(whole, torch.cat(split))
            else:
                torch.testing.assert_close(
                    whole.double(), torch.cat(split).double(), rtol=1e-6, atol=2e-6
                )


@both
def test_14_entropy_along_with_log_probability(backend, device):
    """One pass for both, with gradients (Liger 551, TRL 5349)."""
    hidden, weight, target = problem(12, 30, 8, device, scale=3.0)
    outputs = perplexity.token_log_probabilities(
        hidden, weight, target, with_entropy=True, backend=backend
    )
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    log_p = reference.logits(*leaves).log_softmax(1)
    expected = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    upstream = torch.linspace(0.3, 2.0, 12, device=device)
    for ours, truth in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
        for gradient, exact_gradient in zip(
            torch.autograd.grad(ours, (hidden, weight), upstream, retain_graph=True),
            torch.autograd.grad(truth, leaves, upstream.double(), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-5)


@both
def test_15_log_likelihood_and_whether_it_is_greedy(backend, device):
    """A harness needs both of a continuation, without the memory of full logits.

    (lm-eval 2800, 2698, 1628)
    """
    hidden, weight, target = problem(40, 200, 16, device, scale=4.0)
    target[:20] = (hidden @ weight.T).argmax(1)[:20]
    statistics = perplexity.token_statistics(hidden, weight, target, backend=backend)
    log_p = reference.logits(hidden.double(), weight.double()).log_softmax(1)
    torch.testing.assert_close(
        -statistics.nll.double().sum(), log_p.gather(1, target[:, None]).sum()
    )
    greedy = log_p.argmax(1) == target
    assert torch.equal(statistics.rank == 0, greedy) and 20 <= greedy.sum() < 40
    assert torch.equal(statistics.predicted == target, greedy)


@both
@pytest.mark.parametrize("kind", ["smoothing", "probabilities"])
def test_17_an_offset_of_all_logits_costs_no_precision(kind, backend, device):
    """Σ w · z, taken from 0, cancels against Σ w · logsumexp: 2e-3 off at an offset of 1e4."""
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(16, 600, generator=generator) + 1e4).to(device)
    target = torch.randint(0, 600, (16,), generator=generator).to(device)
    options = dict(reduction="none", label_smoothing=0.1)
    if kind == "probabilities":
        backend, target = "torch", torch.randn(16, 600, generator=generator).softmax(1).to(device)
    ours = perplexity.cross_entropy(z, target, backend=backend, **options)
    exact_target = target.double() if kind == "probabilities" else target
    truth, plain = (
        F.cross_entropy(z.double(), exact_target, **options),
        F.cross_entropy(z, target, **options),
    )
    assert (ours - truth).abs().max() <= (plain - truth).abs().max() + 1e-5
    bias = torch.full((600,), 1e4, device=device)
    weight = torch.eye(600, device=device)
    if kind == "smoothing":
        linear = perplexity.linear_cross_entropy(
            z - 1e4, weight, target, linear_bias=bias, backend=backend, **options
        )
        # z − 1e4 is exact in float32, and so is adding it again.
        assert (linear - truth).abs().max() <= (plain - truth).abs().max() + 1e-5


@both
def test_18_a_wide_softcap_is_exact(backend, device):
    """1 − exp cancels in tanh of small arguments: logits of 50 under a cap of 1,000 lost 5e-5."""
    z = torch.rand(16, 500, generator=torch.Generator().manual_seed(0)).to(device) * 40 + 20
    target = torch.arange(16, device=device)
    for cap in (100.0, 300.0, 1000.0):
        ours = perplexity.cross_entropy(z, target, softcap=cap, reduction="none", backend=backend)
        truth, plain = (
            F.cross_entropy(cap * torch.tanh(logits / cap), target, reduction="none")
            for logits in (z.double(), z)
        )
        assert (ours - truth).abs().max() <= (plain - truth).abs().max() + 1e-5


@both
def test_19_ignored_tokens_may_be_no_numbers(backend, device):
    """Their loss and gradients are 0, under a softcap too, whose slope at NaN is NaN."""
    hidden, weight, target = problem(9, 40, 8, device)
    target[3] = -100
    with torch.no_grad():
        hidden[3] = torch.nan
    for loss_of in (
        lambda h: perplexity.linear_cross_entropy(
            h, weight.detach(), target, softcap=5.0, backend=backend
        ),
        lambda h: perplexity.cross_entropy(h, target.clamp(max=7), softcap=5.0, backend=backend),
    ):
        loss = loss_of(hidden)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.isfinite() and (gradient[3] == 0).all() and gradient.isfinite().all()


def test_16_tokens_times_vocabulary_is_never_held():
    """The largest tensor of any operation on the plain path, seen from inside."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
            return out

    hidden, weight, target = (tensor.detach() for tensor in problem(1024, 20_000, 8, "cpu"))
    with Largest() as forward:
        sums = blockwise.linear_nll(hidden, weight, None, target)
    with Largest() as backward:
        blockwise.linear_nll_grad(
            torch.ones_like(sums),
            sums[0].clone(),
            hidden,
            weight,
            None,
            target,
            needs=(True, True, False),
        )
    assert forward.nbytes <= 12 << 20
    assert backward.nbytes <= 16 << 20 < 4 * 1024 * 20_000
