"""A token's values have the same bits whatever batch the token comes in (triton, forward)."""

import pytest
import torch

pytest.importorskip("triton")
import perplexity
from perplexity.kernels import dispatch
from perplexity.kernels.dispatch import FUSED, Rule
from perplexity.kernels.gpu import launch, logit_tile
from perplexity.kernels.gpu.launch import Target

TOKENS = 90  # two blocks of tokens in the interpreter, the last one not whole
# Alone, within a block, over the ends of blocks.
BATCHES = [slice(0, 1), slice(3, 40), slice(50, 90)]
# V, D and dtype: rows that the copy engine reads (16-bit inputs alone) or not; one span of the
# vocabulary or two; whole tiles or not.
SHAPES = [
    (384, 64, torch.bfloat16),
    (131, 48, torch.float16),
    (131, 7, torch.float32),
    (131, 7, torch.bfloat16),
    pytest.param(2100, 48, torch.bfloat16, marks=pytest.mark.slow),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(vocabulary, dimension, dtype, device):
    """Return hidden states, weight and target.

    The interpreter multiplies by numpy, whose sum along D depends on a row's place in its tile; a
    matrix unit's does not. Eighths have exact products in float32, in any order: on a CPU the test
    is of everything but that sum.
    """
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, dimension, generator=generator)
    weight = torch.randn(vocabulary, dimension, generator=generator)
    if torch.device(device).type == "cpu":
        hidden, weight = ((8 * matrix).round() / 8 for matrix in (hidden, weight))
    target = torch.randint(vocabulary, (TOKENS,), generator=generator)
    target[52:57] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device)


def values(hidden, weight, target, **options):
    """Return every value of a token that the public functions have, one tensor [N] each."""
    head = dict(backend="triton", **options)
    log_probability, entropy = perplexity.token_log_probabilities(
        hidden, weight, target, with_entropy=True, **head
    )
    return [
        perplexity.token_nll(hidden, weight, target, **head),
        log_probability,
        entropy,
        *perplexity.token_statistics(hidden, weight, target, **head),
    ]


def assert_the_same_bits(whole, part, batch):
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[batch], other)


@pytest.mark.parametrize(("vocabulary", "dimension", "dtype"), SHAPES)
def test_a_token_of_hidden_states(vocabulary, dimension, dtype, device):
    hidden, weight, target = inputs(vocabulary, dimension, dtype, device)
    whole = values(hidden, weight, target)
    for batch in BATCHES:
        assert_the_same_bits(whole, values(hidden[batch], weight, target[batch]), batch)


def test_the_shapes_take_both_forwards(device):
    """Read through pointers, and by the copy engine: else the table above would show one of them."""
    target = Target("interpreter", 0)
    taken = set()
    for shape in SHAPES[:-1]:
        hidden, weight, _ = inputs(*shape, device)
        taken.add(all(dispatch.describable(target, matrix) for matrix in (hidden, weight)))
    assert taken == {True, False}


@pytest.mark.parametrize("options", [dict(softcap=5.0, logit_scale=0.7), dict(logit_scale=3.0)])
def test_a_token_under_the_rule_and_among_others(options, device):
    """The same token at other places of a batch, beside other tokens."""
    hidden, weight, target = inputs(131, 48, torch.bfloat16, device)
    whole = values(hidden, weight, target, **options)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1)).to(device)
    moved = values(hidden[order], weight, target[order], **options)
    for one, other in zip(whole, moved, strict=True):
        assert torch.equal(one[order], other)


@pytest.mark.parametrize("memory_limit", [1000, 2000])
def test_a_limit_of_memory_cuts_the_batch(memory_limit, device):
    """Tokens are swept in chunks that fit the limit."""
    hidden, weight, target = inputs(131, 48, torch.bfloat16, device)
    limited = values(hidden, weight, target, memory_limit=memory_limit)
    whole = values(hidden, weight, target)
    for one, other in zip(whole, limited, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [384, 131])
def test_a_token_of_existing_logits(vocabulary, dtype, device):
    hidden, weight, target = inputs(vocabulary, 48, dtype, device)
    hidden, target = hidden[44:56], target[44:56]  # ignored ones among them
    logits = hidden @ weight.T

    def loss(batch):
        return perplexity.cross_entropy(
            logits[batch], target[batch], reduction="none", backend="triton"
        )

    whole = loss(slice(None))
    for batch in (slice(0, 1), slice(3, 11)):
        assert torch.equal(whole[batch], loss(batch))


@pytest.mark.parametrize(
    "target", [Target("cuda", 80), Target("cuda", 90), Target("hip", "gfx942", 64)], ids=str
)
def test_no_way_depends_on_the_batch(target, monkeypatch):
    """Compiled, too: the vendor's product, another for other sizes, is for sums and means alone."""
    monkeypatch.setattr(launch, "target_of", lambda tensor: target)
    monkeypatch.setattr(logit_tile, "target_of", lambda tensor: target)
    weight, configurations = torch.zeros(50_304, 64, dtype=torch.bfloat16), []
    for tokens in (1, 7, 128, 4096):
        hidden = torch.zeros(tokens, 64, dtype=torch.bfloat16)
        plan = dispatch.plan(Rule(), hidden, weight, backend="triton", per_token=True)
        assert plan.way == FUSED
        _, constants, options = logit_tile.logit_arguments(
            hidden, weight, None, Rule(), "nll", may_describe=True
        )
        configurations.append((constants, options))
    assert all(one == configurations[0] for one in configurations)
