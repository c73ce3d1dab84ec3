"""Hugging Face transformers: the fused loss for causal models, and a callback for ``Trainer``."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks, models
from ..errors import InputError, InputTypeError, needing
from ..inputs import check_backend
from ..kernels import reference
from ..losses import cross_entropy, linear_cross_entropy
from ..metric import float64_sum
from ..models import evaluation_mode
from ..models.heads import before_head, options, output_layer
from ..monitor import Monitor
from . import given_monitor, over_ranks
from .loss_terms import extra_terms

with needing(__name__, "integrations"):
    from transformers import TrainerCallback
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast

IGNORED = -100
OF_LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")  # not for the body


@dataclass(frozen=True)
class LossRule:
    """Rule of a model's own loss, which the fused loss follows.

    Attributes:
        body: The head multiplies the body's last hidden states, with no layer between.
        shift: A position is scored on the label of the next position. Decoders of encoder-decoder
            models, such as Bart's, take labels as they are.
        items: The sum is divided by the argument ``num_items_in_batch``.
        named: The forward returns outputs with names. Some classes return tuples, whatever
            ``return_dict`` is.
    """

    body: bool = True
    shift: bool = True
    items: bool = True
    named: bool = True


class FusedLoss:
    """Handle of a model with the fused loss, as ``use_fused_loss`` returns it.

    The model's own forward is back after ``undo()``, or after a ``with`` block over the handle.

    Args:
        model: A transformers causal model.
        backend: "triton" or "torch"; None chooses by the model's device.
        rule: Of the model's own loss.
        statistics: Whether outputs have ``token_statistics``.
    """

    def __init__(
        self,
        model,
        backend: str | None,
        rule: LossRule = LossRule(),
        *,
        statistics: bool = False,
    ) -> None:
        self.model, self.backend, self.rule, self.statistics = model, backend, rule, statistics
        self.active, self.before = True, vars(model).get("forward")
        self.original = original = type(model).forward if self.before is None else self.before

        # The signature stays: Trainer reads the columns to keep and num_items_in_batch from it.
        @functools.wraps(original)
        def forward(module, *args, **kwargs):
            call = self._own(module)
            arguments = _named(call, args, kwargs)
            if not self.active or _labels(arguments, rule)[0] is None:
                return call(*args, **kwargs)
            return self._loss(module, arguments)

        forward._fused = rule  # type: ignore[attr-defined]  # typeshed's wraps has no attributes
        # A method: a deep copy of the model gets a forward that is bound to the copy.
        self.forward = types.MethodType(forward, model)
        model.forward = self.forward

    def _own(self, module):
        """Return the forward of ``module``, the model or a copy of it, without the fused loss."""
        return functools.partial(self.original, module) if self.before is None else self.original

    def _loss(self, module, arguments: dict):
        """Return the outputs of a forward with labels: the fused loss, and no logits."""
        _refuse(module, arguments)
        body = module.base_model if self.rule.body else self._own(module)
        left_out = (*OF_LOSS, "logits_to_keep")
        rest = {name: value for name, value in arguments.items() if name not in left_out}
        return_dict = rest.pop("return_dict", None)
        return_dict = (
            getattr(module.config, "return_dict", True) if return_dict is None else return_dict
        )
        rest = options(body.forward if self.rule.body else body, **rest, return_dict=True)
        if self.rule.body:
            outputs = body(**rest)
            hidden: Any = models.last_hidden_state(outputs)
            outputs = outputs if isinstance(outputs, Mapping) else {}
        else:  # the model's own forward without labels, up to its output layer
            outputs, hidden = {}, before_head(module, body, **rest)
        head = models.head_of(module)
        labels, shift = _labels(arguments, self.rule)
        items = arguments.get("num_items_in_batch") if self.rule.items else None
        result: Any = linear_cross_entropy(
            hidden.to(head.weight.device).reshape(*labels.shape, -1),
            head.weight,
            labels.to(head.weight.device),
            shift=shift,
            ignore_index=_ignored(arguments, self.rule),
            reduction="mean" if items is None else "sum",
            backend=self.backend,
            return_statistics=self.statistics,
            **head.arguments(),
        )
        loss, statistics = result if self.statistics else (result, None)
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        output = CausalLMOutputWithPast(
            loss=loss,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        if self.statistics and torch.is_grad_enabled():
            output["token_statistics"] = statistics
        elif self.statistics:
            # An attribute alone: Trainer's evaluation takes every item of an output for predictions.
            output.token_statistics = statistics
        return output if return_dict and self.rule.named else output.to_tuple()

    def undo(self) -> None:
        """Give the model its own forward back; a second call does nothing."""
        self.active = False  # a wrapper around the fused forward still calls it
        if vars(self.model).get("forward") is self.forward:
            if self.before is None:
                del self.model.forward
            else:
                self.model.forward = self.before

    def __enter__(self) -> FusedLoss:
        return self

    def __exit__(self, *_) -> None:
        self.undo()


def use_fused_loss(model, *, backend: str | None = None, statistics: bool = False) -> FusedLoss:
    """Make a transformers causal model compute its loss from labels without logits in memory.

    ``model(input_ids, labels=...)`` and ``Trainer`` then return the same loss and gradients as
    before: the mean over the labels that are not −100, or their sum over ``num_items_in_batch``.
    Decoders of encoder-decoder models take labels without a shift, as before. ``logits`` is None in
    such outputs, so Trainer's ``compute_metrics`` has no predictions. Where layers lie between body
    and head, as in BERT, the output holds the loss alone. A forward without labels is as before;
    Trainer's ``label_smoothing_factor`` takes the labels away.

    PEFT's LoRA (on the head, too), gradient checkpointing, autocast and tied weights work. The call
    comes before the model is wrapped or prepared (DDP, ``fully_shard``, accelerate).
    ``nn.DataParallel`` is not supported.

    The model is checked at once. Terms that its forward adds to the token loss are searched in the
    forward's source code, with the values of their coefficients. Then loss, gradient and head are
    compared with the model's own on a few positions, in evaluation and in training.

    Args:
        model: A transformers causal model, or one of PEFT's around it.
        backend: "triton" or "torch"; None chooses by the model's device.
        statistics: Whether outputs have ``token_statistics``, the ``TokenStatistics`` of the loss's
            own logits, in the shape of the labels (one position less where they are shifted).
            Default: False.

    Returns:
        A handle, whose ``undo()`` gives the model its own forward back. It is also a context
        manager, for a ``with`` block.

    Raises:
        InputError: The loss is not the mean of −log p alone (a router's auxiliary loss, a z-loss, a
            scaled loss, a mean of the sequences' means). Or training changes what follows the
            hidden states. Or the head has another adapter than LoRA, or LoRA with dropout.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> sizes = dict(vocab_size=99, n_embd=8, n_layer=1, n_head=1, n_positions=16)
        >>> config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
        >>> model = GPT2LMHeadModel(config)
        >>> ids = torch.arange(8)[None]
        >>> own = model.eval()(ids, labels=ids).loss
        >>> with use_fused_loss(model):
        ...     output = model(ids, labels=ids)
        >>> torch.allclose(output.loss, own), output.logits
        (True, None)
        >>> with use_fused_loss(model, statistics=True):
        ...     model(ids, labels=ids).token_statistics.rank.shape
        torch.Size([1, 7])
    """
    check_backend(backend)
    checks.flag("statistics", statistics)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    network = models.as_language_model(model)
    if not isinstance(network, models.HuggingFaceModel):
        raise InputError(f"model: expected a transformers causal model, got {type(model).__name__}")
    if hasattr(inner.forward, "_fused"):  # a bound method has its function's attributes
        raise InputError(
            "model: expected one that computes its own loss, got one with the fused loss in use"
        )
    if getattr(inner, "loss_function", ForCausalLMLoss) is not ForCausalLMLoss:
        name = getattr(inner.loss_function, "__name__", type(inner.loss_function).__name__)
        raise InputError(
            f"model: expected the loss of causal models, {type(inner).__name__} has {name}"
        )
    _refuse(inner, {})
    for message in extra_terms(inner):
        raise InputError(f"{message}; the fused loss has no such term")
    if any(parameter.is_meta for parameter in inner.parameters()):
        return FusedLoss(
            inner, backend, statistics=statistics
        )  # there are no weights yet to compare with
    head = network.head
    count = min(models.VERIFIED_POSITIONS, network.context_length or models.VERIFIED_POSITIONS)
    ids = np.arange(count) % head.weight.shape[0]
    with evaluation_mode(network), torch.no_grad():
        models.verify(network, ids, len(ids))
    if not models.same_body_in_training(network, ids):
        network.body = None  # something follows the body in training, such as dropout
    rule = None
    for training in (False, True):
        with models.mode(network, training), torch.no_grad():
            own = _Losses(inner, ids, network)
            rule = rule or own.rule()
            own.expect_plain(rule)
            handle = FusedLoss(inner, backend, rule, statistics=statistics)
            try:
                own.expect_equal(_Losses(inner, ids, network), head, rule)
            except BaseException:
                handle.undo()
                raise
        if not training:
            handle.undo()
    return handle


class _Losses:
    """Loss of a model on a few positions, and the gradient of its hidden states.

    The positions are two sequences with different numbers of labels. Among the labels are ids that
    some losses leave out: 0 and the configuration's special tokens. Random numbers are the same in
    every instance, so that two of them compare.

    Args:
        model: The model, in evaluation or in training, with or without the fused loss.
        ids: Token ids [n] of the first sequence; the second is reversed.
        network: The same model as a ``HuggingFaceModel``.
    """

    def __init__(self, model, ids: np.ndarray, network: models.HuggingFaceModel) -> None:
        self.name, self.body = type(model).__name__, network.body is not None
        self.when = " in training" if model.training else ""
        rows = network.head.weight.shape[0]
        input_ids = torch.from_numpy(np.stack([ids, ids[::-1]])).to(network.head.weight.device)
        self.labels = input_ids.clone()
        self.labels[0, 3:5] = self.labels[1, : len(ids) // 2] = IGNORED
        special = torch.tensor(_special_ids(model.config.get_text_config(), rows)[: len(ids) // 2])
        self.labels[1, len(ids) - len(special) :] = special.to(self.labels)
        leaves: list[Tensor] = []

        def cut(hidden: Tensor) -> Tensor:
            leaves.append(hidden.detach().reshape(*input_ids.shape, -1).requires_grad_())
            return leaves[-1].reshape(hidden.shape)

        def after_body(module, arguments, output):
            hidden = cut(output[0])
            if isinstance(output, tuple):
                return (hidden, *output[1:])
            output.last_hidden_state = hidden
            return output

        def before_head(module, arguments):
            return (cut(arguments[0]), *arguments[1:])

        # The body's own graph is cut off: a gradient of its weights would take their memory.
        if network.body is not None:
            hook = network.body.register_forward_hook(after_body)
        else:
            hook = output_layer(model).register_forward_pre_hook(before_head)
        inputs = dict(input_ids=input_ids, labels=self.labels)
        with models.seeded(network), hook, torch.enable_grad():
            output = model(**inputs)
            self.named = not isinstance(output, tuple) or not getattr(
                model.config, "return_dict", True
            )
            loss, logits = _loss_and_logits(output)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = type(output).__name__ if loss is None else checks.shown(loss)
                raise InputError(
                    f"model: expected a loss where labels are given, {self.name} gives {got}"
                )
            self.loss = loss.item()
            self.hidden = leaves[0] if leaves else None
            self.gradient = self._gradient(loss)
            self.plain: dict[bool, tuple[float, Tensor | None]] = {}  # with and without a shift
            self.wide = loss.dtype in (torch.float32, torch.float64)
            if isinstance(logits, Tensor) and logits.shape[:2] == self.labels.shape:
                self.exact_logits = logits.dtype in (torch.float32, torch.float64)
                # 16-bit logits are compared in float32, as transformers computes its loss.
                self.plain = {shift: self._plain(logits.float(), shift) for shift in (True, False)}
        try:  # the loss as a sum over a number of items
            with models.seeded(network):
                self.over_items = _loss_and_logits(model(**inputs, num_items_in_batch=7))[0].item()
        except TypeError:  # the forward takes no such number, so Trainer passes none
            self.over_items = None

    def _gradient(self, loss: Tensor) -> Tensor | None:
        """Return the float32 gradient of the hidden states; None where there is none."""
        if self.hidden is None or not loss.requires_grad:
            return None
        (grad,) = torch.autograd.grad(loss, self.hidden, allow_unused=True, retain_graph=True)
        return None if grad is None else grad.float()

    def _plain(self, logits: Tensor, shift: bool) -> tuple[float, Tensor | None]:
        """Return the mean of −log p of logits [2, n, V], and the gradient of the hidden states."""
        target = self.labels[:, 1:] if shift else self.labels
        logits = logits[:, :-1] if shift else logits
        target = target.to(logits.device).flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target, ignore_index=IGNORED)
        return loss.item(), self._gradient(loss)

    def rule(self) -> LossRule:
        """Return the rule that the losses follow, or the default rule where they follow none."""
        tolerance = self._tolerance()
        same = {
            shift: _near(self.loss, plain, tolerance) for shift, (plain, _) in self.plain.items()
        }
        counted = self.over_items is None or not _near(self.over_items, self.loss, tolerance)
        shift = same.get(True, True) or not same.get(False)
        return LossRule(self.body, shift=shift, items=counted, named=self.named)

    def _tolerance(self) -> float:
        """Return the relative tolerance of two losses of the same logits."""
        # Float32: sums of V terms, 1e-6 relative. A loss that the model rounds to 16 bits: 2⁻⁸.
        return 1e-5 if self.wide else 1e-2

    def expect_plain(self, rule: LossRule) -> None:
        """Raise InputError unless loss and gradient are those of the mean of −log p.

        Both sides use the same logits, so they differ by the rounding of the loss alone. That is
        far less than the rounding of a head: small terms show.
        """
        if not self.plain:
            return
        plain, gradient = self.plain[rule.shift]
        self._expect("mean loss", self.loss, plain, self._tolerance())
        # The gradient of 16-bit logits is rounded to 16 bits on both sides.
        tolerance = 1e-4 if self.wide and self.exact_logits else 2e-2
        self._expect_gradient(self.gradient, gradient, tolerance)

    def expect_equal(self, fused: _Losses, head: models.Head, rule: LossRule) -> None:
        """Raise InputError unless the fused loss and gradient are the model's, up to rounding."""
        wide = head.weight.dtype in (torch.float32, torch.float64)
        tolerance = 1e-3 if wide else 2e-2
        self._expect("mean loss", self.loss, fused.loss, tolerance)
        if self.over_items is not None:
            self._expect("mean loss", self.over_items, fused.over_items, tolerance)
        if self.gradient is None or fused.gradient is None or fused.hidden is None:
            return
        unrounded = models.no_rounding(head.weight, fused.hidden)
        # The model rounds 16-bit logits: both gradients are compared with that of float32 logits.
        with torch.enable_grad(), torch.autocast(self.labels.device.type, enabled=False):
            fused.hidden = fused.hidden.detach().float().requires_grad_()
            bias = None if head.bias is None else head.bias.float()
            hidden = fused.hidden.to(head.weight.device).flatten(0, 1)
            logits = reference.logits(
                hidden,
                head.weight.float(),
                bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )
            _, exact = fused._plain(logits.unflatten(0, self.labels.shape), rule.shift)
        rounding = 0.0
        if unrounded:
            self._expect_gradient(self.gradient, exact, tolerance)
        elif exact is not None:
            rounding = (
                ((self.gradient.to(exact.device) - exact).norm() / exact.norm()).nan_to_num().item()
            )
        self._expect_gradient(fused.gradient, exact, tolerance + 2 * rounding)

    def _expect(self, what: str, got: float, expected: float, tolerance: float) -> None:
        if not _near(got, expected, tolerance):
            raise InputError(
                f"model: expected the {what} of next tokens{self.when}, "
                f"{self.name}'s own is {got:.6g} where that is {expected:.6g}"
            )

    def _expect_gradient(
        self, got: Tensor | None, expected: Tensor | None, tolerance: float
    ) -> None:
        if got is None or expected is None:
            return
        difference = (got.to(expected.device) - expected).norm().item()
        if not difference <= tolerance * expected.norm().item():
            raise InputError(
                f"model: expected the gradient of the mean loss of next tokens{self.when}, "
                f"{self.name}'s own differs by "
                f"{difference / expected.norm().item():.2g} of its norm"
            )


def _special_ids(config, rows: int) -> list[int]:
    """Return 0 and a configuration's ids of special tokens, those that are below ``rows``."""
    named = [value for name, value in vars(config).items() if name.endswith("_token_id")]
    ids = [id for value in named for id in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(id for id in [0, *ids] if isinstance(id, int) and 0 <= id < rows))


def _loss_and_logits(output) -> tuple[Any, Any]:
    """Return loss and logits of a forward with labels, None for each that the output lacks."""
    if isinstance(output, tuple):
        loss, logits = (*output, None)[:2]
        return loss, logits
    if isinstance(output, Tensor):  # some classes return their loss alone
        return output, None
    get = output.get if isinstance(output, Mapping) else functools.partial(getattr, output)
    return get("loss", None), get("logits", None)


def _near(got: float, expected: float, tolerance: float) -> bool:
    """Return whether two numbers are equal within a tolerance, relative where they exceed 1."""
    return abs(got - expected) <= tolerance * max(1.0, abs(got))


def _labels(arguments: dict, rule: LossRule) -> tuple[Any, bool]:
    """Return the labels of a call, None where there are none, and whether a shift is to come."""
    shifted = arguments.get("shift_labels") if rule.shift else None
    return (arguments.get("labels"), rule.shift) if shifted is None else (shifted, False)


def _ignored(arguments: dict, rule: LossRule) -> int:
    """Return the label of a call that does not count."""
    return arguments.get("ignore_index", IGNORED) if rule.shift else IGNORED


def _named(call, args: tuple, kwargs: dict) -> dict:
    """Return the arguments of a call by name, those of its ``**kwargs`` among them."""
    if not args:
        return kwargs
    bound = inspect.signature(call).bind_partial(*args, **kwargs)
    arguments = dict(bound.arguments)
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    return arguments


def _refuse(module, arguments: dict) -> None:
    """Raise InputError for arguments and settings that add to the cross-entropy of the labels."""
    router = arguments.get("output_router_logits")
    if router is None:
        configs = module.config, module.config.get_text_config()
        router = any(getattr(config, "output_router_logits", False) for config in configs)
    if router:
        raise InputError(
            "output_router_logits: expected False, "
            "the router's auxiliary loss is not part of the fused loss"
        )
    if isinstance(arguments.get("logits_to_keep"), Tensor) or arguments.get("logits_to_keep"):
        raise InputError("logits_to_keep: expected 0 with labels, there are no logits")
    layer = module.get_output_embeddings()
    dropouts = getattr(layer, "lora_dropout", None) or {}
    if module.training and any(getattr(dropout, "p", 0) for dropout in dropouts.values()):
        raise InputError(
            "lora_dropout: expected 0 on the head, "
            "whose input it would have to drop out for the adapter alone"
        )


class PerplexityCallback(TrainerCallback):
    """Callback for ``Trainer`` that logs token loss and perplexity, and feeds the monitor.

    The token loss is the mean of −log p over all labels that are not −100, in nats. The callback
    computes it from the labels and the logits of each forward, or takes it from the fused loss.
    So it has no auxiliary loss of a router, no label smoothing and no other loss of Trainer's. A
    model with NaN weights has the perplexity NaN, though Trainer logs its loss as 0. The logits of
    each training step are read once more.

    ``token_loss`` and ``perplexity`` are logged with Trainer's ``loss``, ``eval_token_loss`` and
    ``eval_perplexity`` after each evaluation, over all tokens since the last log. (Trainer's
    ``loss`` and ``eval_loss`` are means of batch means.) Where a forward shows no labels or no
    logits, the callback warns and logs nothing. ``label_smoothing_factor`` and
    ``compute_loss_func`` take the labels away; ``attach(trainer)`` lets the callback see them.

    ``Trainer(callbacks=[PerplexityCallback()])`` writes the numbers into ``state.log_history`` and
    ``metrics``. Trackers see the numbers after ``PerplexityCallback().attach(trainer)``, which puts
    the callback before them. The monitor receives the token loss where there is one, else
    Trainer's, and the first of several evaluation sets. Copies with which a sampler pads the last
    batch of a rank are counted.

    Args:
        monitor: A ``Monitor``; None makes a new one. Training stops where its ``stop_on`` is met.

    Raises:
        InputTypeError: ``monitor`` is something else.

    Example:
        >>> from perplexity import Monitor
        >>> callback = PerplexityCallback(Monitor(stop_on="danger"))
        >>> callback.monitor.should_stop  # Trainer(..., callbacks=[callback]) feeds it
        False
    """

    def __init__(self, monitor: Monitor | None = None) -> None:
        self.monitor = given_monitor(monitor)
        self._model, self._hook = None, None
        self._labels: Tensor | None = None  # of the batch whose loss Trainer computes
        self._shift: int | None = None  # of labels against logits, once it is known
        # Sums are float64 [2]: Σ NLL and tokens.
        self._batch: Tensor | None = None  # of the last forward in evaluation
        self._sums: Tensor | None = None  # of the evaluation's batches
        self._trained: Tensor | None = None  # of the training steps since the last log
        self._why: str | None = None  # the reason why a forward has no token loss
        self._warned: set[str] = set()
        self._last: dict[str, float] = {}  # logged numbers of the last evaluation
        self._watched: str | None = None  # the evaluation set that the monitor receives

    def attach(self, trainer) -> PerplexityCallback:
        """Put the callback before all others of a trainer, and let it see the labels.

        Args:
            trainer: A transformers ``Trainer``.

        Returns:
            The callback.

        Raises:
            InputTypeError: ``trainer`` is something else.
        """
        known = hasattr(trainer, "callback_handler") and hasattr(trainer, "compute_loss")
        if not known:
            raise checks.wrong(
                "trainer", "a transformers Trainer", checks.shown(trainer), InputTypeError
            )
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        self._watch(trainer.model)
        own = trainer.compute_loss
        if getattr(own, "_shows_labels_to", None) is not self:

            @functools.wraps(own)
            def compute_loss(model, inputs, *args, **kwargs):
                self._labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
                try:
                    return own(model, inputs, *args, **kwargs)
                finally:
                    self._labels = None

            compute_loss._shows_labels_to = self  # type: ignore[attr-defined]  # as ``_fused``
            trainer.compute_loss = compute_loss
        return self

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._watch(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._trained = None
        self._watch(model)

    def _watch(self, model) -> None:
        """Observe the forwards of a model, in place of those of the model before."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if inner is None or inner is self._model:
            return
        if self._hook is not None:
            self._hook.remove()
        self._shift = self._why = None
        self._model, self._hook = inner, inner.register_forward_hook(self._seen, with_kwargs=True)

    @torch.compiler.disable
    @torch.no_grad()
    def _seen(self, module, args, keywords, output) -> None:
        """Add up the token loss of a forward; only the first forward waits for the device."""
        sums = self._token_sums(module, keywords, output)
        if not module.training:
            self._batch = sums
        elif sums is not None:
            self._trained = sums if self._trained is None else self._trained + sums

    def _token_sums(self, module, keywords: dict, output) -> Tensor | None:
        """Return Σ NLL and tokens of a forward; None, with the reason in ``_why``, without them."""
        shifted, labels = keywords.get("shift_labels"), keywords.get("labels")
        with_loss = shifted is not None or labels is not None
        labels = shifted if shifted is not None else self._labels if labels is None else labels
        if labels is None:
            self._why = (
                "no labels reach the model's forward (label_smoothing_factor or a loss of the "
                "trainer's own takes them away); PerplexityCallback().attach(trainer) sees them"
            )
            return None
        ignored = keywords.get("ignore_index", IGNORED)
        if isinstance(output, tuple):
            loss, logits = (*output, None)[:2] if with_loss else (None, output[0])
        else:
            loss, logits = output.get("loss"), output.get("logits")
        if isinstance(logits, Tensor) and labels.dim() > 1 and logits.shape[:-1] == labels.shape:
            if not hasattr(logits, "full_tensor"):
                labels = labels.to(logits.device)
                if shifted is not None:
                    return _sums_of_logits(logits, labels, 0, ignored)
                return self._shifted_sums(module, logits, labels, ignored, loss, keywords)
            self._why = "the logits are sharded over ranks"
        elif with_loss and (rule := _fused_rule(module)) is not None:
            labels, shift = _labels(keywords, rule)
            tokens = float64_sum((labels[..., 1:] if shift else labels) != _ignored(keywords, rule))
            items = keywords.get("num_items_in_batch") if rule.items else None
            items = tokens if items is None else torch.as_tensor(items).to(tokens)
            total = float64_sum(loss).to(tokens.device) * items
            return torch.stack([torch.where(tokens > 0, total, 0.0), tokens])
        else:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
            self._why = (
                f"the model gives logits of shape {shape} for labels of {tuple(labels.shape)}"
            )
        return None

    def _shifted_sums(
        self,
        module,
        logits: Tensor,
        labels: Tensor,
        ignored: int,
        loss: Tensor | None,
        keywords: dict,
    ) -> Tensor:
        """Return Σ NLL and tokens, with the shift of labels that the model's own loss has."""
        encoder_decoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        default = self._shift if self._shift is not None else 0 if encoder_decoder else 1
        usual = _sums_of_logits(logits, labels, default, ignored)
        if self._shift is not None or loss is None:
            return usual
        # Some decoders and all masked models take labels as they are: the first loss shows which.
        other = _sums_of_logits(logits, labels, 1 - default, ignored)
        items, own = keywords.get("num_items_in_batch"), loss.item()
        # Some of these models ignore the number of items that Trainer passes.
        means = [
            [sums[0] / count for count in (sums[1], items) if count is not None]
            for sums in (usual, other)
        ]
        same, same_as_other = (
            any(_near(own, mean.item(), 1e-3) for mean in each) for each in means
        )
        if same and same_as_other:
            return usual  # this batch decides nothing
        self._shift = 1 - default if same_as_other else default
        return other if same_as_other else usual

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._batch is not None:
            self._sums = self._batch if self._sums is None else self._sums + self._batch
        self._batch = None

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self._sums = None

    def _measured(self, sums: Tensor | None, prefix: str) -> dict[str, float | None]:
        """Return token loss and perplexity over all ranks; warn and return {} without them."""
        measured = over_ranks(sums)
        if measured["loss"] is not None:
            return {"token_loss": measured["loss"], "perplexity": measured["perplexity"]}
        if sums is None and self._why is not None and prefix not in self._warned:
            self._warned.add(prefix)
            warnings.warn(f"no {prefix}perplexity is logged: {self._why}", stacklevel=2)
        return {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = {} if logs is None else logs
        names = [
            name
            for name in logs
            if name.endswith("_loss") and not name.endswith(("token_loss", "train_loss"))
        ]
        if "loss" in logs:
            logs |= (measured := self._measured(self._trained, ""))
            self._trained = None
            extra = {name: logs[name] for name in ("grad_norm",) if name in logs}
            loss = measured.get("token_loss", logs["loss"])
            self.monitor.log(
                state.global_step, train_loss=loss, lr=logs.get("learning_rate"), **extra
            )
        elif names:
            prefix = names[0].removesuffix("_loss")
            measured, self._sums = self._measured(self._sums, f"{prefix}_"), None
            self._last = {f"{prefix}_{name}": value for name, value in measured.items()}
            logs |= self._last
            if measured:
                self._watched = self._watched or prefix
                if prefix == self._watched:
                    self.monitor.log(state.global_step, val_loss=measured["token_loss"])
        if state.log_history:
            state.log_history[-1].update(
                {name: value for name, value in logs.items() if name not in state.log_history[-1]}
            )
        if self.monitor.should_stop:
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics is not None:
            metrics.update(self._last)
        self._last, self._sums = {}, None


def _sums_of_logits(logits: Tensor, labels: Tensor, shift: int, ignored: int) -> Tensor:
    """Return Σ NLL and the number of tokens, float64 [2]; NaN where a label is out of range."""
    if shift:
        labels = torch.nn.functional.pad(labels[..., shift:], (0, shift), value=ignored)
    target = labels.flatten()
    nll = cross_entropy(
        logits.flatten(0, -2), target, reduction="none", ignore_index=ignored, validate=False
    )
    return torch.stack([float64_sum(nll), float64_sum(target != ignored)])


def _fused_rule(module) -> LossRule | None:
    """Return the rule of the fused loss in a model's forward, under its wrappers, or None."""
    forward = inspect.unwrap(module.forward, stop=lambda function: hasattr(function, "_fused"))
    return getattr(forward, "_fused", None)
