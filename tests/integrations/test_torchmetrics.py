"""The metric against torchmetrics' and torcheval's, in collections, checkpoints and over ranks."""

import math
import os
import subprocess
import sys

import pytest
import torch
from processes import HANG
from without_float64 import WithoutFloat64

torchmetrics = pytest.importorskip("torchmetrics")

from perplexity.errors import InputError  # noqa: E402
from perplexity.integrations.torchmetrics import Perplexity  # noqa: E402


def batches(count=4, ignored=True):
    generator = torch.Generator().manual_seed(1)
    for length in range(3, 3 + count):
        logits = torch.randn(2, length, 37, generator=generator) * 3
        target = torch.randint(37, (2, length), generator=generator)
        if ignored:
            target[0, : length - 2] = -100
        yield logits, target


@pytest.mark.parametrize("ignored", [False, True])
def test_equal_to_torchmetrics_and_torcheval(ignored):
    from torcheval.metrics import Perplexity as Torcheval

    given = dict(ignore_index=-100) if ignored else {}
    ours, theirs, evals = (
        Perplexity(**given),
        torchmetrics.text.Perplexity(**given),
        Torcheval(**given),
    )
    nll = 0.0
    for logits, target in batches(ignored=ignored):
        for metric in (ours, theirs, evals):
            metric.update(logits, target)
        nll += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), target.flatten(), reduction="sum"
        ).item()
    assert ours.compute().item() == pytest.approx(math.exp(nll / ours.tokens.item()), rel=1e-6)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)
    assert ours.compute().item() == pytest.approx(evals.compute().item(), rel=1e-5)


def test_in_a_collection_and_a_checkpoint():
    collection = torchmetrics.MetricCollection(
        {"ours": Perplexity(-100), "theirs": torchmetrics.text.Perplexity(-100)}
    )
    for logits, target in batches():
        collection.update(logits, target)
    found = collection.compute()
    assert found["ours"].item() == pytest.approx(found["theirs"].item(), rel=1e-5)
    metric = Perplexity(-100)
    metric.persistent(True)
    for logits, target in batches():
        metric(logits, target)  # forward: of the batch, and kept
    other = Perplexity(-100)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    assert other.compute() == metric.compute() == found["ours"]
    metric.reset()
    assert metric.tokens == 0


def test_nll_without_logits():
    metric = Perplexity()
    metric.update_nll(
        torch.tensor([[1.0, 2.0], [math.nan, 3.0]]), torch.tensor([[True, True], [False, True]])
    )
    metric.update_nll(torch.tensor([2.0]))
    assert (
        metric.compute().item() == pytest.approx(math.exp(2.0))
        and metric.compute().dtype == torch.float64
    )
    metric.update_nll(torch.full((4,), 4.0))
    assert metric.compute().item() == pytest.approx(math.exp(3.0)), (
        "what was computed before is not kept"
    )
    assert metric.update_count == 3
    with pytest.raises(InputError, match="mask: expected the shape of nll"):
        metric.update_nll(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match="nll: expected target= or mask="):
        metric.update_nll(torch.tensor([3.0, 0.0]))
    metric.update_nll(torch.tensor([3.0, 0.0]), target=torch.tensor([5, -100]))
    assert metric.compute().item() == pytest.approx(math.exp(3.0)) and metric.tokens == 9
    ignoring = Perplexity()
    ignoring.update(torch.zeros(2, 5), torch.tensor([1, -100]))
    assert ignoring.tokens == 1 and ignoring.update_count == 1
    with pytest.raises(ValueError, match="target: expected the shape"):
        metric.update(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))


def test_a_device_without_float64(monkeypatch):
    """A metric moved to MPS raised TypeError: its float64 sum stays on the CPU, the count moves."""
    from perplexity.integrations import torchmetrics as ours

    monkeypatch.setattr(ours, "has_float64", lambda kind: kind != "meta")
    metric, there = Perplexity(), Perplexity().to("meta")  # stands for MPS: what was moved is seen
    assert there.tokens.is_meta and there.nll.device.type == "cpu"
    for nll in (torch.ones(3), WithoutFloat64.hold([1.0, 1.0, 1.0])):
        metric.update_nll(nll)
    assert metric.compute().item() == pytest.approx(math.e) and metric.nll.dtype == torch.float64


RANK = """
import sys, torch, torch.distributed as dist
sys.path[:0] = {path!r}
from test_torchmetrics import batches
from perplexity.integrations.torchmetrics import Perplexity
dist.init_process_group("gloo", init_method={meeting!r}, rank=int(sys.argv[1]), world_size=2)
metric = Perplexity(-100)
for number, (logits, target) in enumerate(batches()):
    if number % 2 == dist.get_rank():
        metric.update(logits, target)
print(repr(metric.compute().item()), flush=True)
dist.destroy_process_group()
"""


def test_what_is_gathered_is_summed():
    """Two halves of the batches, gathered as ranks gather them."""
    whole, halves = Perplexity(-100), [Perplexity(-100), Perplexity(-100)]
    for number, (logits, target) in enumerate(batches()):
        whole.update(logits, target)
        halves[number % 2].update(logits, target)
    gathered = []

    def gather(state, group):
        gathered.append(state)
        return [getattr(half, "tokens" if state.dtype == torch.int64 else "nll") for half in halves]

    others = [half.metric_state for half in halves]
    halves[0].sync(dist_sync_fn=gather, distributed_available=lambda: True)
    assert len(gathered) == len(others[0]) == 2
    assert halves[0].nll.item() == pytest.approx(whole.nll.item(), rel=1e-12)
    assert halves[0].tokens == whole.tokens > others[1]["tokens"]


@pytest.mark.slow
def test_over_ranks(tmp_path):
    metric = Perplexity(-100)
    for logits, target in batches():
        metric.update(logits, target)
    # Ranks meet in a file: a port that was free a moment ago may be another process's by now.
    code = RANK.format(
        path=[os.path.dirname(__file__), *sys.path], meeting=f"file://{tmp_path}/meeting"
    )
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [float(rank.communicate(timeout=HANG)[0].split()[-1]) for rank in ranks]
    assert said == pytest.approx([metric.compute().item()] * 2, rel=1e-12)
