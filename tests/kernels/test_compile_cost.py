"""Counts of compiled kernels: how they are read from instructions, and a gate that can fail."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import processes
import pytest

pytest.importorskip("triton")
import triton

from perplexity.kernels import compile_cost
from perplexity.kernels.compile_cost import COST_CASES, LEAST, Cost, Flow

COMMITTED = Path(__file__).parents[2] / "bench" / "results" / "kernel-cost.json"
GOOD = Cost(
    instructions=2000,
    tile=1000,
    logits=128,
    step=100,
    step_barriers=2,
    matrix=4,
    setmaxnreg=2,
    narrow_reads=3,
    narrow_writes=3,
    wide_reads=0,
    wide_writes=8,
    registers=168,
    spilled_bytes=0,
    shared_bytes=65536,
)
# A step of 4 instructions that a branch leads around the tile's 3: the shape of a flattened loop.
FLATTENED = """
S2R R0, SR_TID.X
@!P0 BRA 0x90
BAR.SYNC.DEFER_BLOCKING 0x0
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24
@P0 BRA 0x80
MUFU.EX2 R1, R2
FADD R3, R1, R3
FADD R3, R1, R4
@P1 BRA 0x20
STG.E.U16 desc[UR4][R2.64], R3
EXIT
"""
# Likewise, with 2 instructions that only some tiles need.
BRANCHED = FLATTENED.replace("FADD R3, R1, R3", "@P2 BRA 0x90\nFADD R3, R1, R5\nFADD R3, R1, R6")
BRANCHED = BRANCHED.replace("@P0 BRA 0x80", "@P0 BRA 0xa0").replace(
    "@!P0 BRA 0x90", "@!P0 BRA 0xb0"
)
# A loop over D, then the tile once.
ONE_TILE = """
HMMA.16816.F32.BF16 R4, R8, R12, R4
LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]
@P0 BRA 0x0
MUFU.EX2 R1, R2
STG.E.128 desc[UR4][R2.64], R4
EXIT
"""


def flow(text):
    return Flow([(16 * place, line) for place, line in enumerate(text.strip().splitlines())])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FLATTENED, dict(instructions=11, tile=3, step=4, step_barriers=1, matrix=1)),
        (FLATTENED, dict(narrow_writes=1, wide_writes=0, narrow_reads=0, wide_reads=0)),
        (BRANCHED, dict(instructions=13, tile=3, step=4)),
        (ONE_TILE, dict(instructions=6, tile=3, step=3, step_barriers=0, matrix=1)),
        (ONE_TILE, dict(narrow_writes=0, wide_writes=1, narrow_reads=0, wide_reads=1)),
    ],
)
def test_counts_of_a_program(text, expected, monkeypatch):
    instructions = [(16 * place, line) for place, line in enumerate(text.strip().splitlines())]
    monkeypatch.setattr(compile_cost, "sass", lambda cubin: instructions)
    monkeypatch.setattr(compile_cost, "nvidia_resources", lambda cubin: (64, 0))
    counts = compile_cost.cost(b"", 128, 0)
    assert {name: getattr(counts, name) for name in expected} == expected


def test_a_loop_and_its_shortest_way():
    program = flow(FLATTENED)
    (product,) = program.having(compile_cost.MATRIX)
    assert program.count(program.loop(product)) == 7
    assert program.count(program.shortest_cycle(product, without=program.having("MUFU"))) == 4
    assert program.loop(0) == program.shortest_cycle(0) == set()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"tile": 1020}, None),
        ({"tile": 1021}, "tile: 1000 before, 1021 now"),
        ({"step": 103}, "step"),
        ({"instructions": 2041}, "instructions"),
        ({"narrow_writes": 4}, "narrow_writes"),
        ({"narrow_reads": 4}, "narrow_reads"),
        ({"step_barriers": 3}, "step_barriers"),
        ({"spilled_bytes": 8}, "spilled_bytes"),
        ({"matrix": 0}, "matrix"),
        ({"setmaxnreg": 0}, "setmaxnreg"),
        ({"tile": 900, "wide_writes": 0, "registers": 255}, None),
    ],
)
def test_the_gate_can_fail(changes, words):
    found = compile_cost.compare({"kernel": GOOD}, {"kernel": replace(GOOD, **changes)})
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


def test_a_kernel_without_a_row_is_found():
    assert compile_cost.compare({}, {"kernel": GOOD}) == ["kernel: no row in the committed table"]


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "counts.json"
    tables = {"3.9.0": {"one": GOOD, "two": replace(GOOD, tile=7)}, "3.6.0": {"one": GOOD}}
    compile_cost.write(path, tables)
    assert compile_cost.read(path) == tables
    assert compile_cost.read(tmp_path / "none.json") == {}


def test_the_committed_table_has_a_row_of_every_case():
    for rows in compile_cost.read(COMMITTED).values():
        for case in COST_CASES:
            assert any(name.endswith(f", {case}") for name in rows), case


def run(*arguments):
    """In a process of its own: kernels are interpreted in this one."""
    base = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = (sys.executable, "-W", "ignore", "-m", "perplexity.kernels.compile_cost", *arguments)
    return processes.run(*command, env=base, timeout=10 * processes.HANG)


@pytest.mark.parametrize("extent", [("--least",), pytest.param((), marks=pytest.mark.slow)])
def test_no_kernel_costs_more_than_its_committed_row(extent):
    if triton.__version__ not in compile_cost.read(COMMITTED):
        pytest.skip(f"no committed counts with triton {triton.__version__}")
    done = run(*extent, "--against", COMMITTED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(LEAST[0]) in done.stdout


def test_interpreted_kernels_and_unknown_counts_are_refused(tmp_path):
    assert compile_cost.INTERPRETED and compile_cost.main(["--least"]) == 2
