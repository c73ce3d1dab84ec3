"""The losses as modules, with the constructors and calls of torch.nn's."""

from __future__ import annotations

from torch import Tensor, nn

from .arguments import LossOptions, expect
from .losses import cross_entropy, linear_cross_entropy


class CrossEntropyLoss(nn.Module):
    """``torch.nn.CrossEntropyLoss`` over ``perplexity.cross_entropy``; keyword options beyond torch's are that function's."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int | None = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        **keywords,
    ) -> None:
        super().__init__()
        for name, value in (("size_average", size_average), ("reduce", reduce)):
            expect(value is None, name, "None (torch deprecated it: see reduction)", value)
        LossOptions(
            reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss
        )  # complains here, not in a step
        self.register_buffer("weight", weight)
        self.keywords = dict(
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=softcap,
            logit_scale=logit_scale,
            z_loss=z_loss,
            **keywords,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, self.weight, **self.keywords)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())


class LinearCrossEntropyLoss(nn.Module):
    """``torch.nn.LinearCrossEntropyLoss`` over ``perplexity.linear_cross_entropy``: the head, ``self.linear``, and its loss.

    ``linear.weight`` may be tied to an embedding's. Keyword options beyond torch's are that function's.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        **keywords,
    ) -> None:
        super().__init__()
        expect(
            tuple(out_features) == (),
            "out_features",
            "() (for a K-dimensional loss, one module a dimension)",
            out_features,
        )
        expect(
            options is None, "options", "None (torch's chunking options have no use here: see memory_limit)", options
        )
        if weight is not None:
            expect(tuple(weight.shape) == (num_classes,), "weight", f"shape ({num_classes},)", tuple(weight.shape))
        LossOptions(reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.keywords = dict(
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=softcap,
            logit_scale=logit_scale,
            z_loss=z_loss,
            **keywords,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, weight=self.weight, **self.keywords
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())
