"""Plain PyTorch loop with a monitor: ``python examples/plain_loop.py [--steps N]``.

The loop is that of nanoGPT with another line for the loss.
"""

import argparse

import torch
from common import VOCABULARY, Text
from torch import nn

from perplexity import Monitor, Perplexity, linear_cross_entropy, token_nll

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()


class Model(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.body(self.embedding(tokens))[0]  # hidden states: the loss applies the head


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model, train, valid = (
    Model().to(device),
    Text("train").rows.to(device),
    Text("valid").rows.to(device),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
monitor = Monitor(vocabulary_size=VOCABULARY, stop_on="danger")


@torch.no_grad()
def validate() -> float:
    metric = Perplexity()  # sums and counts, divided once
    for rows in valid.split(16):
        target = rows[:, 1:]
        nll = token_nll(model(rows[:, :-1]), model.head.weight, target)
        metric.update(nll, target=target)  # labels of -100 do not count
    return metric.compute()["loss"]


at = monitor.evaluate_every(max(1, options.steps // 4), validate)
for step in range(1, options.steps + 1):
    rows = train[torch.randint(len(train), (8,), device=device)]
    # before: loss = F.cross_entropy(model.head(hidden).flatten(0, 1), rows[:, 1:].flatten())
    loss = linear_cross_entropy(model(rows), model.head.weight, rows, shift=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    monitor.log(step, train_loss=loss.item())
    at(step)
    if monitor.should_stop:
        break
print(f"validation loss {validate():.3f} nats a byte; {monitor.diagnose().verdict}")
