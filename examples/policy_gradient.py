"""Policy gradient without logits in memory: ``python examples/policy_gradient.py [--steps N]``.

The log-probabilities of sampled tokens and the entropy have gradients.
"""

import argparse

import torch
from common import small_model

from perplexity import token_log_probabilities

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

model = small_model()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
prompt = torch.zeros(16, 1, dtype=torch.long)
vowels = torch.tensor(list(b"aeiou"))
for step in range(1, options.steps + 1):
    model.eval()
    answers = model.generate(
        prompt, max_new_tokens=16, do_sample=True, eos_token_id=None, pad_token_id=0
    )
    reward = torch.isin(answers[:, 1:], vowels).float().mean(1)  # of each answer; here: vowels
    model.train()
    hidden = model.model(answers[:, :-1]).last_hidden_state
    # One pass gives the log-probabilities of the sampled tokens and the entropy, without logits.
    log_p, entropy = token_log_probabilities(
        hidden, model.lm_head.weight, answers[:, 1:], with_entropy=True
    )
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
    loss = -(advantage[:, None] * log_p).mean() - 0.003 * entropy.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (1, options.steps):
        print(f"step {step}: reward {reward.mean():.3f}, entropy {entropy.mean():.2f} nats")
