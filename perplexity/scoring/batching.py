"""The windows that may share a batch: a window's loss must not depend on its neighbours.

Four things make it depend on them: a rotary embedding that changes with the batch's longest row
(LongRoPE, dynamic NTK), attention to the k best keys alone (the choice among equally good ones
depends on the row's length), padding that a recurrent or a custom layer sees, and layers that look
across the batch (expert capacities, batch statistics). The configuration shows the first two; a
comparison once a run shows the others.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.language_model import LanguageModel, no_rounding

# Positions in a batch without a batch size: enough to keep the machine busy, little memory compared
# with a model's.
POSITIONS_AT_ONCE = {"cpu": 2048, "other": 32_768}
# Windows that share a batch, in the order of care. "padded": any that the rotary embedding allows;
# "equal": those of one length; "alone": none.
MODES = ("padded", "equal", "alone")
NOTES = {
    "equal": "the model's values depend on padding: only windows of one length share a batch",
    "alone": "the model's values depend on the other windows of a batch: "
    "windows are scored one at a time",
}


@dataclass(frozen=True)
class LengthRule:
    """A layer whose values change where a batch reads more than ``border`` positions.

    ``exact``: beyond the border they change with every length (dynamic NTK, the k best keys).
    """

    border: int
    exact: bool

    def group(self, length: int) -> int:
        """Return equal numbers for lengths that are computed alike."""
        if length <= self.border:
            return 0
        return length if self.exact else 1


def length_rules(model: LanguageModel) -> list[LengthRule]:
    """Return the rules of a transformers model's configuration, for all its layer types."""
    config = getattr(getattr(model, "model", None), "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return []
    config = config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    rules = []
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(config, name, None)
        if not isinstance(settings, dict):
            continue
        for rope in [settings, *(part for part in settings.values() if isinstance(part, dict))]:
            kind = str(rope.get("rope_type", rope.get("type", "")))
            original = getattr(config, "original_max_position_embeddings", None) or rope.get(
                "original_max_position_embeddings", most
            )
            if kind in ("longrope", "su") and original:
                rules.append(LengthRule(original, exact=False))
            elif "dynamic" in kind and most:
                rules.append(LengthRule(most, exact=True))
    rules += [LengthRule(most, exact=True) for most in _best_keys(config)]
    return list(dict.fromkeys(rules))


# Fields of configurations for the number of keys that attention chooses, or for the number of
# blocks of keys and a block's size.
BEST_KEYS = (
    ("index_topk",),
    ("keep_window_size",),
    ("indexer_budget",),
    ("index_topk_blocks", "index_block_size"),
)


def _best_keys(config) -> list[int]:
    """Return the limits up to which attention to the best keys reads all positions."""
    numbers: list[list[Any]] = [
        [getattr(config, name, None) for name in names] for names in BEST_KEYS
    ]
    return [math.prod(sizes) for sizes in numbers if all(isinstance(size, int) for size in sizes)]


class Batching:
    """The windows that may share a batch of ``networks``, all of which score every window."""

    def __init__(self, networks: Sequence[LanguageModel], batch_size: int | None) -> None:
        self.networks, self.batch_size = networks, batch_size
        device = networks[0].head.weight.device.type
        self.positions = POSITIONS_AT_ONCE["cpu" if device == "cpu" else "other"]
        self.rules = [rule for network in networks for rule in length_rules(network)]
        self.mode = "padded"
        # Token ids and context length of the check to come; None: done, or no text yet.
        self._sample: tuple[np.ndarray, int | None] | None = None

    def group(self, length: int) -> Hashable:
        """Return equal values for lengths that may share a batch."""
        return length if self.mode != "padded" else tuple(rule.group(length) for rule in self.rules)

    def rows(self, longest: int) -> int:
        """Return how many windows of at most ``longest`` positions a batch has."""
        return 1 if self.mode == "alone" else self.batch_size or max(1, self.positions // longest)

    @property
    def notes(self) -> list[str]:
        """Return a result's notes about its batches."""
        return [NOTES[self.mode]] if self.mode in NOTES else []

    def check_later(self, ids: np.ndarray, context_length: int | None) -> None:
        """Keep the arguments of ``check`` until the first batch with several windows."""
        self._sample = ids, context_length

    def check_before(self, batches: Sequence[Sequence[int]]) -> bool:
        """Check once, before the first of ``batches`` with several windows; return whether now."""
        if self._sample is None or all(len(batch) < 2 for batch in batches):
            return False
        sample, self._sample = self._sample, None
        self.check(*sample)
        return True

    @torch.no_grad()
    def check(self, ids: np.ndarray, context_length: int | None) -> None:
        """Compare half a window alone and in a batch; choose the mode that the models need.

        The other window is the longest that may share a batch with it, so this is at most the work
        of one batch. Nothing is compared where a batch has one window.

        Args:
            ids: Token ids [n], n ≥ 1, of the text.
            context_length: The most positions of a window; None for any number.
        """
        if self.batch_size == 1:
            return
        longest = min(
            [
                context_length or self.positions,
                self.positions // 2,
                *(rule.border for rule in self.rules),
            ]
        )
        if longest < 2:
            return
        for network in self.networks:
            self.mode = max(self.mode, _mode_that_fits(network, ids, longest), key=MODES.index)

    def agree(self) -> None:
        """Take the most careful mode of all ranks of ``torch.distributed``."""
        modes: list[str] = [self.mode] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(modes, self.mode)
        self.mode = max(modes, key=MODES.index)


def _mode_that_fits(network: LanguageModel, ids: np.ndarray, longest: int) -> str:
    """Return the mode of a model, from shorter windows where two long ones do not fit."""
    while longest >= 2:
        try:
            return _mode(network, np.resize(ids, longest))
        except torch.OutOfMemoryError:
            longest //= 2
        # Outside the handler: the exception holds the frames, and the frames hold the tensors.
        if network.head.weight.device.type == "cuda":
            torch.cuda.empty_cache()
    return "padded"  # scoring halves batches and names a window that does not fit


def _mode(network: LanguageModel, ids: np.ndarray) -> str:
    """Return the mode of a model, from a window alone, in a padded batch and in an equal one."""
    # Padded to the full length: attention to the k best keys depends on padding only where a window
    # has more than k positions.
    short = ids[: len(ids) // 2]
    padded = np.concatenate([short, np.full(len(ids) - len(short), short[-1])])
    # The other row differs at every position.
    other = (ids + 1) % network.head.weight.shape[0]
    expected = _hidden(network, short)
    if _same(_hidden(network, padded, other)[: len(short)], expected, network):
        return "padded"
    return (
        "equal"
        if _same(_hidden(network, short, other[: len(short)]), expected, network)
        else "alone"
    )


def _hidden(network: LanguageModel, *rows: np.ndarray) -> Tensor:
    """Return the hidden states [T, D] of the first row in a batch of ``rows``."""
    input_ids = torch.from_numpy(np.stack(rows)).to(network.head.weight.device)
    return network.hidden_states(input_ids)[0]


def _same(got: Tensor, expected: Tensor, network: LanguageModel) -> bool:
    """Return whether the two [T, D] differ by rounding alone.

    float32: by at most 1e-4 of the largest value, as in ``models.verify``, at any position. 16
    bits: a router near a tie sends a token or two elsewhere by rounding alone, so the median over
    the positions decides, by 2e-2.
    """
    wide = no_rounding(network.head.weight, expected)
    got, expected = got.float(), expected.float()
    finite = expected.isfinite()
    largest = max(1.0, expected.where(finite, 0).abs().max().item())
    apart = (got - expected).where(finite, 0).abs().amax(1).nan_to_num(torch.inf)
    return (apart.max() if wide else apart.median()).item() <= (1e-4 if wide else 2e-2) * largest
