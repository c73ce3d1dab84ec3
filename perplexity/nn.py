"""The losses as modules, with the constructors and calls of torch.nn's."""

from __future__ import annotations

import math

from torch import Tensor, nn

from . import checks
from .checks import FLOATING_DTYPES, wrong
from .errors import theirs
from .inputs import LossOptions, check_backend
from .losses import cross_entropy, linear_cross_entropy, named_reduction

KEYWORDS = ("softcap", "logit_scale", "z_loss", "shift", "backend", "memory_limit", "validate")


class _Loss(nn.Module):
    """The class weights, and the keywords that go to the function as they are."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None,
        reduction: str,
        ignore_index: int | None,
        label_smoothing: float,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        shift: int = 0,
        backend: str | None = None,
        memory_limit: int | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        # A bad value complains here, not in the first step.
        options = LossOptions(
            reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss, memory_limit
        )
        checks.shift(shift)
        check_backend(backend)
        checks.validate(validate)
        checks.class_weights(weight)
        self._names = (*vars(options), "shift", "backend", "validate")
        # Attributes, as torch.nn's: they may be read and set, and are what was given.
        vars(self).update(
            vars(options),
            shift=shift,
            backend=backend,
            validate=validate,
            ignore_index=ignore_index,
        )
        self.register_buffer("weight", weight)

    @property
    def keywords(self) -> dict:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())


class CrossEntropyLoss(_Loss):
    """``torch.nn.CrossEntropyLoss`` over ``perplexity.cross_entropy``, whose further options are
    keywords here.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | None = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **keywords,
    ) -> None:
        reduction = named_reduction(size_average, reduce, reduction)
        checks.known_keywords("CrossEntropyLoss", keywords, KEYWORDS)
        super().__init__(weight, reduction, ignore_index, label_smoothing, **keywords)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, self.weight, **self.keywords)


class LinearCrossEntropyLoss(_Loss):
    """``torch.nn.LinearCrossEntropyLoss`` over ``perplexity.linear_cross_entropy``: the head,
    ``self.linear``, and its loss.

    ``linear.weight`` may be tied to an embedding's. The function's further options are keywords
    here.
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
        round_logits: bool = True,
        **keywords,
    ) -> None:
        checks.known_keywords("LinearCrossEntropyLoss", keywords, KEYWORDS)
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            checks.integer(name, value, least=1)
        checks.flag("bias", bias)
        dtypes = f"one of {', '.join(map(str, FLOATING_DTYPES))}"
        if dtype is not None and dtype not in FLOATING_DTYPES:
            raise wrong("dtype", dtypes, checks.shown(dtype))
        if not isinstance(out_features, tuple | list):
            raise wrong("out_features", "a tuple of sizes", checks.shown(out_features))
        for size in out_features:
            checks.integer("out_features", size, least=1)
        if options is not None:
            raise wrong(
                "options",
                "None (torch's chunking options have no use here: see memory_limit)",
                options,
            )
        checks.class_weights(weight, num_classes)
        super().__init__(weight, reduction, ignore_index, label_smoothing, **keywords)
        checks.flag("round_logits", round_logits)
        self.round_logits = round_logits
        self._names = (*self._names, "round_logits")
        with theirs(f"device: expected one that torch can use, got {device!r}"):
            # As torch's module: the heads' rows stand in one matrix.
            rows = math.prod(out_features, start=num_classes)
            self.linear = nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.num_classes, self.out_features, self.options = (
            num_classes,
            tuple(out_features),
            options,
        )

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        if self.out_features:
            weight = weight.view(self.num_classes, *self.out_features, -1)
            bias = None if bias is None else bias.view(self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input, weight, target, linear_bias=bias, weight=self.weight, **self.keywords
        )
