"""Ignored tokens cost nothing on a CPU: the scored ones alone go through the head."""

import pytest
import torch
from test_losses import OPTIONS, case, upstream_like

import perplexity
from perplexity import inputs
from perplexity.kernels import operators

N, V, D = 40, 211, 16


def masked(options, share: float):
    """Leaves, targets of which a share is ignored, and keywords of ``linear_cross_entropy``."""
    leaves, target, keywords = case(options, "cpu")
    ignored = -100 if keywords.get("ignore_index") is None else keywords["ignore_index"]
    generator = torch.Generator().manual_seed(8)
    flat = target.view(-1)
    flat[torch.randperm(len(flat), generator=generator)[: int(share * len(flat))]] = ignored
    return leaves, target, keywords | dict(backend="torch")


@pytest.fixture
def seen(monkeypatch):
    """The numbers of tokens that the operators get."""
    tokens = []
    for name in ("linear_nll", "linear_statistics"):
        original = getattr(operators, name)

        def counted(hidden, *rest, original=original):
            tokens.append(len(hidden))
            return original(hidden, *rest)

        monkeypatch.setattr(operators, name, counted)
    return tokens


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_gradients_and_statistics_are_those_of_all_tokens(options, seen, monkeypatch):
    leaves, target, keywords = masked(options, 0.7)
    hidden, weight, *bias = leaves
    keywords["linear_bias"] = bias[0] if bias else None

    def results():
        loss, statistics, confidence = perplexity.linear_cross_entropy(
            hidden, weight, target, return_statistics=True, with_confidence=True, **keywords
        )
        gradients = torch.autograd.grad(loss, leaves, upstream_like(loss))
        plain = perplexity.linear_cross_entropy(hidden, weight, target, **keywords)
        return loss, plain, confidence, *statistics, *gradients

    found = results()
    monkeypatch.setattr(inputs, "MOST_SCORED", 0)
    for ours, expected in zip(found, results(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    few, all_of_them = seen[:2], seen[2:]
    assert max(few) <= 0.4 * target.numel() and set(all_of_them) == {target.numel()}


@pytest.mark.parametrize(
    ("share", "scored"), [(0.0, N), (0.1, N), (0.5, N // 2), (0.975, 1), (1.0, N)]
)
def test_which_tokens_go_through_the_head(share, scored, seen):
    """Few ignored ones are not worth a copy; where none is left the call is as before."""
    target = torch.randint(V, (N,))
    target[: int(share * N)] = -100
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    nll = perplexity.token_nll(hidden, weight, target)
    assert seen == [scored] and nll.shape == (N,)
    exact = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="none")
    torch.testing.assert_close(nll, exact.detach(), rtol=1e-5, atol=1e-5)
    loss = perplexity.linear_cross_entropy(hidden, weight, target)
    loss.backward()
    assert loss.isnan() == (share == 1.0)
    assert (hidden.grad[target == -100] == 0).all() or share == 1.0


def test_the_copy_counts_in_the_limit(seen):
    """Half of the limit is for it; with less the ignored tokens stay where they are."""
    target = torch.randint(V, (N,))
    target[: N // 2] = -100
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    copied = N // 2 * D * 4
    for limit in (2 * copied, 2 * copied - 4):
        perplexity.token_nll(hidden, weight, target, memory_limit=limit)
    assert seen == [N // 2, N]


def test_shifted_sequences_with_masked_prompts(seen):
    """The labels of a fine-tune: prompts ignored, in sequences."""
    hidden, weight = torch.randn(2, 12, D), torch.randn(V, D)
    labels = torch.randint(V, (2, 12))
    labels[:, :6] = -100
    statistics = perplexity.token_statistics(hidden, weight, labels, shift=1)
    assert seen == [12] and statistics.nll.shape == (2, 11)
    logits = (hidden @ weight.T)[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(statistics.nll.flatten(), expected, rtol=1e-5, atol=1e-5)
    assert (statistics.rank[:, :5] == -1).all() and (statistics.rank[:, 5:] >= 0).all()
    assert torch.equal(statistics.predicted[:, 5:], logits.argmax(-1)[:, 5:])


def test_a_compiled_loss_is_the_same():
    target = torch.randint(V, (N,))
    target[: N // 2] = -100
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    compiled = torch.compile(perplexity.linear_cross_entropy, backend="eager", fullgraph=True)
    expected = perplexity.linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(compiled(hidden, weight, target), expected)
