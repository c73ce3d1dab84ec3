"""Normalised words of a text and their hashes, so that copies in another form compare equal.

A word is normalised as Unicode matches compatible characters without regard to case:
NFKC(casefold(NFKC(casefold(NFD)))), with format characters and other default-ignorable code points
removed. HTML's tags and entities are resolved before that.

Hashes are xxhash's (XXH3), the fastest well-kept library that takes one word a call. They are the
same on every machine, unlike those of Python's ``hash``. Hashes of neighbouring words are combined
in numpy, a whole batch of documents at once.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash

# Table for ASCII: upper case becomes lower case; all but letters, digits and underscores become
# spaces.
_SPACED = bytes(
    byte
    if byte > 127
    else ord(chr(byte).lower())
    if chr(byte).isalnum() or byte == ord("_")
    else ord(" ")
    for byte in range(256)
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
# Scripts without spaces (Thai, Lao, Burmese, Khmer, Japanese, Chinese): each character is a word.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
# Category Cf (soft hyphen, joiners, zero-width space, byte order mark, direction marks) and
# Default_Ignorable_Code_Point.
_IGNORED = re.compile(
    "[\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
# Letters in Unicode, but typed as quotation marks.
_APOSTROPHES = re.compile("[\u02b9-\u02bf\u02ee]")
# Text that was escaped more than once repeats "amp;". Every repetition is bounded, for linear time.
_ENTITY = re.compile(
    r"&(?:amp;){0,9}(#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});"
)
_ELEMENTS = (
    "a abbr address article aside b big blockquote body br button caption center cite code "
    "col colgroup dd del details div dl dt em figcaption figure font footer form h[1-6] head "
    "header hr html i iframe img input ins kbd label li link main mark meta nav ol optgroup "
    "option p picture pre q s samp section select small source span strike strong sub summary "
    "sup svg table tbody td textarea tfoot th thead time title tr tt u ul var video wbr"
)
_TAG = re.compile(rf"</?(?:{_ELEMENTS.replace(' ', '|')})(?:[\s/][^<>]{{0,1000}})?>", re.IGNORECASE)
# Cyrillic and Greek letters that look like Latin ones, in lower or in upper case. They are read as
# Latin only next to Latin letters.
_LOOKALIKES = str.maketrans("авеіјкмнорсѕтухһԁԛԝαβεζηικνορτυχ", "abeijkmhopcstyxhdqwabezhikvoptux")
_LOOKALIKE = re.compile(f"[{''.join(map(chr, _LOOKALIKES))}]+")
# Non-starters in a row, as in Unicode's stream-safe text format (UAX #15): sorting more of them
# takes quadratic time.
_MARKS = 30
_LONG = re.compile(rf"[^\x00-\x7f]{{{_MARKS + 1},}}")
_TOO_MANY = re.compile(rb"[^\x00]{%d}(?=[^\x00])" % _MARKS)
_JOINER = "\u034f"  # the combining grapheme joiner, a starter: marks are not sorted across it
_SHORT = 32  # longest run of characters beyond ASCII that is cached
_MULTIPLIER = 0x9E3779B97F4A7C15


def _plain(run: str) -> tuple[str, str]:
    """Normalise characters beyond ASCII: letters, marks and digits stay, the rest becomes spaces.

    Returns the run as it is read by itself, and as it is read next to a Latin letter.
    """
    run = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", run).casefold())
    run = _APOSTROPHES.sub(" ", unicodedata.normalize("NFKC", run.casefold()))
    kept: list[str] = []
    for letter in run:
        if not (letter.isalnum() or letter == "_"):
            # NFKC turns a spacing accent, typed as a quotation mark, into a mark on a space.
            mark = unicodedata.category(letter)[0] == "M" and kept[-1:] != [" "]
            letter = letter if mark else " "
        kept.append(letter)
    plain = "".join(kept)
    if _LOOKALIKE.fullmatch(plain):
        return plain, plain.translate(_LOOKALIKES)
    plain = UNSPACED.sub(r" \g<0> ", plain)
    return plain, plain


_cached_plain = lru_cache(1 << 16)(_plain)


def _plain_of(match: re.Match) -> str:
    """Return the normalised text of a match, which depends on its neighbours."""
    run = match[0]
    plain, latin = _cached_plain(run) if len(run) <= _SHORT else _plain(run)
    if plain is latin:
        return plain
    start, end, text = match.start(), match.end(), match.string
    return (
        latin
        if text[max(0, start - 1) : start].isalpha() or text[end : end + 1].isalpha()
        else plain
    )


class _Classes(dict):
    """Combining classes of the first character of each decomposition, by letter.

    Some characters of class 0 decompose to marks alone.
    """

    def __missing__(self, letter: str) -> int:
        self[letter] = combining = unicodedata.combining(unicodedata.normalize("NFKD", letter)[0])
        return combining


_classes = _Classes()


def _stream_safe(match: re.Match) -> str:
    """Put a joiner after every 30 non-starters in a row."""
    run = match[0]
    ends = [part.end() for part in _TOO_MANY.finditer(bytes(map(_classes.__getitem__, run)))]
    pieces = zip([0, *ends], [*ends, len(run)], strict=True)
    return _JOINER.join(run[start:end] for start, end in pieces) if ends else run


def _entity(match: re.Match) -> str:
    """Return the character of an HTML entity; an unknown name stays."""
    text = html.unescape(f"&{match[1]};")
    return match[0] if text.endswith(";") and len(text) > 1 else text  # an unknown name stays


def words(text: str) -> list[bytes]:
    """Return the words of letters, marks, digits and underscores, normalised, as UTF-8.

    Args:
        text: Any text; the time is linear in its length.

    Returns:
        List of words.

    Example:
        >>> words("Stra\u00dfe &amp; <b>of\u00adfice</b>") == words("STRASSE office")
        True
    """
    if "<" in text:
        text = _TAG.sub(lambda tag: "" if tag[0][:4].lower() == "<wbr" else " ", text)
    if "&" in text:
        text = _ENTITY.sub(_entity, text)
    if not text.isascii():
        text = _LONG.sub(_stream_safe, _IGNORED.sub("", text))
        text = _NOT_ASCII.sub(_plain_of, unicodedata.normalize("NFC", text))
    return text.encode(errors="replace").translate(_SPACED).split()


def hashes(words: Sequence[bytes]) -> np.ndarray:
    """Return the hash of each word, uint64 [words]."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, words), np.uint64, len(words))


def digest(word_hashes: np.ndarray) -> int:
    """Return one hash of a sequence of words.

    It is equal for texts that differ in case, spaces and punctuation alone.
    """
    return xxhash.xxh3_64_intdigest(word_hashes.tobytes())


def grams(word_hashes: np.ndarray, size: int) -> np.ndarray:
    """Return the hashes of every ``size`` neighbouring words, uint64 [words − size + 1].

    A hash is Σ h[i + k] · m^(size − 1 − k) modulo 2⁶⁴. They are computed by doubling: 13 words are
    8, 4 and 1.
    """
    if len(word_hashes) < size:
        return word_hashes[:0]
    combined, taken, block, length = word_hashes, 0, word_hashes, 1
    while True:
        power = np.uint64(pow(_MULTIPLIER, length, 1 << 64))
        if size & length:
            if not taken:
                combined = block
            else:
                count = len(word_hashes) - taken - length + 1
                combined = combined[:count] * power + block[taken : taken + count]
            taken += length
        if length * 2 > size:
            return combined
        block = block[:-length] * power + block[length:]
        length *= 2
