"""All tables of the kernels and losses again, compiled, with the GPU as their ``device``."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import test_acceptance
import test_extreme_logits
import test_features
import test_gradients_ahead
import test_kernels
import test_losses
import test_properties
import test_torch_citizens
import test_training_curve
from tables import Case, build, implementation

pytestmark = pytest.mark.gpu

for module in (
    test_acceptance,
    test_extreme_logits,
    test_features,
    test_gradients_ahead,
    test_kernels,
    test_losses,
    test_properties,
    test_torch_citizens,
    test_training_curve,
):
    for name, function in list(vars(module).items()):
        if name.startswith("test_"):
            globals()[f"{module.__name__}_{name.removeprefix('test_')}"] = function


# gradients made with the loss, and logits recomputed
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_training_step_in_a_cuda_graph(reduction):
    """Nothing on the way waits for the device: a step is captured and replayed on other values."""
    import perplexity

    shapes = dict(hidden=(64, 128), weight=(1000, 128))
    leaves = [
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes.values()
    ]
    target = torch.randint(0, 1000, (64,), device="cuda")

    def step():
        loss = perplexity.linear_cross_entropy(
            *leaves, target, label_smoothing=0.1, reduction=reduction
        ).sum()
        return loss, *torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].normal_()
        target.random_(0, 1000)
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)


def test_two_runs_of_many_programs_give_the_same_bits():
    """More programs than a device holds at once, in whatever order."""
    inputs = build(Case(shape=(4096, 50257, 512), dtype=torch.bfloat16), "cuda")
    arguments = inputs.hidden, inputs.weight, inputs.bias, inputs.target
    forward, backward = implementation("triton")
    first, second = forward(*arguments), forward(*arguments)
    assert torch.equal(first, second)
    gradients = [backward(inputs.upstream, first[0].clone(), *arguments)[:2] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
