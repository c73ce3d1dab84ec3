"""Registration of an operator's derivative, and the errors of derivatives that do not exist."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def refuse_second_derivative(*_):
    """A derivative of the derivative is an error that says so, instead of a silent zero."""
    raise NotImplementedError(
        "double backward: the fused losses have first derivatives only; for a gradient penalty take "
        "torch.nn.functional.cross_entropy on torch.nn.functional.linear, which holds the logits"
    )


def each(function: Callable) -> Callable:
    """Return a rule for vmap that calls ``function`` once an item: its products are large enough to
    be called one by one.
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


# Holds what torch.func's transforms call: it is forgotten with this object.
_TRANSFORMED = torch.library.Library("perplexity", "FRAGMENT")


def register_derivative(operator, setup_context: Callable, backward: Callable) -> None:
    """Register an operator's derivative, for autograd and for torch.func's transforms.

    They take no operator's derivative, only that of an ``autograd.Function`` whose context is set
    up apart. It stands at the first dispatch key of theirs, where a compiled transform finds it,
    too.
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
    """Keep nothing: the derivative is an error."""


def refuse_forward_mode(*_):
    """A forward derivative is an error that says so: an operator without one drops the tangent in
    silence.
    """
    raise NotImplementedError(
        "forward-mode derivatives (jvp, jacfwd, hessian): the fused losses have reverse-mode first derivatives only; "
        "take torch.nn.functional.cross_entropy on torch.nn.functional.linear, which holds the logits"
    )


def only_backward(upstream: Tensor) -> bool:
    """Return whether this is the only backward there will be: not of a graph that is retained, nor
    of what is traced or batched.
    """
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    stays = known is None or known()
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(upstream) or functorch.is_legacy_batchedtensor(
        upstream
    )
    return not stays and not batched
