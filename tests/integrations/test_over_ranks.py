"""A transformers model with the fused loss over ranks, in real processes over gloo.

Loss and gradients equal those of one process.
"""

import pytest
import torch
import torch.distributed as dist
from test_parallel import in_processes
from tiny_models import build_model

VOCABULARY, ROWS, LENGTH = 304, 8, 10


def batch():
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, :row] = -100  # ranks have unequal numbers of labels
    return ids, labels


def expected():
    """Loss and gradients of the model's own loss in this process alone."""
    model, (ids, labels) = build_model(VOCABULARY), batch()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def close(found, gradients):
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * largest, rtol=1e-5, msg=name)


def share(rank, ranks):
    """Return this rank's rows, and the number of labels that makes rank means the overall mean."""
    ids, labels = batch()
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    return dict(
        input_ids=ids[mine],
        labels=labels[mine],
        num_items_in_batch=(labels[:, 1:] != -100).sum() / ranks,
    )


def check(loss, ranks, whole):
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert abs(total.item() / ranks - whole) < 1e-5 * whole


def data_parallel(rank, ranks):
    from torch.nn.parallel import DistributedDataParallel

    from perplexity.integrations.transformers import use_fused_loss

    whole, gradients = expected()
    model = build_model(VOCABULARY)
    use_fused_loss(model)
    wrapped = DistributedDataParallel(model)
    out = wrapped(**share(rank, ranks))
    assert out.logits is None
    out.loss.backward()
    check(out.loss, ranks, whole)
    close({name: parameter.grad for name, parameter in model.named_parameters()}, gradients)


def fully_sharded(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from perplexity.integrations.transformers import use_fused_loss

    whole, gradients = expected()
    model, mesh = build_model(VOCABULARY), init_device_mesh("cpu", (ranks,))
    use_fused_loss(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = model(**share(rank, ranks))
    assert out.logits is None
    out.loss.backward()
    check(out.loss, ranks, whole)
    close(
        {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()},
        gradients,
    )


def vocabulary_parallel(rank, ranks):
    """Spread the head's rows over the ranks: every rank has the same batch (tensor parallelism)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from perplexity.integrations.transformers import use_fused_loss

    whole, gradients = expected()
    model, (ids, labels) = build_model(VOCABULARY), batch()
    use_fused_loss(model)
    parallelize_module(model, init_device_mesh("cpu", (ranks,)), {"lm_head": ColwiseParallel()})
    out = model(input_ids=ids, labels=labels)
    assert out.logits is None and abs(out.loss.item() - whole) < 1e-5 * whole
    out.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found["lm_head.weight"] = found["lm_head.weight"].full_tensor()
    close(found, gradients)


def metric(rank, ranks):
    """Sums and counts of unequal shares, in one collective."""
    from unittest.mock import patch

    import perplexity

    found = perplexity.Perplexity()
    found.update(torch.full((rank + 1,), float(rank)), mask=True, bytes=rank, words=2)
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        found.sync()
    assert reduced.call_count == 1
    tokens = sum(range(1, ranks + 1))
    assert found.state_dict() == dict(
        nll=float(sum(r * (r + 1) for r in range(ranks))),
        tokens=tokens,
        bytes=sum(range(ranks)),
        words=2 * ranks,
    )


def every_kind(rank, ranks):
    for body in (metric, data_parallel, fully_sharded, vocabulary_parallel):
        body(rank, ranks)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(ranks):
    in_processes(ranks, every_kind)
