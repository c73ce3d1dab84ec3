"""Numbers with their nouns and verbs, for messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not 1.

    >>> counted(1, "document"), counted(2_000, "validation loss")
    ('1 document', '2,000 validation losses')
    """
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def by_number(number: int, one: str, several: str) -> str:
    """Return ``one`` of a single thing, else ``several``.

    >>> by_number(1, "is", "are")
    'is'
    """
    return one if number == 1 else several
