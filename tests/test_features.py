"""Pairs of features of both losses against torch in float64, and the forms of their inputs."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import perplexity
from perplexity.kernels import reference

BACKENDS = ("torch", "triton")
N, V, D = 23, 131, 19

FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "target": ("indices", "probabilities"),
    "reduction": ("mean", "sum", "none"),
    "ignore_index": (-100, 5),
    "label_smoothing": (0.0, 0.15),
    "class_weight": (False, True),
    "bias": (False, True),
    "softcap": (None, 3.0),
    "logit_scale": (1.0, 0.4),
    "z_loss": (0.0, 0.02),
    "leading": ((N,), (2, 3, 4), ()),
    "shift": (0, 1, 2),
    "layout": ("contiguous", "strided"),
    "frozen": (None, "input", "linear_weight"),
}


def excluded(case):
    """Return whether features exclude each other.

    Class probabilities know no ignored index and no shards, nor does a single token.
    """
    soft, shift = case["target"] == "probabilities", case["shift"]
    return (soft and (shift or case["ignore_index"] != -100)) or (
        shift and len(case["leading"]) == 0
    )


def covering(factors, excluded):
    """Choose cases in which every possible pair of two factors' values appears, greedily.

    Candidates are drawn: the rarest pair stands in one of 18, so that 600 have them all.
    """
    drawn, pool, found = random.Random(0), [], []
    while len(pool) < 600:
        case = {name: drawn.choice(values) for name, values in factors.items()}
        if not excluded(case):
            places = [(name, values.index(case[name])) for name, values in factors.items()]
            pool.append((case, set(itertools.combinations(places, 2))))
    missing = set().union(*(covered for _, covered in pool))
    while missing:
        case, covered = max(pool, key=lambda entry: len(entry[1] & missing))
        found.append(case)
        missing -= covered
    return found


CASES = covering(FACTORS, excluded)
TOLERANCE = {torch.float32: (1e-5, 5e-4), torch.float16: (1e-3, 1e-3), torch.bfloat16: (1e-2, 1e-2)}


def strided(tensor):
    """The same values, nothing contiguous; a scalar's or a vector's neighbours are others."""
    wide = torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]
    return wide if tensor.dim() < 2 else wide.transpose(0, 1).contiguous().transpose(0, 1)[..., :]


def build(case, device):
    generator = torch.Generator().manual_seed(11)
    leading, dtype = case["leading"], case["dtype"]
    tensors = {
        "input": torch.randn(*leading, D, generator=generator),
        "linear_weight": torch.randn(V, D, generator=generator),
        "linear_bias": torch.randn(V, generator=generator) if case["bias"] else None,
    }
    target = torch.randint(0, V, leading, generator=generator)
    if target.dim():
        target.view(-1)[1::5] = case["ignore_index"]
    if case["target"] == "probabilities":
        target = torch.randn(*leading, V, generator=generator).softmax(-1)
    lay = strided if case["layout"] == "strided" else lambda tensor: tensor
    leaves = {
        name: lay(tensor.to(device, dtype)).detach().requires_grad_(name != case["frozen"])
        for name, tensor in tensors.items()
        if tensor is not None
    }
    weight = torch.rand(V, generator=generator).to(device) if case["class_weight"] else None
    return leaves, lay(target.to(device)), None if weight is None else lay(weight)


def torchs(case, z, target, weight):
    """The loss by torch from logits z [..., V]; z_loss by its definition."""
    shape, shift = target.shape if case["target"] == "indices" else target.shape[:-1], case["shift"]
    if shift:
        z, target = z[..., :-shift, :], target[..., shift:]
        shape = target.shape
    soft = case["target"] == "probabilities"
    z, target = z.reshape(-1, V), target.reshape(-1, V) if soft else target.reshape(-1)
    counted = (
        torch.ones(len(z), dtype=torch.bool, device=z.device)
        if soft
        else target != case["ignore_index"]
    )
    loss = F.cross_entropy(
        z,
        target.to(z.dtype) if soft else target,
        None if weight is None else weight.to(z.dtype),
        reduction=case["reduction"],
        label_smoothing=case["label_smoothing"],
        **({} if soft else {"ignore_index": case["ignore_index"]}),
    )
    penalty = case["z_loss"] * z.logsumexp(1).square() * counted
    if case["reduction"] == "none":
        return (loss + penalty).reshape(shape)
    return loss + (penalty.sum() if case["reduction"] == "sum" else penalty.sum() / counted.sum())


def compare(case, ours, leaves, formula):
    """Assert |ours − float64| ≤ |torch in that dtype − float64| + tolerance of loss and gradients.

    Differences above 1 are relative.
    """
    forward, gradient = TOLERANCE[case["dtype"]]
    results = []
    for dtype in (torch.float64, case["dtype"]):
        copies = {
            name: leaf.detach().to(dtype).contiguous().requires_grad_(leaf.requires_grad)
            for name, leaf in leaves.items()
        }
        loss = formula(**copies)
        results.append((loss, [leaf for leaf in copies.values() if leaf.requires_grad]))
    results.append((ours, [leaf for leaf in leaves.values() if leaf.requires_grad]))
    rows = []
    for loss, wanted in results:
        upstream = torch.linspace(
            0.4, 1.7, loss.numel(), dtype=loss.dtype, device=loss.device
        ).reshape(loss.shape)
        rows.append(
            [
                loss.detach().double(),
                *(g.double() for g in torch.autograd.grad(loss, wanted, upstream)),
            ]
        )
    for index, (exact, plain, got) in enumerate(zip(*rows, strict=True)):
        assert got.shape == exact.shape
        allowed = (plain - exact).abs().max() + (
            gradient if index else forward
        ) * exact.abs().clamp(min=1.0)
        assert ((got - exact).abs() <= allowed).all(), (index, (got - exact).abs().max())


def keywords(case):
    names = (
        "reduction",
        "ignore_index",
        "label_smoothing",
        "softcap",
        "logit_scale",
        "z_loss",
        "shift",
    )
    return {name: case[name] for name in names}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join(str(v).replace("torch.", "") for v in case.values())
)
def test_linear_cross_entropy(case, backend, device):
    if case["target"] == "probabilities" and backend == "triton":
        backend = None
    leaves, target, weight = build(case, device)
    ours = perplexity.linear_cross_entropy(
        leaves["input"],
        leaves["linear_weight"],
        target,
        linear_bias=leaves.get("linear_bias"),
        weight=weight,
        backend=backend,
        **keywords(case),
    )
    assert ours.dtype == torch.float32

    def formula(input, linear_weight, linear_bias=None):
        z = F.linear(input, linear_weight, linear_bias) * case["logit_scale"]
        z = z if z.dtype == torch.float64 else z.float()
        z = z if case["softcap"] is None else case["softcap"] * torch.tanh(z / case["softcap"])
        return torchs(case, z, target, weight)

    compare(case, ours, leaves, formula)


FORMS = {
    "[N, C]": (N,),
    "[C]": (),
    "[N, C, d1]": (4, 5),
    "[N, C, d1, d2]": (2, 3, 4),
    "[1, C, d1]": (1, 6),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["frozen"] != "input" and not case["bias"]],
    ids=lambda case: "-".join(str(v).replace("torch.", "") for v in case.values()),
)
def test_cross_entropy(case, form, backend, device):
    """torch's form has the classes second: [N, C, d1, ...], read where they are."""
    case = case | {"leading": FORMS[form], "bias": False}
    if excluded(case):
        case["shift"] = 0
    if case["shift"] and case["shift"] >= case["leading"][-1]:
        case["shift"] = 1
    leaves, target, weight = build(case, device)
    logits = (leaves["input"] @ leaves["linear_weight"].T).detach()
    if case["layout"] == "strided":
        logits = strided(logits)
    second = min(1, len(case["leading"]))
    logits = logits.movedim(-1, second)
    if case["layout"] == "contiguous":
        logits = logits.contiguous()
    if case["target"] == "probabilities":
        target = target.movedim(-1, second)
        backend = None if backend == "triton" else backend
    logits.requires_grad_()
    ours = perplexity.cross_entropy(logits, target, weight, backend=backend, **keywords(case))
    assert ours.dtype == torch.float32

    def formula(input):
        z = input.movedim(second, -1) * case["logit_scale"]
        z = z if z.dtype == torch.float64 else z.float()
        z = z if case["softcap"] is None else case["softcap"] * torch.tanh(z / case["softcap"])
        return torchs(
            case, z, target.movedim(second, -1) if target.is_floating_point() else target, weight
        )

    compare(case, ours, {"input": logits}, formula)


def test_logits_with_classes_second_are_not_copied():
    """A copy to [N · d1, C] would be the largest tensor there is."""
    from test_memory import LiveBytes

    from perplexity.kernels.cpu import blockwise_rows
    from perplexity.kernels.dispatch import Plan

    logits, target = torch.randn(3, 1000, 200), torch.randint(0, 1000, (600,))
    plan = Plan(memory_limit=1 << 18)
    peak = LiveBytes().of(blockwise_rows.nll, logits, target, plan=plan)
    assert peak <= (1 << 18) + 40 * 8 * 600
    peak = LiveBytes().of(
        blockwise_rows.nll_grad, torch.ones(5, 600), torch.zeros(600), logits, target, plan=plan
    )
    assert peak <= (1 << 18) + 40 * 8 * 600


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shift_copies_no_hidden_states(backend, device, monkeypatch):
    from perplexity.kernels import operators

    seen, original = [], operators.linear_nll
    monkeypatch.setattr(
        operators,
        "linear_nll",
        lambda hidden, *rest: seen.append(hidden) or original(hidden, *rest),
    )
    hidden = torch.randn(2, 9, D, device=device)
    weight, labels = torch.randn(V, D, device=device), torch.randint(0, V, (2, 9), device=device)
    loss = perplexity.linear_cross_entropy(
        hidden, weight, labels, shift=True, reduction="none", backend=backend
    )
    assert seen[0].data_ptr() == hidden.data_ptr() and seen[0].shape == (18, D)
    expected = F.cross_entropy(
        (hidden @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(loss, expected.view(2, 8), rtol=1e-5, atol=1e-5)
    for function in (perplexity.token_nll, perplexity.token_log_probabilities):
        torch.testing.assert_close(
            function(hidden, weight, labels, shift=1, backend=backend).abs(), loss
        )
    statistics = perplexity.token_statistics(hidden, weight, labels, shift=1, backend=backend)
    assert all(part.shape == (2, 8) for part in statistics)
    assert perplexity.linear_cross_entropy(
        hidden, weight, labels, shift=9, reduction="none", backend=backend
    ).shape == (2, 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum", "label_smoothing": 0.1}, {"ignore_index": 2}], ids=str
)
def test_modules_are_torchs(options, bias):
    """The constructors and calls of torch.nn, the same parameters under the same names."""
    weight = torch.rand(V)
    for theirs in (
        nn.LinearCrossEntropyLoss(D, V, bias=bias, weight=weight, **options),
        nn.CrossEntropyLoss(weight, **options),
    ):
        linear = isinstance(theirs, nn.LinearCrossEntropyLoss)
        ours = (
            perplexity.LinearCrossEntropyLoss(D, V, bias=bias, weight=weight, **options)
            if linear
            else perplexity.CrossEntropyLoss(weight, **options)
        )
        ours.load_state_dict(theirs.state_dict())
        assert [name for name, _ in ours.named_parameters()] == [
            name for name, _ in theirs.named_parameters()
        ]
        input = torch.randn(9, D if linear else V)
        for target in (torch.randint(0, V, (9,)), torch.randn(9, V).softmax(1)):
            if target.is_floating_point() and "ignore_index" in options:
                for module, error in ((theirs, RuntimeError), (ours, ValueError)):
                    with pytest.raises(error, match="ignore_index"):
                        module(input, target)
                continue
            torch.testing.assert_close(
                ours(input, target), theirs(input, target), rtol=1e-5, atol=1e-5
            )
    assert "reduction" in repr(ours)


def test_torch_positional_arguments():
    """cross_entropy takes torch's order of arguments."""
    z, target, weight = torch.randn(4, 6), torch.tensor([0, 2, 5, 1]), torch.rand(6)
    arguments = (z, target, weight, None, 2, None, "sum", 0.1)
    torch.testing.assert_close(perplexity.cross_entropy(*arguments), F.cross_entropy(*arguments))
    torch.testing.assert_close(
        perplexity.linear_cross_entropy(z, z.T @ z, target, options=None, ignore_index=None),
        F.linear_cross_entropy(z, z.T @ z, target),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_divergence_of_leading_dimensions(backend, device):
    p, q = (torch.randn(2, 3, d, device=device) for d in (4, 6))
    wp, wq = (torch.randn(V, d, device=device) for d in (4, 6))
    divergence = perplexity.linear_kl_divergence(p, wp, q, wq, backend=backend)
    expected = reference.kl_divergence(
        (p @ wp.T).double().flatten(0, 1), (q @ wq.T).double().flatten(0, 1)
    )
    assert divergence.dtype == torch.float32
    torch.testing.assert_close(divergence.double(), expected.view(2, 3), rtol=1e-5, atol=1e-5)
    assert perplexity.linear_kl_divergence(p[:0], wp, q[:0], wq, backend=backend).shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_divergence_without_support_is_infinite(backend, device):
    """q of 0 where p is not."""
    hidden, weight = torch.randn(3, 4, device=device), torch.randn(9, 4, device=device)
    bias = torch.zeros(9, device=device)
    bias[4] = -torch.inf
    forward = perplexity.linear_kl_divergence(
        hidden, weight, hidden, weight, bias_q=bias, backend=backend
    )
    assert (forward == torch.inf).all()
    backward = perplexity.linear_kl_divergence(
        hidden, weight, hidden, weight, bias_p=bias, backend=backend
    )
    p = (hidden @ weight.T).softmax(1)
    torch.testing.assert_close(backward, -torch.log1p(-p[:, 4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_nothing_and_of_everything_ignored(backend, device):
    weight = torch.randn(V, D, device=device)
    empty = perplexity.token_statistics(
        torch.zeros(0, D, device=device),
        weight,
        torch.zeros(0, dtype=torch.int64, device=device),
        backend=backend,
    )
    assert [part.shape for part in empty] == [(0,)] * 5
    target = torch.full((4,), -100, device=device)
    ignored = perplexity.token_statistics(
        torch.randn(4, D, device=device), weight, target, backend=backend
    )
    assert all((part == 0).all() for part in ignored[:3]) and all(
        (part == -1).all() for part in ignored[3:]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_attack_found(backend, device):
    """Once these failed: memory_limit, no positions, ranks under autocast, ignored first labels."""
    logits, labels = (
        torch.randn(9, 3, device=device, requires_grad=True),
        torch.zeros(9, dtype=torch.int64, device=device),
    )
    loss = perplexity.cross_entropy(logits, labels, memory_limit=100, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    torch.autograd.grad(loss, logits)
    nothing = torch.zeros(3, 0, dtype=torch.int64, device=device)
    assert (
        perplexity.cross_entropy(
            torch.randn(3, 5, 0, device=device), nothing, reduction="sum", backend=backend
        )
        == 0
    )
    hidden, weight = torch.randn(64, 256, device=device), torch.randn(2000, 256, device=device)
    target = torch.randint(0, 2000, (64,), device=device)
    plain = perplexity.token_statistics(
        hidden.bfloat16(), weight.bfloat16(), target, backend=backend
    )
    with torch.autocast(device, torch.bfloat16):
        cast = perplexity.token_statistics(hidden, weight, target, backend=backend)
    assert torch.equal(cast.rank, plain.rank)
    labels = torch.tensor([[9**9, 1, 2]], device=device)  # the first is no target
    perplexity.linear_cross_entropy(
        hidden[:3][None], weight, labels, shift=True, validate=True, backend=backend
    )
    small = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    options = dict(ignore_index=2**32, reduction="none", backend=backend)
    assert (perplexity.cross_entropy(torch.randn(3, 5, device=device), small, **options) > 0).all()


def test_modules_are_changed_by_their_attributes():
    """mixup and others read and set them, as torch.nn's."""
    module = perplexity.CrossEntropyLoss(label_smoothing=0.1)
    assert (module.reduction, module.ignore_index, module.label_smoothing) == ("mean", -100, 0.1)
    module.reduction = "none"
    assert module(torch.randn(3, 5), torch.tensor([1, 2, 0])).shape == (3,)
    import numpy as np

    assert perplexity.CrossEntropyLoss(ignore_index=np.int64(3)).ignore_index == 3
