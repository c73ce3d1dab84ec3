"""Losses that make their gradients in the forward, chunk by chunk of logits: the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from test_features import CASES, build, compare, keywords, torchs
from test_losses import OPTIONS
from test_losses import case as loss_case
from test_losses import exact as exact_loss

import perplexity
from perplexity import losses
from perplexity.inputs import LossOptions
from perplexity.kernels import dispatch
from perplexity.kernels.gpu import linear_nll_chunked
from perplexity.kernels.gpu.launch import Target
from perplexity.kernels.sums import EXP_SHIFT, LOGIT_SUM, SUM_EXP, TARGET

CHUNK = 8
HOPPER = Target("cuda", 90)


@pytest.fixture
def ahead(monkeypatch):
    """Takes the way of a GPU; the list of what it was given."""
    taken, function = [], linear_nll_chunked.linear_nll_with_gradients

    def counted(hidden, *arguments, **options):
        taken.append(hidden.shape[0])
        return function(hidden, *arguments, **options)

    monkeypatch.setattr(dispatch, "ahead_chunk", lambda *_, **__: CHUNK)
    monkeypatch.setattr(linear_nll_chunked, "linear_nll_with_gradients", counted)
    return taken


def leaves_of(device, tokens=20, vocabulary=131, dimension=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    shapes = (tokens, dimension), (vocabulary, dimension)
    leaves = [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in shapes
    ]
    return leaves, torch.randint(vocabulary, (tokens,), generator=generator).to(device)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["target"] == "indices" and case["reduction"] != "none"],
    ids=lambda case: "-".join(str(value).replace("torch.", "") for value in case.values()),
)
def test_every_feature(case, ahead, device):
    leaves, target, weight = build(case, device)
    ours = perplexity.linear_cross_entropy(
        leaves["input"],
        leaves["linear_weight"],
        target,
        linear_bias=leaves.get("linear_bias"),
        weight=weight,
        backend="triton",
        **keywords(case),
    )
    assert len(ahead) == 1

    def formula(input, linear_weight, linear_bias=None):
        z = case["logit_scale"] * F.linear(input, linear_weight, linear_bias)
        z = z if case["softcap"] is None else case["softcap"] * torch.tanh(z / case["softcap"])
        return torchs(case, z, target, weight)

    compare(case, ours, leaves, formula)


@pytest.mark.parametrize(
    "options", [options for options in OPTIONS if options.get("reduction") != "none"], ids=str
)
def test_every_option_in_float32(options, ahead, device):
    # Three chunks, the last one of one token.
    leaves, target, options = loss_case({"leading": (17,)} | options, device)
    hidden, weight, *bias = leaves
    ours = perplexity.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias[0] if bias else None, backend="triton", **options
    )
    doubled, expected = exact_loss(leaves, target, options)
    # float32 sums of 211 terms
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    pairs = zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, doubled), strict=True
    )
    for got, wanted in pairs:
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-4)
    assert len(ahead) == 1


def test_float32_to_the_last_digits(ahead, device):
    """The chunks' sums are those of one product: a mean over the whole, not of chunks' means."""
    leaves, target = leaves_of(device)
    target[3:17] = -100  # a chunk of ignored tokens alone, and others with few
    loss = perplexity.linear_cross_entropy(*leaves, target, label_smoothing=0.1, backend="triton")
    doubled = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = F.cross_entropy(doubled[0] @ doubled[1].T, target, label_smoothing=0.1)
    assert ahead == [20] and abs(loss.item() - exact.item()) < 1e-6 * exact.item()
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, doubled), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got.double(), expected, atol=2e-7, rtol=2e-6)
    assert (
        torch.autograd.grad(perplexity.linear_cross_entropy(*leaves, target), leaves)[0][3:17] == 0
    ).all()


def test_a_retained_graph_gives_the_same_gradients_twice(ahead, device):
    leaves, target = leaves_of(device)
    loss = perplexity.linear_cross_entropy(*leaves, target, backend="triton")
    first = torch.autograd.grad(3.0 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3.0 * loss, leaves)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, leaves)


def test_the_upstream_gradient_scales_them(ahead, device):
    leaves, target = leaves_of(device)
    gradients = [
        torch.autograd.grad(
            factor * perplexity.linear_cross_entropy(*leaves, target, backend="triton"), leaves
        )
        for factor in (1.0, 0.25)
    ]
    for whole, quarter in zip(*gradients, strict=True):
        assert torch.equal(0.25 * whole, quarter) and whole.abs().sum() > 0


def test_a_second_derivative_is_an_error(ahead, device):
    leaves, target = leaves_of(device)
    bias = torch.zeros(131, device=device, requires_grad=True)
    frozen = [leaf.detach() for leaf in leaves]
    of_bias = perplexity.linear_cross_entropy(*frozen, target, linear_bias=bias, backend="triton")
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(of_bias, bias, create_graph=True)[0].square().sum().backward()
    loss = perplexity.linear_cross_entropy(*leaves, target, backend="triton")
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    for gradient in gradients:
        with pytest.raises(NotImplementedError, match="double backward"):
            (loss + gradient.square().sum()).backward(retain_graph=True)


def test_nothing_is_made_where_nobody_asks(ahead, device):
    """The fused kernel runs without gradients, a value a token, with probabilities, on torch."""
    leaves, target = leaves_of(device)
    with torch.no_grad():
        perplexity.linear_cross_entropy(*leaves, target, backend="triton")
    perplexity.linear_cross_entropy(*(leaf.detach() for leaf in leaves), target, backend="triton")
    perplexity.linear_cross_entropy(*leaves, target, backend="triton", reduction="none")
    perplexity.linear_cross_entropy(*leaves, target, backend="torch")
    assert ahead == []
    perplexity.linear_cross_entropy(
        leaves[0].detach(), leaves[1], target, backend="triton"
    ).backward()
    assert ahead == [20] and leaves[0].grad is None and leaves[1].grad is not None


def test_a_training_step_under_autocast(ahead, device):
    """Master weights and a bias in float32, products in bfloat16."""
    leaves, target = leaves_of(device)
    leaves.append(torch.randn(131, device=device, requires_grad=True))
    with torch.autocast(device, torch.bfloat16):
        loss = perplexity.linear_cross_entropy(
            *leaves[:2], target, linear_bias=leaves[2], backend="triton"
        )
        plain = F.cross_entropy(F.linear(*leaves).float(), target)
    assert ahead == [20] and abs(loss.item() - plain.item()) < 0.02
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True)
    for got, expected in pairs:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=5e-2)


def test_a_checkpoint_runs_its_region_twice(ahead, device):
    """A checkpoint runs the loss twice; the loss's own small graphs are not the checkpoint's."""
    from torch.utils.checkpoint import checkpoint

    leaves, target = leaves_of(device)
    runs = []

    def region(hidden, weight):
        runs.append(1)
        return perplexity.linear_cross_entropy(
            hidden.tanh().tanh(), weight, target, backend="triton"
        )

    kept = torch.autograd.grad(region(*leaves), leaves)
    again = torch.autograd.grad(checkpoint(region, *leaves, use_reentrant=False), leaves)
    assert len(runs) == 3 and all(
        torch.equal(one, other) for one, other in zip(kept, again, strict=True)
    )
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.shape) or t, lambda t: t
    ):
        perplexity.linear_cross_entropy(*leaves, target, backend="triton")
    assert len(packed) == 3  # the anchor and two gradients
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        perplexity.linear_cross_entropy(*leaves, target, backend="triton")


def test_what_is_traced_is_left_to_the_operators(ahead, device):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, target = leaves_of(device)

    def gradients(hidden, weight):
        loss = perplexity.linear_cross_entropy(
            hidden, weight, target, backend="triton", validate=False
        )
        return torch.autograd.grad(loss, [hidden, weight])

    traced = make_fx(gradients)(*leaves)
    assert not ahead
    for one, other in zip(traced(*leaves), gradients(*leaves), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = (
            torch.randn(20, 16, device=device, requires_grad=True),
            torch.randn(131, 16, device=device),
        )
        loss = perplexity.linear_cross_entropy(*fake, target, backend="triton", validate=False)
    assert loss.shape == () and len(ahead) == 1


@pytest.mark.parametrize("options", [dict(reduction=one) for one in ("sum", "mean")], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_closed_derivative_is_autograds(options, weighted, smoothing, z_loss):
    """In float64, of every row that a kernel reads; tokens that are not scored are the kernel's."""
    generator = torch.Generator().manual_seed(3)
    sums = torch.rand(5, 30, generator=generator, dtype=torch.float64) + 1.0
    target = torch.randint(131, (30,), generator=generator)
    target[5:9] = -100
    class_weight = torch.rand(131, generator=generator, dtype=torch.float64) if weighted else None
    options = LossOptions(label_smoothing=smoothing, z_loss=z_loss, **options)
    scale, counted = losses._weights_of_tokens(target, class_weight, 131, -100, torch.float64)
    totals = scale.sum(), counted.sum()
    derivative = losses._LossDerivative(scale, class_weight, 131, options, totals)
    for tokens in (slice(0, 12), slice(12, 30)):
        leaf = sums[:, tokens].clone().requires_grad_()
        part = losses._loss(leaf, target[tokens], class_weight, 131, options, totals)
        (expected,) = torch.autograd.grad(part, leaf)
        rows = [SUM_EXP, TARGET, LOGIT_SUM]
        got = derivative(leaf.detach(), tokens)
        scored = counted[tokens]
        torch.testing.assert_close(
            got[rows][:, scored], expected[rows][:, scored], atol=1e-15, rtol=1e-13
        )
        assert expected[rows][:, scored].abs().sum() > 0 and (got[EXP_SHIFT] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.3, float("nan"), 0.0])
def test_a_factor_of_one_costs_no_pass(dtype, factor, device):
    """A product of float32 is rounded once, as torch's on a GPU; a factor of 1 changes nothing."""
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(41, 131, generator=generator).to(device, dtype)
    values[3, 5], values[4, 6] = float("inf"), float("nan")
    upstream = torch.tensor(factor, device=device)
    expected = (values.float() * upstream).to(dtype)
    scaled = linear_nll_chunked.scale_(values, upstream)
    assert scaled is values
    # The interpreter drops the bits that bfloat16 has no room for, instead of rounding them.
    cut = 2**-7 if dtype == torch.bfloat16 and torch.device(device).type == "cpu" else 0.0
    rtol = 0.0 if factor == 1.0 else cut
    torch.testing.assert_close(scaled, expected, atol=0.0, rtol=rtol, equal_nan=True)
    assert linear_nll_chunked.scale_(values[:0], upstream).shape == (0, 131)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "dimension", "chunk"),
    [
        (8192, 128256, 4096, 8192),  # four chunks of 2,048 and float32 sums of 4,096 · V
        (10240, 128256, 4096, 10240),  # five chunks of 2,048: as much memory, to the byte
        (10242, 128256, 4096, 2049),
        (1025, 262144, 1152, 1025),
        (32768, 256000, 2304, 1024),
    ],
)
def test_one_chunk_where_it_takes_no_more_memory(tokens, vocabulary, dimension, chunk):
    hidden, weight = (
        torch.empty(rows, dimension, device="meta", dtype=torch.bfloat16)
        for rows in (tokens, vocabulary)
    )
    several = dispatch.ahead_chunk(HOPPER, hidden, weight, True)
    found = dispatch.ahead_chunk(HOPPER, hidden, weight.requires_grad_(), True)
    assert found == chunk
    # Logits in 16 bits, and float32 sums of the weight's gradient where there are several chunks.
    assert 2 * found * vocabulary <= 2 * several * vocabulary + 4 * vocabulary * dimension


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "dimension", "limit", "chunk"),
    [
        (8192, 128256, 4096, 512 << 20, 2048),  # 2,093 fit: four equal chunks
        (8192, 32768, 2048, 512 << 20, 8192),
        (32768, 256000, 2304, 512 << 20, 1024),
        # 261 tokens: the weight's sums would cost more than they spare
        (8192, 128256, 4096, 64 << 20, 0),
        (200, 128256, 4096, 64 << 20, 256),  # all at once, and no sums at all
        (1024, 262144, 1152, 512 << 20, 1024),
        (1025, 262144, 1152, 512 << 20, 640),
        (0, 128256, 4096, 512 << 20, 0),
        (8192, 0, 4096, 512 << 20, 0),
    ],
)
def test_the_chunk_follows_from_the_limit(tokens, vocabulary, dimension, limit, chunk):
    hidden, weight = (
        torch.empty(rows, dimension, device="meta", dtype=torch.bfloat16)
        for rows in (tokens, vocabulary)
    )
    assert dispatch.ahead_chunk(HOPPER, hidden, weight, True, limit) == chunk
    assert 2 * chunk * vocabulary <= limit


def test_where_gradients_are_left_to_the_backward():
    hidden, weight = torch.empty(8192, 64, device="meta"), torch.empty(1000, 64, device="meta")

    def chunk(target=HOPPER, dtype=torch.bfloat16, rounded=True):
        return dispatch.ahead_chunk(target, hidden.to(dtype), weight.to(dtype), rounded)

    assert chunk() == 8192
    assert chunk(dtype=torch.float16) == chunk(dtype=torch.float32) == chunk(rounded=False) == 0
    assert chunk(Target("hip", "gfx942", 64)) == chunk(Target("interpreter", 0)) == 0


def test_the_logits_held_at_once_are_a_chunk(ahead, device, monkeypatch):
    """What the limit counts: no tensor of more logits than a chunk's is made on the way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if (
                    isinstance(tensor, torch.Tensor)
                    and 131 in tensor.shape
                    and 16 not in tensor.shape
                ):
                    largest = max(largest, tensor.numel())
            return result

    leaves, target = leaves_of(device)
    with Watch():
        perplexity.linear_cross_entropy(*leaves, target, backend="triton").backward()
    assert largest == CHUNK * 131 and ahead == [20]
