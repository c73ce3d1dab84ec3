"""PyTorch Lightning: a callback for perplexity over all tokens and the monitor."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..errors import InputError, needing
from ..metric import float64_sum, scored
from ..monitor import Monitor
from ..nats import logged_perplexity
from . import given_monitor, over_ranks

with needing(__name__, "integrations"):
    if importlib.util.find_spec("pytorch_lightning") and not importlib.util.find_spec("lightning"):
        import pytorch_lightning as pl  # Lightning's former name
    else:
        import lightning.pytorch as pl  # type: ignore[no-redef]  # one library, two names


class PerplexityCallback(pl.Callback):
    """Callback that logs perplexities of training and validation, and feeds the monitor.

    It logs ``train_perplexity`` after each training batch, and ``val_loss_token`` (nats a token)
    and ``val_perplexity`` over all tokens of a validation epoch and all ranks. Several validation
    loaders count as one. The monitor receives every loss, and stops the trainer where its
    ``stop_on`` is met.

    ``training_step`` returns the loss, or a dict with "loss". The loss has to be the mean of −log p
    over tokens, in nats. A dict with a loss of other terms or of label smoothing needs that mean as
    "token_loss". A training loss of exactly 0 has no perplexity.

    ``validation_step`` returns a dict: "loss" (the mean of −log p) and "tokens" (the number of
    scored tokens), or "nll" with "target" or "mask", as ``perplexity.Perplexity.update`` takes
    them.

    Args:
        monitor: A ``Monitor``; None makes a new one.

    Raises:
        InputTypeError: ``monitor`` is something else.
        InputError: ``validation_step`` returned neither form.

    Example:
        >>> from perplexity import Monitor
        >>> callback = PerplexityCallback(Monitor(stop_on="danger"))
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
        >>> callback.monitor.should_stop
        False
    """

    def __init__(self, monitor: Monitor | None = None) -> None:
        self.monitor = given_monitor(monitor)
        self._sums: Tensor | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        # Lightning has divided the loss by the number of accumulated batches.
        value = float(loss.detach()) * trainer.accumulate_grad_batches
        if isinstance(outputs, dict) and outputs.get("token_loss") is not None:
            value = float(outputs["token_loss"])
        perplexity = logged_perplexity(value)
        if perplexity is not None:
            pl_module.log("train_perplexity", perplexity, prog_bar=True)
        rates = [
            group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups
        ]
        self.monitor.log(trainer.global_step, train_loss=value, lr=rates[0] if rates else None)
        trainer.should_stop = trainer.should_stop or self.monitor.should_stop

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self._sums = None

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if not isinstance(outputs, dict) or not (
            "nll" in outputs or {"loss", "tokens"} <= outputs.keys()
        ):
            got = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise InputError(
                f'validation_step: expected a dict with "nll", or "loss" and "tokens", got {got}'
            )
        if "nll" in outputs:
            nll = outputs["nll"].detach()
            target, mask = outputs.get("target"), outputs.get("mask")
            kept = scored('"nll" of validation_step', nll, target, None, mask)
            nll = nll if kept is None else nll[kept]
            total = float64_sum(nll)
            sums = torch.stack([total, total.new_tensor(nll.numel())])
        else:
            loss = float64_sum(outputs["loss"])
            tokens = float64_sum(torch.as_tensor(outputs["tokens"])).to(loss.device)
            sums = torch.stack([torch.where(tokens > 0, loss * tokens, 0.0), tokens])
        self._sums = sums if self._sums is None else self._sums + sums

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        if self._sums is None:
            return
        measured = over_ranks(self._sums)
        if measured["loss"] is None:
            return
        pl_module.log("val_loss_token", measured["loss"])
        pl_module.log("val_perplexity", measured["perplexity"], prog_bar=True)
        if not trainer.sanity_checking:
            self.monitor.log(trainer.global_step, val_loss=measured["loss"])
            trainer.should_stop = trainer.should_stop or self.monitor.should_stop
