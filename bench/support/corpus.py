"""Real disjoint texts, and the kinds of copies that are planted in one of them."""

import glob
import os
import random
import re
from functools import cache

WORDS = (
    *("amber", "brook", "cedar", "delta", "ember", "fjord"),
    *("grove", "heath", "inlet", "joint", "knoll", "ledge"),
)


@cache
def topics() -> list[str]:
    """Return CPython's documentation, without the topic that pdb's source has word for word."""
    from pydoc_data import topics

    return [text for name, text in topics.topics.items() if name != "debugger"]


@cache
def documentation() -> list[str]:
    """Return the documentation's paragraphs of 20 words or more."""
    paragraphs = (
        part for text in topics() for part in re.split(r"\n\s*\n", text) if len(part.split()) >= 20
    )
    return list(dict.fromkeys(paragraphs))


@cache
def sources() -> list[str]:
    """Return the standard library's sources without pydoc_data."""
    root = os.path.dirname(os.__file__)
    paths = [
        path
        for path in sorted(glob.glob(f"{root}/**/*.py", recursive=True))
        if "pydoc_data" not in path
    ]
    return [
        open(path, errors="replace").read()
        for path in paths
        if not re.search(r"site-packages|/tests?/", path)
    ]


def exact(text: str, _: random.Random) -> str:
    return text


def respaced(text: str, generator: random.Random) -> str:
    words = (generator.choice((str.upper, str.lower, str.title))(word) for word in text.split())
    return "".join(word + generator.choice((" ", "\n", "\t ", "  \n\n ")) for word in words)


def changed(text: str, generator: random.Random) -> str:
    """Return a text with one word in ten replaced."""
    words = text.split()
    for place in generator.sample(range(len(words)), max(1, len(words) // 10)):
        words[place] = generator.choice(WORDS)
    return " ".join(words)


def inside(text: str, generator: random.Random) -> str:
    """Return a longer document with the text as one of its paragraphs."""
    around = generator.choice(sources())
    middle = around.find("\n", len(around) // 2) + 1
    return f"{around[:middle]}\n\n{text}\n\n{around[middle:]}"


KINDS = {"exact": exact, "respaced": respaced, "changed": changed, "inside": inside}
