"""Time of each step of a block on this CPU, and of alternatives: ``python bench/steps.py``.

Every variant streams the same weight, block by block, through a matrix product and the sweeps after
it. So a step is timed in its place, with the caches as the steps before have left them. Times are
milliseconds for 2²⁰ logits, medians over blocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import RESULTS, commit, cpu_name, now, slug, version, write

T, R, D, BLOCKS = 2048, 512, 768, 24
LOG2E = 1.4426950408889634
Step = tuple[str, Callable]


def row_steps(z: torch.Tensor, state: dict) -> list[Step]:
    """Return the steps of ``blockwise.py`` from a block of logits [tokens, columns] to its sum."""
    return [
        ("amax", lambda: state.update(maximum=z.amax(1)[:, None])),
        ("subtract the maximum", lambda: z.sub_(state["maximum"])),
        ("times log2 e", lambda: z.mul_(LOG2E)),
        ("exp2", z.exp2_),
        ("sum", lambda: z.sum(1)),
    ]


def variants() -> dict[str, tuple[torch.dtype, Callable[[dict], list[Step]]]]:
    hidden = {dtype: torch.randn(T, D).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    buffer, narrow = torch.empty(T * R), torch.empty(T * R, dtype=torch.bfloat16)
    wide_weight, wide_panel = torch.empty(R, D), torch.empty(T, 4 * R)
    rows, columns = buffer.view(T, R), buffer.view(R, T)
    target, ignored = torch.randint(R, (T, 1)), torch.rand(T) < 0.1
    few = torch.randperm(T)[: T * R // 50257]
    float32, bfloat16 = torch.float32, torch.bfloat16

    def product(state, out=rows):
        return [("product", lambda: torch.mm(hidden[float32], state["weight"].T, out=out))]

    def replaced(steps: list[Step], by: dict[str, list[Step]]) -> list[Step]:
        return [new for step in steps for new in by.get(step[0], [step])]

    def exp(state):
        steps = product(state) + row_steps(rows, state)
        return replaced(steps, {"times log2 e": [], "exp2": [("exp", rows.exp_)]})

    def argmax(state):
        gather = [
            (
                "argmax and gather",
                lambda: state.update(maximum=rows.gather(1, rows.argmax(1)[:, None])),
            )
        ]
        return replaced(product(state) + row_steps(rows, state), {"amax": gather})

    def transposed(state):
        return [
            ("product", lambda: torch.mm(state["weight"], hidden[float32].T, out=columns)),
            ("amax", lambda: state.update(maximum=columns.amax(0))),
            ("subtract the maximum", lambda: columns.sub_(state["maximum"])),
            ("times log2 e", lambda: columns.mul_(LOG2E)),
            ("exp2", columns.exp2_),
            ("sum", lambda: columns.sum(0)),
        ]

    def every_target(state):
        return [
            *product(state),
            ("gather of every row", lambda: rows.gather(1, target)),
            *row_steps(rows, state),
        ]

    def few_targets(state):
        picked = ("index of the block's own", lambda: rows[few, target[few, 0]])
        return [*product(state), picked, *row_steps(rows, state)]

    def strided(state):
        part = wide_panel[:, R : 2 * R]
        return product(state, part) + row_steps(part, state)

    def masked(state):
        mask = ignored[:, None]
        return [*product(state), ("zero by mask", lambda: rows.masked_fill_(mask, 0.0))]

    def indexed(state):
        return [
            *product(state),
            ("zero by index", lambda: rows.index_fill_(0, ignored.nonzero()[:, 0], 0.0)),
        ]

    def rounded(state):
        z = narrow.view(T, R)
        return [
            ("product", lambda: torch.mm(hidden[bfloat16], state["weight"].T, out=z)),
            ("to float32", lambda: rows.copy_(z)),
            *row_steps(rows, state),
        ]

    def widened(state):
        return [
            ("weight to float32", lambda: wide_weight.copy_(state["weight"])),
            ("product", lambda: torch.mm(hidden[float32], wide_weight.T, out=rows)),
            *row_steps(rows, state),
        ]

    return {
        "float32, as it is": (float32, few_targets),
        "float32, exp": (float32, exp),
        "float32, argmax": (float32, argmax),
        "float32, blocks [columns, tokens]": (float32, transposed),
        "float32, a gather of every row's target": (float32, every_target),
        "float32, in a wider panel": (float32, strided),
        "float32, ignored rows zeroed by mask": (float32, masked),
        "float32, ignored rows zeroed by index": (float32, indexed),
        "bfloat16, rounded products": (bfloat16, rounded),
        "bfloat16, float32 logits": (bfloat16, widened),
    }


@torch.no_grad()
def measure() -> dict[str, dict[str, float]]:
    milliseconds = {}
    for name, (dtype, steps_of) in variants().items():
        weight, times = (torch.randn(BLOCKS * R, D) * D**-0.5).to(dtype), {}
        for _ in range(2):
            times.clear()
            for block in weight.split(R):
                for step, call in steps_of({"weight": block}):
                    start = time.perf_counter()
                    call()
                    times.setdefault(step, []).append(time.perf_counter() - start)
        milliseconds[name] = {
            step: 1e3 * statistics.median(values) * 2**20 / (T * R)
            for step, values in times.items()
        }
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="steps", description=__doc__.split("\n\n")[0])
    name = cpu_name()
    parser.add_argument("--out", type=Path, default=RESULTS / f"cpu-{slug(name)}-steps.json")
    arguments = parser.parse_args()
    content = dict(
        device=name,
        cores=torch.get_num_threads(),
        torch=version("torch"),
        date=now(),
        commit=commit(),
        block=dict(tokens=T, columns=R, hidden=D),
        milliseconds=measure(),
    )
    write(content, arguments.out)
    for variant, steps in content["milliseconds"].items():
        total = sum(ms for step, ms in steps.items() if step != "product")
        print(f"{variant}: {total:.2f} beside {steps['product']:.2f} of product; ", end="")
        print(", ".join(f"{step} {ms:.3f}" for step, ms in steps.items()))


if __name__ == "__main__":
    main()
