"""The operators as torch wants them: opcheck, gradcheck, compile, second and double backward, nothing that waits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import perplexity
from perplexity.kernels import blockwise, logit_blocks, operators

N, V, D = 6, 11, 5
BACKENDS = ("torch", "triton")


def problem(device="cpu", dtype=torch.float32, tokens=N):
    generator = torch.Generator().manual_seed(5)
    leaves = [
        torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in ((tokens, D), (V, D), (V,), (tokens, D), (V, D), (V,))
    ]
    target = torch.randint(0, V, (tokens,), generator=generator)
    target[1] = -100
    return leaves, target.to(device)


def operator_calls(device, backend):
    """One call of every operator, with gradients wanted where it has them."""
    (h, w, b, g, u, c), target = problem(device)
    weight, logits = torch.rand(V, device=device), (h @ w.T).detach()
    options = -100, 3.0, 0.5, True, True, False
    sums, kept = (out.detach() for out in operators.linear_nll(h, w, b, target, weight, *options, [4, 7], 0, backend))
    kept = kept if backend == "torch" else torch.zeros_like(w)  # which no kernel is asked for
    rows = operators.linear_kl(h, w, b, g, u, c, 3.0, 0.5, None, 1.0, 0, backend)[1].detach()
    maximum = sums[0].clone()
    at_target = operators.target_logit(h, w, b, target, 3.0, 0.5, 0, backend).detach()
    partials = torch.stack([sums, sums + 0.5], dim=1)
    with torch.no_grad():
        leaves = [tensor.detach() for tensor in (h, w, b, g, u, c)]
    return {
        "checked_target": (target, V, -100),
        "linear_nll": (h, w, b, target, weight, *options, [], 0, backend),
        "linear_nll_grad": (
            *(sums, maximum, *leaves[:3], target, weight, *options),
            *(0, backend, [True, False, True]),
        ),
        "linear_nll_grad_kept": (
            kept,
            sums,
            maximum,
            *leaves[:3],
            target,
            weight,
            *options,
            [4, 7],
            0,
            [True, True, True],
        ),
        "target_logit": (*leaves[:3], target, 3.0, 0.5, 0, backend),
        "linear_statistics": (*leaves[:3], target, at_target, -100, 3.0, 0.5, 0, backend),
        "nll": (logits.requires_grad_(), target, weight, -100, None, 1.0, True, True, 0, backend),
        "nll_grad": (sums, maximum, logits.detach(), target, weight, -100, None, 1.0, True, True, 0, backend),
        "merge": (partials.requires_grad_(), target, torch.tensor([3.0, V - 3.0], device=device), V, -100, backend),
        "linear_kl": (h, w, b, g, u, c, 3.0, 0.5, None, 1.0, 0, backend),
        "linear_kl_grad": (
            maximum,
            rows,
            *leaves,
            3.0,
            0.5,
            None,
            1.0,
            0,
            backend,
            [True, True, False, True, False, True],
        ),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", operator_calls("cpu", "torch"))
def test_opcheck(name, backend, device):
    torch.library.opcheck(getattr(operators, name), operator_calls(device, backend)[name])


def test_opcheck_of_the_forward_that_keeps_products(device):
    """All but tracing, which never asks for it: the backward overwrites what was kept."""
    arguments = list(operator_calls(device, "torch")["linear_nll"])
    arguments[11] = [4, 7]
    torch.library.opcheck(
        operators.linear_nll,
        tuple(arguments),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_every_operator_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("perplexity::")
    }
    assert registered == set(operator_calls("cpu", "torch"))


SCALARS = dict(softcap=4.0, logit_scale=0.7)
FUNCTIONS = {
    "linear_cross_entropy": lambda h, w, b, g, u, c, t, k: perplexity.linear_cross_entropy(
        h, w, t, linear_bias=b, reduction="none", label_smoothing=0.1, z_loss=0.01, weight=k, **SCALARS
    ),
    "mean": lambda h, w, b, g, u, c, t, k: perplexity.linear_cross_entropy(h, w, t, linear_bias=b, weight=k),
    "probabilities": lambda h, w, b, g, u, c, t, k: perplexity.linear_cross_entropy(
        h, w, torch.softmax((g @ u.T).detach(), 1), linear_bias=b, label_smoothing=0.2, weight=k, **SCALARS
    ),
    "cross_entropy": lambda h, w, b, g, u, c, t, k: perplexity.cross_entropy(
        h @ w.T, t, k, label_smoothing=0.1, reduction="none", z_loss=0.1, **SCALARS
    ),
    "token_log_probabilities": lambda h, w, b, g, u, c, t, k: perplexity.token_log_probabilities(
        h, w, t, linear_bias=b, with_entropy=True, **SCALARS
    ),
    "linear_kl_divergence": lambda h, w, b, g, u, c, t, k: perplexity.linear_kl_divergence(
        h, w, g, u, bias_p=b, bias_q=c, softcap_p=3.0, softcap_q=5.0, logit_scale_q=0.6
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_in_float64(name, monkeypatch):
    leaves, target = problem(dtype=torch.float64)
    weight = torch.linspace(0.5, 2.0, V, dtype=torch.float64)
    used = [
        index for index in range(6) if name == "linear_kl_divergence" or index < (2 if name == "cross_entropy" else 3)
    ]

    def function(*chosen):
        every = list(leaves)
        for index, leaf in zip(used, chosen, strict=True):
            every[index] = leaf
        return FUNCTIONS[name](*every, target, weight)

    # The public results are float32 where the contract says so: their rounding would drown a difference of 1e-6.
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    assert torch.autograd.gradcheck(function, [leaves[index] for index in used])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_eager_with_ignored_labels(name, backend, device, monkeypatch):
    """Liger 1338: silently wrong once a label is ignored."""
    if name == "probabilities" and backend == "triton":
        pytest.skip("class probabilities: torch backend only")
    monkeypatch.setenv("PERPLEXITY_BACKEND", backend)
    leaves, target = problem(device)
    weight = torch.linspace(0.5, 2.0, V, device=device)
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for run in (function, compiled):
        out = run(*leaves, target, weight)
        total = sum(
            (part * torch.linspace(0.3, 2.0, part.numel(), device=device)).sum()
            for part in (out if isinstance(out, tuple) else (out,))
        )
        results.append((total, *torch.autograd.grad(total, leaves, allow_unused=True)))
    for eager, traced in zip(*results, strict=True):
        assert (eager is None) == (traced is None)
        if eager is not None:
            torch.testing.assert_close(traced, eager)


def test_compiled_by_inductor_with_changing_lengths():
    leaves, target = problem()
    compiled = torch.compile(lambda h, w, t: perplexity.linear_cross_entropy(h, w, t), fullgraph=True)
    for length in (6, 5, 3):
        eager = perplexity.linear_cross_entropy(leaves[0][:length], leaves[1], target[:length])
        torch.testing.assert_close(compiled(leaves[0][:length], leaves[1], target[:length]), eager)


def test_compiled_with_dynamic_numbers_and_shapes():
    """Every size and number traced as a symbol, or as a new constant: arguments are checked by comparisons alone."""
    leaves, target = problem()
    for module in (perplexity.LinearCrossEntropyLoss(D, V), lambda h, t: perplexity.cross_entropy(h, t % D)):
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        labels = target.clamp(min=0)
        torch.testing.assert_close(compiled(leaves[0], labels), module(leaves[0], labels))
    compiled = torch.compile(perplexity.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for scale, index in ((1.0, -100), (0.5, 3), (0.7, 4)):
        options = dict(logit_scale=scale, ignore_index=index, validate=False)
        eager = perplexity.linear_cross_entropy(*leaves[:2], target.abs() % V, **options)
        torch.testing.assert_close(compiled(*leaves[:2], target.abs() % V, **options), eager)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_an_error_that_says_so(name):
    """An operator without a forward derivative drops the tangent: a derivative of 0, in silence."""
    leaves, target = problem()
    leaves = [leaf.detach() for leaf in leaves]
    weight = torch.rand(V)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda h: FUNCTIONS[name](h, *leaves[1:], target, weight), (leaves[0],), (leaves[0],))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_is_right(backend, device):
    """Gradients that are scaled in place are wrong the second time (Liger, quack)."""
    leaves, target = problem(device)
    loss = perplexity.linear_cross_entropy(*leaves[:2], target, reduction="none", backend=backend)
    upstream = torch.linspace(0.3, 2.0, N, device=device)
    first = torch.autograd.grad(loss, leaves[:2], upstream, retain_graph=True)
    second = torch.autograd.grad(loss, leaves[:2], 2 * upstream)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mean", "cross_entropy", "linear_kl_divergence"])
def test_double_backward_is_an_error_that_says_so(name, backend, device, monkeypatch):
    monkeypatch.setenv("PERPLEXITY_BACKEND", backend)
    leaves, target = problem(device)
    loss = FUNCTIONS[name](*leaves, target, None).sum()
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"double backward.*torch.nn.functional"):
        gradient.square().sum().backward()


def test_the_gradient_takes_the_place_of_the_kept_products(monkeypatch):
    """Three products where a step needs one backward, four where another may follow; the same gradients in both."""
    (hidden, weight, *_), target = problem()
    calls, original = [], operators.linear_nll_grad_kept
    monkeypatch.setattr(operators, "linear_nll_grad_kept", lambda *inputs: calls.append(1) or original(*inputs))
    for repeated in (False, True):
        loss = perplexity.linear_cross_entropy(hidden, weight, target)
        gradients = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=repeated)
        assert len(calls) == 1
        expected = torch.autograd.grad(
            3 * torch.nn.functional.cross_entropy(hidden @ weight.T, target), (hidden, weight)
        )
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="second time"):
        loss = perplexity.linear_cross_entropy(hidden, weight, target)
        torch.autograd.grad(loss, weight)
        torch.autograd.grad(loss, weight)


def test_another_number_of_threads_in_the_backward():
    """The number of threads decides the blocks, and so where products were kept."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) / 300**0.25 for shape in ((300, 300), (3000, 300)))
    target = torch.randint(0, 3000, (300,), generator=generator)
    leaves, threads = [hidden.requires_grad_(), weight.requires_grad_()], torch.get_num_threads()
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(hidden @ weight.T, target), leaves)
    try:
        for there, back in ((1, 2), (2, 1), (8, 1)):
            torch.set_num_threads(there)
            loss = perplexity.linear_cross_entropy(*leaves, target)
            torch.set_num_threads(back)
            for ours, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_gets_no_gradient(backend, device):
    """A node after it may return None for its gradient."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    (hidden, weight, *_), target = problem(device)
    loss = perplexity.linear_cross_entropy(hidden, weight, target, reduction="none", backend=backend)
    Cut.apply(loss).sum().backward()
    assert hidden.grad is None or not hidden.grad.any()


def test_batched_gradients_on_the_torch_backend():
    (hidden, weight, *_), target = problem()
    loss = perplexity.linear_cross_entropy(hidden, weight, target, reduction="none")
    batched = torch.autograd.grad(loss, (hidden, weight), torch.eye(N)[:3], is_grads_batched=True)
    for row in range(3):
        loss = perplexity.linear_cross_entropy(hidden, weight, target, reduction="none")
        for all_of_them, one in zip(batched, torch.autograd.grad(loss[row], (hidden, weight)), strict=True):
            torch.testing.assert_close(all_of_them[row], one)


class NoWaiting(TorchDispatchMode):
    """Fails on what makes the host wait for a device: reading a value, shapes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.is_nonzero,
        ), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "linear_nll",
        "linear_nll_grad",
        "linear_nll_grad_kept",
        "target_logit",
        "linear_statistics",
        "nll",
        "nll_grad",
        "merge",
        "linear_kl",
        "linear_kl_grad",
    ],
)
def test_no_operator_waits_for_the_device(name, backend, device, monkeypatch):
    """A wait inside a CUDA graph is an error: the operators' own code is run under a mode that refuses them."""
    for module in (blockwise, logit_blocks):
        monkeypatch.setattr(module, "values_are_here", lambda tensor: False)
    call = operator_calls(device, backend)[name]
    with torch.no_grad(), NoWaiting():
        getattr(operators, name)._init_fn(*call)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_loss_waits_for_the_device(name):
    """Everything around the operators, on tensors without data: whatever reads a value fails. As a GPU, they are no CPU."""
    leaves = [torch.empty(shape, device="meta", requires_grad=True) for shape in ((N, D), (V, D), (V,)) * 2]
    target = torch.empty(N, dtype=torch.int64, device="meta")
    with NoWaiting():
        out = FUNCTIONS[name](*leaves, target, torch.empty(V, device="meta"))
        total = sum(part.sum() for part in out) if isinstance(out, tuple) else out.sum()
        torch.autograd.grad(total, leaves, allow_unused=True)
