"""Training a small transformer through the fused loss and through the plain one: the same curve."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import perplexity
from perplexity.kernels import dispatch

VOCABULARY, LENGTH, BATCH, STEPS = 1024, 32, 16, 300


class Transformer(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        return self.norm(self.layers(hidden, mask=mask, is_causal=True))


def batches(device):
    """Text of a kind: sequences from a random table of successors, one of four each."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=generator)
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        for _ in range(LENGTH):
            choice = torch.randint(4, (BATCH, 1), generator=generator)
            tokens = torch.cat([tokens, successors[tokens[:, -1:], choice]], 1)
        yield tokens.to(device)


def curve(loss, seed, device):
    """The last losses of a run, float32 whatever trained it."""
    torch.manual_seed(seed)
    model = Transformer().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for tokens in batches(device):
        value = loss(
            model(tokens[:, :-1]).flatten(0, 1), model.head.weight, tokens[:, 1:].flatten()
        )
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.detach())
    return torch.stack(losses).double().cpu()


def plain(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def ours(hidden, weight, target):
    """In bfloat16, as under autocast."""
    return perplexity.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target)


@pytest.mark.slow
def test_the_curves_agree_within_the_spread_of_two_seeds(device):
    first, second = (curve(plain, seed, device) for seed in (0, 1))
    fused = curve(ours, 0, device)
    assert first[:10].mean() > 6.8 and first[-50:].mean() < 2.5, "it learns"
    for start in range(0, STEPS, 50):
        part = slice(start, start + 50)
        spread = (first[part] - second[part]).abs().mean()
        assert (fused[part] - first[part]).abs().mean() <= spread


@pytest.mark.parametrize("vocabulary", [256, pytest.param(256_000, marks=pytest.mark.gpu)])
def test_many_chunks_drift_no_further_than_one(vocabulary, device, monkeypatch):
    """The weight's gradient is summed in float32: 64 chunks are as close to float64 as one.

    (On a CPU every chunk's product is rounded to bfloat16 before it is added, which no GPU does;
    sums in bfloat16 are half as far off again.)
    """
    if vocabulary > 256 and device == "cpu":
        pytest.skip("interpreted, a minute")
    generator = torch.Generator().manual_seed(4)
    tokens, errors = 256, []
    if device == "cpu":
        # Interpreted, a token is a program: 64 chunks of one. So few show sums in bfloat16 (1.28)
        # only where a row of the weight gets several of them.
        tokens, vocabulary = 64, 32
    leaves = [
        torch.randn(rows, 32, generator=generator).to(device, torch.bfloat16)
        for rows in (tokens, vocabulary)
    ]
    target = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    doubled = [leaf.double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(
        F.cross_entropy(doubled[0] @ doubled[1].T, target, reduction="sum"), doubled[1]
    )[0]
    for chunk in (tokens, tokens // 64):
        monkeypatch.setattr(dispatch, "ahead_chunk", lambda *_, chunk=chunk, **__: chunk)
        copies = [leaf.detach().requires_grad_() for leaf in leaves]
        loss = perplexity.linear_cross_entropy(*copies, target, reduction="sum", backend="triton")
        errors.append(
            (torch.autograd.grad(loss, copies[1])[0].double() - exact).square().mean().sqrt()
        )
    assert errors[1] <= (1.15 if device == "cpu" else 1.02) * errors[0], errors
