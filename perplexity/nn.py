"""The losses as modules, with the constructors and calls of torch.nn's."""

from __future__ import annotations

import math

from torch import Tensor, nn

from . import checks, tensor_checks
from .checks import wrong
from .errors import theirs
from .inputs import LossOptions, check_backend
from .losses import cross_entropy, linear_cross_entropy, named_reduction

KEYWORDS = (
    "softcap",
    "logit_scale",
    "z_loss",
    "shift",
    "backend",
    "memory_limit",
    "validate",
    "temperature",
)


class _Loss(nn.Module):
    """Class weights, and the keywords that are passed on to the function."""

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
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        # A bad value raises here, not in the first step.
        options = LossOptions(
            reduction,
            ignore_index,
            label_smoothing,
            softcap,
            logit_scale,
            z_loss,
            memory_limit,
            temperature,
        )
        checks.shift(shift)
        check_backend(backend)
        checks.validate(validate)
        tensor_checks.class_weights(weight)
        self._names = (*vars(options), "shift", "backend", "validate")
        # Attributes as torch.nn's: with the caller's values, and settable.
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
    """``torch.nn.CrossEntropyLoss`` over ``perplexity.cross_entropy``.

    Args:
        weight: Class weights [C]. Default: None.
        size_average, reduce: torch's deprecated flags, which replace ``reduction``. Default: None.
        ignore_index: Class index that is not scored. Default: −100.
        reduction: "mean" (default), "sum" or "none".
        label_smoothing: Smoothing in [0, 1]. Default: 0.
        keywords: Further options of ``perplexity.cross_entropy``: softcap, logit_scale, z_loss,
            shift, backend, memory_limit, validate, temperature.

    Raises:
        InputError: An argument has another value than expected (a ValueError).
        InputTypeError: An argument has another type than expected, or is unknown (a TypeError).

    Example:
        >>> import torch
        >>> from perplexity import CrossEntropyLoss
        >>> loss = CrossEntropyLoss(softcap=30.0)
        >>> loss(torch.zeros(2, 10), torch.tensor([3, 4]))
        tensor(2.3026)
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
        """Return the loss of logits, as ``perplexity.cross_entropy`` does.

        Args:
            input: Logits [C], [N, C] or [N, C, d1, ...], floating.
            target: Class indices or class probabilities.

        Returns:
            Loss in nats: a scalar, or in the shape of ``target`` for reduction "none".

        Example:
            >>> import torch
            >>> CrossEntropyLoss(reduction="none").forward(torch.zeros(2, 10), torch.tensor([3, 4]))
            tensor([2.3026, 2.3026])
        """
        return cross_entropy(input, target, self.weight, **self.keywords)


class LinearCrossEntropyLoss(_Loss):
    """A head and its loss: ``torch.nn.LinearCrossEntropyLoss`` over ``linear_cross_entropy``.

    The head is ``self.linear``, whose weight may be tied to an embedding's.

    Args:
        in_features: Hidden size D.
        num_classes: Vocabulary size V.
        out_features: Sizes (d_1, ..., d_K) of torch's K-dimensional loss. Default: ().
        bias: Whether the head has a bias. Default: False.
        device, dtype: Of the head's parameters. Default: None, torch's defaults.
        reduction: "mean" (default), "sum" or "none".
        weight: Class weights [V]. Default: None.
        ignore_index: Class index that is not scored. Default: None, −100.
        label_smoothing: Smoothing in [0, 1]. Default: 0.
        options: None; torch's chunking options have no use here.
        round_logits, return_statistics, with_confidence: As in
            ``perplexity.linear_cross_entropy``. Default: True, False, False.
        keywords: Further options of ``perplexity.linear_cross_entropy``: softcap, logit_scale,
            z_loss, shift, backend, memory_limit, validate, temperature.

    Raises:
        InputError: An argument has another value than expected (a ValueError).
        InputTypeError: An argument has another type than expected, or is unknown (a TypeError).

    Example:
        >>> import torch
        >>> from perplexity import LinearCrossEntropyLoss
        >>> loss = LinearCrossEntropyLoss(8, 100)
        >>> loss.in_features
        8
        >>> loss(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)).detach()
        tensor(4.6052)
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
        return_statistics: bool = False,
        with_confidence: bool = False,
        **keywords,
    ) -> None:
        checks.known_keywords("LinearCrossEntropyLoss", keywords, KEYWORDS)
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            checks.integer(name, value, least=1)
        checks.flag("bias", bias)
        dtypes = f"one of {', '.join(map(str, tensor_checks.FLOATING_DTYPES))}"
        if dtype is not None and dtype not in tensor_checks.FLOATING_DTYPES:
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
        tensor_checks.class_weights(weight, num_classes)
        super().__init__(weight, reduction, ignore_index, label_smoothing, **keywords)
        flags = dict(
            round_logits=round_logits,
            return_statistics=return_statistics,
            with_confidence=with_confidence,
        )
        for name, value in flags.items():
            checks.flag(name, value)
        vars(self).update(flags)
        self._names = (*self._names, *flags)
        with theirs(f"device: expected one that torch can use, got {device!r}"):
            # As in torch's module, one matrix holds the rows of all heads.
            rows = math.prod(out_features, start=num_classes)
            self.linear = nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.num_classes, self.out_features, self.options = (
            num_classes,
            tuple(out_features),
            options,
        )

    @property
    def in_features(self) -> int:
        """Return the hidden size D."""
        return self.linear.in_features

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of hidden states, as ``perplexity.linear_cross_entropy`` does.

        Args:
            input: Hidden states [..., D], floating.
            target: Class indices [...] or class probabilities [..., V].

        Returns:
            Loss in nats: a scalar, or in the shape of ``target`` for reduction "none"; with
            ``return_statistics`` a tuple, as of the function.

        Example:
            >>> import torch
            >>> loss = LinearCrossEntropyLoss(8, 100, reduction="none")
            >>> loss.forward(torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)).shape
            torch.Size([3])
        """
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        if self.out_features:
            weight = weight.view(self.num_classes, *self.out_features, -1)
            bias = None if bias is None else bias.view(self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input, weight, target, linear_bias=bias, weight=self.weight, **self.keywords
        )
