"""``return_statistics``: the loss, its gradients and the statistics of its own logits in one pass."""

import pytest
import torch
import torch.nn.functional as F
from test_losses import OPTIONS, case, upstream_like

import perplexity
from perplexity import LinearCrossEntropyLoss, VocabularyShard
from perplexity.errors import InputError, InputTypeError
from perplexity.kernels import chunks, dispatch
from perplexity.kernels.cpu import blockwise_statistics, logit_blocks

BACKENDS = ("torch", "triton")
HEAD = ("linear_bias", "softcap", "logit_scale", "ignore_index", "shift")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_equal_those_of_their_own_call(options, backend, device):
    leaves, target, keywords = case(options, device)
    hidden, weight, *bias = leaves
    keywords |= dict(linear_bias=bias[0] if bias else None, backend=backend)
    plain = perplexity.linear_cross_entropy(hidden, weight, target, **keywords)
    loss, statistics, confidence = perplexity.linear_cross_entropy(
        hidden, weight, target, return_statistics=True, with_confidence=True, **keywords
    )
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    upstream = upstream_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves, upstream),
        torch.autograd.grad(plain, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    rule = {name: keywords[name] for name in HEAD if name in keywords} | {"backend": backend}
    expected, sure = perplexity.token_statistics(
        hidden, weight, target, with_confidence=True, **rule
    )
    for name, ours, theirs in zip(statistics._fields, statistics, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=name)
        assert not ours.requires_grad and ours.shape == target.shape
    torch.testing.assert_close(confidence, sure, rtol=1e-6, atol=1e-6)


def test_the_mean_accuracy_is_a_line(device):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 9, 16, generator=generator)
    weight = torch.randn(211, 16, generator=generator)
    target = (hidden @ weight.T).argmax(-1)
    target[:, ::2] = (target[:, ::2] + 1) % 211  # wrong ones
    target[0] = -100
    _, statistics = perplexity.linear_cross_entropy(
        hidden, weight, target, shift=0, return_statistics=True
    )
    counted = target != -100
    accuracy = (statistics.rank == 0).sum() / counted.sum()
    assert accuracy == (statistics.predicted == target).sum() / counted.sum() == 8 / 18


@pytest.mark.parametrize("shift", [0, 1])
def test_rounded_logits_are_the_statistics_too(shift, monkeypatch):
    """Logits rounded to bfloat16: the NLL of the statistics is the loss's, and ranks count them."""
    for module in (logit_blocks, blockwise_statistics, chunks, dispatch):
        monkeypatch.setattr(module, "multiplies_16_bits", lambda *_: True)
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(4, 33, 24, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(500, 24, generator=generator).bfloat16().requires_grad_()
    target = torch.randint(500, (4, 33), generator=generator)
    loss, statistics = perplexity.linear_cross_entropy(
        hidden, weight, target, reduction="none", shift=shift, return_statistics=True
    )
    torch.testing.assert_close(loss, statistics.nll, rtol=0, atol=0)
    z = F.linear(hidden, weight).float().detach()[:, : 33 - shift]
    own = z.gather(-1, target[:, shift:, None])
    assert torch.equal(statistics.rank, (z > own).sum(-1))
    assert torch.equal(statistics.predicted, z.argmax(-1))
    loss.sum().backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_training_keeps_products_here_too(monkeypatch):
    """Three matrix products, not four: the backward recalls the forward's."""
    recalled = []
    recall = logit_blocks.Logits.block

    def block(self, tokens, columns):
        recalled.append(self.recall and self.kept is not None)
        return recall(self, tokens, columns)

    monkeypatch.setattr(logit_blocks.Logits, "block", block)
    hidden, weight = (torch.randn(size, 32, requires_grad=True) for size in (16, 300))
    target = torch.randint(300, (16,))
    loss, _ = perplexity.linear_cross_entropy(hidden, weight, target, return_statistics=True)
    loss.backward()
    assert any(recalled)


def test_as_a_module_and_compiled():
    module = LinearCrossEntropyLoss(16, 211, return_statistics=True, with_confidence=True)
    hidden, target = torch.randn(7, 16), torch.randint(211, (7,))
    loss, statistics, confidence = module(hidden, target)
    assert confidence.shape == statistics.rank.shape == (7,) and (confidence > 0).all()
    torch.testing.assert_close(loss, statistics.nll.mean())
    assert "return_statistics=True" in module.extra_repr()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    again, _, _ = compiled(hidden, target)
    torch.testing.assert_close(again, loss)


def test_a_shard_of_everything(tmp_path):
    """The vocabulary of one rank: the merge of one part changes nothing."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        hidden, weight = torch.randn(5, 8), torch.randn(64, 8, requires_grad=True)
        target = torch.tensor([3, 63, -100, 0, 7])
        plain, expected = perplexity.linear_cross_entropy(
            hidden, weight, target, return_statistics=True
        )
        shard = VocabularyShard.of(weight)
        loss, statistics = perplexity.linear_cross_entropy(
            hidden, weight, target, shard=shard, return_statistics=True
        )
        torch.testing.assert_close(loss, plain)
        for ours, theirs in zip(statistics, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(return_statistics=1), InputTypeError, "return_statistics: expected True or False"),
        (dict(with_confidence=True), InputError, "with_confidence: expected False without"),
        (
            dict(target=torch.full((2, 5), 0.2), return_statistics=True),
            InputTypeError,
            "target: expected class indices with return_statistics, got class probabilities",
        ),
        (
            dict(linear_weight=torch.zeros(5, 3, 8), return_statistics=True),
            InputError,
            "return_statistics: expected False with a linear_weight of 3 dimensions",
        ),
    ],
)
def test_bad_input(options, error, words):
    given = dict(
        input=torch.zeros(2, 8), linear_weight=torch.zeros(5, 8), target=torch.tensor([1, 2])
    )
    with pytest.raises(error, match=words):
        perplexity.linear_cross_entropy(**given | options)
