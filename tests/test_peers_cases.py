"""Cases of other libraries' own test suites on our functions (slow).

PyTorch's samples are its OpInfo database, installed with it. Liger-Kernel and cut-cross-entropy
install no tests: the tables below have the shapes, dtypes and options of theirs.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import perplexity

pytestmark = pytest.mark.slow

OURS = {
    "nn.functional.cross_entropy": perplexity.cross_entropy,
    "nn.functional.linear_cross_entropy": perplexity.linear_cross_entropy,
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Of a loss of some nats and of gradients of at most 1: rounding of the dtype that the result has.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def wide(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().double().requires_grad_(value.requires_grad) if floating else value


def gradients(loss, arguments):
    """Of every argument that wants one, with an upstream gradient of its own for each element."""
    leaves = [one for one in arguments if isinstance(one, torch.Tensor) and one.requires_grad]
    upstream = (
        torch.linspace(0.5, 1.5, max(1, loss.numel()))
        .to(loss.dtype)[: loss.numel()]
        .view(loss.shape)
    )
    return torch.autograd.grad(loss, leaves, upstream) if loss.requires_grad else ()


def check(function, reference, arguments, keywords, dtype, peer=None):
    """Compare with float64, where ``peer`` in the arguments' dtype may be nearly as far off."""
    ours = function(*arguments, **keywords)
    exact_arguments = [wide(one) for one in arguments]
    exact = reference(*exact_arguments, **{name: wide(value) for name, value in keywords.items()})
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    results = [ours, *gradients(ours, arguments)], [exact, *gradients(exact, exact_arguments)]
    others = [None] * len(results[0])
    if peer is not None:
        loss = peer(*arguments, **keywords)
        others = [loss, *gradients(loss, arguments)]
    for got, expected, other in zip(*results, others, strict=True):
        off = 0.0 if other is None else (other.double() - expected).abs().nan_to_num().max().item()
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            got.double(), expected, rtol=tolerance, atol=tolerance + off, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_torchs_own_samples(name, dtype):
    pytest.importorskip("expecttest")  # torch's testing package needs it
    from torch.testing._internal.common_methods_invocations import op_db

    count = 0
    for operation in (one for one in op_db if one.name == name):
        for sample in operation.sample_inputs("cpu", dtype, requires_grad=True):
            keywords = {key: value for key, value in sample.kwargs.items() if key != "options"}
            reference = {"nn.functional.cross_entropy": F.cross_entropy}.get(
                name, F.linear_cross_entropy
            )
            arguments = [sample.input, *sample.args]
            check(
                OURS[name],
                reference,
                arguments,
                keywords,
                dtype,
                reference if dtype == torch.bfloat16 else None,
            )
            count += 1
    assert count >= 20


def leaves(tokens, vocabulary, dimension, dtype, bias=False):
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    shapes = [(tokens, dimension), (vocabulary, dimension), *([(vocabulary,)] if bias else [])]
    made = [torch.randn(shape, generator=generator) / shape[-1] ** 0.25 for shape in shapes]
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return [one.to(dtype).requires_grad_() for one in made], target


def formula(
    input, linear_weight, target, *, linear_bias=None, softcap=None, z_loss=0.0, shift=0, **keywords
):
    """The plain path in float64."""
    z = F.linear(input, linear_weight, linear_bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, target, **keywords)
    if z_loss:
        penalty = z_loss * z.logsumexp(1).square() * (target != keywords.get("ignore_index", -100))
        reduce = {
            "mean": lambda x: x.sum() / (target != keywords.get("ignore_index", -100)).sum(),
            "sum": torch.sum,
        }
        loss = loss + reduce[keywords.get("reduction", "mean")](penalty)
    return loss


LIGER_SHAPES = [(8 * 128, 1024, 4096), (3 * 47, 31, 123)]  # tokens, hidden size, vocabulary
LIGER_OPTIONS = [
    dict(
        reduction=reduction,
        label_smoothing=smoothing,
        ignore_index=ignored,
        z_loss=z_loss,
        softcap=softcap,
    )
    for reduction, (smoothing, ignored, z_loss, softcap) in itertools.product(
        ("mean", "sum"), ((0.0, -100, 0.0, None), (0.1, 42, 1e-4, 30.0), (0.1, -100, 1e-4, None))
    )
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LIGER_SHAPES, ids=str)
def test_the_cases_of_liger(shape, dtype):
    tokens, dimension, vocabulary = shape
    for options, bias, classes in itertools.product(LIGER_OPTIONS, (False, True), (False, True)):
        (input, weight, *rest), target = leaves(tokens, vocabulary, dimension, dtype, bias)
        target[::5] = options["ignore_index"]
        keywords = options | ({"weight": torch.linspace(0.1, 1.0, vocabulary)} if classes else {})
        if rest:
            keywords["linear_bias"] = rest[0]
        keywords["round_logits"] = False

        def reference(*arguments, round_logits, **keywords):
            return formula(*arguments, **keywords)

        check(perplexity.linear_cross_entropy, reference, [input, weight, target], keywords, dtype)


# tokens, vocabulary, hidden size
CCE_SHAPES = [(256, 512, 512), (252, 507, 512), (252, 507, 497), (255, 512, 512)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", CCE_SHAPES, ids=str)
def test_the_cases_of_cut_cross_entropy(shape, dtype):
    """With a softcap and without, invalid tokens among them, shifted, each reduction."""
    tokens, vocabulary, dimension = shape
    for softcap, invalids, reduction in itertools.product(
        (None, 20.0), (False, True), ("none", "mean", "sum")
    ):
        (input, weight), target = leaves(tokens, vocabulary, dimension, dtype)
        if invalids:
            target[torch.arange(0, tokens, 7)] = -100
        keywords = {"softcap": softcap, "reduction": reduction}
        check(
            lambda *arguments, **keywords: perplexity.linear_cross_entropy(
                *arguments, **keywords, round_logits=False
            ),
            formula,
            [input, weight, target],
            keywords,
            dtype,
        )
        shifted = perplexity.linear_cross_entropy(input, weight, target, shift=1, **keywords)
        plain = perplexity.linear_cross_entropy(input[:-1], weight, target[1:], **keywords)
        torch.testing.assert_close(shifted, plain, rtol=1e-6, atol=1e-6)
