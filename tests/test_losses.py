"""The public losses against torch.nn.functional.cross_entropy in float64 on full logits."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import perplexity
from perplexity.kernels import reference

BACKENDS = ("torch", "triton")
N, V, D = 37, 211, 19

OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"ignore_index": 5},
    {"ignore_index": None},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "class_weight": True, "reduction": "none"},
    {"label_smoothing": 1.0, "class_weight": True},
    {"class_weight": True},
    {"class_weight": True, "reduction": "sum", "softcap": 4.0},
    {"softcap": 4.0, "logit_scale": 0.3, "label_smoothing": 0.2},
    {"z_loss": 1e-2},
    {"z_loss": 1e-2, "reduction": "none", "class_weight": True, "softcap": 3.0},
    {"z_loss": 1e-2, "reduction": "sum", "bias": True},
    {"bias": True},
    {"bias": True, "leading": (2, 3)},
]


def case(options, device, dtype=torch.float32):
    """Leaves, target and keyword arguments of linear_cross_entropy."""
    options = dict(options)
    generator = torch.Generator().manual_seed(3)
    leading = options.pop("leading", (N,))
    leaves = [torch.randn(*leading, D, generator=generator), torch.randn(V, D, generator=generator)]
    if options.pop("bias", False):
        leaves.append(torch.randn(V, generator=generator))
    target = torch.randint(0, V, leading, generator=generator)
    target.view(-1)[2] = target.view(-1)[4] = (
        -100 if options.get("ignore_index") is None else options["ignore_index"]
    )
    if options.pop("class_weight", False):
        options["weight"] = torch.rand(V, generator=generator).to(device)
    return [leaf.to(device, dtype).requires_grad_() for leaf in leaves], target.to(device), options


def exact(leaves, target, options):
    """The loss by torch, float64, z_loss by its definition."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    hidden, weight, *bias = leaves
    z_loss, reduction = options.get("z_loss", 0.0), options.get("reduction", "mean")
    ignore_index = options.get("ignore_index", -100)
    ignore_index = -100 if ignore_index is None else ignore_index
    z = reference.logits(
        hidden.reshape(-1, D),
        weight,
        *bias,
        softcap=options.get("softcap"),
        logit_scale=options.get("logit_scale", 1.0),
    )
    flat = target.reshape(-1)
    class_weight = options.get("weight")
    loss = F.cross_entropy(
        z,
        flat,
        None if class_weight is None else class_weight.double(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    if z_loss:
        penalty = z_loss * z.logsumexp(1).square() * (flat != ignore_index)
        if reduction == "mean":
            penalty = penalty.sum() / (flat != ignore_index).sum()
        loss = loss + (penalty.sum() if reduction == "sum" else penalty)
    return leaves, loss.reshape(target.shape) if reduction == "none" else loss


def upstream_like(loss):
    """Return a gradient that differs by token: scaling all by the first must show (Liger 968)."""
    return torch.linspace(0.3, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(
        loss.shape
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_cross_entropy_is_torchs(options, backend, device):
    leaves, target, keywords = case(options, device)
    hidden, weight, *bias = leaves
    loss = perplexity.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias[0] if bias else None, backend=backend, **keywords
    )
    exact_leaves, expected = exact(leaves, target, keywords)
    # float32 sums of 211 terms; the losses are below 100.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss, leaves, upstream_like(loss))
    for ours, theirs in zip(
        gradients, torch.autograd.grad(expected, exact_leaves, upstream_like(expected)), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [o for o in OPTIONS if "bias" not in o], ids=str)
def test_cross_entropy_is_torchs(options, backend, device):
    leaves, target, keywords = case(options, device)
    logits = (leaves[0].detach() @ leaves[1].detach().T).requires_grad_()
    loss = perplexity.cross_entropy(
        logits, target, keywords.pop("weight", None), backend=backend, **keywords
    )
    _, _, keywords = case(options, device)
    exact_logits = logits.detach().double().requires_grad_()
    identity = torch.eye(V, dtype=torch.float64, device=device)
    z = reference.logits(
        exact_logits,
        identity,
        softcap=keywords.get("softcap"),
        logit_scale=keywords.get("logit_scale", 1.0),
    )
    plain = {
        key: value for key, value in keywords.items() if key in ("reduction", "label_smoothing")
    }
    ignore_index = keywords.get("ignore_index") or -100
    class_weight = keywords.get("weight")
    expected = F.cross_entropy(
        z,
        target,
        None if class_weight is None else class_weight.double(),
        ignore_index=ignore_index,
        **plain,
    )
    if keywords.get("z_loss"):
        penalty = keywords["z_loss"] * z.logsumexp(1).square() * (target != ignore_index)
        counted = (target != ignore_index).sum()
        reduction = keywords.get("reduction", "mean")
        expected = expected + (
            penalty
            if reduction == "none"
            else penalty.sum() / (counted if reduction == "mean" else 1)
        )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad(loss, logits, upstream_like(loss))
    (theirs,) = torch.autograd.grad(expected, exact_logits, upstream_like(expected))
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_give_a_float32_loss(dtype, backend, device):
    leaves, target, _ = case({}, device, dtype)
    loss = perplexity.linear_cross_entropy(*leaves, target, backend=backend, round_logits=False)
    _, expected = exact(leaves, target, {})
    assert loss.dtype == torch.float32
    # The inputs are the rounded ones on both sides, and logits are float32: no 16-bit error is left
    # in the loss.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert [g.dtype for g in torch.autograd.grad(loss, leaves)] == [dtype, dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_logits_are_no_worse_than_the_plain_path(dtype, backend, device):
    """A loss may round products as torch.nn.functional.linear does; everything else is float32."""
    leaves, target, _ = case({}, device, dtype)
    nll = perplexity.linear_cross_entropy(
        *leaves, target, backend=backend, reduction="none"
    ).double()
    plain = F.cross_entropy(F.linear(*leaves).float(), target, reduction="none").double()
    _, expected = exact(leaves, target, {"reduction": "none"})
    assert (nll - expected).abs().max() <= (plain - expected).abs().max() + 1e-5
    exactly = perplexity.token_nll(*leaves, target, backend=backend).double()
    torch.testing.assert_close(exactly, expected, rtol=1e-5, atol=1e-5)
    asked = perplexity.token_nll(*leaves, target, backend=backend, round_logits=True).double()
    assert torch.equal(asked, nll.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_nll(backend, device):
    leaves, target, _ = case({"leading": (3, 5)}, device)
    nll = perplexity.token_nll(*leaves, target, backend=backend)
    _, expected = exact(leaves, target, {"reduction": "none"})
    assert nll.dtype == torch.float32 and nll.shape == target.shape and not nll.requires_grad
    assert (nll[target == -100] == 0).all() and (nll >= 0).all()
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_ignored(backend, device):
    """The mean is NaN as torch's, the sum and every gradient of it 0."""
    leaves, target, _ = case({}, device)
    target.fill_(-100)
    assert perplexity.linear_cross_entropy(*leaves, target, backend=backend).isnan()
    loss = perplexity.linear_cross_entropy(
        *leaves, target, reduction="sum", z_loss=0.1, label_smoothing=0.1, backend=backend
    )
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_keeps_the_others_gradient(frozen, backend, device):
    """Liger loses the weight's gradient when the input is frozen."""
    leaves, target, _ = case({}, device)
    everything = torch.autograd.grad(
        perplexity.linear_cross_entropy(*leaves, target, backend=backend), leaves
    )
    leaves[frozen].requires_grad_(False)
    perplexity.linear_cross_entropy(*leaves, target, backend=backend).backward()
    assert leaves[frozen].grad is None
    assert torch.equal(leaves[1 - frozen].grad, everything[1 - frozen])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_is_right(backend, device):
    """Gradients scaled in place would be wrong the second time."""
    leaves, target, _ = case({"reduction": "none"}, device)
    loss = perplexity.linear_cross_entropy(*leaves, target, reduction="none", backend=backend)
    first = torch.autograd.grad(loss, leaves, upstream_like(loss), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, 2 * upstream_like(loss))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend, device):
    hidden = torch.randn(0, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=device)
    assert perplexity.linear_cross_entropy(hidden, weight, target, backend=backend).isnan()
    loss = perplexity.linear_cross_entropy(hidden, weight, target, reduction="sum", backend=backend)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0 and gradients[0].shape == (0, D) and (gradients[1] == 0).all()
    assert perplexity.cross_entropy(
        torch.randn(0, V, device=device), target, backend=backend
    ).isnan()


def test_autocast(device):
    leaves, target, _ = case({}, device)
    with torch.autocast(device, torch.bfloat16):
        loss = perplexity.linear_cross_entropy(*leaves, target)
    rounded = [leaf.detach().bfloat16() for leaf in leaves]
    torch.testing.assert_close(loss, perplexity.linear_cross_entropy(*rounded, target))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_counting_bigrams(backend, device):
    """One-hot states times log probabilities are an end-to-end oracle: plain counting."""
    from pydoc_data.topics import topics

    text = torch.tensor(list(topics["assignment"].encode()[:1500]))
    counts = Counter(zip(text[:-1].tolist(), text[1:].tolist(), strict=True))
    table = torch.ones(256, 256, dtype=torch.float64)  # add-one smoothing
    for (previous, following), count in counts.items():
        table[following, previous] += count
    log_probability = (table / table.sum(0)).log()
    counted = -sum(count * log_probability[b, a].item() for (a, b), count in counts.items()) / (
        len(text) - 1
    )
    hidden = F.one_hot(text[:-1], 256).float().to(device)
    loss = perplexity.token_nll(
        hidden, log_probability.float().to(device), text[1:].to(device), backend=backend
    )
    # Weights rounded to float32: 6e-8 relative each.
    assert math.exp(loss.double().mean().item()) == pytest.approx(math.exp(counted), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_class_weights_of_any_stride(backend, device):
    """Kernels read class weights as consecutive floats: a column gave its neighbours' values."""
    leaves, target, keywords = case({"class_weight": True, "label_smoothing": 0.5}, device)
    strided = torch.stack([keywords["weight"], keywords["weight"] + 5.0], 1)[:, 0]
    losses = [
        perplexity.linear_cross_entropy(
            *leaves, target, weight=weight, label_smoothing=0.5, backend=backend
        )
        for weight in (strided, keywords["weight"])
    ]
    assert torch.equal(*losses)
    losses = [
        perplexity.cross_entropy(
            leaves[0], target % D, strided[:D], label_smoothing=0.5, backend=backend
        ),
        perplexity.cross_entropy(
            leaves[0], target % D, keywords["weight"][:D], label_smoothing=0.5, backend=backend
        ),
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_reaches_no_sum(backend, device):
    """Autocast in an operator rounded logits · class weights to bfloat16: 0.4 off in 300."""
    leaves, target, keywords = case(
        {"class_weight": True, "label_smoothing": 0.5, "reduction": "none"}, device
    )
    rounded = [leaf.detach().bfloat16() for leaf in leaves]
    with torch.autocast(device, torch.bfloat16):
        loss = perplexity.linear_cross_entropy(*rounded, target, backend=backend, **keywords)
    assert torch.equal(
        loss, perplexity.linear_cross_entropy(*rounded, target, backend=backend, **keywords)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_and_target_of_any_stride(backend, device):
    """A column as bias or as target, read as consecutive values, gave its neighbours' values."""
    (*leaves, bias), target, _ = case({"bias": True}, device)
    results = []
    for b, t in (
        (bias, target),
        (torch.stack([bias, bias + 5.0], 1)[:, 0], torch.stack([target, target * 0], 1)[:, 0]),
    ):
        loss = perplexity.linear_cross_entropy(*leaves, t, linear_bias=b, backend=backend)
        rows = perplexity.cross_entropy(leaves[0] @ leaves[1].T, t, backend=backend)
        results.append([loss, rows, *torch.autograd.grad(loss + rows, [*leaves, bias])])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_head_on_a_16_bit_body(dtype, backend):
    """RL trainers keep the head in float32: neither products nor the head's gradient is rounded."""
    hidden, weight = (
        torch.randn(9, 16).to(dtype).requires_grad_(),
        torch.randn(31, 16).requires_grad_(),
    )
    target = torch.randint(31, (9,))
    wide = hidden.detach().float().requires_grad_()
    exact = torch.nn.functional.cross_entropy((wide.double() @ weight.double().T), target)
    expected = torch.autograd.grad(exact, (wide, weight))
    loss = perplexity.linear_cross_entropy(hidden, weight, target, backend=backend)
    found = torch.autograd.grad(loss, (hidden, weight))
    # Float32 sums of 16 products; the 16-bit gradient of the hidden states is rounded once, by half
    # a unit.
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        found[0], expected[0].to(dtype), atol=1e-6, rtol=torch.finfo(dtype).eps
    )
    per_token = dict(backend=backend)
    nll = perplexity.token_nll(hidden, weight, target, **per_token)
    assert torch.equal(nll, perplexity.token_nll(wide, weight, target, **per_token))
    statistics = perplexity.token_statistics(hidden, weight, target, **per_token)
    assert torch.equal(
        statistics.entropy, perplexity.token_statistics(wide, weight, target, **per_token).entropy
    )
    log_p = perplexity.token_log_probabilities(hidden, weight, target, **per_token)
    torch.testing.assert_close(log_p, -nll)
    divergence = perplexity.linear_kl_divergence(
        hidden, weight, hidden, weight.roll(1, 0), **per_token
    )
    same = perplexity.linear_kl_divergence(wide, weight, wide, weight.roll(1, 0), **per_token)
    assert torch.equal(divergence, same)
