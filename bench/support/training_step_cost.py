"""Cost of a training step: ``python training_step_cost.py PROVIDER`` prints bytes, seconds, loss.

"plain" is a transformers model's own loss from labels, with V = 128,256; "fused" is the same model
after ``use_fused_loss``. Bytes are the peak memory beyond the model and its gradients.
"""

import sys
import time

import torch
from peak_memory import high_water, reset_high_water

VOCABULARY, WIDTH, LAYERS, ROWS, LENGTH = 128_256, 256, 2, 4, 256
PROVIDERS = ("plain", "fused")


def main(provider: str, rounds: int = 3) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    if provider == "fused":
        from perplexity.integrations.transformers import use_fused_loss

        use_fused_loss(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item()

    model(input_ids=ids[:1, :8], labels=ids[:1, :8]).loss.backward()
    reset_high_water()
    before = high_water()
    loss, seconds = step(), []
    peak = high_water() - before
    for _ in range(rounds):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    print(peak, sorted(seconds)[rounds // 2], loss)


if __name__ == "__main__":
    main(*sys.argv[1:2])
