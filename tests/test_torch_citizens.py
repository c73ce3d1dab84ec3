"""The operators under opcheck, gradcheck, compile, second and double backward; nothing waits."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import perplexity
from perplexity.kernels import chunks, operators
from perplexity.kernels.cpu import blockwise, logit_blocks
from perplexity.kernels.dispatch import KEPT, Plan, Rule
from perplexity.kernels.operators import _linear_nll

N, V, D = 6, 11, 5
BACKENDS = ("torch", "triton")


def problem(device="cpu", dtype=torch.float32, tokens=N, seed=5):
    generator = torch.Generator().manual_seed(seed)
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
    plan, keeping = Plan(backend), Plan("torch", KEPT, block=(4, 7))
    everything, uncapped = (
        (*rule, *plan)
        for rule in (Rule(-100, 3.0, 0.5, True, True), Rule(-100, None, 1.0, True, True))
    )
    capped = 3.0, 0.5, None, 1.0, *plan
    kept = operators.linear_nll(h, w, b, target, weight, *everything[:5], *keeping)[1].detach()
    sums = operators.linear_nll(h, w, b, target, weight, *everything)[0].detach()
    rows = operators.linear_kl(h, w, b, g, u, c, *capped)[1].detach()
    maximum = sums[0].clone()
    at_target = operators.target_logit(h, w, b, target, *everything).detach()
    partials = torch.stack([sums, sums + 0.5], dim=1)
    with torch.no_grad():
        leaves = [tensor.detach() for tensor in (h, w, b, g, u, c)]
    return {
        "checked_target": (target, V, -100),
        "linear_nll": (h, w, b, target, weight, *everything),
        "linear_nll_grad": (
            *(sums, maximum, *leaves[:3], target, weight),
            *([True, False, True], *everything),
        ),
        "linear_nll_grad_kept": (
            kept,
            sums,
            maximum,
            *leaves[:3],
            target,
            weight,
            [True, True, True],
            *everything[:5],
            *keeping,
        ),
        "target_logit": (*leaves[:3], target, *everything),
        "linear_statistics": (h, w, b, target, at_target, weight, *everything),
        "nll": (logits.requires_grad_(), target, weight, *uncapped),
        "nll_grad": (sums, maximum, logits.detach(), target, weight, *uncapped),
        "merge": (
            partials.requires_grad_(),
            target,
            torch.tensor([3.0, V - 3.0], device=device),
            V,
            -100,
            backend,
        ),
        "linear_kl": (h, w, b, g, u, c, *capped),
        "linear_kl_grad": (
            maximum,
            rows,
            *leaves,
            [True, True, False, True, False, True],
            *capped,
        ),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", operator_calls("cpu", "torch"))
def test_opcheck(name, backend, device):
    torch.library.opcheck(
        getattr(torch.ops.perplexity, name).default, operator_calls(device, backend)[name]
    )


def test_opcheck_of_the_forward_that_keeps_products(device):
    """All but tracing, which never asks for it: the backward overwrites what was kept."""
    arguments = list(operator_calls(device, "torch")["linear_nll"])
    arguments[5 + len(Rule._fields) :] = Plan("torch", KEPT, block=(4, 7))
    torch.library.opcheck(
        torch.ops.perplexity.linear_nll.default,
        tuple(arguments),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_every_operator_is_checked():
    registered = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("perplexity::")
    }
    assert registered == set(operator_calls("cpu", "torch"))


SCALARS = dict(softcap=4.0, logit_scale=0.7)
FUNCTIONS = {
    "linear_cross_entropy": lambda h, w, b, g, u, c, t, k: perplexity.linear_cross_entropy(
        h,
        w,
        t,
        linear_bias=b,
        reduction="none",
        label_smoothing=0.1,
        z_loss=0.01,
        weight=k,
        **SCALARS,
    ),
    "mean": lambda h, w, b, g, u, c, t, k: perplexity.linear_cross_entropy(
        h, w, t, linear_bias=b, weight=k
    ),
    "with_statistics": lambda h, w, b, g, u, c, t, k: perplexity.linear_cross_entropy(
        h, w, t, linear_bias=b, label_smoothing=0.1, return_statistics=True, **SCALARS
    )[0],
    "probabilities": lambda h, w, b, g, u, c, t, k: perplexity.linear_cross_entropy(
        h,
        w,
        torch.softmax((g @ u.T).detach(), 1),
        linear_bias=b,
        label_smoothing=0.2,
        weight=k,
        **SCALARS,
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
        index
        for index in range(6)
        if name == "linear_kl_divergence" or index < (2 if name == "cross_entropy" else 3)
    ]

    def function(*chosen):
        every = list(leaves)
        for index, leaf in zip(used, chosen, strict=True):
            every[index] = leaf
        return FUNCTIONS[name](*every, target, weight)

    # The public results are float32 where the contract says so: their rounding would drown a
    # difference of 1e-6.
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
    compiled = torch.compile(
        lambda h, w, t: perplexity.linear_cross_entropy(h, w, t), fullgraph=True, dynamic=True
    )
    for length in (6, 5, 3):
        eager = perplexity.linear_cross_entropy(leaves[0][:length], leaves[1], target[:length])
        torch.testing.assert_close(compiled(leaves[0][:length], leaves[1], target[:length]), eager)


def test_compiled_with_dynamic_numbers_and_shapes():
    """Sizes and numbers are traced as symbols or constants: comparisons alone check arguments."""
    leaves, target = problem()
    for module in (
        perplexity.LinearCrossEntropyLoss(D, V),
        lambda h, t: perplexity.cross_entropy(h, t % D),
    ):
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
        torch.func.jvp(
            lambda h: FUNCTIONS[name](h, *leaves[1:], target, weight), (leaves[0],), (leaves[0],)
        )


TRANSFORMED = {
    **FUNCTIONS,
    "per_sample_hidden": lambda h, w, b, g, u, c, t, k: perplexity.linear_cross_entropy(
        h, w, t, linear_bias=b, z_loss=0.01
    ),
    "shifted": lambda h, w, b, g, u, c, t, k: perplexity.linear_cross_entropy(
        h, w, t, linear_bias=b, shift=1, reduction="sum"
    ),
}


def both_backends(names, interpreted):
    """Names with both backends; slow on triton, whose programs are interpreted, but for some."""
    return pytest.mark.parametrize(
        ("name", "backend"),
        [
            pytest.param(
                name,
                backend,
                marks=[pytest.mark.slow] * (backend == "triton" and name not in interpreted),
            )
            for backend in BACKENDS
            for name in names
        ],
    )


def scalar(name):
    """One number of a function's result, of which every element has a weight of its own."""

    def call(leaves, target, weight):
        out = TRANSFORMED[name](*leaves, target, weight)
        parts = out if isinstance(out, tuple) else (out,)
        return sum(
            (part * torch.linspace(0.5, 1.5, part.numel()).view(part.shape)).sum() for part in parts
        )

    return call


# The other names call the same operators under the same transforms.
@both_backends(
    TRANSFORMED,
    ("linear_cross_entropy", "cross_entropy", "token_log_probabilities", "linear_kl_divergence"),
)
def test_torch_func(name, backend, monkeypatch):
    """grad, vjp, jacrev and per-sample gradients give what backward gives."""
    if name == "probabilities" and backend == "triton":
        pytest.skip("class probabilities are for the torch backend")
    monkeypatch.setenv("PERPLEXITY_BACKEND", backend)
    function, weight = scalar(name), torch.linspace(0.5, 2.0, V)
    samples = [problem(seed=seed) for seed in range(2)]
    expected = []
    for leaves, target in samples:
        grads = torch.autograd.grad(function(leaves, target, weight), leaves, allow_unused=True)
        expected.append(
            [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
        )
    detached = [[leaf.detach() for leaf in leaves] for leaves, _ in samples]
    targets = [target for _, target in samples]

    def check(results, expected):
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted)

    check(torch.func.grad(function)(detached[0], targets[0], weight), expected[0])
    value, pull = torch.func.vjp(lambda leaves: function(leaves, targets[0], weight), detached[0])
    torch.testing.assert_close(value, function(detached[0], targets[0], weight))
    check(pull(torch.tensor(1.0))[0], expected[0])
    check(torch.func.jacrev(function)(detached[0], targets[0], weight), expected[0])
    stacked = [torch.stack(parts) for parts in zip(*detached, strict=True)]
    per_sample = torch.vmap(torch.func.grad(function), in_dims=(0, 0, None))(
        stacked, torch.stack(targets), weight
    )
    check(per_sample, [torch.stack(parts) for parts in zip(*expected, strict=True)])
    # One head for all samples, the samples in another dimension.
    hidden = torch.stack([leaves[0] for leaves in detached], dim=1)
    shared = torch.vmap(
        lambda h, t: torch.func.grad(function)([h, *detached[0][1:]], t, weight), in_dims=(1, 0)
    )(hidden, torch.stack(targets))
    for place in range(2):
        leaves = [detached[place][0], *detached[0][1:]]
        alone = torch.func.grad(function)(leaves, targets[place], weight)
        check([part[place] for part in shared], alone)


@pytest.mark.parametrize(
    "name",
    ["mean", pytest.param("cross_entropy", marks=pytest.mark.slow), "linear_kl_divergence"],
)
def test_torch_func_compiled(name):
    """The transform is traced with the loss, so Dynamo does not see which way an operator takes."""
    function, weight = scalar(name), torch.linspace(0.5, 2.0, V)
    leaves, target = problem()
    leaves = [torch.stack([leaf.detach(), 2 * leaf.detach()]) for leaf in leaves]
    targets = torch.stack([target, target.flip(0)])

    def alone(leaves, target):
        return torch.func.grad(function)(leaves, target, weight)

    for transform, inputs in (
        (alone, ([leaf[0] for leaf in leaves], target)),
        (torch.vmap(alone), (leaves, targets)),
    ):
        compiled = torch.compile(transform, backend="aot_eager")
        for traced, eager in zip(compiled(*inputs), transform(*inputs), strict=True):
            torch.testing.assert_close(traced, eager)


def test_a_bad_target_under_vmap_is_told_by_sample_and_token():
    hidden, weight = torch.randn(3, 5, D), torch.randn(V, D)
    targets = torch.zeros(5, 3, dtype=torch.int64)  # samples in dimension 1
    targets[4, 2] = V
    with pytest.raises(IndexError, match=re.escape("position (2, 4)")):
        torch.vmap(lambda h, t: perplexity.linear_cross_entropy(h, weight, t), in_dims=(0, 1))(
            hidden, targets
        )


def test_torch_func_of_a_module():
    """functional_call with per-sample gradients of its parameters, as torch's own module."""
    torch.manual_seed(0)
    module = perplexity.LinearCrossEntropyLoss(D, V, bias=True, label_smoothing=0.1)
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    hidden, targets = torch.randn(3, N, D), torch.randint(V, (3, N))

    def ours(parameters, h, t):
        return torch.func.functional_call(module, parameters, (h, t))

    def theirs(parameters, h, t):
        logits = torch.nn.functional.linear(
            h, parameters["linear.weight"], parameters["linear.bias"]
        )
        return torch.nn.functional.cross_entropy(logits, t, label_smoothing=0.1)

    got, expected = (
        torch.vmap(torch.func.grad(function), in_dims=(None, 0, 0))(parameters, hidden, targets)
        for function in (ours, theirs)
    )
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize(
    "transform",
    [torch.func.hessian, lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())],
)
def test_torch_func_has_no_second_derivative(transform):
    leaves, target = problem()
    with pytest.raises(NotImplementedError, match="double backward|forward-mode"):
        transform(lambda h: perplexity.linear_cross_entropy(h, leaves[1].detach(), target))(
            leaves[0].detach()
        )


def test_metrics_under_vmap():
    """What has no derivative is mapped, too.

    Every token is scored: alone, ignored ones are left out, and products of fewer rows may sum in
    another order.
    """
    (h, w, *_), target = problem()
    target = target.clamp(min=0)
    h, w = h.detach(), w.detach()
    stacked = torch.stack([h, 2 * h])
    statistics = torch.vmap(lambda h: perplexity.token_statistics(h, w, target))(stacked)
    for place in range(2):
        alone = perplexity.token_statistics(stacked[place], w, target)
        for mapped, value in zip(statistics, alone, strict=True):
            torch.testing.assert_close(mapped[place], value, rtol=0, atol=0)


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
    """One backward takes three products, a possible second one four; the gradients are the same."""
    (hidden, weight, *_), target = problem()
    calls, original = [], operators.linear_nll_grad_kept
    monkeypatch.setattr(
        _linear_nll, "linear_nll_grad_kept", lambda *inputs: calls.append(1) or original(*inputs)
    )
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
    hidden, weight = (
        torch.randn(*shape, generator=generator) / 300**0.25 for shape in ((300, 300), (3000, 300))
    )
    target = torch.randint(0, 3000, (300,), generator=generator)
    leaves, threads = [hidden.requires_grad_(), weight.requires_grad_()], torch.get_num_threads()
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(hidden @ weight.T, target), leaves
    )
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
    loss = perplexity.linear_cross_entropy(
        hidden, weight, target, reduction="none", backend=backend
    )
    Cut.apply(loss).sum().backward()
    assert hidden.grad is None or not hidden.grad.any()


def test_batched_gradients_on_the_torch_backend():
    (hidden, weight, *_), target = problem()
    loss = perplexity.linear_cross_entropy(hidden, weight, target, reduction="none")
    batched = torch.autograd.grad(loss, (hidden, weight), torch.eye(N)[:3], is_grads_batched=True)
    for row in range(3):
        loss = perplexity.linear_cross_entropy(hidden, weight, target, reduction="none")
        for all_of_them, one in zip(
            batched, torch.autograd.grad(loss[row], (hidden, weight)), strict=True
        ):
            torch.testing.assert_close(all_of_them[row], one)


class NoWaiting(TorchDispatchMode):
    """Mode that fails where the host waits for a device, to read a value or to know a shape."""

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
    """A wait inside a CUDA graph is an error: operators run under a mode that refuses to wait."""
    for module in (blockwise, chunks, logit_blocks):
        monkeypatch.setattr(module, "values_are_here", lambda tensor: False)
    call = operator_calls(device, backend)[name]
    with torch.no_grad(), NoWaiting():
        getattr(operators, name)._init_fn(*call)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_loss_waits_for_the_device(name):
    """Losses run on tensors without data, where reading a value fails; they count as a GPU's."""
    leaves = [
        torch.empty(shape, device="meta", requires_grad=True)
        for shape in ((N, D), (V, D), (V,)) * 2
    ]
    target = torch.empty(N, dtype=torch.int64, device="meta")
    with NoWaiting():
        out = FUNCTIONS[name](*leaves, target, torch.empty(V, device="meta"))
        total = sum(part.sum() for part in out) if isinstance(out, tuple) else out.sum()
        torch.autograd.grad(total, leaves, allow_unused=True)
