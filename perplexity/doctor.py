"""The report of ``ppl doctor``: packages, the backend of each device, a self-check."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from .inputs import choose_backend
from .kernels import reference
from .kernels.dispatch import triton_available
from .losses import linear_cross_entropy

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "rich",
    "matplotlib",
    "tensorboard",
)


def self_check(device: str, backend: str | None) -> tuple[float, float]:
    """Return the largest errors of the loss and of the gradients against float64 full logits.

    No block size divides any size of the inputs.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 123, generator=generator)
    weight = torch.randn(507, 123, generator=generator)
    target = torch.randint(0, 507, (70,), generator=generator)
    target[3] = -100
    inputs = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
    loss = linear_cross_entropy(*inputs, target.to(device), backend=backend)
    gradients = torch.autograd.grad(loss, inputs)
    exact_inputs = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    exact = torch.nn.functional.cross_entropy(reference.logits(*exact_inputs), target)
    exact_gradients = torch.autograd.grad(exact, exact_inputs)
    errors = [
        (a.cpu().double() - b).abs().max().item()
        for a, b in zip(gradients, exact_gradients, strict=True)
    ]
    return abs(loss.item() - exact.item()), max(errors)


def report() -> int:
    """Print the report; return 0 if every self-check passed, else 1."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        try:
            print(f"  {name:<14}{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name:<14}not installed")
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    checks: list[tuple[str, str | None]] = [(device, None) for device in devices]
    if not triton_available():
        print(
            "triton is not installed: the plain PyTorch fallback computes every loss, "
            "on every device"
        )
    else:
        from .kernels.gpu.launch import INTERPRETED

        if INTERPRETED:
            checks.append(("cpu", "triton"))
            print(
                "TRITON_INTERPRET=1: kernels can be interpreted on CPU tensors (backend='triton'), "
                "slowly"
            )
    failed = False
    for device, backend in checks:
        name = (
            torch.cuda.get_device_name(device)
            if device.startswith("cuda")
            else platform.processor() or "CPU"
        )
        try:
            chosen = choose_backend(backend, torch.empty(0, device=device))
            loss_error, gradient_error = self_check(device, backend)
        except Exception as error:  # whatever fails is the report
            failed = True
            print(
                f"{device} ({name}): backend {backend or 'auto'} FAILED: {type(error).__name__}: "
                f"{error}"
            )
            continue
        passed = loss_error < 1e-4 and gradient_error < 5e-4
        failed |= not passed
        verdict = "ok" if passed else "FAILED"
        print(
            f"{device} ({name}): backend {chosen}, self-check {verdict}: "
            f"loss off by {loss_error:.1e}, gradients by {gradient_error:.1e} from float64"
        )
    return int(failed)
