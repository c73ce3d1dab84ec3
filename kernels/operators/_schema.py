"""Shared parts of the operators: argument lists, the table of backends, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import Plan, Rule

# An operator takes no tuple of mixed types: a Rule and a Plan are unpacked to scalars at its
# boundary, in the order of their fields.
PLAN = "str backend, str way, bool rounded, int[] block, int memory_limit"
SCALARS = (
    "int ignore_index, float? softcap, float logit_scale, bool with_logit_sum, "
    f"bool with_exp_shift, {PLAN}"
)
HEAD = "Tensor hidden, Tensor weight, Tensor? bias"

# The modules have the same functions with the same signatures. triton is imported for its own
# module only.
BACKENDS = {"torch": "cpu.backend", "triton": "gpu.backend"}


@cache
def implementation(backend: str) -> ModuleType:
    """Return the functions of a backend.

    Args:
        backend: "torch" or "triton".

    Returns:
        Module with the functions; both have the same functions with the same signatures.

    Raises:
        ValueError: ``backend`` is neither.

    Example:
        >>> implementation("torch").__name__
        'perplexity.kernels.cpu.backend'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'triton' or 'torch', got {backend!r}")
    return import_module(f"..{BACKENDS[backend]}", __package__)


def operator(schema: str, mutates: Sequence[str] = ()) -> Callable:
    """Register the function below as ``perplexity::`` and its name, by its schema."""

    def register(function: Callable):
        name = f"perplexity::{function.__name__}"
        return torch.library.custom_op(name, function, mutates_args=mutates, schema=schema)

    return register


def read(scalars: Sequence) -> tuple[Rule, Plan]:
    """Return the ``Rule`` and the ``Plan`` from an operator's scalars."""
    fields = len(Rule._fields)
    return Rule(*scalars[:fields]), Plan(*scalars[fields:])


def wide(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 where a tensor is float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_class_weight(class_weight: Tensor | None, backend: str) -> None:
    """Raise for class probabilities with the triton backend, which takes class indices alone."""
    if backend == "triton" and class_weight is not None and class_weight.dim() == 2:
        raise TypeError(
            "target: the triton backend expects class indices, got class probabilities; "
            "backend='torch' takes both"
        )


def present(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Return tensors only, as an operator must: an empty one where no gradient is needed."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def fake_gradients(
    tensors: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor
) -> tuple[Tensor, ...]:
    """Return gradients without data; they are contiguous, whatever the leaves' strides."""
    return tuple(
        tensor.new_empty(tensor.shape) if needed and tensor is not None else like.new_empty(0)
        for tensor, needed in zip(tensors, needs, strict=True)
    )


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Return gradients as autograd takes them: None where none is needed."""
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
