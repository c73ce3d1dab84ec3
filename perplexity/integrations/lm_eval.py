"""lm-evaluation-harness without logits: its Hugging Face model, scored from hidden states.

Importing this module registers the model as ``fused-hf``. On the command line
``python -m perplexity.integrations.lm_eval`` is ``lm_eval`` with that model known::

    python -m perplexity.integrations.lm_eval --model fused-hf --model_args pretrained=gpt2 ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import models
from ..errors import InputError, needing
from ..inputs import check_backend
from ..statistics import token_statistics

with needing(__name__, "lm-eval"):
    import lm_eval.models  # noqa: F401  # all others: the harness imports them only where none is known
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm

Request = tuple[Any, list[int], list[int]]  # what is cached, context, continuation


@register_model("fused-hf")
class FusedHFLM(HFLM):
    """The harness's causal Hugging Face model without a tensor of tokens × vocabulary.

    Log-likelihoods, whether a continuation is the greedy one, and rolling log-likelihoods come from
    the hidden states of the tokens that are scored, in float32. Inputs that several requests share,
    as the choices of a question do, go through the model once. Generation is the harness's.

    Args:
        pretrained, ...: As for the harness's ``hf`` model.
        loss_backend: "triton" or "torch"; None (default) chooses by the model's device.

    Raises:
        InputError: The model is no causal one, or its logits do not follow from its hidden states.

    Example:
        >>> import torch
        >>> from lm_eval.api.registry import get_model
        >>> get_model("fused-hf").__name__
        'FusedHFLM'
    """

    def __init__(self, pretrained: Any, *, loss_backend: str | None = None, **options: Any) -> None:
        check_backend(loss_backend)
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise InputError(f"fused-hf: expected a causal model, got one of kind {self.backend}")
        self.loss_backend = loss_backend
        self.network = models.as_language_model(self.model)
        with self._precision():
            models.verify(self.network, np.empty(0, np.int64), self.max_length)

    def _precision(self) -> AbstractContextManager:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _scores(self, ids: Tensor, rows: Tensor, columns: Tensor, targets: Tensor) -> tuple:
        """Return log-probabilities [n] of targets at (rows, columns) of ids, and which are greedy."""
        with torch.no_grad(), self._precision():
            hidden = self.network.hidden_states(ids)
        head = self.network.head
        device = head.weight.device
        statistics = token_statistics(
            hidden.to(device)[rows.to(device), columns.to(device)],
            head.weight,
            targets.to(device),
            ignore_index=None,
            backend=self.loss_backend,
            **head.arguments(),
        )
        return -statistics.nll.cpu(), (statistics.predicted == targets.to(device)).cpu()

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels=None) -> Tensor:
        """Return log-probabilities [..., 1]: the harness finds by them which batch fits."""
        rows, columns = torch.meshgrid(*map(torch.arange, inps.shape), indexing="ij")
        scores, _ = self._scores(inps, rows.flatten(), columns.flatten(), inps.flatten())
        return scores.reshape(*inps.shape, 1)

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        # Requests by what the model reads for them; the longest first, as in the harness: where
        # memory ends, it ends at once.
        sharing: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :]
            sharing.setdefault(tuple(tokens[:-1]), []).append(number)
        inputs = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))
        answers: dict[int, tuple[float, bool]] = {}
        hidden_bar = disable_tqdm or self.rank != 0
        with tqdm(
            total=len(requests), disable=hidden_bar, desc="Running loglikelihood requests"
        ) as bar:
            for batch in self._batches(inputs, override_bs):
                numbers = [number for tokens in batch for number in sharing[tokens]]
                answers |= self._answers(requests, batch, sharing)
                for number in numbers:
                    # A rolling window has no key: its document is cached as a whole.
                    if requests[number][0] is not None:
                        key, answer = requests[number][0], answers[number]
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                bar.update(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def _batches(self, inputs: list[tuple[int, ...]], size: int | None) -> Iterator[list]:
        """Yield batches of inputs, of the harness's own size where none is given."""
        self.batch_sizes: dict[int, int] = {}
        automatic = size is None and self.batch_size == "auto"
        asked = [(None, list(tokens), [0]) for tokens in inputs] if automatic else []
        scheduled = len(inputs) >= self.batch_schedule
        find = (
            self._batch_scheduler if scheduled else lambda at, of: self._detect_batch_size(of, at)
        )
        place = 0
        while place < len(inputs):
            here = find(place, asked) if automatic else int(size or self.batch_size)
            yield inputs[place : place + here]
            place += here

    def _answers(
        self,
        requests: list[Request],
        batch: list[tuple[int, ...]],
        sharing: dict[tuple[int, ...], list[int]],
    ) -> dict[int, tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) by number of the requests that share a batch."""
        ids = pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True)
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        numbers, counts = [], []
        for row, tokens in enumerate(batch):
            for number in sharing[tokens]:
                continuation = requests[number][2]
                rows += [row] * len(continuation)
                columns += range(len(tokens) - len(continuation), len(tokens))
                targets += continuation
                numbers.append(number)
                counts.append(len(continuation))
        scores, greedy = self._scores(
            ids.to(self.device), *map(torch.tensor, (rows, columns, targets))
        )
        return {
            number: (score.sum(dtype=torch.float64).item(), bool(right.all()))
            for number, score, right in zip(
                numbers, scores.split(counts), greedy.split(counts), strict=True
            )
        }


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
