"""Distillation without logits in memory: ``python examples/distillation.py [--steps N]``.

The heads of teacher and student have different widths.
"""

import argparse

import torch
from common import VOCABULARY, Text, small_model
from transformers import LlamaConfig, LlamaForCausalLM

from perplexity import linear_cross_entropy, linear_kl_divergence

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=150)
options = parser.parse_args()

rows = Text("train").rows
teacher = small_model()
student = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
)
generator = torch.Generator().manual_seed(0)


def batch() -> torch.Tensor:
    return rows[torch.randint(len(rows), (8,), generator=generator)]


optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
for _ in range(options.steps):
    tokens = batch()
    hidden = teacher.model(tokens).last_hidden_state
    linear_cross_entropy(hidden, teacher.lm_head.weight, tokens, shift=True).backward()
    optimizer.step()
    optimizer.zero_grad()

teacher.requires_grad_(False)
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
for step in range(1, options.steps + 1):
    tokens = batch()
    of_teacher, of_student = (
        teacher.model(tokens).last_hidden_state,
        student.model(tokens).last_hidden_state,
    )
    divergence = linear_kl_divergence(
        of_teacher, teacher.lm_head.weight, of_student, student.lm_head.weight
    ).mean()
    optimizer.zero_grad()
    divergence.backward()
    optimizer.step()
    if step in (1, options.steps):
        print(f"step {step}: KL divergence from the teacher {divergence.item():.3f} nats a token")
