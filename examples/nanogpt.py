"""A model and a tokenizer of one's own, trained and evaluated: nanoGPT on characters.

    python examples/nanogpt.py --steps 100

``Characters`` is a ``perplexity.evaluation.Tokenizer``, ``Adapter`` a ``LanguageModel``: the two
interfaces that ``evaluate`` needs where no transformers class is at hand.
"""

import argparse

import torch
from torch import nn

from perplexity import evaluate, linear_cross_entropy
from perplexity.evaluation import Document, Head


class Characters:
    """A character tokenizer, as nanoGPT's prepare.py for Shakespeare makes it."""

    def __init__(self, text: str) -> None:
        self.letters = sorted(set(text))
        self.index = {letter: number for number, letter in enumerate(self.letters)}
        self.vocabulary_size = len(self.letters)

    def encode(self, text: str) -> list[int]:
        return [self.index[letter] for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.letters[number] for number in ids)


class Block(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention, self.projection = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, size = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.attention(self.ln_1(x)).chunk(3, dim=-1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).reshape(batch, length, size))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT's model: embeddings, blocks, a norm, and a head that shares the embeddings."""

    def __init__(self, vocabulary: int, block_size: int, size: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.block_size = block_size
        self.wte, self.wpe = nn.Embedding(vocabulary, size), nn.Embedding(block_size, size)
        self.blocks = nn.Sequential(*(Block(size, heads=4) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(size)
        self.lm_head = nn.Linear(size, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [B, T, D] that the head multiplies."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.ln_f(self.blocks(self.wte(ids) + self.wpe(places)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.features(ids))


class Adapter:
    """What ``evaluate`` asks of a model: hidden states, a head, and the model's own logits."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.head = Head(model.lm_head.weight)
        self.context_length = model.block_size

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.features(input_ids)

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids)


def main() -> None:
    from pydoc_data.topics import topics

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    texts = [text for _, text in sorted(topics.items())]
    tokenizer = Characters("".join(texts))
    train, valid = texts[8:], texts[:8]
    data = torch.tensor(tokenizer.encode("\n".join(train)))
    model = GPT(tokenizer.vocabulary_size, block_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(data) - 65, (16,))
        rows = torch.stack([data[start : start + 65] for start in starts])
        hidden = model.features(rows[:, :-1])
        loss = linear_cross_entropy(hidden, model.lm_head.weight, rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = evaluate(Adapter(model), tokenizer, [text[:2000] for text in valid])
    print(f"perplexity {result.perplexity:.2f} a character, {result.bits_per_byte:.3f} bits a byte")
    # The second half of each text, after the first half.
    halves = [Document(text[:2000], spans=[(1000, len(text[:2000]))]) for text in valid]
    halves = [half for half in halves if len(half.text) > 1000]
    result = evaluate(Adapter(model), tokenizer, halves)
    print(f"second halves: {result.bits_per_byte:.3f} bits a byte over {result.tokens} characters")


if __name__ == "__main__":
    main()
