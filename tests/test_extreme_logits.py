"""Logits at the ends of a dtype's range, and zeros that must be exact, compared with torch."""

import pytest
import torch
import torch.nn.functional as F

import perplexity
from perplexity.kernels import operators, reference
from perplexity.kernels.dispatch import Plan, Rule
from perplexity.kernels.gpu import linear_kl, linear_nll

BACKENDS = ("torch", "triton")
V = 2100  # two spans, the second one odd; nine blocks on the torch backend under LIMIT
LIMIT = 1 << 12
SHORT_V, SHORT_SPAN = 300, 256  # two spans of two tiles and one, the last one odd
INF = torch.inf


@pytest.fixture
def size(backend, device, monkeypatch):
    """Return the vocabulary and the length of a span: both shorter where kernels are interpreted.

    The interpreter's time is that of the tiles: it has three instead of seventeen.
    """
    if backend == "torch" or device != "cpu":
        return V, linear_nll.SPAN
    for module in (linear_nll, linear_kl):
        monkeypatch.setattr(module, "SPAN", SHORT_SPAN)
    return SHORT_V, SHORT_SPAN


def targets(V):
    return [0, V // 2, V - 1, -100]


def rows(dtype, V=V, last_from=linear_nll.SPAN):
    """Return logits [V] by name.

    A fused loss whose maximum starts at a finite number sees no logit below it.
    """
    low, generator = torch.finfo(dtype).min, torch.Generator().manual_seed(0)
    half, last = slice(0, V // 2), slice(last_from, V)

    def filled(value, *parts):
        z = (
            torch.randn(V, generator=generator)
            if value is None
            else torch.full((V,), value, dtype=torch.float64)
        )
        z = z.double()
        for part, other in parts:
            z[part] = other
        return z.to(dtype)

    return {
        "all lowest": filled(low),
        "all below a quarter of the lowest": filled(0.27 * low),
        "all above a quarter of the lowest": filled(0.23 * low),
        "first half lowest": filled(None, (half, low)),
        "every other lowest": filled(None, (slice(0, None, 2), low)),
        "last span lowest": filled(None, (last, low)),
        "one lowest": filled(None, (1, low)),
        "first half -inf": filled(None, (half, -INF)),
        "last span -inf": filled(None, (last, -INF)),
        "-inf, then lowest": filled(low, (half, -INF)),
        "-inf, then highest": filled(-low, (half, -INF)),
        "one lowest, else -inf": filled(-INF, (3, low)),
        "lowest, then highest": filled(low, (last, -low)),
        "highest, then lowest": filled(-low, (last, low)),
        "one highest": filled(None, (V // 2, -low)),
        "all -inf": filled(-INF),
        "one +inf": filled(None, (2, INF)),
    }


# What differs for blocks, tiles and spans.
NAMES = [
    "all lowest",
    "all below a quarter of the lowest",
    "first half lowest",
    "last span lowest",
    "first half -inf",
    "last span -inf",
    "-inf, then lowest",
    "lowest, then highest",
    "highest, then lowest",
    "all -inf",
    "one +inf",
]


def entropy(z):
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)  # 0 · log 0 is 0, and so is its derivative


def close(what, ours, plain, exact, tolerance=1e-5):
    """Assert that values are infinite or NaN where torch's are, else nearly as close to float64.

    They may be ``tolerance`` further from float64 than torch's.

    1e-5: sums of 2,100 float32 terms, as ``tables.FORWARD``.
    """
    ours, plain, exact = (tensor.double() for tensor in (ours, plain, exact))
    finite = plain.isfinite()
    assert torch.equal(ours.isfinite(), finite), (what, ours, plain)
    assert torch.allclose(ours[~finite], plain[~finite], equal_nan=True), (what, ours, plain)
    ours, plain, exact = (tensor[finite] for tensor in (ours, plain, exact))
    excess = (ours - exact).abs() - (plain - exact).abs() - tolerance * exact.abs().clamp(min=1.0)
    assert (excess <= 0).all(), (what, excess.max().item())


def beside_torch(what, ours, theirs, *leaves):
    """Compare values and gradients of ``ours(*leaves)`` with ``theirs``, and with float64."""
    results = []
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    for function, dtype in ((ours, leaves[0].dtype), (theirs, wide), (theirs, torch.float64)):
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        out = function(*own)
        # More than 1: a product of the upstream gradient and a lowest number is then infinite.
        upstream = torch.linspace(0.4, 2.7, out.numel(), dtype=out.dtype, device=out.device).view(
            out.shape
        )
        results.append([out.detach(), *torch.autograd.grad(out, own, upstream)])
    narrow = leaves[0].dtype.itemsize == 2
    for index, values in enumerate(zip(*results, strict=True)):
        # A gradient in 16 bits is rounded to them: 2⁻⁸ of bfloat16's.
        close((what, index), *values, tolerance=1e-2 if index and narrow else 1e-5)


LOSSES = [
    {"label_smoothing": 0.1},
    {"logit_scale": -0.5},
    {"softcap": 5.0, "logit_scale": 0.25, "label_smoothing": 0.1},
]


def torchs(z, target, *, label_smoothing=0.0, softcap=None, logit_scale=1.0):
    # The gradient of an ignored row is 0, whatever its logits; torch's is no number where they are
    # none.
    z = z.masked_fill((target == -100)[:, None], 0.0)
    z = z if logit_scale == 1.0 else z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, target, reduction="none", label_smoothing=label_smoothing)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_logits_that_exist(dtype, backend, device):
    """A row masked by finfo.min had a loss of −inf."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    table = torch.stack(list(rows(dtype).values())).to(device)
    z = table
    for turn, options in enumerate(LOSSES if dtype == torch.float32 else LOSSES[:1]):
        # Every row with another target in each turn; a row of the interpreter takes milliseconds.
        target = torch.tensor(
            [targets(V)[(row + turn) % 4] for row in range(len(table))], device=device
        )
        beside_torch(
            options,
            lambda z, options=options, target=target: perplexity.cross_entropy(
                z, target, reduction="none", backend=backend, **options
            ),
            lambda z, options=options, target=target: torchs(z, target, **options),
            z,
        )
    if dtype == torch.float32:  # the square of such a logsumexp is finite, or not, as torch's
        ours = perplexity.cross_entropy(z, target, reduction="none", z_loss=1e-30, backend=backend)
        plain = torchs(z, target) + 1e-30 * (z.logsumexp(1) ** 2).masked_fill(target == -100, 0.0)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_from_hidden_states(name, backend, device, size):
    """The logits are the bias, exactly, so that its gradient is theirs."""
    V, span = size
    bias = rows(torch.float32, V, span)[name].to(device)
    target = torch.tensor(targets(V), device=device)
    hidden, weight = torch.zeros(len(target), 4, device=device), torch.zeros(V, 4, device=device)
    options = dict(backend=backend, memory_limit=LIMIT if backend == "torch" else None)

    def logits(bias):
        return bias.expand(len(target), V)

    for rule in (LOSSES[0], LOSSES[2]) if name == "first half lowest" else LOSSES[:1]:
        beside_torch(
            rule,
            lambda bias, rule=rule: perplexity.linear_cross_entropy(
                hidden, weight, target, linear_bias=bias, reduction="none", **rule, **options
            ),
            lambda bias, rule=rule: torchs(logits(bias), target, **rule),
            bias,
        )
    counted = target != -100

    def log_probability_and_entropy(z):
        picked = z.log_softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]
        return torch.stack([picked, entropy(z)]).masked_fill(~counted, 0.0)

    beside_torch(
        "entropy",
        lambda bias: torch.stack(
            perplexity.token_log_probabilities(
                hidden, weight, target, linear_bias=bias, with_entropy=True, **options
            )
        ),
        lambda bias: log_probability_and_entropy(logits(bias)),
        bias,
    )
    statistics = perplexity.token_statistics(hidden, weight, target, linear_bias=bias, **options)
    nll = perplexity.token_nll(hidden, weight, target, linear_bias=bias, **options)
    z = logits(bias)
    plain, exact = torchs(z, target), torchs(z.double(), target)
    close("nll", statistics.nll, plain, exact)
    close("nll", nll, plain, exact)
    wide = [
        entropy(z.to(dtype)).masked_fill(~counted, 0.0) for dtype in (bias.dtype, torch.float64)
    ]
    close("entropy", statistics.entropy, *wide)
    # torch's logsumexp is +inf there, though its log-probabilities are no numbers
    if name != "one +inf":
        wide = [
            z.to(dtype).logsumexp(1).masked_fill(~counted, 0.0)
            for dtype in (bias.dtype, torch.float64)
        ]
        close("logsumexp", statistics.logsumexp, *wide)
    unknown = plain.isnan() | ~counted
    above = (z > z.gather(1, target.clamp(min=0)[:, None])).sum(1)
    assert torch.equal(statistics.rank, above.masked_fill(unknown, -1))
    first = (z == z.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(statistics.predicted, first.masked_fill(unknown, -1))


def lowest_weight(value):
    return torch.ones(1, 1), torch.full((3, 1), value), torch.tensor([1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-8e37, -9e37, -3e38, torch.finfo(torch.float32).min])
def test_products_of_any_size(value, backend, device):
    """Logits below −8.5e37 that a product makes: the NLL was −inf, the entropy no number."""
    hidden, weight, target = (tensor.to(device) for tensor in lowest_weight(value))
    log3 = torch.tensor([3.0], device=device).log()
    statistics = perplexity.token_statistics(hidden, weight, target, backend=backend)
    loss = perplexity.linear_cross_entropy(
        hidden, weight, target, reduction="none", backend=backend
    )
    for ours in (statistics.nll, statistics.entropy, loss):
        assert torch.equal(ours, log3), "no rounding at all between equal logits"
    assert (statistics.rank.item(), statistics.predicted.item()) == (0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_maxima_of_any_size(backend, device):
    """A power's exponent is rounded with the maximum: by 64 near 2³⁰, by infinity near 2¹²⁷."""
    size = (1.1 * 2.0 ** torch.arange(-2, 127).double()).float()
    hidden, weight = torch.cat([size, -size])[:, None], torch.tensor([[1.0], [1.0], [0.5], [-1.0]])
    z = hidden.double() @ weight.double().T
    target = z.argmax(1)
    probability = z.softmax(1)
    entropy = -torch.where(probability > 0, probability * z.log_softmax(1), 0.0).sum(1)
    statistics = perplexity.token_statistics(
        hidden.to(device), weight.to(device), target.to(device), backend=backend
    )
    exact = F.cross_entropy(z, target, reduction="none")
    torch.testing.assert_close(statistics.nll.double().cpu(), exact, rtol=3e-7, atol=2e-7)
    torch.testing.assert_close(statistics.entropy.double().cpu(), entropy, rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [5.0, 30.0, 40.0, 50.0, 1e4])
def test_capped_logits(softcap, backend, device):
    """Within 1e-5 of the exact ones by the formula of narrow softcaps and by that of wide ones."""
    hidden = torch.linspace(-4.0, 4.0, 64)[:, None] * softcap
    hidden[:8] = torch.linspace(-1e-3, 1e-3, 8)[:, None]
    weight, target = torch.tensor([[1.0], [-1.0]]), torch.zeros(64, dtype=torch.int64)
    rule, plan = Rule(softcap=softcap), Plan(backend=backend)
    inputs = [tensor.to(device) for tensor in (hidden, weight)]
    capped = operators.target_logit(*inputs, None, target.to(device), *rule, *plan).cpu()
    exact = softcap * torch.tanh(hidden[:, 0].double() / softcap)
    torch.testing.assert_close(capped.double(), exact, rtol=2e-7, atol=1e-5)
    nll = perplexity.token_nll(*inputs, target.to(device), softcap=softcap, backend=backend)
    assert (nll >= 0).all()


# Names of ``rows`` for P and for Q. A sum of several float32 maxima is infinite in ours, where
# torch's products of a probability and a logarithm may be finite: Q masks one entry by the lowest
# number, or the same ones as P.
PAIRS = [
    ("all lowest", "all lowest"),
    ("all lowest", "all below a quarter of the lowest"),
    ("every other lowest", "every other lowest"),
    ("first half lowest", "one lowest elsewhere"),
    ("one highest", "one highest"),
    ("first half -inf", "one lowest elsewhere"),
    ("one lowest", "one lowest"),
    ("last span lowest", "one lowest"),
    ("first half -inf", "first half -inf"),
    ("one lowest", "first half -inf"),
    ("all -inf", "one lowest"),
    ("one lowest", "all -inf"),
    ("one +inf", "one lowest"),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_divergences(backend, device):
    """Gradients are compared where the divergence is finite: elsewhere torch's may be NaN."""
    # three tiles of the interpreter; spans are merged in plain PyTorch
    table = rows(torch.float32, 300, 256)
    table["one lowest elsewhere"] = table["one lowest"].roll(7)
    hidden, weight = torch.zeros(1, 4, device=device), torch.zeros(300, 4, device=device)
    for p, q in PAIRS:
        biases = table[p].to(device), table[q].to(device)

        def ours(a, b):
            return perplexity.linear_kl_divergence(
                hidden, weight, hidden, weight, bias_p=a, bias_q=b, backend=backend
            )

        def theirs(a, b):
            return reference.kl_divergence(a[None], b[None])

        plain = theirs(*biases)
        if plain.isfinite().all():
            beside_torch((p, q), ours, theirs, *biases)  # the divergence, too
        else:
            close((p, q), ours(*biases), plain, theirs(*(bias.double() for bias in biases)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [-INF, torch.finfo(torch.float32).min], ids=["-inf", "lowest"])
@pytest.mark.parametrize("empty", [False, True], ids=["two", "one empty"])
def test_a_shard_that_is_masked(empty, masked, backend, device, size):
    """All rows of a rank are masked: shards are merged without processes, gradients included."""
    V, _ = size
    split = 3 * V // 7
    shards = [(0, 0)] * empty + [(0, split), (split, V)]
    generator = torch.Generator().manual_seed(3)
    for hidden_from in (0, split):  # the masked shard is the first one or the last one
        bias = torch.randn(V, generator=generator)
        bias[hidden_from : split if hidden_from == 0 else V] = masked
        bias, target = (
            bias.to(device),
            torch.tensor([split - hidden_from, V - 1 - hidden_from, -100], device=device),
        )
        hidden, weight = torch.zeros(3, 4, device=device), torch.zeros(V, 4, device=device)

        def sharded(bias, target=target, hidden=hidden, weight=weight):
            parts = []
            for start, end in shards:
                local = torch.where((target >= start) & (target < end), target - start, -1)
                local = torch.where(target == -100, -100, local)
                sums, _ = operators.linear_nll(
                    hidden,
                    weight[start:end],
                    bias[start:end],
                    local,
                    None,
                    *Rule(with_exp_shift=True),
                    *Plan(backend),
                )
                rows = list(sums.unbind())
                rows[2] = torch.where(local >= 0, rows[2], 0.0)
                parts.append(torch.stack(rows))
            sums = operators.merge(torch.stack(parts, 1), target, None, V, -100, backend)
            from perplexity.per_token import negative_log_likelihood, token_entropy

            return torch.stack([negative_log_likelihood(sums), token_entropy(sums)])

        def whole(bias, target=target):
            z = bias.expand(3, V)
            return torch.stack([torchs(z, target), entropy(z).masked_fill(target == -100, 0.0)])

        beside_torch(hidden_from, sharded, whole, bias)


def is_zero(tensor):
    return bool((tensor == 0).all()) and not bool(tensor.signbit().any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1.0, -30.0, 1e4, 1e6, -1e6])
def test_zeros_are_exact_and_positive(offset, backend, device):
    """−log p of probability 1 was −0: at ignored positions, of one class, of a dominant class."""
    target = torch.tensor([0, -100, 0], device=device)
    for classes in (1, 5):
        z = torch.full((3, classes), offset, device=device)
        z[:, 1:] -= 1000.0  # e to that power is 0
        hidden, weight = torch.zeros(3, 2, device=device), torch.zeros(classes, 2, device=device)
        options = dict(linear_bias=z[0], backend=backend)
        statistics = perplexity.token_statistics(hidden, weight, target, **options)
        log_p, spread = perplexity.token_log_probabilities(
            hidden, weight, target, with_entropy=True, **options
        )
        linear = perplexity.linear_cross_entropy(
            hidden, weight, target, reduction="none", **options
        )
        smoothed = perplexity.cross_entropy(
            z, target, reduction="none", label_smoothing=0.1, backend=backend
        )
        leaf = z.clone().requires_grad_()
        loss = perplexity.cross_entropy(leaf, target, reduction="none", backend=backend)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        for ours in (statistics.nll, statistics.entropy, log_p, spread, linear, loss, gradient):
            assert is_zero(ours), ours
        assert is_zero(smoothed if classes == 1 else smoothed[1:2])
        assert is_zero(statistics.logsumexp[1:2])
        divergence = perplexity.linear_kl_divergence(
            hidden, weight, hidden, weight, bias_p=z[0], bias_q=z[0] - 7.0, backend=backend
        )
        assert is_zero(divergence)
