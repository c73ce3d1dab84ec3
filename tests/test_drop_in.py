"""Arguments of torch's cross_entropy and linear_cross_entropy give torch's values and gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import perplexity
from perplexity.errors import InputError

N, V, D = 6, 11, 5
BACKENDS = ("torch", "triton")


def tensors(*shapes, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def labels(*shape, dtype=torch.int64, seed=4):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def equal(ours, theirs, leaves, **tolerance):
    """Values and the gradients of all leaves."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    upstream = torch.linspace(0.5, 1.5, ours.numel()).view(ours.shape)
    got, expected = (
        torch.autograd.grad(loss, leaves, upstream, retain_graph=True) for loss in (ours, theirs)
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_of_every_integer_dtype(dtype, backend):
    hidden, weight = tensors((N, D), (V, D))
    target, wide = labels(N, dtype=dtype), labels(N)
    logits = hidden @ weight.T
    equal(
        perplexity.cross_entropy(logits, target, backend=backend),
        F.cross_entropy(logits, wide),
        [hidden, weight],
    )
    ours = perplexity.linear_cross_entropy(hidden, weight, target, backend=backend)
    equal(ours, F.cross_entropy(logits, wide), [hidden, weight])


def test_probabilities_with_a_gradient():
    """Labels that are learnt, or a teacher that is trained along: torch has that gradient."""
    options = itertools.product(
        ("mean", "sum", "none"), (0.0, 0.2), (None, torch.linspace(0.5, 2.0, V))
    )
    for reduction, smoothing, classes in options:
        hidden, weight, scores, bias = tensors((N, D), (V, D), (N, V), (V,))
        keywords = {"reduction": reduction, "label_smoothing": smoothing, "weight": classes}
        theirs = F.cross_entropy(hidden @ weight.T + bias, scores.softmax(1), **keywords)
        ours = perplexity.linear_cross_entropy(
            hidden, weight, scores.softmax(1), linear_bias=bias, **keywords
        )
        equal(ours, theirs, [hidden, weight, scores, bias])
        images = (hidden @ weight.T).view(2, 3, V).movedim(-1, 1)
        soft = scores.softmax(1).view(2, 3, V).movedim(-1, 1)
        theirs = F.cross_entropy(images, soft, **keywords)
        equal(perplexity.cross_entropy(images, soft, **keywords), theirs, [hidden, weight, scores])


def test_probabilities_have_the_rule_of_the_logits():
    """Softcap and scale in the gradient of the labels, against the formula in float64."""
    hidden, weight, scores = (
        tensor.detach().double().requires_grad_() for tensor in tensors((N, D), (V, D), (N, V))
    )
    z = 3.0 * torch.tanh(0.7 * (hidden @ weight.T) / 3.0)
    expected = (
        -(scores.softmax(1) * z.log_softmax(1)).sum(1).mean() + 0.1 * z.logsumexp(1).square().mean()
    )
    ours = perplexity.linear_cross_entropy(
        hidden, weight, scores.softmax(1), softcap=3.0, logit_scale=0.7, z_loss=0.1
    )
    equal(ours, expected, [hidden, weight, scores])
    scaled = perplexity.cross_entropy(
        hidden @ weight.T, scores.softmax(1), softcap=3.0, logit_scale=0.7, z_loss=0.1
    )
    equal(scaled, expected, [hidden, weight, scores])


def test_a_second_derivative_by_probabilities_is_an_error():
    hidden, weight, scores = tensors((N, D), (V, D), (N, V))
    loss = perplexity.linear_cross_entropy(hidden, weight, scores.softmax(1))
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(gradient.sum(), hidden)


@pytest.mark.parametrize("index", [None, -100, -1, -7])
def test_a_negative_ignore_index_with_probabilities(index):
    hidden, weight = tensors((N, D), (V, D))
    soft = torch.softmax(torch.arange(N * V).view(N, V) % 5.0, 1)
    theirs = F.cross_entropy(hidden @ weight.T, soft, ignore_index=-100 if index is None else index)
    equal(
        perplexity.linear_cross_entropy(hidden, weight, soft, ignore_index=index),
        theirs,
        [hidden, weight],
    )
    with pytest.raises(InputError, match="ignore_index: expected None or a negative number"):
        perplexity.linear_cross_entropy(hidden, weight, soft, ignore_index=2)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize(
    ("size_average", "reduce"), list(itertools.product((None, True, False), repeat=2))
)
def test_the_older_reductions(size_average, reduce):
    (logits,) = tensors((N, V))
    older = {"size_average": size_average, "reduce": reduce, "reduction": "sum"}
    target = labels(N)
    equal(
        perplexity.cross_entropy(logits, target, **older),
        F.cross_entropy(logits, target, **older),
        [logits],
    )
    ours, theirs = perplexity.CrossEntropyLoss(**older), torch.nn.CrossEntropyLoss(**older)
    assert ours.reduction == theirs.reduction
    equal(ours(logits, target), theirs(logits, target), [logits])


@pytest.mark.parametrize("places", [(1,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_of_several_heads(places, soft, reduction):
    hidden, weight, bias = tensors((N, D), (V, *places, D), (V, *places))
    target = labels(N, *places)
    if soft:
        target = torch.softmax(torch.arange(target.numel() * V).view(N, V, *places) % 7.0, 1)
    else:
        target.view(-1)[::4] = -100
    for classes, smoothing in ((None, 0.0), (torch.linspace(0.5, 2.0, V), 0.3)):
        keywords = {
            "linear_bias": bias,
            "reduction": reduction,
            "weight": classes,
            "label_smoothing": smoothing,
        }
        theirs = F.linear_cross_entropy(hidden, weight, target, **keywords)
        equal(
            perplexity.linear_cross_entropy(hidden, weight, target, **keywords),
            theirs,
            [hidden, weight, bias],
        )


def test_a_module_of_several_heads_has_torchs_attributes():
    torch.manual_seed(0)
    theirs = torch.nn.LinearCrossEntropyLoss(D, V, out_features=(2, 3), bias=True, ignore_index=4)
    ours = perplexity.LinearCrossEntropyLoss(D, V, out_features=(2, 3), bias=True, ignore_index=4)
    ours.load_state_dict(theirs.state_dict())
    for name in (
        "num_classes",
        "out_features",
        "reduction",
        "ignore_index",
        "label_smoothing",
        "options",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.in_features == theirs.linear.in_features
    hidden, target = torch.randn(N, D), labels(N, 2, 3)
    torch.testing.assert_close(ours(hidden, target), theirs(hidden, target))
    single = perplexity.LinearCrossEntropyLoss(D, V)
    assert (single.num_classes, single.out_features, single.options, single.ignore_index) == (
        V,
        (),
        None,
        None,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_loss": 0.1}, "z_loss: expected 0.0 with a linear_weight of 3 dimensions"),
        ({"shift": 1}, "shift: expected 0 with a linear_weight of 3 dimensions"),
        ({"target": labels(N)}, r"target: expected shape \(6, 3\), got \(6,\)"),
        ({"linear_bias": torch.zeros(V)}, r"linear_bias: expected shape \(11, 3\)"),
        ({"input": torch.zeros(2, 3, D)}, r"input: expected shape \[N, D\]"),
    ],
)
def test_several_heads_refuse_what_they_do_not_take(change, message):
    arguments = {
        "input": torch.zeros(N, D),
        "linear_weight": torch.zeros(V, 3, D),
        "target": labels(N, 3),
    } | change
    with pytest.raises(InputError, match=message):
        perplexity.linear_cross_entropy(**arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ignored_token_that_is_no_number_leaves_the_weight_alone(
    value, backend, keep, reduction
):
    """Padding may hold anything: 0 times that is no number in the weight's gradient."""
    hidden, weight, bias = tensors((N, D), (V, D), (V,))
    target = labels(N)
    target[2] = target[5] = -100
    broken = hidden.detach().clone()
    broken[2], broken[5, 1] = value, -value
    broken.requires_grad_()
    results = []
    for states in (broken, hidden):
        loss = perplexity.linear_cross_entropy(
            states,
            weight,
            target,
            linear_bias=bias,
            backend=backend,
            reduction=reduction,
            z_loss=0.1,
            softcap=9.0,
        )
        results.append(torch.autograd.grad(loss.sum(), [states, weight, bias], retain_graph=keep))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
