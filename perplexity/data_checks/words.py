"""A text as the sequence of its words, and those as hashes: what copies are told by, whatever was done to case and spaces.

xxhash (XXH3) for the hashes: the fastest well-kept library that takes one word a call, and the same on every machine, which
Python's own ``hash`` is not. Hashes of neighbouring words are then combined in numpy, a whole batch of documents at once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash

_SPACED = bytes(byte if byte > 127 or chr(byte).isalnum() or byte == ord("_") else ord(" ") for byte in range(256))
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
# Written without spaces (Thai, Lao, Burmese, Khmer, Japanese, Chinese): each character is a word.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_SHORT = 32  # characters beyond ASCII in a row that are worth remembering
_MULTIPLIER = 0x9E3779B97F4A7C15


def _plain(run: str) -> str:
    """Of characters beyond ASCII: letters, marks and digits in their compatible form, spaces for the rest."""
    run = unicodedata.normalize("NFKC", run).lower()
    run = "".join(letter if letter.isalnum() or unicodedata.category(letter)[0] == "M" else " " for letter in run)
    return UNSPACED.sub(r" \g<0> ", run)


_remembered = lru_cache(1 << 16)(_plain)


def _plain_of(found: re.Match) -> str:
    run = found[0]
    return _remembered(run) if len(run) <= _SHORT else _plain(run)


def words(text: str) -> list[bytes]:
    """Words of letters, digits and underscores, in lower case, UTF-8."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = _NOT_ASCII.sub(_plain_of, text)
    return text.lower().encode(errors="replace").translate(_SPACED).split()


def hashes(words: Sequence[bytes]) -> np.ndarray:
    """uint64 [words]."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, words), np.uint64, len(words))


def digest(word_hashes: np.ndarray) -> int:
    """One number for a sequence of words: equal for texts that differ in case, spaces and punctuation alone."""
    return xxhash.xxh3_64_intdigest(word_hashes.tobytes())


def grams(word_hashes: np.ndarray, size: int) -> np.ndarray:
    """Hashes of every ``size`` neighbouring words, uint64 [words − size + 1]: Σ h[i + k] · m^(size − 1 − k) modulo 2⁶⁴.

    By doubling: 13 words are 8, 4 and 1.
    """
    if len(word_hashes) < size:
        return word_hashes[:0]
    found, taken, block, length = None, 0, word_hashes, 1
    while True:
        power = np.uint64(pow(_MULTIPLIER, length, 1 << 64))
        if size & length:
            if found is None:
                found = block
            else:
                count = len(word_hashes) - taken - length + 1
                found = found[:count] * power + block[taken : taken + count]
            taken += length
        if length * 2 > size:
            return found
        block = block[:-length] * power + block[length:]
        length *= 2
