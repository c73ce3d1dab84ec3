"""The vocabulary sharded over ranks, in real processes over gloo: numbers equal one process's."""

import functools
import os
import tempfile
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import perplexity
from perplexity import VocabularyShard

N, V, D = 21, 50, 12
# Rows a rank holds: uneven, one row, none at all (in each place).
SPLITS = {
    2: [(25, 25), (49, 1), (50, 0), (0, 50)],
    3: [(17, 17, 16), (0, 30, 20), (30, 0, 20), (1, 49, 0)],
}
DTYPES = (torch.float32, torch.bfloat16)
LOSSES = [
    {},
    {"reduction": "sum", "softcap": 2.0, "logit_scale": 0.7},
    {"reduction": "none", "label_smoothing": 0.2, "class_weight": True, "z_loss": 0.01},
    {"label_smoothing": 0.1, "bias": True, "ignore_index": 3},
    {"ignore_index": -1, "shift": True},
]


def worker(rank, ranks, meeting, calls, finished, failures):
    os.environ.update(GLOO_SOCKET_IFNAME="lo", TRITON_INTERPRET="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    try:
        for place, (body, *arguments) in enumerate(calls):
            body(rank, ranks, *arguments)
            dist.barrier()
            finished[rank] = place + 1
        dist.destroy_process_group()
    except BaseException:
        failures.put((finished[rank], rank, traceback.format_exc()))
        raise
    # Threads of gloo and autograd may outlive the group; the interpreter's exit would now and then
    # abort on them.
    os._exit(0)


def outcomes(ranks, calls):
    """Run every ``body(rank, ranks, *arguments)`` of ``calls`` in the same processes.

    Return the first traceback of each call, or None where the call succeeds. A call that fails ends
    its processes, since other ranks may wait for the failed one: new processes run the later calls.
    """
    context, found = mp.get_context("spawn"), []
    while len(found) < len(calls):
        left = calls[len(found) :]
        finished, failures = context.Array("i", ranks), context.SimpleQueue()
        # Ranks meet in a file: a port that was free a moment ago may be another process's by now.
        with tempfile.TemporaryDirectory() as folder:
            try:
                shared = ranks, f"{folder}/meeting", left, finished, failures
                mp.spawn(worker, shared, nprocs=ranks)
                found += [None] * len(left)
            except Exception as error:
                # A rank that died without a word died in the call after the last one finished.
                place, text = max(finished), str(error)
                if not failures.empty():
                    place, rank, text = failures.get()
                    text = f"rank {rank}:\n{text}"
                found += [None] * place + [text]
    return found


def in_processes(ranks, body, *arguments):
    """Run ``body(rank, ranks, *arguments)`` in processes; fail with the first traceback."""
    (failure,) = outcomes(ranks, [(body, *arguments)])
    if failure is not None:
        pytest.fail(failure)


@pytest.fixture(scope="module")
def failures(request):
    """Return a function from a number of ranks to ``{test: traceback or None}``.

    All chosen tests of that many ranks share one launch: a process imports for seconds.
    """

    @functools.cache
    def of(ranks):
        calls = {
            item.nodeid: item.callspec.params["call"]
            for item in request.session.items
            if item.path == request.path
            and "failures" in item.fixturenames
            and item.callspec.params["ranks"] == ranks
        }
        return dict(zip(calls, outcomes(ranks, list(calls.values())), strict=True))

    return of


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    bias, class_weight = torch.randn(V, generator=generator), torch.rand(V, generator=generator)
    target = torch.randint(0, V, (N,), generator=generator)
    target[::6] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), class_weight, target


def close(ours, expected, dtype):
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def losses_and_statistics(rank, ranks, backend, dtypes, splits):
    for dtype in dtypes:
        hidden, weight, bias, class_weight, target = problem(dtype)
        for rows in splits:
            start = sum(rows[:rank])
            mine = slice(start, start + rows[rank])
            shard = VocabularyShard.of(weight[mine])
            assert (shard.start, shard.size) == (start, V)
            for options in LOSSES:
                options = dict(options)
                with_bias = options.pop("bias", False)
                if options.pop("class_weight", False):
                    options["weight"] = class_weight
                labels = target.clone()
                if "ignore_index" in options:
                    labels[labels == -100] = options["ignore_index"]
                whole = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
                part = [
                    tensor.clone().requires_grad_() for tensor in (hidden, weight[mine], bias[mine])
                ]
                results = []
                for leaves, sharded in ((whole, None), (part, shard)):
                    loss = perplexity.linear_cross_entropy(
                        *leaves[:2],
                        labels,
                        linear_bias=leaves[2] if with_bias else None,
                        shard=sharded,
                        backend=backend,
                        **options,
                    )
                    (
                        loss * torch.linspace(0.5, 2.0, max(1, loss.numel())).reshape(loss.shape)
                    ).sum().backward()
                    results.append(loss.detach())
                close(results[1], results[0], torch.float32)
                close(part[0].grad, whole[0].grad, dtype)
                close(part[1].grad, whole[1].grad[mine], dtype)
                if with_bias:
                    close(part[2].grad, whole[2].grad[mine], dtype)
            rule = dict(softcap=3.0, logit_scale=0.5, backend=backend)
            statistics = perplexity.token_statistics(
                hidden, weight[mine], target, shard=shard, **rule
            )
            expected = perplexity.token_statistics(hidden, weight, target, **rule)
            for ours, one in zip(statistics, expected, strict=True):
                assert ours.dtype == one.dtype
                torch.testing.assert_close(ours, one, rtol=1e-5, atol=1e-5)
            nll = perplexity.token_nll(hidden, weight[mine], target, shard=shard, **rule)
            torch.testing.assert_close(nll, expected.nll, rtol=1e-5, atol=1e-5)


def frozen_input(rank, ranks):
    """No gradient of the input: no rank may wait for the others' part of it."""
    hidden, weight, _, _, target = problem()
    mine = slice(0, 20) if rank == 0 else slice(20, V)
    leaf = weight[mine].clone().requires_grad_()
    perplexity.linear_cross_entropy(hidden, leaf, target, shard=VocabularyShard.of(leaf)).backward()
    whole = weight.clone().requires_grad_()
    perplexity.linear_cross_entropy(hidden, whole, target).backward()
    close(leaf.grad, whole.grad[mine], torch.float32)


def equal_rows_tie(rank, ranks):
    """Check that copies of the largest logit on another rank are not ranked above the first."""
    hidden = torch.randn(5, D, generator=torch.Generator().manual_seed(2)).repeat(8, 1)
    weight = hidden[:1].repeat(V, 1)
    target = torch.arange(40)
    mine = slice(0, 20) if rank == 0 else slice(20, V)
    statistics = perplexity.token_statistics(
        hidden, weight[mine], target, shard=VocabularyShard.of(weight[mine])
    )
    assert (statistics.rank == 0).all() and (statistics.predicted == 0).all()


def bad_input(rank, ranks):
    hidden, weight, bias, _, target = problem()
    mine = slice(0, 20) if rank == 0 else slice(20, V)
    shard = VocabularyShard.of(weight[mine])
    target[4] = V
    with pytest.raises(
        IndexError, match=rf"target: expected values in \[0, {V}\).*got {V} at position 4"
    ):
        perplexity.linear_cross_entropy(hidden, weight[mine], target, shard=shard)
    loss = perplexity.linear_cross_entropy(
        hidden, weight[mine], target, shard=shard, reduction="none", validate=False
    )
    assert loss.isnan().nonzero().flatten().tolist() == [4]
    target[4] = 0
    with pytest.raises(
        ValueError, match=r"input and target: expected the same on every rank.*full_tensor"
    ):
        perplexity.linear_cross_entropy(hidden + rank, weight[mine], target, shard=shard)
    with pytest.raises(ValueError, match="class indices with a sharded vocabulary"):
        perplexity.linear_cross_entropy(hidden, weight[mine], torch.rand(N, V), shard=shard)
    for start, size in ((0, V), (20 * rank - 5, V), (20 * rank, V + 1)):
        wrong = VocabularyShard(start, size)
        with pytest.raises(
            ValueError,
            match=r"shard: expected starts \[0, 20\] and size 50 for ranks of \[20, 30\] rows",
        ):
            perplexity.linear_cross_entropy(hidden, weight[mine], target, shard=wrong)
    with pytest.raises(ValueError, match=rf"linear_bias: expected shape \({len(weight[mine])},\)"):
        perplexity.linear_cross_entropy(hidden, weight[mine], target, linear_bias=bias, shard=shard)


def dtensors(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    hidden, weight, bias, _, target = problem()
    for vocabulary in (V, V - 1, 1):  # 1: every rank but the first is empty
        labels = torch.where(target == -100, target, target % vocabulary)
        whole = [
            tensor.clone().requires_grad_()
            for tensor in (hidden, weight[:vocabulary], bias[:vocabulary])
        ]
        expected = perplexity.linear_cross_entropy(*whole[:2], labels, linear_bias=whole[2])
        expected.backward()
        sharded = [
            distribute_tensor(tensor.detach(), mesh, [Shard(0)]).requires_grad_()
            for tensor in whole[1:]
        ]
        for replicated in (False, True):
            leaf = hidden.clone()
            leaf = distribute_tensor(leaf, mesh, [Replicate()]) if replicated else leaf
            leaf.requires_grad_()
            loss = perplexity.linear_cross_entropy(leaf, sharded[0], labels, linear_bias=sharded[1])
            gradients = torch.autograd.grad(loss, [leaf, *sharded])
            close(loss, expected, torch.float32)
            assert all(isinstance(gradient, DTensor) for gradient in gradients[1:])
            for ours, one in zip(gradients, whole, strict=True):
                close(
                    ours.full_tensor() if isinstance(ours, DTensor) else ours,
                    one.grad,
                    torch.float32,
                )
    for placement in (Replicate(), Shard(1)):
        with pytest.raises(
            ValueError,
            match=r"linear_weight: expected a DTensor sharded over its rows.*full_tensor",
        ):
            perplexity.linear_cross_entropy(
                hidden, distribute_tensor(weight, mesh, [placement]), target
            )
    split = distribute_tensor(torch.cat([hidden, hidden[:1]])[: 2 * ranks], mesh, [Shard(0)])
    with pytest.raises(ValueError, match="input: expected"):
        perplexity.linear_cross_entropy(
            split, distribute_tensor(weight, mesh, [Shard(0)]), target[: 2 * ranks]
        )


def fully_sharded(rank, ranks):
    """Train under FSDP2, which gathers the head: own tokens on each rank, gradients averaged."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hidden, weight, _, _, target = problem()
    head = perplexity.LinearCrossEntropyLoss(D, V)
    head.linear.weight.data.copy_(weight)
    fully_shard(head, mesh=init_device_mesh("cpu", (ranks,)))
    tokens = slice(rank, N, ranks)
    head(hidden[tokens], target[tokens]).backward()
    whole = weight.clone().requires_grad_()
    total = sum(
        perplexity.linear_cross_entropy(hidden[r::ranks], whole, target[r::ranks])
        for r in range(ranks)
    )
    (total / ranks).backward()
    close(head.linear.weight.grad.full_tensor(), whole.grad, torch.float32)


def edges(rank, ranks):
    for body in (frozen_input, equal_rows_tie, bad_input):
        body(rank, ranks)


# The interpreter takes a minute for every split and dtype: `make test` has an empty rank and a
# smaller one.
@pytest.mark.parametrize(
    ("ranks", "call"),
    [
        pytest.param(ranks, (losses_and_statistics, *arguments), id=name, marks=marks)
        for name, ranks, arguments, marks in (
            ("2-torch", 2, ("torch", DTYPES, SPLITS[2]), ()),
            ("3-torch", 3, ("torch", DTYPES, SPLITS[3]), pytest.mark.slow),
            ("3-torch-some", 3, ("torch", DTYPES[:1], SPLITS[3][:2]), ()),
            ("2-triton", 2, ("triton", DTYPES, SPLITS[2]), pytest.mark.slow),
            ("3-triton", 3, ("triton", DTYPES, SPLITS[3]), pytest.mark.slow),
            ("3-triton-some", 3, ("triton", DTYPES[1:], SPLITS[3][1:2]), ()),
        )
    ],
)
def test_a_sharded_vocabulary_equals_one_process(ranks, call, failures, request):
    failure = failures(ranks)[request.node.nodeid]
    assert failure is None, failure


@pytest.mark.parametrize(
    ("ranks", "call"),
    [
        pytest.param(2, (edges,), id="edges-2"),
        pytest.param(2, (dtensors,), id="dtensors-2", marks=pytest.mark.slow),
        pytest.param(3, (dtensors,), id="dtensors-3"),
        pytest.param(2, (fully_sharded,), id="fully_sharded-2"),
    ],
)
def test_edges_dtensors_and_fsdp(ranks, call, failures, request):
    failure = failures(ranks)[request.node.nodeid]
    assert failure is None, failure


def fails(rank, ranks, word):
    if rank == 1:
        raise ValueError(word)
    dist.barrier()


def dies(rank, ranks):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def succeeds(rank, ranks):
    total = torch.tensor(rank)
    dist.all_reduce(total)
    assert total == 1


@pytest.mark.slow
def test_every_call_of_a_launch_has_its_own_outcome():
    """A failing call neither hides the calls before it nor those after it."""
    calls = [(succeeds,), (fails, "first"), (succeeds,), (dies,), (fails, "last")]
    found = outcomes(2, calls)
    assert found[0] is None and found[2] is None
    assert "rank 1:" in found[1] and "ValueError: first" in found[1]
    assert "exit code 7" in found[3] and "ValueError: last" in found[4]
