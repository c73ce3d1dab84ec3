"""Cross-entropy from hidden states or from logits: torch's semantics, without N × V in memory for the first."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import LOGIT_SUM, MAX, SUM_EXP, TARGET, operators

REDUCTIONS = ("none", "mean", "sum")
BACKENDS = ("triton", "torch")


@dataclass(frozen=True)
class LossOptions:
    """How per-token sums become a loss; the meaning of each is the public functions'."""

    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self):
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {self.reduction!r}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing: expected a value in [0, 1], got {self.label_smoothing}")
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap: expected None or a positive value, got {self.softcap}")


def triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose_backend(backend: str | None, tensor: Tensor) -> str:
    """ "triton" on a GPU where triton is installed and has a kernel for the dtype, else "torch".

    An explicit ``backend``, or the environment's PERPLEXITY_BACKEND, is taken as it is: ValueError where it cannot run.
    """
    source = "backend"
    if backend is None and os.environ.get("PERPLEXITY_BACKEND"):
        backend, source = os.environ["PERPLEXITY_BACKEND"], "PERPLEXITY_BACKEND"
    if backend is None:
        return "triton" if tensor.is_cuda and tensor.dtype != torch.float64 and triton_available() else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "triton" and not triton_available():
        raise ValueError(f"{source}: 'triton' was asked for, but triton is not installed; 'torch' needs only torch")
    if backend == "triton" and tensor.device.type == "cpu":
        from .kernels.launch import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f"{source}: 'triton' needs a GPU, got CPU tensors; use 'torch', or set TRITON_INTERPRET=1 before "
                "triton is imported to interpret the kernels"
            )
    return backend


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_target(target: Tensor, shape: torch.Size, device: torch.device) -> None:
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: expected int64 (or int32) class indices, got {target.dtype}")
    _expect(
        target.shape == shape,
        "target",
        f"shape {tuple(shape)}, that of input without its last dimension",
        tuple(target.shape),
    )
    _expect(target.device == device, "target", f"a tensor on {device}, as input", target.device)


def _check_vector(name: str, vector: Tensor | None, vocabulary: int, device: torch.device) -> None:
    if vector is None:
        return
    if not vector.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {vector.dtype}")
    _expect(
        vector.shape == (vocabulary,), name, f"shape ({vocabulary},), one value a vocabulary entry", tuple(vector.shape)
    )
    _expect(vector.device == device, name, f"a tensor on {device}, as input", vector.device)


def _dense(class_weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Class weights as the kernels read them: contiguous, in the dtype of the sums."""
    return None if class_weight is None else class_weight.to(torch.promote_types(dtype, torch.float32)).contiguous()


def _check_linear(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None) -> None:
    for name, tensor in (("input", input), ("linear_weight", linear_weight)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    _expect(input.dim() >= 1, "input", "shape [..., D]", "a scalar")
    _expect(linear_weight.dim() == 2, "linear_weight", "shape [V, D]", tuple(linear_weight.shape))
    _expect(linear_weight.shape[0] > 0, "linear_weight", "at least one row", tuple(linear_weight.shape))
    _expect(
        input.shape[-1] == linear_weight.shape[1],
        "linear_weight",
        f"shape [V, {input.shape[-1]}] for an input of {tuple(input.shape)}",
        tuple(linear_weight.shape),
    )
    if input.dtype != linear_weight.dtype:
        raise TypeError(f"linear_weight: expected {input.dtype}, the dtype of input, got {linear_weight.dtype}")
    _expect(
        linear_weight.device == input.device,
        "linear_weight",
        f"a tensor on {input.device}, as input",
        linear_weight.device,
    )
    _check_target(target, input.shape[:-1], input.device)
    _check_vector("linear_bias", linear_bias, linear_weight.shape[0], input.device)


def _loss(sums: Tensor, target: Tensor, class_weight: Tensor | None, vocabulary: int, options: LossOptions) -> Tensor:
    """Per-token sums [5, N] to the loss, in the dtype of the sums; formulas of torch.nn.functional.cross_entropy.

    loss = (1 − ε) · w[t] · nll + ε / V · Σ_v w[v] · (logsumexp − z[v]) + z_loss · logsumexp²
    """
    counted = target != options.ignore_index
    log_sum = sums[SUM_EXP].log()
    nll = (sums[MAX] - sums[TARGET]) + log_sum
    scale = counted.to(nll.dtype)
    if class_weight is not None:
        scale = scale * class_weight[target.clamp(0, vocabulary - 1).long()]
    loss = nll * scale if class_weight is not None else nll
    if options.label_smoothing:
        weight_sum = vocabulary if class_weight is None else class_weight.sum()
        spread = weight_sum * (sums[MAX] + log_sum) - sums[LOGIT_SUM]
        loss = (1.0 - options.label_smoothing) * loss + options.label_smoothing / vocabulary * spread
    penalty = options.z_loss * (sums[MAX] + log_sum).square() if options.z_loss else None
    if options.reduction == "none":
        return loss if penalty is None else loss + penalty
    total = loss.sum()
    if options.reduction == "mean":
        total = total / scale.sum()
    if penalty is not None:
        total = total + (penalty.sum() / counted.sum() if options.reduction == "mean" else penalty.sum())
    return total


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of ``input @ linear_weight.T + linear_bias`` against ``target``, in nats, without holding the logits.

    input [..., D], linear_weight [V, D], target int64 [...], linear_bias [V], weight (of classes) [V]. The logits are
    ``softcap * tanh(logit_scale * (input @ linear_weight.T + linear_bias) / softcap)``, in float32 for 16-bit inputs.
    Returns float32 (float64 for float64 inputs): a scalar, or the shape of target for ``reduction="none"``.
    ``reduction``, ``ignore_index``, ``label_smoothing`` and ``weight`` mean what they mean in
    ``torch.nn.functional.cross_entropy``; ``z_loss`` adds z_loss · logsumexp² per token (PaLM, arXiv:2204.02311).
    Raises ValueError or TypeError naming the argument; IndexError for a target outside [0, V) on a CPU (NaN on a GPU).
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    options = LossOptions(reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        # As torch's autocast: float64 and integers stay what they are.
        input, linear_weight = (
            tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
            for tensor in (input, linear_weight)
        )
    _check_linear(input, linear_weight, target, linear_bias)
    vocabulary = linear_weight.shape[0]
    _check_vector("weight", weight, vocabulary, input.device)
    weight = _dense(weight, input.dtype)
    flat = target.reshape(-1)
    sums = operators.linear_nll(
        input.reshape(-1, input.shape[-1]),
        linear_weight,
        linear_bias,
        flat,
        weight,
        ignore_index,
        softcap,
        logit_scale,
        label_smoothing > 0.0,
        False,
        0,
        choose_backend(backend, input),
    )
    loss = _loss(sums, flat, weight, vocabulary, options)
    return loss.reshape(target.shape) if reduction == "none" else loss


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of logits that exist: input [N, V] against target int64 [N], in nats; float32 for 16-bit logits.

    The options are those of ``linear_cross_entropy``; the logits are ``softcap * tanh(logit_scale * input / softcap)``.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    options = LossOptions(reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    if not input.is_floating_point():
        raise TypeError(f"input: expected a floating dtype, got {input.dtype}")
    _expect(input.dim() == 2 and input.shape[1] > 0, "input", "shape [N, V] with V > 0", tuple(input.shape))
    _check_target(target, input.shape[:-1], input.device)
    _check_vector("weight", weight, input.shape[1], input.device)
    weight = _dense(weight, input.dtype)
    sums = operators.nll(
        input,
        target,
        weight,
        ignore_index,
        softcap,
        logit_scale,
        label_smoothing > 0.0,
        False,
        choose_backend(backend, input),
    )
    return _loss(sums, target, weight, input.shape[1], options)


@torch.no_grad()
def token_nll(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """−log p(target) of every token in nats, the shape of target, float32, 0 at ignored positions, no gradient.

    Arguments as in ``linear_cross_entropy``; the logits are float32 whatever the inputs' dtype.
    """
    return linear_cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        reduction="none",
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        backend=backend,
    ).float()
