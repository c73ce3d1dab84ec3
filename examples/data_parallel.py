"""DDP or FSDP2: ``torchrun --nproc-per-node 2 examples/data_parallel.py [--fsdp] [--steps N]``."""

import argparse
import os

import torch
import torch.distributed as dist
from common import Text, small_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from perplexity import Perplexity
from perplexity.integrations.transformers import use_fused_loss

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--fsdp", action="store_true")
options = parser.parse_args()

gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
model = small_model().to(device)
use_fused_loss(model)  # before it is wrapped
if options.fsdp:
    mesh = init_device_mesh("cuda" if gpu else "cpu", (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    # The head belongs to the root: its rows are gathered while the loss is computed.
    fully_shard(model, mesh=mesh)
    wrapped = model
else:
    wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
rows = Text("train").rows[rank::ranks].to(device)
generator = torch.Generator().manual_seed(rank)
for _ in range(options.steps):
    tokens = rows[torch.randint(len(rows), (8,), generator=generator)]
    loss = wrapped(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

metric = Perplexity()
with torch.no_grad():
    for tokens in Text("valid").rows[rank::ranks].to(device).split(8):
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        target = tokens[:, 1:]
        metric.update(loss.expand(target.shape), target=target)
measured = metric.sync().compute()  # the perplexity of all tokens, not a mean over ranks
if rank == 0:
    print(f"perplexity {measured['perplexity']:.2f} a byte over {ranks} ranks")
dist.destroy_process_group()
