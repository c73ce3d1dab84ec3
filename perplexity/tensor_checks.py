"""Checks of tensors that are arguments: kind, dtype, shape and device, as ``checks`` for values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import wrong
from .errors import InputError, InputTypeError

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING_DTYPES = (*TRITON_DTYPES, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def dense(name: str, tensor: object) -> None:
    """Raise unless ``tensor`` is a dense (strided) tensor."""
    if not isinstance(tensor, Tensor):
        raise wrong(name, "a tensor", type(tensor).__name__, InputTypeError)
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = tensor.layout if tensor.layout is not torch.strided else "a nested tensor"
        raise wrong(name, "a dense tensor (to_dense(), or padding)", layout, InputTypeError)


def floating(name: str, tensor: Any) -> None:
    """Raise unless ``tensor`` is a dense floating tensor of 16 bits or more.

    Narrower ones have their scale elsewhere.
    """
    dense(name, tensor)
    if not tensor.is_floating_point():
        raise wrong(name, "a floating dtype", tensor.dtype, InputTypeError)
    if tensor.dtype not in FLOATING_DTYPES:
        known = "float32, float64, bfloat16 or float16 (dequantise it first)"
        raise wrong(name, known, tensor.dtype, InputTypeError)


def vector(name: str, tensor: Tensor | None, entries: int, device: torch.device) -> None:
    """Raise unless ``tensor`` is None or floating [entries] on ``device``."""
    if tensor is None:
        return
    floating(name, tensor)
    if tuple(tensor.shape) != (entries,):
        raise wrong(name, f"shape ({entries},), one value a class", tuple(tensor.shape))
    if tensor.device != device:
        raise wrong(name, f"a tensor on {device}, as input", tensor.device)


def head(
    names: tuple[str, str, str], input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> None:
    """Raise unless input [..., D], weight [V, D] and bias [V] have one dtype and device.

    ``names`` are what messages call these three.
    """
    input_name, weight_name, bias_name = names
    if input.dim() < 1:
        raise wrong(input_name, "shape [..., D]", "a scalar")
    if linear_weight.dim() != 2:
        raise wrong(weight_name, "shape [V, D]", tuple(linear_weight.shape))
    if input.shape[-1] != linear_weight.shape[1]:
        shape = f"shape [V, {input.shape[-1]}] for an {input_name} of {tuple(input.shape)}"
        raise wrong(weight_name, shape, tuple(linear_weight.shape))
    if input.shape[-1] == 0:
        raise wrong(input_name, "a hidden size of 1 or more", tuple(input.shape))
    if input.dtype != linear_weight.dtype:
        dtype = f"{input.dtype}, the dtype of {input_name} (or float32 for a 16-bit one)"
        raise wrong(weight_name, dtype, linear_weight.dtype, InputTypeError)
    if linear_weight.device != input.device:
        raise wrong(
            weight_name, f"a tensor on {input.device}, as {input_name}", linear_weight.device
        )
    vector(bias_name, linear_bias, linear_weight.shape[0], input.device)


def class_weights(weight: Tensor | None, entries: int | None = None) -> None:
    """Raise unless ``weight`` is None or class weights [V]; ``entries`` is V, None for any."""
    if weight is None:
        return
    floating("weight", weight)
    if weight.dim() != 1 or entries not in (None, weight.shape[0]):
        raise wrong(
            "weight",
            f"shape ({'V' if entries is None else entries},), one value a class",
            tuple(weight.shape),
        )
    if weight.requires_grad:
        raise wrong("weight", "class weights without gradient", "a tensor that requires grad")


def target(
    value: Any,
    classes: tuple[int, ...],
    probabilities: tuple[int, ...],
    device: torch.device,
    ignored: int,
) -> None:
    """Raise unless ``value`` has class indices or class probabilities in the expected shape.

    Class probabilities have no ignored class, as in torch: ``ignored`` has to be negative for them.

    Args:
        value: The argument ``target``.
        classes: Shape of class indices.
        probabilities: Shape of class probabilities.
        device: Device of the input.
        ignored: Class index that is not scored.
    """
    dense("target", value)
    shape = tuple(value.shape)
    if value.is_floating_point():
        floating("target", value)
        if shape != probabilities:
            wanted = (
                f"shape {probabilities} of class probabilities "
                f"(or {classes} of class indices, int64)"
            )
            kind = InputError if shape != classes else InputTypeError
            raise wrong("target", wanted, f"{shape} of {value.dtype}", kind)
        if ignored >= 0:
            raise wrong(
                "ignore_index", "None or a negative number with class probabilities", ignored
            )
    else:
        if value.dtype not in INDEX_DTYPES:
            known = "int64 class indices (or int32, int16, int8, uint8), or class probabilities"
            raise wrong("target", known, value.dtype, InputTypeError)
        if shape != classes:
            raise wrong("target", f"shape {classes}, as input without classes", shape)
    if value.device != device:
        raise wrong("target", f"a tensor on {device}, as input", value.device)
