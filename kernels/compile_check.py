"""Compile every kernel ahead of time for each GPU target, without a GPU, and refuse what would run badly.

``python -m perplexity.kernels.compile_check [--quick] [--markdown OUT]``

The launchers themselves are called, under ``launch.recording``, with tensors that have no data: what is compiled here is
what would be launched there, with the specialisation the JIT would apply. A case fails on a spilled register, on more
shared memory than the device has, and where a kernel that multiplies matrices does not use the matrix unit.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import SUMS
from .launch import INTERPRETED, Launch, Target, recording

TARGETS = {
    "sm_80": Target("cuda", 80, 32),
    "sm_90": Target("cuda", 90, 32),
    "sm_100": Target("cuda", 100, 32),
    "gfx942": Target("hip", "gfx942", 64),
}
# Shared memory one program may use, in KiB (CUDA programming guide, table of compute capabilities; CDNA 3 ISA).
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
FEATURES = ("bias", "softcap", "class_weight", "logit_sum", "exp_shift")


@dataclass(frozen=True)
class Case:
    """One set of inputs: every kernel it launches is compiled."""

    target: str
    dtype: str
    layout: str  # aligned; odd (no size divides anything, no pointer is aligned); strided (even sizes, no unit stride)
    features: frozenset[str]

    def __str__(self) -> str:
        return f"{self.target} {self.dtype} {self.layout} {'+'.join(sorted(self.features)) or 'plain'}"


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes; ``multiplies`` says whether its source has a matrix product."""

    kernel: str
    case: Case
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int
    multiplies: bool

    def failures(self) -> list[str]:
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > SHARED_KIB[self.case.target] << 10:
            found.append(f"takes {self.shared_bytes} bytes of shared memory, over {SHARED_KIB[self.case.target]} KiB")
        if self.multiplies and not self.matrix_instructions:
            found.append(f"multiplies matrices without {MATRIX_INSTRUCTION[self.case.target]}")
        return [f"{self.kernel}, {self.case}: {text}" for text in found]


def launches(case: Case) -> list[Launch]:
    """Every launch of a forward and a backward from hidden states and from logits, one a kernel."""
    from . import linear_nll, linear_nll_grad, nll

    tokens, dtype = 1024, DTYPES[case.dtype]
    vocabulary, dimension = (50257, 123) if case.layout == "odd" else (50304, 768)

    def empty(*shape, dtype=dtype):
        if case.layout == "strided" and len(shape) == 2:
            return torch.empty((shape[0], 3 * shape[1]), device="meta", dtype=dtype)[:, ::3]
        return torch.empty(shape, device="meta", dtype=dtype)

    hidden, weight, logits = empty(tokens, dimension), empty(vocabulary, dimension), empty(tokens, vocabulary)
    bias = empty(vocabulary) if "bias" in case.features else None
    class_weight = empty(vocabulary, dtype=torch.float32) if "class_weight" in case.features else None
    upstream, maximum = empty(SUMS, tokens, dtype=torch.float32), empty(tokens, dtype=torch.float32)
    target = empty(tokens, dtype=torch.int32 if case.layout == "odd" else torch.int64)
    options = dict(
        softcap=30.0 if "softcap" in case.features else None,
        logit_scale=0.5,
        with_logit_sum="logit_sum" in case.features,
        with_exp_shift="exp_shift" in case.features,
    )
    with recording(TARGETS[case.target]) as recorded:
        linear_nll.linear_nll(hidden, weight, bias, target, class_weight, **options)
        linear_nll_grad.linear_nll_grad(upstream, maximum, hidden, weight, bias, target, class_weight, **options)
        if "bias" not in case.features:
            nll.nll(logits, target, class_weight, **options)
            nll.nll_grad(upstream, maximum, logits, target, class_weight, **options)
    return list({launch.kernel.__name__: launch for launch in recorded}.values())


def source(launch: Launch, target: Target, aligned: bool) -> ASTSource:
    """The launch as source to compile, specialised as the JIT does: ints of 1, multiples of 16, on AMD small tensors."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        divisible = False
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible = aligned
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        found = [["tt.divisibility", 16]] if divisible else []
        if isinstance(value, torch.Tensor) and target.backend == "hip" and value.untyped_storage().nbytes() < 2**31:
            found.append(["tt.pointer_range", 32])
        if found:
            attributes[(index,)] = found
    return ASTSource(launch.kernel, signature, constants, attributes)


def nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a cubin, from Triton's own cuobjdump; a spill is stack or local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", out)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def compile_case(case: Case) -> list[Compiled]:
    target, found = TARGETS[case.target], []
    for launch in launches(case):
        compiled = triton.compile(
            source(launch, target, aligned=case.layout != "odd"),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=launch.options,
        )
        if target.backend == "cuda":
            registers, spilled = nvidia_resources(compiled.asm["cubin"])
            text = compiled.asm["ptx"]
        else:
            text = compiled.asm["amdgcn"]
            registers, vector, scalar, scratch = (
                int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
                for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
            )
            spilled = max(4 * (vector + scalar), scratch)
        found.append(
            Compiled(
                launch.kernel.__name__.strip("_"),
                case,
                registers,
                spilled,
                compiled.metadata.shared,
                text.count(MATRIX_INSTRUCTION[case.target]),
                "tt.dot" in compiled.asm["ttir"],
            )
        )
    return found


def cases(quick: bool) -> list[Case]:
    """Targets × dtypes × layouts × feature sets; ``quick``: for each target a set that covers every pair that has failed."""
    everything = frozenset(FEATURES)
    few = [
        ("float32", "aligned", frozenset()),
        ("float32", "odd", everything),
        ("bfloat16", "aligned", frozenset()),
        ("bfloat16", "aligned", everything - {"bias"}),
        ("bfloat16", "odd", frozenset({"bias", "softcap"})),
        ("bfloat16", "strided", everything),
        ("float16", "odd", frozenset({"softcap", "exp_shift"})),
    ]
    chosen = [Case(target, *values) for target in TARGETS for values in few]
    if quick:
        return chosen
    subsets = [
        frozenset(names)
        for size in range(len(FEATURES) + 1)
        for names in itertools.combinations(FEATURES, size)
        if "class_weight" not in names or "logit_sum" in names  # the kernels read class weights for that sum only
    ]
    grid = [Case(*values) for values in itertools.product(TARGETS, DTYPES, ("aligned", "odd"), subsets)]
    strided = [Case(*values) for values in itertools.product(TARGETS, DTYPES, ("strided",), (frozenset(), everything))]
    return grid + strided


def _worst(rows: list[Compiled]) -> list[Compiled]:
    """For each kernel, target and dtype the row that spills most, of equal ones the one with most registers."""
    worst = {}
    for row in rows:
        key = row.kernel, row.case.target, row.case.dtype
        if key not in worst or (row.spilled_bytes, row.registers) > (worst[key].spilled_bytes, worst[key].registers):
            worst[key] = row
    return [worst[key] for key in sorted(worst)]


def markdown(rows: list[Compiled]) -> str:
    lines = [
        "| kernel | target | dtype | registers | spilled bytes | shared bytes | matrix instruction |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in _worst(rows):
        unit = MATRIX_INSTRUCTION[row.case.target] if row.matrix_instructions else ""
        lines.append(
            f"| {row.kernel} | {row.case.target} | {row.case.dtype} | {row.registers} | {row.spilled_bytes} "
            f"| {row.shared_bytes} | {unit} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compile_check", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a covering set")
    parser.add_argument("--markdown", metavar="OUT", help="write the table to this file")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        print("compile_check: expected compiled kernels, got TRITON_INTERPRET=1; unset it", file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            os.cpu_count(), initializer=os.environ.update, initargs=({"TRITON_CACHE_DIR": cache},)
        ) as pool,
    ):
        rows = [row for found in pool.map(compile_case, cases(arguments.quick)) for row in found]
    table = markdown(rows)
    print(table)
    failures = sorted({failure for row in rows for failure in row.failures()})
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(failures)} failures")
    if arguments.markdown:
        heading = (
            f"# Compile check\n\nWritten by `make compile-check` with triton {triton.__version__}: {len(rows)} compilations of "
            "every kernel × target × dtype × layout × feature set; a row is the one with most registers.\n\n"
        )
        Path(arguments.markdown).write_text(heading + table + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
