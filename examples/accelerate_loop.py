"""Training loop with Accelerate: ``accelerate launch examples/accelerate_loop.py [--steps N]``."""

import argparse

import torch
from accelerate import Accelerator
from common import Text, small_model

from perplexity import Perplexity
from perplexity.integrations.transformers import use_fused_loss

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

accelerator = Accelerator(cpu=not torch.cuda.is_available())
model = small_model()
use_fused_loss(model)
loader = torch.utils.data.DataLoader(Text("train"), batch_size=8, shuffle=True)
valid = torch.utils.data.DataLoader(Text("valid"), batch_size=8)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, loader, valid = accelerator.prepare(model, optimizer, loader, valid)
for step, batch in enumerate(loader, 1):
    loss = model(**batch).loss
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    if step >= options.steps:
        break
metric = Perplexity()
model.eval()
with torch.no_grad():
    for batch in valid:
        loss = model(**batch).loss
        target = batch["labels"][:, 1:]
        metric.update(loss.expand(target.shape), target=target)  # -100 does not count
perplexity = metric.sync().compute()["perplexity"]
accelerator.print(f"perplexity {perplexity:.2f} a byte over {accelerator.num_processes} processes")
