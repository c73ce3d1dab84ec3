"""Words are compared in Unicode's caseless compatible form, without format characters, tags and
entities.
"""

import random
import sys
import time
import unicodedata

import pytest

from perplexity.text.words import words


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Straße STRASSE Straẞe", "strasse strasse strasse"),
        ("ΟΔΟΣ οδός", "οδοσ οδόσ"),  # a sigma is a sigma wherever it stands; the accent stays
        ("İ", "i\u0307"),  # Unicode's full folding, which knows no language
        ("5 \u212a 3 \u212b", "5 k 3 å"),  # the signs of kelvin and ångström
        ("\ufb01le o\ufb03ce \ufb05op", "file office stop"),
        ("\uff26\uff55\uff4c\uff4c \uff11\uff12", "full 12"),
        ("ᾳ", "αι"),  # the iota below folds to a letter
        ("cafe\u0301 e\u0323\u0302", "café e\u0302\u0323"),
        ("e\u00ad\u0301", "é"),  # composed once the soft hyphen is gone
        (
            "exam\u00adple wo\u200brd \ufeffstart no\u200cn jo\u200din r\u200eight",
            "example word start non join right",
        ),
        ("x\ufe0f y\u034fz \u2060w", "x yz w"),
        (
            "don’t “stop” — no‑one … ‘ever’ donʼt l´été",
            "don't \"stop\" - no-one ... 'ever' don`t l'été",
        ),
        (
            "one&nbsp;two &amp; don&#8217;t &#x201C;stop&rdquo; &amp;amp;lt; caf&eacute;",
            "one two don't stop < café",
        ),
        ("<p class='a b'>one <b>two</b></p>\n<br/>three<td>four", "one two three four"),
        ("super<wbr>cali&shy;fragilistic", "supercalifragilistic"),
        # Cyrillic, Greek
        ("ex\u0430mple s\u0441\u043e\u0440\u0435 \u0422he m\u03bfre", "example scope the more"),
        ("Привет, МИР", "привет мир"),
    ],
)
def test_forms_that_are_the_same_words(text, same):
    assert words(text) == words(same) != []
    assert words(same.upper()) == words(same) or "İ" in text


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("resume", "résumé"),  # diacritics distinguish words
        ("vector<int> x", "vector x"),  # no element of HTML
        ("a < b and c > d", "a d"),
        ("&unknown; x", "x"),
        ("сор", "cop"),  # a word of Cyrillic letters alone is a Cyrillic word
        ("snake_case", "snake case"),
    ],
)
def test_forms_that_are_other_words(text, other):
    assert words(text) != words(other)


def test_every_format_character_is_removed():
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) == "Cf":
            assert words(f"ab{chr(code)}cd") == [b"abcd"], hex(code)


def test_every_letter_folds_as_its_canonical_equivalents_do():
    """NFC, NFD and a second folding make no difference: of each letter of the basic plane."""
    for code in range(0x80, 0xD7FF):
        letter = chr(code)
        if letter.isalpha():
            found = words(f"x {letter} y")
            for form in ("NFC", "NFD"):
                assert words(f"x {unicodedata.normalize(form, letter)} y") == found, hex(code)
            assert words(b" ".join(found).decode()) == found, hex(code)


@pytest.mark.parametrize(
    ("head", "run"),
    [
        ("a", "\u0301\u0316"),  # Python's normalisation sorts such a run in quadratic time
        ("", "\u0301\u0316"),
        ("", "\u0f73\u0344"),  # marks that decompose to two
        ("", "\uff9e\u0316"),  # a mark in its compatible form alone
        ("", "&amp;"),
        ("", "&amp;amp"),
        ("", "<a "),
        ("<a", " x"),
        ("", "</"),
        ("", "\u0430"),
    ],
)
def test_a_hostile_text_takes_linear_time(head, run):
    """A run of 160 kB of alternating marks took minutes.

    Of eight times the text linear time takes 8 times as long, quadratic time 64 times: the two are
    told apart by their middle on a machine of any speed. The shorter text is timed thrice for its
    noise.
    """

    def seconds(count: int) -> float:
        begin = time.process_time()
        words(head + run * count)
        return time.process_time() - begin

    short = max(seconds(5000) for _ in range(3))
    assert seconds(40_000) < 23 * max(short, 1e-3)


def test_a_run_of_marks_is_cut_as_unicode_cuts_it():
    """Canonically equal within 30 marks, and no more than 30 are ever sorted."""
    generator = random.Random(0)
    for count in (1, 5, 30):
        marks = generator.choices("\u0301\u0316\u0327\u0345\u0308", k=count)
        text = "q" + "".join(marks)
        assert (
            words(text)
            == words(unicodedata.normalize("NFD", text))
            == words(unicodedata.normalize("NFC", text))
        )
    (word,) = words("q" + "\u0316" * 100)
    assert word.decode().replace("\u034f", "") == "q" + "\u0316" * 100
