"""Measures beyond perplexity: of generated texts, and of a judge's answers about texts.

``probe`` generates texts and measures them, ``Questioner`` asks a model yes or no about texts.
"""

import importlib

from ..errors import needing

# Each module is imported when one of its names is first used: a report of probes needs no model.
_HOME = {
    "ask": ("Answer", "Questioner"),
    "prober": ("Probe", "probe"),
    "prompts": ("Prompt", "read_prompts"),
    "scores": ("Checkpoint", "Health", "Part", "Scorer", "health"),
    "settings": ("GenerationSettings",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing(f"{__name__}.{name}", "probe"):
        return getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
