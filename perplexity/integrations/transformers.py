"""Hugging Face transformers: causal models that train through the fused loss, and a callback for
``Trainer``.
"""

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
OF_LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")


@dataclass(frozen=True)
class LossRule:
    """Findings about a model: where its head begins, and what its own loss reads beside labels."""

    body: bool = True  # the head multiplies the body's last hidden states, with nothing between
    # a position is scored on the next one's label; decoders as Bart's take labels as they are
    shift: bool = True
    items: bool = True  # the sum is divided by num_items_in_batch where that is given
    named: bool = True  # the outputs have names; some classes give tuples, whatever return_dict is


class FusedLoss:
    """What ``use_fused_loss`` did to a model: ``undo()`` it, or leave the ``with`` block."""

    def __init__(self, model, backend: str | None, rule: LossRule = LossRule()) -> None:
        self.model, self.backend, self.rule = model, backend, rule
        self.active, self.before = True, vars(model).get("forward")
        self.original = original = type(model).forward if self.before is None else self.before

        # The signature stays: Trainer looks at it for the columns to keep and for
        # num_items_in_batch.
        @functools.wraps(original)
        def forward(module, *args, **kwargs):
            call = self._own(module)
            given = _named(call, args, kwargs)
            if not self.active or _labels(given, rule)[0] is None:
                return call(*args, **kwargs)
            return self._loss(module, given)

        forward._fused = rule  # type: ignore[attr-defined]  # typeshed's wraps declares no attributes
        # a deep copy of the model gets one bound to itself
        self.forward = types.MethodType(forward, model)
        model.forward = self.forward

    def _own(self, module):
        """Return the forward that ``module`` has without the fused loss, which may be a copy's."""
        return functools.partial(self.original, module) if self.before is None else self.original

    def _loss(self, module, given: dict):
        _refuse(module, given)
        body = module.base_model if self.rule.body else self._own(module)
        rest = {
            name: value for name, value in given.items() if name not in (*OF_LOSS, "logits_to_keep")
        }
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
        labels, shift = _labels(given, self.rule)
        items = given.get("num_items_in_batch") if self.rule.items else None
        loss = linear_cross_entropy(
            hidden.to(head.weight.device).reshape(*labels.shape, -1),
            head.weight,
            labels.to(head.weight.device),
            shift=shift,
            ignore_index=_ignored(given, self.rule),
            reduction="mean" if items is None else "sum",
            backend=self.backend,
            **head.arguments(),
        )
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        found = CausalLMOutputWithPast(
            loss=loss,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        return found if return_dict and self.rule.named else found.to_tuple()

    def undo(self) -> None:
        """The model as it was; nothing where it was undone before."""
        self.active = False  # whoever wrapped the forward since then still calls through
        if vars(self.model).get("forward") is self.forward:
            if self.before is None:
                del self.model.forward
            else:
                self.model.forward = self.before

    def __enter__(self) -> FusedLoss:
        return self

    def __exit__(self, *_) -> None:
        self.undo()


def use_fused_loss(model, *, backend: str | None = None) -> FusedLoss:
    """Make a transformers causal model compute its loss from labels without logits:
    ``model(input_ids, labels=...)``, ``Trainer``.

    Loss and gradients are the unpatched model's (a mean over the labels that are not −100, or their
    sum over ``num_items_in_batch``; the decoders of encoder-decoder models take labels without a
    shift, and do so here); ``logits`` is then None: what wants predictions beside a loss (Trainer's
    ``compute_metrics``) has none. Where layers lie between body and head, as in BERT, the output
    holds the loss alone. Without labels the model is as before (Trainer's
    ``label_smoothing_factor`` takes them away). PEFT's LoRA, on the head too, gradient
    checkpointing, autocast and tied weights work. Call it before the model is wrapped or prepared
    (DDP, ``fully_shard``, accelerate); ``nn.DataParallel`` is not supported. Returns a handle:
    ``undo()``, or a ``with`` block.

    The model is checked at once. Terms that its forward adds to the token loss are looked for in
    the forward's source code with the values of their coefficients. Then loss, gradient and head
    are compared with the model's own on a few positions, in evaluation and in training.

    Raises:
        InputError: The loss is not the mean of −log p alone (a router's auxiliary loss, a z-loss, a
        scaled
            loss, a mean of the sequences' means), training changes what follows the hidden states,
            or the head has another adapter than LoRA, or one with dropout.
    """
    check_backend(backend)
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
        return FusedLoss(inner, backend)  # nothing to compute with yet
    head = network.head
    count = min(models.VERIFIED_POSITIONS, network.context_length or models.VERIFIED_POSITIONS)
    ids = np.arange(count) % head.weight.shape[0]
    with evaluation_mode(network), torch.no_grad():
        models.verify(network, ids, len(ids))
    if not models.same_body_in_training(network, ids):
        network.body = None  # dropout between body and head, for one
    rule = None
    for training in (False, True):
        with models.mode(network, training), torch.no_grad():
            own = _Losses(inner, ids, network)
            rule = rule or own.rule()
            own.expect_plain(rule)
            handle = FusedLoss(inner, backend, rule)
            try:
                own.expect_equal(_Losses(inner, ids, network), head, rule)
            except BaseException:
                handle.undo()
                raise
        if not training:
            handle.undo()
    return handle


class _Losses:
    """A model's loss of a few positions and its gradient of the hidden states, as the model is now.

    The positions are two sequences with different numbers of labels, among these the ids that a
    loss may leave out: 0 and the configuration's special tokens. Random numbers are the same each
    time.
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
        given = dict(input_ids=input_ids, labels=self.labels)
        with models.seeded(network), hook, torch.enable_grad():
            found = model(**given)
            self.named = not isinstance(found, tuple) or not getattr(
                model.config, "return_dict", True
            )
            loss, logits = _loss_and_logits(found)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = type(found).__name__ if loss is None else checks.shown(loss)
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
        try:  # as a sum over a number of items, too
            with models.seeded(network):
                self.over_items = _loss_and_logits(model(**given, num_items_in_batch=7))[0].item()
        except TypeError:  # then Trainer gives it none either
            self.over_items = None

    def _gradient(self, loss: Tensor) -> Tensor | None:
        if self.hidden is None or not loss.requires_grad:
            return None
        (found,) = torch.autograd.grad(loss, self.hidden, allow_unused=True, retain_graph=True)
        return None if found is None else found.float()

    def _plain(self, logits: Tensor, shift: bool) -> tuple[float, Tensor | None]:
        target = self.labels[:, 1:] if shift else self.labels
        logits = logits[:, :-1] if shift else logits
        target = target.to(logits.device).flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target, ignore_index=IGNORED)
        return loss.item(), self._gradient(loss)

    def rule(self) -> LossRule:
        """Return the rule that these losses follow; the usual one where they follow none."""
        tolerance = self._tolerance()
        same = {
            shift: _near(self.loss, plain, tolerance) for shift, (plain, _) in self.plain.items()
        }
        counted = self.over_items is None or not _near(self.over_items, self.loss, tolerance)
        shift = same.get(True, True) or not same.get(False)
        return LossRule(self.body, shift=shift, items=counted, named=self.named)

    def _tolerance(self) -> float:
        # Float32: sums of V terms, 1e-6 relative. A loss that the model rounds to 16 bits: 2⁻⁸.
        return 1e-5 if self.wide else 1e-2

    def expect_plain(self, rule: LossRule) -> None:
        """Raise InputError unless loss and gradient are those of the mean of −log p, of the same
        logits.

        The logits are the same numbers on both sides, so that only the rounding of the loss is
        between them: far less than any head's rounding, and small terms show.
        """
        if not self.plain:
            return
        plain, gradient = self.plain[rule.shift]
        self._expect("mean loss", self.loss, plain, self._tolerance())
        # The gradient of 16-bit logits is rounded to 16 bits on both sides.
        tolerance = 1e-4 if self.wide and self.exact_logits else 2e-2
        self._expect_gradient(self.gradient, gradient, tolerance)

    def expect_equal(self, fused: _Losses, head: models.Head, rule: LossRule) -> None:
        """Raise InputError unless the fused loss and its gradient are the model's own, up to
        rounding.
        """
        wide = head.weight.dtype in (torch.float32, torch.float64)
        tolerance = 1e-3 if wide else 2e-2
        self._expect("mean loss", self.loss, fused.loss, tolerance)
        if self.over_items is not None:
            self._expect("mean loss", self.over_items, fused.over_items, tolerance)
        if self.gradient is None or fused.gradient is None or fused.hidden is None:
            return
        unrounded = models.no_rounding(head.weight, fused.hidden)
        # 16-bit logits are rounded, by the model at least: both are measured from float32 logits.
        with torch.enable_grad(), torch.autocast(self.labels.device.type, enabled=False):
            fused.hidden = fused.hidden.detach().float().requires_grad_()
            bias = None if head.bias is None else head.bias.float()
            given = dict(softcap=head.softcap, logit_scale=head.logit_scale)
            hidden = fused.hidden.to(head.weight.device).flatten(0, 1)
            logits = reference.logits(hidden, head.weight.float(), bias, **given)
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
                f"model: expected the {what} of next tokens{self.when}, {self.name}'s own is {got:.6g} where that is "
                f"{expected:.6g}"
            )

    def _expect_gradient(
        self, got: Tensor | None, expected: Tensor | None, tolerance: float
    ) -> None:
        if got is None or expected is None:
            return
        difference = (got.to(expected.device) - expected).norm().item()
        if not difference <= tolerance * expected.norm().item():
            raise InputError(
                f"model: expected the gradient of the mean loss of next tokens{self.when}, {self.name}'s own "
                f"differs by {difference / expected.norm().item():.2g} of its norm"
            )


def _special_ids(config, rows: int) -> list[int]:
    """Return 0 and the ids of special tokens that a configuration names, of those below
    ``rows``.
    """
    named = [value for name, value in vars(config).items() if name.endswith("_token_id")]
    found = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return list(
        dict.fromkeys(one for one in [0, *found] if isinstance(one, int) and 0 <= one < rows)
    )


def _loss_and_logits(output) -> tuple[Any, Any]:
    """Return loss and logits of a forward that was given labels; None for what it does not give."""
    if isinstance(output, tuple):
        loss, logits = (*output, None)[:2]
        return loss, logits
    if isinstance(output, Tensor):  # of a class that gives its loss alone
        return output, None
    get = output.get if isinstance(output, Mapping) else functools.partial(getattr, output)
    return get("loss", None), get("logits", None)


def _near(got: float, expected: float, tolerance: float) -> bool:
    return abs(got - expected) <= tolerance * max(1.0, abs(got))


def _labels(given: dict, rule: LossRule) -> tuple[Any, bool]:
    """Return the labels of a call, None where it has none, and whether they are still to be
    shifted.
    """
    shifted = given.get("shift_labels") if rule.shift else None
    return (given.get("labels"), rule.shift) if shifted is None else (shifted, False)


def _ignored(given: dict, rule: LossRule) -> int:
    return given.get("ignore_index", IGNORED) if rule.shift else IGNORED


def _named(call, args: tuple, kwargs: dict) -> dict:
    """Arguments by name, those of ``**kwargs`` among them."""
    if not args:
        return kwargs
    bound = inspect.signature(call).bind_partial(*args, **kwargs)
    found = dict(bound.arguments)
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(parameter.name, {})
    return found


def _refuse(module, given: dict) -> None:
    """What the loss of labels would be more than cross-entropy for, by name."""
    router = given.get("output_router_logits")
    if router is None:
        configs = module.config, module.config.get_text_config()
        router = any(getattr(config, "output_router_logits", False) for config in configs)
    if router:
        raise InputError(
            "output_router_logits: expected False, the router's auxiliary loss is not part of the fused loss"
        )
    if isinstance(given.get("logits_to_keep"), Tensor) or given.get("logits_to_keep"):
        raise InputError("logits_to_keep: expected 0 with labels, there are no logits")
    layer = module.get_output_embeddings()
    dropouts = getattr(layer, "lora_dropout", None) or {}
    if module.training and any(getattr(dropout, "p", 0) for dropout in dropouts.values()):
        raise InputError(
            "lora_dropout: expected 0 on the head, whose input it would have to drop out for the adapter alone"
        )


class PerplexityCallback(TrainerCallback):
    """A callback for ``Trainer``: token loss and perplexity side by side, read by the monitor.

    The token loss is the mean of −log p over all labels that are not −100. The callback computes it
    from the labels and the logits of each forward, or takes it from the fused loss. So the
    auxiliary loss of a router, label smoothing and a loss of Trainer's own are not in it, and a
    model with NaN weights has the perplexity NaN (Trainer logs its loss as 0). The logits of each
    training step are read once more.

    Logs ``token_loss`` and ``perplexity`` beside ``loss`` and, after each evaluation,
    ``eval_token_loss`` and ``eval_perplexity``, over all tokens since the last log. Trainer's
    ``loss`` and ``eval_loss`` are means of batch means. Where a forward shows no labels or no
    logits, a warning says so and nothing is logged. ``label_smoothing_factor`` and
    ``compute_loss_func`` take the labels away: ``attach(trainer)`` lets the callback see them.

    ``monitor`` (a ``Monitor``, a new one by default) gets every loss, the token loss where there is
    one. When the monitor's ``stop_on`` fires, training stops.
    ``Trainer(callbacks=[PerplexityCallback()])`` is enough for the numbers in ``state.log_history``
    and ``metrics``. Trackers see the numbers after ``PerplexityCallback().attach(trainer)``, which
    puts the callback before them. Of several evaluation sets the monitor gets the first. A sampler
    that pads the last batch of ranks with copies has the copies counted.
    """

    def __init__(self, monitor: Monitor | None = None) -> None:
        self.monitor = given_monitor(monitor)
        self._model, self._hook = None, None
        self._labels: Tensor | None = None  # of the batch that Trainer computes a loss of
        self._shift: int | None = None  # of labels against logits, once it is known
        # Each float64 [2]: Σ nll, tokens.
        self._batch: Tensor | None = None  # of the forward in evaluation that was seen last
        self._sums: Tensor | None = None  # of the evaluation's batches
        self._trained: Tensor | None = None  # of the training steps since the last log
        self._why: str | None = None  # a forward has no token loss
        self._warned: set[str] = set()
        self._last: dict[str, float] = {}  # what was logged of the last evaluation
        # of several evaluation sets the one the monitor is told of
        self._watched: str | None = None

    def attach(self, trainer) -> PerplexityCallback:
        """Add the callback to a trainer, before everything that writes logs, and show it the
        labels.
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

            compute_loss._shows_labels_to = self  # type: ignore[attr-defined]  # typeshed's wraps declares none
            trainer.compute_loss = compute_loss
        return self

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._watch(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._trained = None
        self._watch(model)

    def _watch(self, model) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if inner is None or inner is self._model:
            return
        if self._hook is not None:
            self._hook.remove()
        self._shift = self._why = None
        self._model, self._hook = inner, inner.register_forward_hook(self._seen, with_kwargs=True)

    @torch.compiler.disable
    @torch.no_grad()
    def _seen(self, module, arguments, given, output) -> None:
        """Add up the token loss of a forward; only the first waits for the device."""
        sums = self._token_sums(module, given, output)
        if not module.training:
            self._batch = sums
        elif sums is not None:
            self._trained = sums if self._trained is None else self._trained + sums

    def _token_sums(self, module, given: dict, output) -> Tensor | None:
        """Return Σ nll and tokens of a forward, or None and leave the reason in ``_why``."""
        shifted, labels = given.get("shift_labels"), given.get("labels")
        with_loss = shifted is not None or labels is not None
        labels = shifted if shifted is not None else self._labels if labels is None else labels
        if labels is None:
            self._why = (
                "no labels reach the model's forward (label_smoothing_factor or a loss of the trainer's own "
                "takes them away); PerplexityCallback().attach(trainer) sees them"
            )
            return None
        ignored = given.get("ignore_index", IGNORED)
        if isinstance(output, tuple):
            loss, logits = (*output, None)[:2] if with_loss else (None, output[0])
        else:
            loss, logits = output.get("loss"), output.get("logits")
        if isinstance(logits, Tensor) and labels.dim() > 1 and logits.shape[:-1] == labels.shape:
            if not hasattr(logits, "full_tensor"):
                labels = labels.to(logits.device)
                if shifted is not None:
                    return _sums_of_logits(logits, labels, 0, ignored)
                return self._shifted_sums(module, logits, labels, ignored, loss, given)
            self._why = "the logits are sharded over ranks"
        elif with_loss and (rule := _fused_rule(module)) is not None:
            labels, shift = _labels(given, rule)
            tokens = float64_sum((labels[..., 1:] if shift else labels) != _ignored(given, rule))
            items = given.get("num_items_in_batch") if rule.items else None
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
        self, module, logits: Tensor, labels: Tensor, ignored: int, loss: Tensor | None, given: dict
    ) -> Tensor:
        """Return Σ nll and tokens, of next tokens or of labels as they are, as the model's own loss
        is.
        """
        encoder_decoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        default = self._shift if self._shift is not None else 0 if encoder_decoder else 1
        found = _sums_of_logits(logits, labels, default, ignored)
        if self._shift is not None or loss is None:
            return found
        # Some decoders and all masked models take labels as they are: the first batch's loss shows
        # it.
        other = _sums_of_logits(logits, labels, 1 - default, ignored)
        items, own = given.get("num_items_in_batch"), loss.item()
        # Some of them take no number of items either, though Trainer gives them one.
        means = [
            [sums[0] / count for count in (sums[1], items) if count is not None]
            for sums in (found, other)
        ]
        same, same_as_other = (
            any(_near(own, mean.item(), 1e-3) for mean in each) for each in means
        )
        if same and same_as_other:
            return found  # this batch cannot tell
        self._shift = 1 - default if same_as_other else default
        return other if same_as_other else found

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._batch is not None:
            self._sums = self._batch if self._sums is None else self._sums + self._batch
        self._batch = None

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self._sums = None

    def _measured(self, sums: Tensor | None, prefix: str) -> dict[str, float | None]:
        """Return token loss and perplexity over all ranks; empty without tokens, with a warning if
        that is odd.
        """
        found = over_ranks(sums)
        if found["loss"] is not None:
            return {"token_loss": found["loss"], "perplexity": found["perplexity"]}
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
    """Return Σ nll and the number of tokens, float64 [2]; an impossible label makes the sum NaN."""
    if shift:
        labels = torch.nn.functional.pad(labels[..., shift:], (0, shift), value=ignored)
    target = labels.flatten()
    nll = cross_entropy(
        logits.flatten(0, -2), target, reduction="none", ignore_index=ignored, validate=False
    )
    return torch.stack([float64_sum(nll), float64_sum(target != ignored)])


def _fused_rule(module) -> LossRule | None:
    """Return the rule of the fused loss that the model's forward is, under whatever was wrapped
    around it.
    """
    forward = inspect.unwrap(module.forward, stop=lambda function: hasattr(function, "_fused"))
    return getattr(forward, "_fused", None)
