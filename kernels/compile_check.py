"""Compile every kernel ahead of time for each GPU target, without a GPU, and check the result.

``python -m perplexity.kernels.compile_check [--quick] [--markdown OUT] [--expect-triton VERSION]``

The launchers themselves are called, under ``launch.recording``, with tensors that have no data. So
the check compiles what a device would launch, with the specialisation that the JIT would apply. A
case fails on a spilled register, on more shared memory than the device has, and where a kernel that
multiplies matrices does not use the matrix unit.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .devices import Target
from .dispatch import Rule
from .fingerprint import kernels_hash
from .gpu.launch import INTERPRETED, Launch, recording
from .sums import DIVERGENCE_ROWS, SUMS, Head

# A kind has products of its own, or a copy engine, or neither; the quick check covers its pairs.
KINDS = {
    "sm_80": Target("cuda", 80, 32),
    "sm_90": Target("cuda", 90, 32),
    "sm_100": Target("cuda", 100, 32),
    "sm_120": Target("cuda", 120, 32),
    "gfx942": Target("hip", "gfx942", 64),
    "gfx1100": Target("hip", "gfx1100", 32),
}
# Devices of these kinds with other limits.
RELATIVES = {
    "sm_86": Target("cuda", 86, 32),
    "sm_89": Target("cuda", 89, 32),
    "sm_103": Target("cuda", 103, 32),
    "gfx90a": Target("hip", "gfx90a", 64),
    "gfx950": Target("hip", "gfx950", 64),
    "gfx1201": Target("hip", "gfx1201", 32),
}
TARGETS = KINDS | RELATIVES
# By the matrix unit: in the PTX, or in AMD's assembly.
MATRIX_INSTRUCTIONS = {
    "mma": "mma.sync",
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mfma": "v_mfma",
    "wmma": "v_wmma",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
# Features of each operation beyond target, dtype and layout; ``REQUIRES`` names the feature that
# another one depends on.
FEATURES = {
    "linear_nll": ("bias", "softcap", "class_weight", "logit_sum", "exp_shift"),
    "linear_statistics": ("bias", "softcap", "class_weight", "logit_sum"),
    "linear_kl": ("p_bias", "p_softcap", "q_bias", "q_softcap"),
    "nll": ("softcap", "class_weight", "logit_sum", "exp_shift", "positions", "positions_first"),
}
REQUIRES = {"class_weight": "logit_sum", "positions_first": "positions"}
# aligned: every size is whole tiles; ragged: rows are read 16 bytes at a time and end within a
# tile; odd: no size is a multiple of anything, no input is aligned; strided: no unit stride; mixed:
# P is odd and in float32, Q is aligned.
LAYOUTS = {
    "linear_nll": ("aligned", "ragged", "odd", "strided"),
    "linear_statistics": ("aligned", "ragged", "odd", "strided"),
    "linear_kl": ("aligned", "ragged", "odd", "strided", "mixed"),
    "nll": ("aligned", "odd", "strided"),
}
# Extents of a check: the part of kernel × target × dtype × layout × feature set that is compiled.
EXTENTS = {"least": "each value once of", "quick": "a pairwise covering set of", "full": "every"}
# Hidden size in each layout.
DIMENSION = {"aligned": 768, "ragged": 720, "odd": 123, "strided": 768, "mixed": 768}


@dataclass(frozen=True)
class Case:
    """An operation on one set of inputs; every kernel of its forward and backward is compiled."""

    operation: str
    target: str
    dtype: str
    layout: str
    features: frozenset[str]
    vocabulary: int = 0  # 0: the layout's

    def __str__(self) -> str:
        features = "+".join(sorted(self.features)) or "plain"
        text = f"{self.operation} {self.target} {self.dtype} {self.layout} {features}"
        return f"{text} V={self.vocabulary}" if self.vocabulary else text

    def demanding(self) -> str | None:
        """Return why a case needs most of a device; None where others need more."""
        if (self.dtype, self.layout, self.features) == ("bfloat16", "aligned", frozenset()):
            return "the largest tiles"
        features = frozenset(FEATURES[self.operation])
        if (self.dtype, self.layout, self.features) == ("float32", "odd", features):
            return "the most registers a logit"
        return None

    def values(self, together: int) -> set:
        """Return all combinations of ``together`` values of the case, absent features included."""
        features = [(name, name in self.features) for name in FEATURES[self.operation]]
        return set(
            itertools.combinations([self.target, self.dtype, self.layout, *features], together)
        )


@dataclass(frozen=True)
class Compiled:
    """Resources of a compiled kernel; it ``multiplies`` if its source has a matrix product."""

    kernel: str
    case: Case
    compilation: str  # equal for equal specialisations
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int
    multiplies: bool
    descriptor_loads: int = 0  # loads by the copy engine (TMA)
    described: bool = False  # whether the launch passes descriptors
    programs: int = 0  # that fit on a multiprocessor
    step_bytes: int = 0  # of both tiles that one step of a matrix product reads

    def failures(self) -> list[str]:
        """Return what is wrong with the kernel, one line each."""
        failures = []
        if self.spilled_bytes:
            failures.append(f"spills {self.spilled_bytes} bytes")
        limit = TARGETS[self.case.target].facts.shared_kib
        if self.shared_bytes > limit << 10:
            failures.append(f"takes {self.shared_bytes} bytes of shared memory, over {limit} KiB")
        has_unit = TARGETS[self.case.target].multiplies(DTYPES[self.case.dtype])
        if self.multiplies and has_unit and not self.matrix_instructions:
            failures.append(f"multiplies matrices without {matrix_instruction(self.case.target)}")
        if self.described and not self.descriptor_loads:
            failures.append("is passed tensor descriptors and reads through pointers")
        return [f"{self.kernel}, {self.case}: {text}" for text in failures]


def matrix_instruction(target: str) -> str:
    """Return the name of a target's matrix instruction."""
    return MATRIX_INSTRUCTIONS[TARGETS[target].facts.matrix_unit]


def launches(case: Case) -> list[tuple[ASTSource, dict]]:
    """Return source and options of each kernel that a case's forward and backward launch.

    Each specialisation is listed once.
    """
    from .gpu import (
        linear_kl,
        linear_nll,
        linear_nll_chunked,
        linear_nll_grad,
        linear_statistics,
        nll,
    )

    tokens, dtype = 1024, DTYPES[case.dtype]
    vocabulary = case.vocabulary or {"odd": 50257, "aligned": 197 * 256}.get(case.layout, 50304)

    def empty(*shape, dtype=dtype, layout=case.layout):
        if layout == "odd":  # one element past an aligned address
            return torch.empty(math.prod(shape) + 1, device="meta", dtype=dtype)[1:].view(shape)
        if layout == "strided":
            return torch.empty((*shape[:-1], 3 * shape[-1]), device="meta", dtype=dtype)[..., ::3]
        return torch.empty(shape, device="meta", dtype=dtype)

    def head(side="", **options) -> Head:
        dimension = DIMENSION[options.get("layout", case.layout)]
        bias = empty(vocabulary, **options) if f"{side}bias" in case.features else None
        return empty(tokens, dimension, **options), empty(vocabulary, dimension, **options), bias

    def softcap(side=""):
        return 30.0 if f"{side}softcap" in case.features else None

    def row(*shape):
        return torch.empty(*shape, tokens, device="meta")

    target = empty(tokens, dtype=torch.int32 if case.layout == "odd" else torch.int64)
    class_weight = (
        torch.empty(vocabulary, device="meta") if "class_weight" in case.features else None
    )
    wanted = {f"with_{name}": name in case.features for name in ("logit_sum", "exp_shift")}
    rule = Rule(softcap=softcap(), logit_scale=0.5 if softcap() else 1.0, **wanted)
    with recording(TARGETS[case.target]) as recorded:
        if case.operation == "linear_nll":
            linear_nll.linear_nll(*head(), target, class_weight, rule)
            linear_nll_grad.linear_nll_grad(row(SUMS), row(), *head(), target, class_weight, rule)
            gradient = torch.empty(vocabulary, DIMENSION[case.layout], device="meta", dtype=dtype)
            linear_nll_chunked.scale_(gradient, torch.empty((), device="meta"))
        elif case.operation == "linear_statistics":
            at_target = linear_statistics.target_logit(*head(), target, rule)
            linear_statistics.linear_statistics(*head(), target, at_target, class_weight, rule)
        elif case.operation == "linear_kl":
            mixed = case.layout == "mixed"
            p_head = head("p_", layout="odd", dtype=torch.float32) if mixed else head("p_")
            p_rule, q_rule = (Rule(softcap=softcap(side), logit_scale=0.5) for side in ("p_", "q_"))
            linear_kl.linear_kl(p_head, head("q_"), p_rule, q_rule)
            linear_kl.linear_kl_grad(
                row(), row(DIVERGENCE_ROWS), p_head, head("q_"), p_rule, q_rule
            )
        else:
            positions = (7 if case.layout == "odd" else 16) if "positions" in case.features else 1
            items = tokens // positions
            if "positions_first" in case.features:
                # A model's [items, positions, V], seen as torch's [items, V, positions].
                logits = empty(items, positions, vocabulary).transpose(1, 2)
            else:
                logits = (
                    empty(items, vocabulary, positions)
                    if positions > 1
                    else empty(items, vocabulary)
                )
            target = target[: items * positions]
            nll.nll(logits, target, class_weight, rule)
            nll.nll_grad(row(SUMS), row(), logits, target, class_weight, rule)
    sources = [(source(launch, TARGETS[case.target]), launch.options) for launch in recorded]
    return list(
        {(built.hash(), str(options)): (built, options) for built, options in sources}.values()
    )


def source(launch: Launch, target: Target) -> ASTSource:
    """Return a launch as source to compile, specialised as the JIT does.

    It specialises integers of 1, multiples of 16 and, on AMD, small tensors.
    """
    signature, constants, attributes = {}, dict(launch.constants), {}
    kernel: Any = launch.kernel  # triton's JITFunction
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        divisible = False
        if isinstance(value, TensorDescriptor):
            element, block = (
                POINTERS[value.base.dtype].lstrip("*"),
                ",".join(map(str, value.block_shape)),
            )
            signature[name] = f"tensordesc<{element}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        hints = [["tt.divisibility", 16]] if divisible else []
        if (
            isinstance(value, torch.Tensor)
            and target.backend == "hip"
            and value.untyped_storage().nbytes() < 2**31
        ):
            hints.append(["tt.pointer_range", 32])
        if hints:
            attributes[(index,)] = hints
    return ASTSource(kernel, signature, constants, attributes)


def nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and spilled bytes of a cubin, from Triton's own cuobjdump.

    A spill is local memory, or a stack that some instruction reads or writes: a branch within a
    branch may reserve 8 bytes of it that none does.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dumped(what: str) -> str:
            command = [str(tool), what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        out = dumped("--dump-resource-usage")
        registers, stack, local = (
            int(re.findall(rf"{key}:(\d+)", out)[0]) for key in ("REG", "STACK", "LOCAL")
        )
        if stack and not re.search(r"\b(LDL|STL)\b", dumped("-sass")):
            stack = 0
    return registers, stack + local


def programs_a_multiprocessor(target: str, registers: int, shared_bytes: int, warps: int) -> int:
    """Return how many programs fit on a multiprocessor, by registers, shared memory and warps.

    Sources: CUDA occupancy calculator; ISA guides of CDNA 3 (512 registers a lane of each of 4
    SIMDs) and RDNA 3 (1,536).
    """
    facts = TARGETS[target].facts
    if TARGETS[target].backend == "hip":
        file, granule = (512, 8) if facts.matrix_unit == "mfma" else (1536, 24)
        fit = min(facts.warps // 4, file // max(granule * -(-registers // granule), granule))
        return min(4 * fit // warps, (facts.pool_kib << 10) // max(shared_bytes, 1))
    a_warp = 256 * -(-32 * registers // 256)
    # One KiB of each program is the system's.
    by_shared = (facts.shared_kib + 1 << 10) // (shared_bytes + 1024)
    return min(65536 // (a_warp * warps), by_shared, facts.warps // warps, 32)


def compile_case(case: Case) -> list[Compiled]:
    """Compile the kernels of a case and return their resources."""
    target, kernels = TARGETS[case.target], []
    for built, options in launches(case):
        gpu = GPUTarget(target.backend, target.arch, target.warp_size)
        compiled = triton.compile(built, target=gpu, options=options)
        if target.backend == "cuda":
            registers, spilled = nvidia_resources(compiled.asm["cubin"])
            text = compiled.asm["ptx"]
        else:
            text = compiled.asm["amdgcn"]
            # Scalar registers that run out go to lanes of a vector register, not to memory, unless
            # there is a segment.
            registers, vector, scratch = (
                int(re.findall(rf"\.{key}:\s*(\d+)", text)[0])
                for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
            )
            spilled = max(4 * vector, scratch)
        constants = {built.fn.arg_names[key[0]]: value for key, value in built.constants.items()}
        multiplies = "tt.dot" in compiled.asm["ttir"]
        tiles = (
            sum(constants[name] for name in ("BLOCK_N", "BLOCK_V")) * constants["BLOCK_D"]
            if multiplies
            else 0
        )
        kernels.append(
            Compiled(
                built.fn.__name__.strip("_"),
                case,
                compiled.hash,
                registers,
                spilled,
                compiled.metadata.shared,
                text.count(matrix_instruction(case.target)),
                multiplies,
                text.count("cp.async.bulk.tensor"),
                any(kind.startswith("tensordesc") for kind in built.signature.values()),
                programs_a_multiprocessor(
                    case.target, registers, compiled.metadata.shared, compiled.metadata.num_warps
                ),
                tiles * DTYPES[case.dtype].itemsize,
            )
        )
    return kernels


def valid_cases() -> list[Case]:
    """Return every operation × target × dtype × layout × set of features that can be launched."""
    every = []
    for operation, names in FEATURES.items():
        subsets = [
            frozenset(itertools.compress(names, present))
            for present in itertools.product((False, True), repeat=len(names))
        ]
        subsets = [one for one in subsets if all(REQUIRES.get(name, name) in one for name in one)]
        every += [
            Case(operation, *values)
            for values in itertools.product(TARGETS, DTYPES, LAYOUTS[operation], subsets)
        ]
    return every


def covering(candidates: list[Case], together: int) -> list[Case]:
    """Choose few cases that have every combination of ``together`` values.

    The choice is greedy: next comes the case with most combinations not covered yet.
    """
    left, chosen = set().union(*(case.values(together) for case in candidates)), []
    while left:
        chosen.append(max(candidates, key=lambda case: len(case.values(together) & left)))
        left -= chosen[-1].values(together)
    return chosen


def cases(extent: str) -> list[Case]:
    """Return the cases of an extent of ``EXTENTS``."""
    everything = valid_cases()
    together = 1 if extent == "least" else 2
    chosen = []
    for operation in FEATURES:
        here = [case for case in everything if case.operation == operation]
        chosen += covering([case for case in here if case.target in KINDS], together)
        if extent != "least":
            chosen += [
                case for case in here if case.target in RELATIVES and case.demanding() is not None
            ]
    full = [
        case for case in everything if case.target in KINDS and case.layout in ("aligned", "odd")
    ]
    return list(dict.fromkeys(chosen + (full if extent == "full" else [])))


def _worst(rows: list[Compiled]) -> list[Compiled]:
    """Return the row with most spills, then most registers, of each kernel, target and dtype."""
    worst: dict[tuple[str, str, str], Compiled] = {}
    for row in rows:
        key = row.kernel, row.case.target, row.case.dtype
        if key not in worst or (row.spilled_bytes, row.registers) > (
            worst[key].spilled_bytes,
            worst[key].registers,
        ):
            worst[key] = row
    return [worst[key] for key in sorted(worst)]


def markdown(rows: list[Compiled]) -> str:
    """Return the table of the worst rows."""
    lines = [
        "| kernel | target | dtype | registers | spilled bytes | shared bytes | programs "
        "| matrix instructions | TMA loads | KiB a step |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in _worst(rows):
        unit = (
            f"{row.matrix_instructions} {matrix_instruction(row.case.target)}"
            if row.matrix_instructions
            else ""
        )
        lines.append(
            f"| {row.kernel} | {row.case.target} | {row.case.dtype} "
            f"| {row.registers} | {row.spilled_bytes} | {row.shared_bytes} | {row.programs} | "
            f"{unit} | {row.descriptor_loads or ''} "
            f"| {f'{row.step_bytes / 1024:g}' if row.step_bytes else ''} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the check; return 0 if nothing fails, 1 if a kernel does, 2 for a wrong environment."""
    parser = argparse.ArgumentParser(prog="compile_check", description=__doc__.split("\n")[0])
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--least",
        dest="extent",
        action="store_const",
        const="least",
        help="compile each value at least once",
    )
    extent.add_argument(
        "--quick",
        dest="extent",
        action="store_const",
        const="quick",
        help="compile each pair of values",
    )
    parser.set_defaults(extent="full")
    parser.add_argument("--target", choices=TARGETS, help="compile the cases of this target alone")
    parser.add_argument(
        "--operations",
        nargs="+",
        choices=FEATURES,
        default=tuple(FEATURES),
        metavar="NAME",
        help=f"compile the cases of these operations alone: {', '.join(FEATURES)}",
    )
    parser.add_argument("--markdown", metavar="OUT", help="write the table to this file")
    parser.add_argument(
        "--expect-triton", metavar="VERSION", help="fail if another triton is imported"
    )
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        print(
            "compile_check: expected compiled kernels, got TRITON_INTERPRET=1; unset it",
            file=sys.stderr,
        )
        return 2
    if arguments.expect_triton not in (None, triton.__version__):
        print(
            f"compile_check: expected triton {arguments.expect_triton}, "
            f"got {triton.__version__} from {triton.__file__}",
            file=sys.stderr,
        )
        return 2
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            os.cpu_count(), initializer=os.environ.update, initargs=({"TRITON_CACHE_DIR": cache},)
        ) as pool,
    ):
        chosen = [
            case
            for case in cases(arguments.extent)
            if arguments.target in (None, case.target) and case.operation in arguments.operations
        ]
        rows = list(itertools.chain.from_iterable(pool.map(compile_case, chosen)))
    table = markdown(rows)
    print(table)
    failures = sorted({failure for row in rows for failure in row.failures()})
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    compilations = len({row.compilation for row in rows})
    print(f"{compilations} compilations with triton {triton.__version__}, {len(failures)} failures")
    if arguments.markdown:
        heading = (
            f"# Compile check\n\nWritten by `make compile-check` with triton {triton.__version__}: "
            f"{compilations} compilations, {EXTENTS[arguments.extent]} "
            "kernel × target × dtype × layout × feature set; of each kernel, target and dtype "
            "the row with most registers. "
            f"Device code {kernels_hash()} (`kernels/fingerprint.py`). "
            "Where the row with most registers reads through pointers no TMA load is counted; "
            "a kernel that is given descriptors and has none fails. "
            "*Programs*: as many as a multiprocessor has room for, "
            "by registers, shared memory and warps. "
            "*KiB a step*: both tiles of one step of a matrix product.\n\n"
        )
        Path(arguments.markdown).write_text(heading + table + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
