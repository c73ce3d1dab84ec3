"""Cost of an evaluation: ``python evaluation_cost.py PROVIDER [WINDOWS]``.

It prints bytes, seconds and loss. The model has V = 128,256, D = 256 and 2 layers; windows have
1,024 tokens. Bytes are the rise of the high-water mark of resident memory in this process, after a
first run on a short text, which loads libraries and starts threads.
"""

import sys
import time

import numpy as np
import torch
from peak_memory import high_water, reset_high_water, small_pages

VOCABULARY, WIDTH, LAYERS, CONTEXT = 128_256, 256, 2, 1024


def build():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            initializer_range=0.1,
        )
    ).eval()


class Tokens:
    """Stand-in for a tokenizer, for documents that come as tokens."""

    bos_token_id = eos_token_id = unk_token_id = None
    special_tokens_map = ()

    def __len__(self):
        return VOCABULARY

    def get_vocab(self):
        return {}

    def __call__(self, *_, **__):
        raise NotImplementedError("every document is tokens already")

    def decode(self, ids, **_):
        return "".join(chr(33 + token % 90) for token in ids)


def ours(model, ids: np.ndarray) -> float:
    from perplexity import evaluate
    from perplexity.evaluation import Document

    documents = [Document(str(row), "", ids=tokens) for row, tokens in enumerate(ids)]
    return evaluate(model, Tokens(), documents, context_length=CONTEXT, stride=CONTEXT - 1).loss


@torch.inference_mode()
def plain(model, ids: np.ndarray) -> float:
    """Return the mean of ``model(input_ids, labels=input_ids).loss`` over windows of one length."""
    return float(
        np.mean(
            [
                model(input_ids=row[None], labels=row[None]).loss.item()
                for row in torch.from_numpy(ids)
            ]
        )
    )


PROVIDERS = {"ours": ours, "plain": plain}


def measure(provider: str, windows: int) -> tuple[int, float, float]:
    model = build()
    generator = np.random.default_rng(0)
    run = PROVIDERS[provider]
    run(model, generator.integers(0, VOCABULARY, (1, 16)))
    ids = generator.integers(0, VOCABULARY, (windows, CONTEXT))
    reset_high_water()
    before = high_water()
    start = time.perf_counter()
    loss = run(model, ids)
    return high_water() - before, time.perf_counter() - start, loss


if __name__ == "__main__":
    small_pages()
    print(*measure(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4))
