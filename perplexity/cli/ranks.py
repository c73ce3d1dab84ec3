"""Processes and devices of a command, from the environment that torchrun sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import InputError, theirs


def device_of(device: str | None) -> str:
    """Return ``device``, or for None "cuda" where there is a GPU, else "cpu"."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def world_size() -> int:
    """Return the number of processes of the run."""
    return _environment("WORLD_SIZE", 1)


def _environment(name: str, default: int) -> int:
    """Return a whole number from the environment, or ``default`` where it is not set."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(
            f"{name}: expected a whole number in the environment, as of torchrun, got {value!r}"
        )
    return int(value)


@contextmanager
def ranks(device: str | None) -> Iterator[tuple[int, int, str]]:
    """Yield (rank, number of ranks, device), inside a process group where there are several.

    Args:
        device: Of ``--device``; None takes a GPU where there is one. On GPUs each process takes the
            one of its local rank.

    Raises:
        InputError: The environment is not that of torchrun.
    """
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
