"""Registration of an operator's derivative, and the errors of derivatives that do not exist."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def refuse_second_derivative(*_):
    """Raise instead of returning a silent zero as the derivative of a derivative.

    Raises:
        NotImplementedError: Always.

    Example:
        >>> refuse_second_derivative()
        Traceback (most recent call last):
            ...
        NotImplementedError: double backward: ...
    """
    raise NotImplementedError(
        "double backward: the fused losses have first derivatives only; "
        "for a gradient penalty take torch.nn.functional.cross_entropy on "
        "torch.nn.functional.linear, which holds the logits"
    )


def each(function: Callable) -> Callable:
    """Return a rule for vmap that calls ``function`` once per item.

    The products of one item are large enough.
    """

    def rule(info, in_dims, *arguments):
        def item(place: int):
            return [
                argument.select(dim, place)
                if isinstance(argument, Tensor) and dim is not None
                else argument
                for argument, dim in zip(arguments, in_dims, strict=True)
            ]

        results = [function(*item(place)) for place in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


# torch.func's transforms call what is registered here, as long as this object lives.
_TRANSFORMED = torch.library.Library("perplexity", "FRAGMENT")


def register_derivative(operator, setup_context: Callable, backward: Callable) -> None:
    """Register an operator's derivative, for autograd and for torch.func's transforms.

    The transforms take no operator's derivative, only that of an ``autograd.Function`` whose
    context is set up apart. It is registered at their first dispatch key, where a compiled
    transform finds it, too.
    """
    operator.register_autograd(backward, setup_context=setup_context)
    members = {
        "forward": staticmethod(lambda *arguments: operator(*arguments)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(refuse_forward_mode),
        "vmap": staticmethod(each(operator)),
    }
    name = operator._name
    function: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), members)
    _TRANSFORMED.impl(
        name, lambda *arguments: function.apply(*arguments), "FuncTorchDynamicLayerFrontMode"
    )


def no_context(ctx, inputs, output) -> None:
    """Save nothing: the derivative raises."""


def refuse_forward_mode(*_):
    """Raise for a forward derivative; an operator without one drops the tangent silently.

    Raises:
        NotImplementedError: Always.

    Example:
        >>> refuse_forward_mode()
        Traceback (most recent call last):
            ...
        NotImplementedError: forward-mode derivatives (jvp, jacfwd, hessian): ...
    """
    raise NotImplementedError(
        "forward-mode derivatives (jvp, jacfwd, hessian): "
        "the fused losses have reverse-mode first derivatives only; "
        "take torch.nn.functional.cross_entropy on torch.nn.functional.linear, "
        "which holds the logits"
    )


def only_backward(upstream: Tensor) -> bool:
    """Return whether no second backward can follow: the graph is not retained, traced or batched.

    Args:
        upstream: Upstream gradient, a tensor.

    Returns:
        True if saved memory may be overwritten.

    Example:
        >>> seen = []
        >>> x = torch.ones(2, requires_grad=True)
        >>> _ = x.register_hook(lambda upstream: seen.append(only_backward(upstream)))
        >>> x.sum().backward()
        >>> (x * 2).sum().backward(retain_graph=True)
        >>> seen
        [True, False]
    """
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    stays = known is None or known()
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(upstream) or functorch.is_legacy_batchedtensor(
        upstream
    )
    return not stays and not batched
