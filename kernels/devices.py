"""What a device has: its matrix unit, its copy engine, and the shared memory of a program.

The policy of the kernels asks for these, never for a device's number. Sources: CUDA programming
guide, table of technical specifications by compute capability; PTX ISA (wgmma, tcgen05); AMD's ISA
guides of CDNA 2 to 4 and RDNA 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch


class Facts(NamedTuple):
    """What a kind of device has."""

    # Where Triton's products run: mma (operands and sums in registers), wgmma (operands in shared
    # memory, sums in registers), tcgen05 (sums in a memory of their own), mfma, wmma; "" for none.
    matrix_unit: str
    shared_kib: int  # of one program at most
    # Of a multiprocessor: warps, and shared memory.
    warps: int = 64
    pool_kib: int = 0  # 0: one KiB more than a program may use, which is the system's


NVIDIA = {
    80: Facts("mma", 163),
    86: Facts("mma", 99, 48),
    87: Facts("mma", 163, 48),
    89: Facts("mma", 99, 48),
    90: Facts("wgmma", 227),
    100: Facts("tcgen05", 227),
    103: Facts("tcgen05", 227),
    110: Facts("tcgen05", 227, 48),
    120: Facts("mma", 99, 48),
    121: Facts("mma", 99, 48),
}
# A device newer than this table: what all since Ampere have.
NEWER = Facts("mma", 99, 48)
AMD = {
    "gfx908": Facts("mfma", 64, 32, 64),
    "gfx90a": Facts("mfma", 64, 32, 64),
    "gfx942": Facts("mfma", 64, 32, 64),
    "gfx950": Facts("mfma", 160, 32, 160),
    # A pair of compute units shares 128 KiB and four times 16 warps of 32 lanes.
    "gfx1100": Facts("wmma", 64, 64, 128),
    "gfx1101": Facts("wmma", 64, 64, 128),
    "gfx1102": Facts("wmma", 64, 64, 128),
    "gfx1200": Facts("wmma", 64, 64, 128),
    "gfx1201": Facts("wmma", 64, 64, 128),
}
# No older NVIDIA device has products that Triton compiles to its matrix unit: 7 to 11 KB of stack a
# thread take their place.
LEAST_ARCH = 80


@dataclass(frozen=True)
class Target:
    """Target of a compilation: ``backend`` cuda, hip or interpreter; ``arch`` 90, "gfx942", ..."""

    backend: str
    arch: int | str
    warp_size: int = 32

    @property
    def facts(self) -> Facts:
        """Return what the device has."""
        if self.backend == "interpreter":
            return Facts("interpreter", 1 << 20)
        if isinstance(self.arch, int):
            return NVIDIA.get(self.arch, NEWER if self.arch >= LEAST_ARCH else Facts("", 48))
        return AMD.get(self.arch, Facts("mfma" if self.arch.startswith("gfx9") else "", 64))

    @property
    def float32_products(self) -> str:
        """Return the precision of float32 matrix products.

        Plain tf32 (10 bits) misses the exactness rule; three products of tf32 parts meet it.
        """
        return "tf32x3" if self.backend == "cuda" else "ieee"

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Return whether the matrix unit multiplies this dtype: RDNA's has no float32."""
        unit = self.facts.matrix_unit
        return bool(unit) and not (unit == "wmma" and dtype == torch.float32)

    @property
    def copy_engine(self) -> bool:
        """Return whether the device has the engine that reads tiles (NVIDIA from Hopper on).

        The interpreter simulates the engine.
        """
        return self.backend == "interpreter" or (isinstance(self.arch, int) and self.arch >= 90)

    @property
    def own_accumulator(self) -> bool:
        """Return whether the sums of a product lie in a memory of their own, not in registers."""
        return self.facts.matrix_unit == "tcgen05"

    @property
    def wide_accumulator(self) -> bool:
        """Return whether registers and shared memory have room for a tile of 128 × 256 sums."""
        return self.facts.matrix_unit in ("wgmma", "tcgen05")


@lru_cache
def device_target(index: int) -> Target:
    """Return the target of a GPU by its number: a machine may have several kinds."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.warp_size)
    return Target("cuda", 10 * properties.major + properties.minor, 32)


def index_of(device: torch.device) -> int:
    """Return the number of a GPU; a device without one is the current GPU."""
    return torch.cuda.current_device() if device.index is None else device.index


def why_not(device: torch.device) -> str | None:
    """Return why no kernel runs on a GPU; None if kernels do."""
    target = device_target(index_of(device))
    if target.facts.matrix_unit:
        return None
    needs = (
        "compute capability 8.0 or newer"
        if target.backend == "cuda"
        else "an AMD GPU with matrix instructions (CDNA, RDNA 3 or newer)"
    )
    name = (
        f"{target.arch // 10}.{target.arch % 10}" if isinstance(target.arch, int) else target.arch
    )
    return f"needs {needs}, got {torch.cuda.get_device_name(index_of(device))} ({name})"
