"""The kernel tables: cases, and bodies that take a device, so that tests/gpu runs them compiled.

The oracle is ``perplexity.kernels.reference`` in float64 on the very inputs (rounded to the case's
dtype); the rule for 16 bits is |ours − exact| ≤ |torch in that dtype − exact| + tolerance.
"""

from dataclasses import dataclass, field, replace

import torch

from perplexity.kernels import operators, reference, sums
from perplexity.kernels.dispatch import Plan, Rule
from perplexity.kernels.sums import EXP_SHIFT, LOGIT_SUM, MAX, SUM_EXP, TARGET

# Forward: torch's own float32 sums differ among themselves by some 1e-6 at these shapes; 16-bit
# inputs are exact in ours.
FORWARD = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Gradients: products of N or V terms in float32; rounded to the inputs' dtype at the end.
GRADIENT = {torch.float64: 1e-11, torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}

SHAPES = [
    (140, 507, 123),  # nothing divides anything
    (9, 41, 7),
    (1, 1, 1),
    (1, 300, 5),
    (70, 4201, 40),  # three spans of the vocabulary, the last one odd
    (33, 517, 300),  # hidden size larger than one block
]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int] = (33, 517, 70)
    dtype: torch.dtype = torch.float32
    bias: bool = False
    masked_bias: bool = False  # some entries −inf
    softcap: float | None = None
    logit_scale: float = 1.0
    class_weight: bool = False
    scale: float = 1.0  # standard deviation of the logits, about
    peaked: bool = False  # the target far above the rest
    ignored: str = "some"  # none, some, most, all
    target_dtype: torch.dtype = torch.int64
    layout: str = "contiguous"  # transposed, sliced, misaligned
    options: dict = field(default_factory=dict)

    def __str__(self):
        default = Case()
        parts = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)]
        return ",".join(parts).replace("torch.", "") or "default"


@dataclass
class Inputs:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    class_weight: torch.Tensor | None
    upstream: torch.Tensor


def laid_out(matrix, layout):
    """The same values in another storage."""
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "sliced":
        wide = matrix.new_zeros(matrix.shape[0], 2 * matrix.shape[1] + 1)
        wide[:, 1::2] = matrix
        return wide[:, 1::2]
    if layout == "misaligned":
        flat = matrix.new_zeros(matrix.numel() + 1)
        flat[1:] = matrix.reshape(-1)
        return flat[1:].view(matrix.shape)
    return matrix


def build(case: Case, device: str) -> Inputs:
    N, V, D = case.shape
    generator = torch.Generator().manual_seed(N + V + D)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight = randn(N, D), randn(V, D) * case.scale / D**0.5
    target = torch.randint(0, V, (N + 1,), generator=generator)
    if case.peaked:
        weight[target[1:]] += 3.0 * hidden
    share = {"none": 0.0, "some": 0.2, "most": 0.95, "all": 1.0}[case.ignored]
    target[torch.rand(N + 1, generator=generator) < share] = -100
    bias = randn(V) if case.bias or case.masked_bias else None
    if case.masked_bias:
        bias[torch.rand(V, generator=generator) < 0.3] = -torch.inf
        bias[target[target >= 0]] = 0.5
    upstream = randn(5, N)
    upstream[MAX] = 0.0
    upstream[LOGIT_SUM] /= V
    if case.masked_bias:
        upstream[LOGIT_SUM] = 0.0  # the sum of −inf has no gradient
    return Inputs(
        laid_out(hidden.to(device, case.dtype), case.layout),
        laid_out(weight.to(device, case.dtype), case.layout),
        None if bias is None else bias.to(device, case.dtype),
        target.to(device, case.target_dtype)[1:],  # labels[1:]: not 16-byte aligned
        torch.rand(V, generator=generator).to(device) if case.class_weight else None,
        upstream.to(device),
    )


def derived(sums, with_logit_sum):
    """What a user sees of the five sums."""
    log_sum = sums[SUM_EXP].log()
    out = {
        "nll": (sums[MAX] - sums[TARGET]) + log_sum,
        "logsumexp": sums[MAX] + log_sum,
        "entropy": log_sum - sums[EXP_SHIFT] / sums[SUM_EXP],
    }
    return out | ({"logit_sum": sums[LOGIT_SUM]} if with_logit_sum else {})


def oracle(case: Case, inputs: Inputs, dtype: torch.dtype):
    """Compute sums, derived quantities and gradients from full logits in ``dtype``.

    In 16 bits the logits are rounded as the plain path rounds them.
    """
    leaves = [
        None if tensor is None else tensor.detach().to(dtype).contiguous().requires_grad_()
        for tensor in (inputs.hidden, inputs.weight, inputs.bias)
    ]
    z = reference.logits(*leaves, softcap=case.softcap, logit_scale=case.logit_scale)
    z = z if dtype == torch.float64 else z.float()
    class_weight = None if inputs.class_weight is None else inputs.class_weight.to(z.dtype)
    sums = reference.sums(z, inputs.target.long(), class_weight)
    given = [leaf for leaf in leaves if leaf is not None]
    # Row by row: the logit sum of a masked bias is −inf, and 0 · −inf no number.
    weighted = sum(
        (sums[row] * inputs.upstream[row].to(sums.dtype)).sum()
        for row in range(5)
        if inputs.upstream[row].any()
    )
    gradients = torch.autograd.grad(weighted, given) if len(inputs.target) else given
    return derived(sums.detach(), not case.masked_bias), [
        gradient.detach() for gradient in gradients
    ]


def assert_close(name, ours, plain, exact, tolerance):
    """Assert |ours − exact| ≤ |plain − exact| + tolerance · max(1, |exact|), NaN and inf alike."""
    ours, plain, exact = (tensor.double().cpu() for tensor in (ours, plain, exact))
    assert ours.shape == exact.shape, (name, ours.shape, exact.shape)
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: finite in other places"
    ours, plain, exact = (tensor[finite] for tensor in (ours, plain, exact))
    # One bound a tensor: a rounding of the plain path may hit another element than ours.
    allowed = (plain - exact).abs().max().item() if exact.numel() else 0.0
    excess = (ours - exact).abs() - tolerance * exact.abs().clamp(min=1.0)
    assert not exact.numel() or excess.max().item() <= allowed, (
        f"{name}: off by {(ours - exact).abs().max():.3g}"
    )


def implementation(backend: str):
    module = operators.implementation(backend)
    return module.linear_nll, module.linear_nll_grad


def check_linear(
    case: Case, backend: str, device: str, kept: torch.Tensor | None = None, **plan
) -> None:
    """Check sums and gradients from hidden states against float64.

    ``kept`` and ``plan`` are passed to the forward and the backward.
    """
    forward, backward = implementation(backend)
    inputs = build(case, device)
    rule = Rule(
        softcap=case.softcap, logit_scale=case.logit_scale, with_logit_sum=True, with_exp_shift=True
    )
    plan = Plan(backend, **case.options, **plan)
    arguments = (
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.target,
        inputs.class_weight,
        rule,
        plan,
        kept,
    )
    sums = forward(*arguments)
    exact, exact_gradients = oracle(case, inputs, torch.float64)
    plain, plain_gradients = oracle(case, inputs, case.dtype)
    got = derived(sums, not case.masked_bias)
    for name, value in got.items():
        assert_close(name, value, plain[name], exact[name], FORWARD[case.dtype])
    assert (got["nll"] >= 0).all(), "NLL is never negative"
    maximum = sums[MAX].clone()
    gradients = backward(inputs.upstream.to(sums.dtype), maximum, *arguments)
    gradients = [gradient for gradient in gradients if gradient is not None]
    for name, *values in zip(
        ("hidden", "weight", "bias"), gradients, plain_gradients, exact_gradients, strict=False
    ):
        assert values[0].dtype == case.dtype
        assert_close(f"gradient of {name}", *values, GRADIENT[case.dtype])
    assert len(gradients) == len(exact_gradients)


def check_rows(case: Case, backend: str, device: str) -> None:
    """Sums and gradients from logits that exist, the gradient in their place too."""
    module = operators.implementation(backend)
    N, V, _ = case.shape
    # Logits as "hidden" and an identity as weight: the same oracle.
    inputs = build(replace(case, shape=(N, V, V), layout="contiguous"), device)
    logits = laid_out((inputs.hidden * case.scale).to(case.dtype), case.layout)
    inputs.hidden, inputs.weight = logits, torch.eye(V, dtype=case.dtype, device=device)
    rule = Rule(
        softcap=case.softcap, logit_scale=case.logit_scale, with_logit_sum=True, with_exp_shift=True
    )
    sums = module.nll(logits, inputs.target, inputs.class_weight, rule)
    exact, (exact_gradient, *_) = oracle(case, inputs, torch.float64)
    plain, (plain_gradient, *_) = oracle(case, inputs, case.dtype)
    for name, value in derived(sums, True).items():
        assert_close(name, value, plain[name], exact[name], FORWARD[case.dtype])
    arguments = (
        inputs.upstream.to(sums.dtype),
        sums[MAX].clone(),
        logits,
        inputs.target,
        inputs.class_weight,
        rule,
    )
    gradient = module.nll_grad(*arguments)
    assert_close(
        "gradient of logits", gradient, plain_gradient, exact_gradient, GRADIENT[case.dtype]
    )
    in_place = module.nll_grad(*arguments, out=logits)
    assert in_place is logits and torch.equal(logits, gradient)


def check_statistics(case: Case, backend: str, device: str) -> None:
    """Sums, rank and prediction from hidden states against float64 logits."""
    module, inputs = operators.implementation(backend), build(case, device)
    rule = Rule(softcap=case.softcap, logit_scale=case.logit_scale)
    head = inputs.hidden, inputs.weight, inputs.bias, inputs.target
    at_target = module.target_logit(*head, rule)
    sums, above, best = module.linear_statistics(
        *head, at_target, None, rule, Plan(backend, **case.options)
    )
    exact, _ = oracle(case, inputs, torch.float64)
    plain, _ = oracle(case, inputs, case.dtype)
    for name, value in derived(sums, False).items():
        assert_close(name, value, plain[name], exact[name], FORWARD[case.dtype])
    counted = inputs.target != -100
    assert (above[~counted] == 0).all() and (best[~counted] == 0).all()
    wide = [None if x is None else x.double() for x in (inputs.hidden, inputs.weight, inputs.bias)]
    z = reference.logits(*wide, softcap=case.softcap, logit_scale=case.logit_scale)[counted]
    own = z.gather(1, inputs.target[counted].long()[:, None])
    torch.testing.assert_close(at_target[counted].double(), own[:, 0], rtol=1e-5, atol=1e-5)
    # Logits that differ by less than float32's rounding may be counted either way, no others.
    slack = 1e-5 * z[z.isfinite()].abs().max().clamp(min=1.0) if counted.any() else 0.0
    above, best = above[counted], best[counted]
    assert (above >= (z > own + slack).sum(1)).all() and (
        above <= (z > own - slack).sum(1) - 1
    ).all()
    assert (z.gather(1, best[:, None])[:, 0] >= z.amax(1) - slack).all() if counted.any() else True


def check_kl(case: Case, backend: str, device: str) -> None:
    """KL divergence of two heads of different hidden sizes, and its gradients, against float64."""
    module = operators.implementation(backend)
    N, V, D = case.shape
    p, q = (
        build(case, device),
        build(
            replace(case, shape=(N, V, D + 9), bias=not case.bias, scale=0.7 * case.scale), device
        ),
    )
    # A masked bias hides the same entries on both sides: elsewhere the divergence is infinite.
    heads = [
        (side.hidden, side.weight, p.bias if case.masked_bias else side.bias) for side in (p, q)
    ]
    rules = Rule(softcap=case.softcap, logit_scale=case.logit_scale), Rule()
    plan = Plan(backend, **case.options)
    rows = module.linear_kl(*heads, *rules, plan)
    upstream = p.upstream[0] + torch.linspace(0.3, 2.0, N, device=device)

    def expected(dtype):
        leaves = [
            [
                None if tensor is None else tensor.detach().to(dtype).contiguous().requires_grad_()
                for tensor in head
            ]
            for head in heads
        ]
        a = reference.logits(*leaves[0], softcap=case.softcap, logit_scale=case.logit_scale)
        b = reference.logits(*leaves[1])
        a, b = (a, b) if dtype == torch.float64 else (a.float(), b.float())
        divergence = reference.kl_divergence(a, b)
        given = [leaf for head in leaves for leaf in head if leaf is not None]
        return divergence.detach(), torch.autograd.grad(
            divergence, given, upstream.to(divergence.dtype)
        )

    exact, exact_gradients = expected(torch.float64)
    plain, plain_gradients = expected(case.dtype)
    divergence = sums.divergence(rows)
    assert (divergence >= 0).all()
    assert_close("divergence", divergence, plain, exact, FORWARD[case.dtype])
    gradients = module.linear_kl_grad(upstream, rows, *heads, *rules, plan)
    present = [gradient for gradient in gradients if gradient is not None]
    for index, values in enumerate(zip(present, plain_gradients, exact_gradients, strict=True)):
        assert values[0].dtype == case.dtype
        assert_close(f"gradient {index}", *values, GRADIENT[case.dtype])


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LINEAR = [
    *(Case(shape=shape) for shape in SHAPES),
    *(Case(dtype=dtype, bias=True) for dtype in DTYPES),
    *(Case(dtype=dtype, scale=6.0, peaked=True) for dtype in DTYPES),
    Case(scale=0.0),  # uniform
    Case(scale=1e4),
    Case(scale=1e4, peaked=True),
    Case(softcap=5.0, logit_scale=0.5, bias=True, class_weight=True),
    Case(softcap=5.0, shape=(9, 41, 7)),  # a cap before the mask: padded lanes must not count
    Case(dtype=torch.bfloat16, softcap=20.0, class_weight=True, scale=6.0),
    Case(dtype=torch.float16, shape=(7, 2181, 40), bias=True, softcap=9.0),
    Case(masked_bias=True),
    Case(ignored="none"),
    Case(ignored="most", shape=(130, 300, 16)),
    Case(ignored="all"),
    Case(target_dtype=torch.int32),
    *(Case(layout=layout) for layout in ("transposed", "sliced", "misaligned")),
    Case(options={"memory_limit": 4096}, shape=(17, 300, 40), bias=True),
    Case(options={"memory_limit": 1 << 16}, shape=(130, 400, 30)),
]
ROWS = [
    *(Case(shape=shape) for shape in ((9, 41, 0), (1, 1, 0), (33, 517, 0), (5, 2101, 0))),
    *(Case(shape=(8, 300, 0), dtype=dtype, scale=6.0) for dtype in DTYPES),
    *(Case(shape=(8, 300, 0), layout=layout) for layout in ("transposed", "sliced", "misaligned")),
    Case(shape=(8, 300, 0), scale=1e4),
    Case(shape=(8, 300, 0), softcap=5.0, logit_scale=0.5, class_weight=True),
    Case(shape=(8, 300, 0), ignored="all"),
    Case(shape=(8, 300, 0), target_dtype=torch.int32),
]
# Rank and prediction ask nothing of class weights, nor the divergence of targets.
STATISTICS = [replace(case, class_weight=False) for case in LINEAR]
KL = [
    # A tile takes twice the time: two spans of the vocabulary are enough.
    *(Case(shape=(shape[0], min(shape[1], 2181), shape[2])) for shape in SHAPES),
    *(Case(dtype=dtype, bias=True, scale=3.0) for dtype in DTYPES),
    Case(scale=0.0),
    Case(scale=100.0),
    Case(softcap=5.0, logit_scale=0.5, bias=True),
    Case(masked_bias=True),
    *(Case(layout=layout) for layout in ("transposed", "sliced", "misaligned")),
    Case(options={"memory_limit": 4096}, shape=(17, 300, 40), bias=True),
    Case(options={"memory_limit": 1 << 16}, shape=(130, 400, 30)),
]
