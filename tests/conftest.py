"""Where the kernels run in tests: compiled on a GPU if there is one, else interpreted on the CPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when triton decorates a kernel, so before anything imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent / "kernels"))  # cases.py, which tests/gpu shares


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE
