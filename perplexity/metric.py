"""Perplexity as a streaming metric: float64 sums and int64 counts, divided once."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import checks, tensor_checks
from .checks import IGNORE_INDEX
from .errors import InputError, InputTypeError
from .nats import exp


class Perplexity:
    """Streaming metric: exp(Σ NLL / Σ tokens) over all updates, with NLL in nats.

    Sums are divided once, in ``compute``: a mean of batch means would be another number.

    Example:
        >>> import torch
        >>> from perplexity import Perplexity
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor([1.0, 2.0, 3.0]), mask=torch.tensor([True, True, False]))
        >>> metric.compute()["loss"]
        1.5
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set sums and counts to 0.

        Example:
            >>> metric = Perplexity()
            >>> metric.update(torch.tensor([1.0]), mask=True)
            >>> metric.reset()
            >>> metric.compute()["loss"] is None
            True
        """
        self.nll, self.tokens, self.bytes, self.words = 0.0, 0, 0, 0

    def update(
        self,
        token_nll: Tensor,
        *,
        target: Tensor | None = None,
        ignore_index: int | None = IGNORE_INDEX,
        mask: Tensor | bool | None = None,
        bytes: int = 0,
        words: int = 0,
    ) -> None:
        """Add the token NLLs of the scored tokens.

        ``perplexity.token_nll`` gives 0 at ignored labels, so the metric has to know which tokens
        were scored. Pass the same ``target`` as to ``token_nll``. A scored NaN, of a label outside
        the vocabulary for example, makes the loss NaN.

        Args:
            token_nll: Floating tensor of any shape, in nats.
            target: Integer tensor of the same shape. Labels of ``ignore_index`` are left out.
                Default: None.
            ignore_index: Label that is not scored. Default: −100, also for None.
            mask: Tensor of the same shape, bool or integer, nonzero where a token is scored; True
                scores all tokens. A token has to pass ``target`` as well, where both are passed.
                Default: None.
            bytes: Length of the scored text in bytes, for ``bits_per_byte``. Default: 0.
            words: Number of words of the scored text, for ``word_perplexity``. Default: 0.

        Raises:
            InputError: An argument has another type or shape than expected, or a value is exactly 0
                with neither ``target`` nor ``mask``.

        Example:
            >>> metric = Perplexity()
            >>> metric.update(torch.tensor([1.0, 0.0]), target=torch.tensor([7, -100]))
            >>> metric.compute()["loss"]
            1.0
        """
        bytes = checks.integer("bytes", bytes, least=0)
        words = checks.integer("words", words, least=0)
        kept = scored("token_nll", token_nll, target, ignore_index, mask)
        if kept is not None:
            token_nll = token_nll[kept]
        self.nll += float64_sum(token_nll).item()
        self.tokens += token_nll.numel()
        self.bytes += bytes
        self.words += words

    def merge_state(self, others: Iterable[Perplexity]) -> Perplexity:
        """Add the sums and counts of other metrics, in their order.

        After an error nothing is added.

        Args:
            others: Sequence of ``Perplexity`` metrics.

        Returns:
            This metric.

        Raises:
            InputTypeError: ``others`` is no sequence of metrics.

        Example:
            >>> first, second = Perplexity(), Perplexity()
            >>> second.update(torch.tensor([1.0, 2.0]), mask=True)
            >>> first.merge_state([second]).compute()["loss"]
            1.5
        """
        checks.several("others", others, "metrics", (Perplexity,))
        others = list(others)
        for other in others:
            checks.instance("others", other, Perplexity, "Perplexity metrics")
        for other in others:
            self.nll += other.nll
            self.tokens += other.tokens
            self.bytes += other.bytes
            self.words += other.words
        return self

    def sync(self, group=None) -> Perplexity:
        """Sum over the ranks of ``torch.distributed``, in one collective.

        Without a process group nothing is done.

        Args:
            group: Process group. Default: None, all ranks.

        Returns:
            This metric, with the sums of all ranks.

        Example:
            >>> metric = Perplexity()
            >>> metric.update(torch.tensor([1.0]), mask=True)
            >>> metric.sync().compute()["loss"]
            1.0
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
        # Counts are exact in float64 up to 2⁵³.
        state = torch.tensor(
            [self.nll, self.tokens, self.bytes, self.words], dtype=torch.float64, device=device
        )
        torch.distributed.all_reduce(state, group=group)
        self.nll, *counts = state.tolist()
        self.tokens, self.bytes, self.words = map(int, counts)
        return self

    def compute(self) -> dict[str, float | None]:
        """Compute the measures of all updates.

        Returns:
            ``loss`` in nats per token, ``perplexity``, ``bits_per_byte``, ``byte_perplexity`` and
            ``word_perplexity``; None where undefined.
        """

        return measures(self.nll, self.tokens, self.bytes, self.words)

    def state_dict(self) -> dict[str, float | int]:
        """Return sums and counts, for a checkpoint.

        Returns:
            ``nll`` (nats), ``tokens``, ``bytes`` and ``words``.

        Example:
            >>> Perplexity().state_dict()
            {'nll': 0.0, 'tokens': 0, 'bytes': 0, 'words': 0}
        """
        return {"nll": self.nll, "tokens": self.tokens, "bytes": self.bytes, "words": self.words}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Replace sums and counts by those of a ``state_dict``; after an error nothing is replaced.

        Args:
            state: Dict as returned by ``state_dict``.

        Raises:
            InputError: Keys are missing or unknown, or a count is negative.
            InputTypeError: ``state`` is no dict, or a value is no number.

        Example:
            >>> metric = Perplexity()
            >>> metric.load_state_dict({"nll": 6.0, "tokens": 3, "bytes": 12, "words": 2})
            >>> metric.compute()["loss"]
            2.0
        """
        expected = set(self.state_dict())
        checks.mapping("state", state, "a dict of state_dict()")
        if set(state) != expected:
            got = sorted(map(str, state))
            raise InputError(f"state: expected the keys {sorted(expected)}, got {got}")
        nll = checks.measured("state: nll", state["nll"])
        names = ("tokens", "bytes", "words")
        counts = [checks.integer(f"state: {name}", state[name], least=0) for name in names]
        self.nll = nll
        self.tokens, self.bytes, self.words = counts


def measures(
    nll: float, tokens: int, bytes: int | None = None, words: int | None = None
) -> dict[str, float | None]:
    """Return loss, perplexity and the measures per byte and word, each divided once.

    Args:
        nll: Sum over the scored tokens, in nats.
        tokens: Number of scored tokens.
        bytes: Bytes of the scored text. Default: None; None or 0 is unknown.
        words: Words of the scored text. Default: None; None or 0 is unknown.

    Returns:
        ``loss`` in nats per token, ``perplexity``, ``bits_per_byte``, ``byte_perplexity`` and
        ``word_perplexity``; None where undefined.

    Example:
        >>> measures(6.0, tokens=3, bytes=12)["loss"]
        2.0
    """

    def per(count: int | None) -> float | None:
        return nll / count if count else None

    by_byte = per(bytes)
    return {
        "loss": per(tokens),
        "perplexity": exp(per(tokens)),
        "bits_per_byte": None if by_byte is None else by_byte / math.log(2),
        "byte_perplexity": exp(by_byte),
        "word_perplexity": exp(per(words)),
    }


def scored(
    name: str,
    nll: Tensor,
    target: Tensor | None,
    ignore_index: int | None,
    mask: Tensor | bool | None,
) -> Tensor | None:
    """Return which values of ``nll`` are of scored tokens: bool in their shape, or None for all.

    ``name`` is the argument that messages name. Raises InputError as ``Perplexity.update`` does.
    """
    if not isinstance(nll, Tensor) or not nll.is_floating_point():
        raise InputTypeError(f"{name}: expected a floating tensor, got {_kind(nll)}")
    tensor_checks.floating(name, nll)
    if nll.is_meta:
        raise InputError(f"{name}: expected a tensor with values, got one on the meta device")
    ignored = checks.ignored_label(ignore_index)
    if target is None and mask is None:
        if (nll == 0).any():
            raise InputError(
                f"{name}: expected target= or mask= with values of exactly 0, which ignored labels "
                "have; mask=True says that all tokens were scored"
            )
        return None
    selected = None
    if target is not None:
        _check_labels("target", "int64 labels", target, name, nll)
        selected = (target != ignored).to(nll.device)
    if mask is not None and mask is not True:
        passed = (
            _check_labels("mask", "True or a bool tensor", mask, name, nll, bools=True).to(
                nll.device
            )
            != 0
        )
        selected = passed if selected is None else selected & passed
    return selected


def _check_labels(
    argument: str,
    expected: str,
    got: object,
    name: str,
    nll: Tensor,
    *,
    bools: bool = False,
) -> Tensor:
    """Return the labels or the mask ``got``; raise unless they have the shape of ``nll``."""
    # A floating mask may be an additive one, where 0 keeps a token.
    if (
        not isinstance(got, Tensor)
        or got.is_floating_point()
        or got.is_complex()
        or (got.dtype is torch.bool and not bools)
    ):
        raise InputTypeError(f"{argument}: expected {expected}, got {_kind(got)}")
    tensor_checks.dense(argument, got)
    if got.shape != nll.shape:
        shape = f"the shape of {name}, {tuple(nll.shape)}"
        raise InputError(f"{argument}: expected {shape}, got {tuple(got.shape)}")
    return got


def _kind(value: object) -> str:
    """Return a tensor's dtype, or the beginning of another value's repr, for a message."""
    return str(value.dtype) if isinstance(value, Tensor) else " ".join(repr(value).split())[:40]


@functools.cache
def has_float64(device_type: str) -> bool:
    """Return whether tensors on this kind of device can be float64; Apple's MPS has none."""
    try:
        torch.zeros((), dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError):
        return False
    return True


def float64_sum(values: Tensor) -> Tensor:
    """Return the sum of ``values`` in float64, on the CPU where their device has no float64."""
    values = values.detach()
    return (values if has_float64(values.device.type) else values.cpu()).sum(dtype=torch.float64)
