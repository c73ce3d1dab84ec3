"""Count what compiled kernels cost, and compare the counts with a committed table, without a GPU.

``python -m perplexity.kernels.compile_cost [--least] [--against FILE] [--write FILE]``

The kernels of ``COST_CASES`` are compiled as in ``compile_check``, and their instructions (SASS)
are read with Triton's own cuobjdump. Counts are static: an instruction counts once, however often
it runs. The check fails where a count grew by more than 2 %, where a kernel has more narrow reads
or writes than before, and where it waits at more barriers in a step of its product.

- **tile**: instructions for the logits of one tile, a thread. These are the instructions of the
  shortest way around the loop over tiles, without the step of the product. So a branch that few
  tiles take counts as not taken: the end of the vocabulary, the target of some token. Where no loop
  has an exponential, they are the instructions of the whole kernel, without the step.
- **step**: instructions of one step of a matrix product along D: of the shortest cycle through the
  matrix instructions that passes no exponential.
- **narrow**: reads and writes of global memory of less than 16 bytes a thread. A row of sums is
  read and written so: only a change says something.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from .compile_check import TARGETS, Case, launches, nvidia_resources
from .gpu.launch import INTERPRETED

MATRIX = re.compile(r"\b(?:HMMA|HGMMA|QGMMA|UTC\w*MMA)\b")
EXPONENTIAL = "MUFU.EX2"
# Global memory, and copies from there to shared memory.
ACCESS = re.compile(r"\b(LDG|LDGSTS|LD|STG|ST)((?:\.\w+)*)\s")
BRANCH = re.compile(r"^(@\S+\s+)?BRA\S*\s+(.*?)(0x[0-9a-f]+)")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
GROWTH = 1.02  # ptxas schedules a few instructions otherwise from version to version
WIDE = 16  # bytes that one thread reads or writes at once at best


def _case(operation: str, target: str, *features: str, vocabulary: int = 0) -> Case:
    return Case(operation, target, "bfloat16", "aligned", frozenset(features), vocabulary)


# Qwen's vocabulary is rows of whole 128 columns but not of 256; GPT-2's is odd.
QWEN, GPT2 = 151_936, 50_257
COST_CASES = (
    *(_case("linear_nll", target) for target in ("sm_80", "sm_90", "sm_100", "sm_120")),
    *(_case("linear_nll", "sm_90", vocabulary=vocabulary) for vocabulary in (QWEN, GPT2)),
    *(_case("linear_nll", target, "softcap") for target in ("sm_80", "sm_90", "sm_100")),
    _case("linear_nll", "sm_90", "softcap", vocabulary=QWEN),
    _case("linear_nll", "sm_90", "logit_sum", "exp_shift"),
    _case("linear_statistics", "sm_90"),
    _case("linear_statistics", "sm_90", vocabulary=GPT2),
    _case("linear_statistics", "sm_90", "softcap"),
    _case("linear_kl", "sm_90"),
    _case("linear_kl", "sm_90", "p_softcap", "q_softcap", vocabulary=QWEN),
    _case("nll", "sm_90"),
    _case("nll", "sm_90", vocabulary=GPT2),
    _case("nll", "sm_90", "softcap"),
)
# The part that a test of every run compiles.
LEAST = (_case("linear_nll", "sm_90", vocabulary=QWEN),)
# A few rows a token are folded, or nothing is done: their cost is their launch.
SKIPPED = ("merge_kernel", "scale_kernel")


@dataclass(frozen=True)
class Cost:
    """Static counts of a compiled kernel."""

    instructions: int  # of the whole kernel
    tile: int  # of a thread and tile
    logits: int  # of a thread and tile
    step: int  # of a step of the product
    step_barriers: int  # waits for all threads of a program, in a step
    matrix: int  # matrix instructions
    setmaxnreg: int  # changes of a warp's registers (warp specialisation)
    narrow_reads: int
    narrow_writes: int
    wide_reads: int
    wide_writes: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    def grown(self, before: Cost) -> list[str]:
        """Return what is worse than ``before``, one line each."""
        found = [
            f"{name}: {getattr(before, name)} before, {getattr(self, name)} now"
            for name in ("tile", "step", "instructions")
            if getattr(self, name) > GROWTH * getattr(before, name)
        ]
        found += [
            f"{name}: {getattr(before, name)} before, {getattr(self, name)} now"
            for name in ("narrow_reads", "narrow_writes", "step_barriers", "spilled_bytes")
            if getattr(self, name) > getattr(before, name)
        ]
        found += [
            f"{name}: {getattr(before, name)} before, none now"
            for name in ("matrix", "setmaxnreg")
            if getattr(before, name) and not getattr(self, name)
        ]
        return found


def sass(cubin: bytes) -> list[tuple[int, str]]:
    """Return the addresses and texts of a program's instructions."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    return [
        (int(match[1], 16), match[2].strip())
        for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([@A-Z][^;]*);", text)
    ]


class Flow:
    """Basic blocks of a program and the jumps between them."""

    def __init__(self, instructions: list[tuple[int, str]]):
        """Cut the program at its jumps and at their destinations."""
        jumps = {address: BRANCH.match(text) for address, text in instructions}
        starts = {int(jump[3], 16) for jump in jumps.values() if jump}
        self.blocks: list[list[str]] = [[]]
        first = [instructions[0][0]]
        ended = False
        for address, text in instructions:
            if (ended or address in starts) and self.blocks[-1]:
                self.blocks.append([])
                first.append(address)
            self.blocks[-1].append(text)
            ended = bool(jumps[address]) or "EXIT" in text
        place = {address: number for number, address in enumerate(first)}
        self.next: list[set[int]] = []
        for number, block in enumerate(self.blocks):
            jump, last = BRANCH.match(block[-1]), block[-1]
            after = {place[int(jump[3], 16)]} if jump else set()
            always = bool(jump and not jump[1] and not jump[2].strip()) or last.startswith("EXIT")
            if not always and number + 1 < len(self.blocks):
                after.add(number + 1)
            self.next.append(after)

    def having(self, pattern: str | re.Pattern) -> set[int]:
        """Return the blocks with an instruction that has the pattern."""
        return {
            number
            for number, block in enumerate(self.blocks)
            if any(re.search(pattern, text) for text in block)
        }

    def count(self, blocks: set[int], pattern: str | re.Pattern = "") -> int:
        """Return how many instructions of these blocks have the pattern."""
        return sum(
            bool(re.search(pattern, text))
            for number in blocks
            for text in self.blocks[number]
            if not text.startswith("NOP")
        )

    def reached(self, block: int) -> set[int]:
        """Return the blocks that may run after ``block``."""
        seen: set[int] = set()
        todo = list(self.next[block])
        while todo:
            number = todo.pop()
            if number not in seen:
                seen.add(number)
                todo += self.next[number]
        return seen

    def loop(self, block: int) -> set[int]:
        """Return the outermost loop that has ``block``; empty if no loop has it."""
        return {number for number in self.reached(block) if block in self.reached(number)}

    def shortest_way(
        self, start: int, end: int, without: frozenset[int] | set[int] = frozenset()
    ) -> set[int]:
        """Return the blocks of the way from ``start`` to ``end`` of fewest instructions.

        ``start`` is left at least once, ``end`` is among the blocks. Empty if there is no way.
        """
        ways: dict[int, tuple[int, list[int]]] = {start: (0, [])}
        done: set[int] = set()
        while todo := set(ways) - done:
            number = min(todo, key=lambda one: ways[one][0])
            length, way = ways[number]
            if number == end and way:
                return set(way)
            if way:
                done.add(number)
            else:
                del ways[number]  # the way back to the start may be wanted
            for after in self.next[number] - without - done:
                new = length + len(self.blocks[after])
                if after not in ways or new < ways[after][0]:
                    ways[after] = new, [*way, after]
        return set()

    def shortest_cycle(
        self, *through: int, without: frozenset[int] | set[int] = frozenset()
    ) -> set[int]:
        """Return the cycle through blocks, in this order, of fewest instructions; empty if none."""
        parts = [
            self.shortest_way(start, end, without)
            for start, end in zip(through, (*through[1:], through[0]), strict=True)
        ]
        return set().union(*parts) if all(parts) else set()


def cost(cubin: bytes, logits: int, shared_bytes: int) -> Cost:
    """Return the counts of a program whose threads have ``logits`` logits of a tile each."""
    instructions = sass(cubin)
    flow = Flow(instructions)
    every = set(range(len(flow.blocks)))
    exponentials = flow.having(re.escape(EXPONENTIAL))
    step: set[int] = set()
    for block in flow.having(MATRIX) - exponentials:
        step |= flow.shortest_cycle(block, without=exponentials)
    products = sorted(step & flow.having(MATRIX))
    ways = [flow.shortest_cycle(block, *products) for block in exponentials]
    # Some loop may have a few exponentials, and no logits.
    tile = max(
        (way for way in ways if way),
        key=lambda way: (flow.count(way, re.escape(EXPONENTIAL)), -flow.count(way)),
        default=every,
    )
    widths: dict[tuple[str, bool], int] = {}
    for _, text in instructions:
        access = ACCESS.search(text)
        if access:
            width = next((WIDTHS[part] for part in access[2].split(".") if part in WIDTHS), 4)
            key = "writes" if access[1] in ("STG", "ST") else "reads", width >= WIDE
            widths[key] = widths.get(key, 0) + 1
    registers, spilled = nvidia_resources(cubin)
    return Cost(
        instructions=flow.count(every),
        tile=flow.count(tile - step),
        logits=logits,
        step=flow.count(step),
        step_barriers=flow.count(step, r"\bBAR\."),
        matrix=flow.count(every, MATRIX),
        setmaxnreg=flow.count(every, "USETMAXREG"),
        narrow_reads=widths.get(("reads", False), 0),
        narrow_writes=widths.get(("writes", False), 0),
        wide_reads=widths.get(("reads", True), 0),
        wide_writes=widths.get(("writes", True), 0),
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared_bytes,
    )


def costs(case: Case) -> dict[str, Cost]:
    """Compile the kernels of a case; return their counts by kernel and case."""
    target, rows = TARGETS[case.target], {}
    for built, options in launches(case):
        name = built.fn.__name__.strip("_")
        if name in SKIPPED:
            continue
        gpu = GPUTarget(target.backend, target.arch, target.warp_size)
        compiled = triton.compile(built, target=gpu, options=options)
        constants = {built.fn.arg_names[key[0]]: value for key, value in built.constants.items()}
        size = constants.get("BLOCK_N", 1) * constants["BLOCK_V"]
        logits = size // (32 * compiled.metadata.num_warps)
        key = f"{name}, {case}"
        if key in rows:  # a divergence has a gradient kernel a side
            key = f"{name} (2), {case}"
        rows[key] = cost(compiled.asm["cubin"], logits, compiled.metadata.shared)
    return rows


def markdown(rows: dict[str, Cost]) -> str:
    """Return the table of all counts."""
    lines = [
        "| kernel, case | tile | a logit | step | barriers a step | matrix | setmaxnreg "
        "| narrow reads | narrow writes | wide reads | wide writes | registers | shared bytes |",
        "| --- |" + " ---: |" * 12,
    ]
    for name, row in rows.items():
        cells = (
            f"{row.tile:,}",
            f"{row.tile / row.logits:.1f}",
            row.step or "",
            row.step_barriers if row.step else "",
            row.matrix or "",
            row.setmaxnreg or "",
            row.narrow_reads,
            row.narrow_writes,
            row.wide_reads,
            row.wide_writes,
            row.registers,
            f"{row.shared_bytes:,}",
        )
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def compare(before: dict[str, Cost], now: dict[str, Cost]) -> list[str]:
    """Return what is worse now, one line each; a kernel without a row before is one, too."""
    found = []
    for name, row in now.items():
        if name not in before:
            found.append(f"{name}: no row in the committed table")
        else:
            found += [f"{name}: {text}" for text in row.grown(before[name])]
    return found


def read(path: Path) -> dict[str, dict[str, Cost]]:
    """Return the committed counts by version of triton; none if there is no such file."""
    if not path.exists():
        return {}
    tables = json.loads(path.read_text(encoding="utf-8"))
    return {
        version: {name: Cost(**row) for name, row in rows.items()}
        for version, rows in tables.items()
    }


def write(path: Path, tables: dict[str, dict[str, Cost]]) -> None:
    """Write counts by version of triton, with a row a line."""
    lines = []
    for version, rows in sorted(tables.items()):
        body = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(asdict(row))}" for name, row in rows.items()
        )
        lines.append(f'  "{version}": {{\n{body}\n  }}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the check; return 0 if nothing grew, 1 if a count did, 2 for a wrong environment."""
    parser = argparse.ArgumentParser(prog="compile_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--least", action="store_true", help="compile one case alone")
    parser.add_argument(
        "--against", metavar="FILE", type=Path, help="fail on growth over this file"
    )
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the counts to this file")
    parser.add_argument(
        "--markdown", metavar="FILE", type=Path, help="write the table to this file"
    )
    parser.add_argument("--processes", type=int, default=1, help="default: 1")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        print(
            "compile_cost: expected compiled kernels, got TRITON_INTERPRET=1; unset it",
            file=sys.stderr,
        )
        return 2
    before = read(arguments.against) if arguments.against else {}
    if arguments.against and triton.__version__ not in before:
        print(
            f"compile_cost: expected counts with triton {triton.__version__} in "
            f"{arguments.against}, got {', '.join(before) or 'no file'}",
            file=sys.stderr,
        )
        return 2
    rows: dict[str, Cost] = {}
    with ProcessPoolExecutor(arguments.processes) as pool:
        for part in pool.map(costs, LEAST if arguments.least else COST_CASES):
            rows |= part
    table = markdown(rows)
    print(table)
    found = compare(before[triton.__version__], rows) if before else []
    for text in found:
        print(f"FAILED {text}", file=sys.stderr)
    if arguments.write:
        write(arguments.write, read(arguments.write) | {triton.__version__: rows})
    if arguments.markdown:
        heading = (
            "# What compiled kernels cost\n\nWritten by `make compile-cost` with triton "
            f"{triton.__version__}; the counts are in `bench/results/kernel-cost.json`. "
            f"{__doc__.split('- **tile**', 1)[0].split('FILE]``', 1)[1].strip()}\n\n"
            f"- **tile**{__doc__.split('- **tile**', 1)[1].rstrip()}\n\n"
        )
        arguments.markdown.write_text(heading + table + "\n", encoding="utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
