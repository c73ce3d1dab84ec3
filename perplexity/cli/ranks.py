"""The processes and devices of a command, as torchrun's environment says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import InputError, theirs


def device_of(device: str | None) -> str:
    """Return ``device``, else a GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def world_size() -> int:
    """Return the number of processes."""
    return _environment("WORLD_SIZE", 1)


def _environment(name: str, default: int) -> int:
    """Return a whole number that torchrun puts into the environment."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(
            f"{name}: expected a whole number in the environment, as of torchrun, got {value!r}"
        )
    return int(value)


@contextmanager
def ranks(device: str | None) -> Iterator[tuple[int, int, str]]:
    """Yield (rank, ranks, device), with a process group where there is more than one process."""
    size = world_size()
    device = device_of(device)
    if size < 2:
        yield 0, 1, device
        return
    if device == "cuda":
        device = f"cuda:{_environment('LOCAL_RANK', 0)}"
    with theirs(
        f"distributed: expected the environment of torchrun for {size} processes, got another"
    ):
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield torch.distributed.get_rank(), size, device
    finally:
        torch.distributed.destroy_process_group()
