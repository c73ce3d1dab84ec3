"""Hashes that identify a tokenizer, a text and a model's tensors.

Evaluations with equal hashes are of the same tokenizer, text or model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def tokenizer_fingerprint(tokenizer) -> str:
    """Return a hash of all that decides tokens: vocabulary, merges, normaliser, special tokens.

    Padding, truncation and the tokens put around a text are settings of a call and left out. A
    tokenizer of another library has its own ``fingerprint``.
    """
    own = getattr(tokenizer, "fingerprint", None)
    if isinstance(own, str):
        return hashlib.sha256(own.encode()).hexdigest()[:16]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state = json.dumps(
            {k: v for k, v in state.items() if k not in ("padding", "truncation", "post_processor")}
        )
    else:
        merges = sorted(getattr(tokenizer, "bpe_ranks", {}).items())
        settings = {
            k: v
            for k, v in getattr(tokenizer, "init_kwargs", {}).items()
            if isinstance(v, bool)
            and k not in ("is_local", "local_files_only", "trust_remote_code", "use_fast")
        }
        state = repr(
            (
                type(tokenizer).__name__,
                sorted(tokenizer.get_vocab().items()),
                merges,
                sorted(settings.items()),
            )
        )
    special = sorted(
        pair for pair in dict(tokenizer.special_tokens_map).items() if pair[0] != "pad_token"
    )
    return hashlib.sha256((state + repr(special)).encode()).hexdigest()[:16]


class TextFingerprint:
    """Hash of a sequence of documents' texts, and of the parts of them that are scored."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, text: str, spans: Sequence[tuple[int, int]] | None = None) -> str:
        """Add a document's text; return the hash of this text alone.

        ``spans`` are the scored parts, None for the whole text: equal texts with other parts
        differ.
        """
        alone = hashlib.sha256(text.encode())
        if spans is not None:
            alone = hashlib.sha256(alone.digest() + repr([*spans]).encode())
        self._sha256.update(alone.digest())
        return alone.hexdigest()[:16]

    def value(self) -> str:
        """Return the hash of all documents so far."""
        return self._sha256.hexdigest()[:16]


# Bytes hashed at a time: few enough that threads share a matrix, enough that their start costs
# nothing.
PIECE = 4 << 20


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of every bit of ``named`` tensors, with their names, shapes and dtypes.

    SHA-256 of each tensor's pieces, and of all of these hashes in order: pieces are hashed in
    torch's number of threads. It takes 0.8 s of processor time a GB where the processor has SHA
    instructions. Tensors on the meta device have no values: shape and dtype stand for them.
    """
    whole = hashlib.sha256()
    # Holds the tensors: the memory of one made for this walk must not be reused by the next.
    known: dict[tuple, tuple[Tensor, list[bytes]]] = {}
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for name, tensor in _plain(named):
            tensor = tensor.detach()
            header = (name, tuple(tensor.shape), str(tensor.dtype))
            # Tied weights have two names and are hashed once.
            place = (tensor.data_ptr(), tensor.device, tensor.stride(), *header[1:])
            if tensor.is_meta:
                pieces = [b"meta"]
            elif place in known and tensor.numel():
                _, pieces = known[place]
            else:
                parts = _pieces(tensor)
                pieces = list((pool.map if len(parts) > 1 else map)(_piece_digest, parts))
                known[place] = tensor, pieces
            whole.update(repr(header).encode())
            whole.update(b"".join(pieces))
    return whole.hexdigest()


def _plain(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield ``named`` tensors, each quantised one as the plain tensors that it consists of."""
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            continue
        # bitsandbytes keeps a quantised weight's scales as its attribute, in no module's state.
        scales = getattr(getattr(tensor, "quant_state", None), "as_dict", None)
        if scales is not None:
            yield from _plain((f"{name}.{part}", value) for part, value in sorted(scales().items()))
        if hasattr(tensor, "__tensor_flatten__"):
            parts = tensor.__tensor_flatten__()[0]
            yield from _plain((f"{name}.{part}", getattr(tensor, part)) for part in parts)
        else:
            yield (
                (f"{name} {tensor.dtype}", tensor.dequantize())
                if tensor.is_quantized
                else (name, tensor)
            )


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return a tensor's bytes in pieces of ``PIECE`` bytes."""
    # Copies only where the memory is not contiguous.
    return tensor.contiguous().reshape(-1).view(torch.uint8).split(PIECE) if tensor.numel() else ()


def _piece_digest(piece: Tensor) -> bytes:
    """Return the SHA-256 of a piece."""
    return hashlib.sha256(piece.cpu().numpy().data).digest()
