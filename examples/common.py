"""Text and model of the examples: real text as bytes, and a small Llama."""

import torch

VOCABULARY, LENGTH = 256, 64


class Text(torch.utils.data.Dataset):
    """Stretches of CPython's documentation, a byte a token.

    Args:
        side: "train" or "valid", which have different topics.
    """

    def __init__(self, side: str) -> None:
        from pydoc_data.topics import topics

        chosen = [
            text
            for number, (_, text) in enumerate(sorted(topics.items()))
            if (number % 10 == 0) == (side == "valid")
        ]
        data = torch.frombuffer(bytearray("\0".join(chosen).encode()), dtype=torch.uint8).long()
        if side == "valid":
            data = data[: 64 * LENGTH]
        self.rows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return {"input_ids": self.rows[row], "labels": self.rows[row]}


def small_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)
