"""Rows of ``make bench``: the cases, providers, sizes and dtypes that are measured on a CPU."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from cases import CASES, DTYPES
from torch import Tensor

from perplexity import token_nll

# N, V, D
SHAPES = ((2048, 50257, 768), (512, 128256, 2048), (256, 262144, 1152), (2048, 32000, 4096))
# Measured at the first shape only: some take a minute to compile, or a minute a step.
PEERS = ("torch_compile", "torch_linear", "cce", "liger")
FORWARD, TRAIN, STATISTICS = "linear_nll_forward", "linear_nll_train", "token_statistics"


@dataclass
class BestProduct:
    """Matrix product of hidden states and weight alone, in the fastest blocks of vocabulary rows.

    A block's logits overwrite those of the block before.
    """

    rows: int = 0

    def __call__(self, x: Tensor, w: Tensor, *_: Tensor) -> None:
        with torch.no_grad():
            if not self.rows:
                self.rows = min(self.candidates(x, w), key=lambda rows: self.seconds(x, w, rows))
            self.multiply(x, w, self.rows)

    @staticmethod
    def candidates(x: Tensor, w: Tensor) -> list[int]:
        limit = max(64 << 20, x.shape[0] * 256 * 4)  # bytes of the buffer
        sizes = [
            rows for rows in (256, 512, 1024, 2048, 4096, 8192) if rows * x.shape[0] * 4 <= limit
        ]
        return [rows for rows in sizes if rows < w.shape[0]] or [w.shape[0]]

    @staticmethod
    def multiply(x: Tensor, w: Tensor, rows: int) -> None:
        buffer = x.new_empty(x.shape[0] * rows)
        for block in w.split(rows):
            torch.mm(x, block.T, out=buffer[: x.shape[0] * len(block)].view(x.shape[0], len(block)))

    def seconds(self, x: Tensor, w: Tensor, rows: int) -> float:
        part = w[: max(16 * rows, w.shape[0] // 4)]
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self.multiply(x, part, rows)
            times.append(time.perf_counter() - start)
        return min(times)


@dataclass(frozen=True)
class Row:
    group: str
    case: str
    provider: str
    n: int
    v: int
    d: int | None
    dtype: str

    def __str__(self):
        return "-".join(str(part) for part in vars(self).values() if part is not None)

    @property
    def size(self) -> tuple:
        return self.n, self.d, self.v

    def inputs(self) -> list[Tensor]:
        return CASES[self.case].inputs(*self.size, DTYPES[self.dtype], "cpu")

    def function(self) -> Callable:
        if self.provider == "product":
            return BestProduct()
        if self.provider == "ours_rounded":
            return partial(token_nll, round_logits=True)
        return CASES[self.case].providers[self.provider]


KEYS = tuple(Row.__dataclass_fields__)


def _rows(
    group: str, cases: Iterable[str], providers: Iterable[str], *size, dtype: str
) -> list[Row]:
    return [Row(group, case, provider, *size, dtype) for case in cases for provider in providers]


def table() -> list[Row]:
    rows = []
    for index, shape in enumerate(SHAPES):
        for dtype in ("float32", "bfloat16"):
            add = partial(_rows, "shapes", dtype=dtype)
            peers = PEERS if index == 0 else ()
            rounded = ("ours_rounded",) if dtype != "float32" else ()
            rows += add((FORWARD,), ("product", "ours", *rounded, "torch"), *shape)
            rows += add((STATISTICS,), ("ours", "torch") if index == 0 else ("ours",), *shape)
            rows += add((TRAIN,), ("ours", "torch", *peers), *shape)
            rows += add((FORWARD,), peers, *shape)
    for dtype, (v, d), n in itertools.product(
        ("float32", "bfloat16"), ((32000, 768), (128256, 2048)), (1, 16, 64)
    ):
        rounded = ("ours_rounded",) if dtype != "float32" else ()
        rows += _rows("small", (FORWARD,), ("ours", *rounded, "torch"), n, v, d, dtype=dtype)
    for dtype in ("float32", "bfloat16"):
        cases = "nll_logits", "nll_logits_train"
        rows += _rows(
            "logits", cases, ("ours", "torch", "torch_compile"), 2048, 50257, None, dtype=dtype
        )
    rows += _rows("float16", (FORWARD, TRAIN), ("ours", "torch"), 256, 50257, 768, dtype="float16")
    for axis, times in itertools.product(range(3), (1, 2, 4, 8, 16)):
        size = [256, 16384, 256]
        size[axis] *= times
        if times > 1 or axis == 0:
            rows += _rows("growth", (FORWARD, TRAIN), ("ours",), *size, dtype="float32")
    for v in (16384, 65536, 262144, 1048576):
        # At 262,144 PyTorch's chunked step takes 40 s.
        chunked = ("torch_linear",) if v <= 65536 else ()
        rows += _rows(
            "vocabulary",
            (FORWARD, TRAIN),
            ("ours", "torch", *chunked),
            512,
            v,
            256,
            dtype="float32",
        )
    return rows
