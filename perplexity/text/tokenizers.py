"""Tokenizers of any library, in the shape of a transformers tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from .. import checks
from ..errors import InputTypeError, theirs

NEEDED = ("bos_token_id", "eos_token_id", "decode", "__len__", "__call__")
EXPECTED = (
    "a transformers tokenizer, a tokenizers.Tokenizer, a tiktoken Encoding, a sentencepiece "
    "processor, or an object with encode, decode and vocabulary_size"
)


class Tokenizer(Protocol):
    """A tokenizer of one's own: what ``evaluate``, ``check_data`` and ``probe`` need of it.

    Optional attributes are ``bos_token_id`` and ``eos_token_id`` (int or None), and
    ``fingerprint``, a string that tells two tokenizers apart. Without a fingerprint, the class and
    what every id decodes to stand for the tokenizer.

    Bytes are exact where the decoded tokens of a text, one by one, are the text; else they are an
    estimate, and a note says so.

    Attributes:
        vocabulary_size: Number of ids.

    Example:
        >>> class Characters:
        ...     letters = "abc "
        ...     vocabulary_size = 4
        ...     def encode(self, text):
        ...         return [self.letters.index(letter) for letter in text]
        ...     def decode(self, ids):
        ...         return "".join(self.letters[i] for i in ids)
        >>> as_tokenizer(Characters())(["a cab"])["input_ids"]
        [[0, 3, 2, 0, 1]]
    """

    vocabulary_size: int

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of a text, without BOS and EOS."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids."""
        ...


def as_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer of any library in the shape of a transformers tokenizer.

    Args:
        tokenizer: A transformers tokenizer, which is returned as it is; a ``tokenizers.Tokenizer``;
            a tiktoken ``Encoding``; a sentencepiece processor; or a ``Tokenizer``.

    Raises:
        InputTypeError: The object is none of these.
    """
    if all(hasattr(tokenizer, name) for name in NEEDED):
        return tokenizer
    if all(hasattr(tokenizer, name) for name in ("to_str", "encode_batch", "token_to_id")):
        return _of_tokenizers(tokenizer)
    if all(hasattr(tokenizer, name) for name in ("encode_ordinary", "decode_bytes", "n_vocab")):
        return AdaptedTokenizer(tokenizer, **_of_tiktoken(tokenizer))
    if all(hasattr(tokenizer, name) for name in ("get_piece_size", "unk_id", "bos_id")):
        return AdaptedTokenizer(tokenizer, **_of_sentencepiece(tokenizer))
    if not all(callable(getattr(tokenizer, name, None)) for name in ("encode", "decode")):
        raise checks.wrong("tokenizer", EXPECTED, type(tokenizer).__name__, InputTypeError)
    size = getattr(tokenizer, "vocabulary_size", getattr(tokenizer, "vocab_size", None))
    return AdaptedTokenizer(
        tokenizer,
        size=checks.integer("tokenizer.vocabulary_size", size, "a number of ids", 1),
        bos=getattr(tokenizer, "bos_token_id", None),
        eos=getattr(tokenizer, "eos_token_id", None),
        fingerprint=getattr(tokenizer, "fingerprint", None),
    )


class AdaptedTokenizer:
    """A tokenizer with the parts of a transformers tokenizer that scoring uses.

    Args:
        tokenizer: An object with ``encode`` and ``decode``.
        size: Number of ids.
        bos: Id of BOS, or None.
        eos: Id of EOS, or None.
        unknown: Id that stands for unknown text, or None.
        special: Ids of special tokens by their spelling.
        encode: Function of a text, and of whether special tokens spelled in it are read as text.
            Default: ``tokenizer.encode`` of the text.
        piece: Function of an id that returns its bytes. Default: what the id decodes to.
        offsets: Function of a text that returns which characters [begin, end) each token covers.
            Default: by the bytes of its tokens.
        fingerprint: What tells tokenizers apart. Default: the class and the bytes of every id.
    """

    is_fast = True  # offsets are known wherever the tokens' texts are the text
    chat_template = model_max_length = pad_token_id = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        size: int,
        bos: int | None = None,
        eos: int | None = None,
        unknown: int | None = None,
        special: dict[str, int] | None = None,
        encode: Callable[[str, bool], Iterable[int]] | None = None,
        piece: Callable[[int], bytes] | None = None,
        offsets: Callable[[str], list[tuple[int, int]]] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.bos_token_id, self.eos_token_id, self.unk_token_id = bos, eos, unknown
        self.special_tokens_map = special or {}
        self._encode = encode or (lambda text, as_text: tokenizer.encode(text))
        self._own_piece = piece or (lambda token: tokenizer.decode([token]).encode())
        self._own_offsets, self._own_fingerprint = offsets, fingerprint
        self._pieces: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Return the number of ids."""
        return self.size

    def __call__(
        self, text: str | list[str], *, split_special_tokens: bool = False, **options: Any
    ) -> dict:
        """Return the ids of a text, or of each of several, and which characters they cover."""
        texts = [text] if isinstance(text, str) else text
        ids = [[int(i) for i in self._encode(each, split_special_tokens)] for each in texts]
        if isinstance(text, str):
            return {"input_ids": ids[0]}
        encoding = _Encodings(input_ids=ids)
        encoding.encodings = [
            self._encoding(each, tokens) for each, tokens in zip(texts, ids, strict=True)
        ]
        return encoding

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **options: Any) -> str:
        """Return the text of some ids."""
        special = set(self.all_special_ids) if skip_special_tokens else ()
        return self.tokenizer.decode([token for token in ids if token not in special])

    def convert_ids_to_tokens(self, token: int) -> str:
        """Return what an id stands for."""
        return self._piece(token).decode(errors="replace")

    @property
    def unk_token(self) -> str | None:
        """Return what the unknown token stands for; None without one."""
        unknown = self.unk_token_id
        return None if unknown is None else self.convert_ids_to_tokens(unknown)

    @property
    def all_special_ids(self) -> list[int]:
        """Return the ids of BOS, EOS and further special tokens."""
        known = {self.bos_token_id, self.eos_token_id, *self.special_tokens_map.values()}
        return sorted(token for token in known if token is not None)

    @property
    def all_special_tokens(self) -> list[str]:
        """Return the spellings of special tokens."""
        return [*self.special_tokens_map]

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the tokenizer, or what the tokenizer itself gives."""
        if self._own_fingerprint is not None:
            return str(self._own_fingerprint)
        whole = hashlib.sha256(type(self.tokenizer).__name__.encode())
        with theirs("tokenizer: expected one that decodes each of its ids, got one that fails"):
            for token in range(self.size):
                whole.update(repr(self._piece(token)).encode())
        return whole.hexdigest()

    def _piece(self, token: int) -> bytes:
        if token not in self._pieces:
            self._pieces[token] = self._own_piece(token)
        return self._pieces[token]

    def _encoding(self, text: str, ids: list[int]) -> _Encoding | None:
        """Return which characters each token covers; None where that is not known."""
        if self._own_offsets is not None:
            return _Encoding(self._own_offsets(text))
        pieces, raw = [self._piece(token) for token in ids], text.encode()
        if b"".join(pieces) != raw:
            return None
        # The number of characters that begin before each byte, and before the end.
        leads = (np.frombuffer(raw, np.uint8) & 0xC0) != 0x80
        before = np.concatenate([[0], np.cumsum(leads)])
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        begins = ends - [len(piece) for piece in pieces]
        # A token that begins within a character covers that character.
        inside = np.append(leads, True)[begins] == 0
        first = before[begins] - inside
        return _Encoding(list(zip(first.tolist(), before[ends].tolist(), strict=True)))


class _Encoding:
    """The characters that each token of a text covers."""

    def __init__(self, offsets: list[tuple[int, int]]) -> None:
        self.offsets = offsets


class _Encodings(dict):
    """The ids of texts, with the encoding of each."""

    encodings: list[_Encoding | None]


def _of_tokenizers(tokenizer: Any) -> Any:
    """Return a transformers tokenizer around one of the tokenizers library.

    BOS is the special token that its post-processor puts first, EOS the one that it puts last.
    """
    from transformers import PreTrainedTokenizerFast

    with theirs("tokenizer: expected one that takes every Unicode text, got one that fails"):
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        ids = tokenizer.encode("a").ids
    around = {}
    if len(ids) > len(plain):
        if ids[0] != (plain or [None])[0]:
            around["bos_token"] = tokenizer.id_to_token(ids[0])
        if ids[-1] != (plain or [None])[-1]:
            around["eos_token"] = tokenizer.id_to_token(ids[-1])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **around)


def _of_tiktoken(encoding: Any) -> dict[str, Any]:
    """Return the arguments of ``AdaptedTokenizer`` for a tiktoken Encoding."""
    special = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}

    def encode(text: str, as_text: bool) -> list[int]:
        return (
            encoding.encode_ordinary(text)
            if as_text
            else encoding.encode(text, allowed_special="all")
        )

    parts = [getattr(encoding, name, None) for name in ("_pat_str", "_mergeable_ranks")]
    state = repr((encoding.name, encoding.n_vocab, sorted(special.items()), parts))
    return dict(
        size=encoding.n_vocab,
        eos=special.get("<|endoftext|>"),
        special=special,
        encode=encode,
        piece=lambda token: encoding.decode_bytes([token]),
        fingerprint=hashlib.sha256(state.encode()).hexdigest(),
    )


def _of_sentencepiece(processor: Any) -> dict[str, Any]:
    """Return the arguments of ``AdaptedTokenizer`` for a sentencepiece processor."""
    ids = [processor.bos_id(), processor.eos_id(), processor.unk_id()]
    bos, eos, unknown = (None if token < 0 else token for token in ids)

    def offsets(text: str) -> list[tuple[int, int]]:
        try:
            pieces = processor.encode(text, return_type="proto").pieces
        except TypeError:  # before sentencepiece 0.2.2
            pieces = processor.encode(text, out_type="immutable_proto").pieces
        # Their places are bytes or characters, by the version; their surfaces are in order.
        covered, place = [], 0
        for piece in pieces:
            begin = max(place, text.find(piece.surface, place))
            place = begin + len(piece.surface)
            covered.append((begin, place))
        return covered

    return dict(
        size=processor.get_piece_size(),
        bos=bos,
        eos=eos,
        unknown=unknown,
        special={processor.id_to_piece(token): token for token in (bos, eos) if token is not None},
        encode=lambda text, as_text: processor.encode(text, out_type=int),
        piece=lambda token: processor.id_to_piece(token).encode(),
        offsets=offsets,
        fingerprint=hashlib.sha256(processor.serialized_model_proto()).hexdigest(),
    )
