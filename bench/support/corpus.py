"""Real disjoint text, and what is done to a copy before it is put into the other."""

import glob
import os
import random
import re
from functools import cache

WORDS = (
    "amber",
    "brook",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "joint",
    "knoll",
    "ledge",
)


@cache
def topics() -> list[str]:
    """CPython's documentation, but for the debugger's, which the source of pdb has word for
    word.
    """
    from pydoc_data import topics

    return [text for name, text in topics.topics.items() if name != "debugger"]


@cache
def documentation() -> list[str]:
    """Its paragraphs of 20 words or more."""
    found = (
        part for text in topics() for part in re.split(r"\n\s*\n", text) if len(part.split()) >= 20
    )
    return list(dict.fromkeys(found))


@cache
def sources() -> list[str]:
    """The standard library's sources without pydoc_data."""
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
    """One word in ten another."""
    words = text.split()
    for place in generator.sample(range(len(words)), max(1, len(words) // 10)):
        words[place] = generator.choice(WORDS)
    return " ".join(words)


def inside(text: str, generator: random.Random) -> str:
    """A paragraph of a longer document."""
    around = generator.choice(sources())
    middle = around.find("\n", len(around) // 2) + 1
    return f"{around[:middle]}\n\n{text}\n\n{around[middle:]}"


KINDS = {"exact": exact, "respaced": respaced, "changed": changed, "inside": inside}
