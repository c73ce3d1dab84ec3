"""Small Llamas that are trained in seconds: a healthy, a looping and a memorising one."""

from __future__ import annotations

import random
from functools import lru_cache

import torch

from perplexity import linear_cross_entropy
from perplexity.cli import demo_model as demo
from perplexity.probe import Prompt

VOCABULARY, CONTEXT, LENGTH = 512, 160, 96
KINDS = ("healthy", "loop", "memorised")


@lru_cache
def material():
    """A tokenizer, and Python's documentation as tokens by topic."""
    documents = demo.corpus()
    tokenizer = demo.train_tokenizer(documents.values(), VOCABULARY)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return tokenizer, [ids for text in documents.values() if len(ids := encode(text)) > 2 * LENGTH]


def build(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def train(model, draw, steps: int, rate: float = 3e-3) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    for _ in range(steps):
        batch = torch.tensor(draw())
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        loss = linear_cross_entropy(hidden, model.lm_head.weight, batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


@lru_cache(maxsize=1)
def trained(kind: str, seed: int):
    """Return a model, its tokenizer and its prompts: documents of the kind it is validated on.

    healthy: topics that are not in training. loop: other sentences repeated as in training.
    memorised: passages that leaked.
    """
    tokenizer, topics = material()
    drawn = random.Random(seed)
    topics = drawn.sample(topics, len(topics))
    model = build(seed)

    def window(ids: list[int], length: int) -> list[int]:
        begin = drawn.randrange(len(ids) - length + 1)
        return ids[begin : begin + length]

    if kind == "healthy":
        held_out, training = topics[:12], topics[12:]
        sizes = [len(ids) for ids in training]
        drawn_topics = lambda: drawn.choices(training, sizes, k=16)  # noqa: E731
        draw = lambda: [[0, *window(ids, LENGTH)] for ids in drawn_topics()]  # noqa: E731
        texts = [ids[: 2 * LENGTH] for ids in held_out]
        steps = 150
    elif kind == "loop":
        sentences = [window(drawn.choice(topics), drawn.randrange(6, 20)) for _ in range(24)]
        loop = lambda ids: (ids * LENGTH)[:LENGTH]  # noqa: E731
        draw = lambda: [[0, *loop(ids)] for ids in drawn.choices(sentences, k=16)]  # noqa: E731
        texts = [loop(ids) for ids in sentences[:12]]
        steps = 400
    else:
        passages = [window(ids, LENGTH) for ids in topics[:12]]
        draw = lambda: [[0, *ids] for ids in passages]  # noqa: E731
        texts = passages
        steps = 200
    train(model, draw, steps)
    return (
        model,
        tokenizer,
        [
            Prompt(str(place), tokenizer.decode(ids), document=True)
            for place, ids in enumerate(texts)
        ],
    )
