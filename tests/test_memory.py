"""``memory_limit`` is kept: by all live tensors inside the operators, and by the process."""

import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from processes import run
from torch.utils._python_dispatch import TorchDispatchMode

from perplexity.kernels.cpu import blockwise, blockwise_kl, blockwise_statistics
from perplexity.kernels.dispatch import Plan, Rule

MIB = 1 << 20


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside and alive at once, at most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}

    def _gone(self, key):
        self.live -= self.seen.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.seen and storage.data_ptr() not in self.given:
                    self.seen[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, key)
        return out

    def of(self, function, *tensors_and, **keywords):
        flat = [x for part in tensors_and for x in (part if isinstance(part, tuple) else (part,))]
        self.given = {x.untyped_storage().data_ptr() for x in flat if isinstance(x, torch.Tensor)}
        with self:
            result = function(*tensors_and, **keywords)
        results = [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]
        # Gradients are counted in float32, in which they are accumulated.
        return self.peak - sum(x.numel() * max(4, x.element_size()) for x in results)


FEATURES = {
    "plain": Rule(),
    "capped": Rule(softcap=9.0, logit_scale=0.5),
    "all": Rule(softcap=9.0, with_logit_sum=True, with_exp_shift=True),
}


@pytest.fixture
def two_threads(monkeypatch):
    """Blocks of the size that two threads' caches hold.

    The work itself keeps its threads: two on a core that others use as well wait for each other
    most of the time.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("limit", [MIB // 2, 2 * MIB, 16 * MIB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [200, 500])
def test_no_more_is_alive_at_once(N, dtype, limit, two_threads):
    V, D = 3000, 64
    hidden, weight, other = (torch.randn(*shape).to(dtype) for shape in ((N, D), (V, D), (N, D)))
    target, at_target = torch.randint(0, V, (N,)), torch.zeros(N)
    vectors = 40 * 8 * N  # a few dozen numbers a token: running sums, their merges, local targets
    head, plan = (hidden, weight, None), Plan(memory_limit=limit)
    calls = {
        "statistics": lambda: LiveBytes().of(
            blockwise_statistics.linear_statistics, *head, target, at_target, None, Rule(), plan
        ),
        "divergence": lambda: LiveBytes().of(
            blockwise_kl.linear_kl, head, (other, weight, None), plan=plan
        ),
        "divergence, gradients": lambda: LiveBytes().of(
            blockwise_kl.linear_kl_grad,
            torch.ones(N),
            torch.rand(5, N) + 1.0,
            head,
            (other, weight, None),
            Rule(softcap=9.0, logit_scale=0.5),
            plan=plan,
        ),
    }
    for name, rule in FEATURES.items():
        calls[name] = lambda rule=rule: LiveBytes().of(
            blockwise.linear_nll, *head, target, None, rule, plan
        )
        calls[f"{name}, gradients"] = lambda rule=rule: LiveBytes().of(
            blockwise.linear_nll_grad,
            torch.rand(5, N),
            torch.zeros(N),
            *head,
            target,
            None,
            rule,
            plan,
        )
    peaks = {name: call() for name, call in calls.items()}
    over = {name: peak / MIB for name, peak in peaks.items() if peak > limit + vectors}
    assert not over, f"over {limit / MIB} MiB and {vectors / MIB:.2f} of vectors: {over}"
    # The cap is used, not merely kept: blocks far below it would cost time.
    assert dtype != torch.float32 or peaks["plain, gradients"] > min(limit, 4 * N * V) / 4


# Beside the tensors: packed operands of the library's matrix products, and pages of code that run
# for the first time.
LIBRARY = 6 * MIB


NAMES = ("forward", "statistics", "divergence", "train", "train_everything", "rows")
LIMITS = (0, 8 * MIB)
SIZE = (1024, 12_000, 64)  # the logits would be 47 MiB, in 16 bits 23
LARGE_HEAD = (64, 60_000, 256)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def taken(request):
    """Measure all cases in one process; return a dtype and ``{(name, N, V, D, limit): bytes}``."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    cases = [(name, *SIZE, limit) for name in NAMES for limit in LIMITS] + [
        ("train", *LARGE_HEAD, 0)
    ]
    # A fixed threshold: freed blocks go back to the system, and the figure is the call's, not the
    # allocator's history. One thread, whatever the machine has: blocks are as large as the caches
    # of all threads.
    options = {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
        "MKL_DISABLE_FAST_MM": "1",
        "OMP_NUM_THREADS": "1",
    }
    words = [",".join(map(str, case)) for case in cases]
    script = Path(__file__).parents[1] / "bench" / "support" / "peak_memory.py"
    done = run(sys.executable, script, request.param, *words, env=os.environ | options)
    assert done.returncode == 0, done.stderr
    return request.param, dict(zip(cases, map(int, done.stdout.split()), strict=True))


def float32_sums(dtype: str, name: str, N: int, V: int, D: int) -> int:
    """Return the bytes by which the float32 sums of 16-bit gradients exceed the gradients."""
    return 2 * (N + V) * D if dtype == "bfloat16" and name.startswith("train") else 0


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_the_process_takes_no_more(taken, name, limit):
    """The system's own figure, allocator and libraries included."""
    dtype, bytes_of = taken
    found = bytes_of[(name, *SIZE, limit)]
    allowed = limit or (16 if name.startswith("train") else 12) * MIB
    allowed += float32_sums(dtype, name, *SIZE)
    assert found <= allowed + LIBRARY, f"{found / MIB:.1f} MiB, {allowed / MIB} MiB allowed"
    assert found > 0, "nothing was measured"


def test_training_takes_its_gradients_and_little_more(taken):
    """Training holds no second [V, D]: no zeros for unwanted gradients, no copy of the gradient.

    One has 59 MiB in float32.
    """
    dtype, bytes_of = taken
    allowed = 32 * MIB + float32_sums(dtype, "train", *LARGE_HEAD)
    assert bytes_of[("train", *LARGE_HEAD, 0)] <= allowed
