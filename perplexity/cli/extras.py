"""Check for the packages beyond torch that a command needs, before its work begins."""

from __future__ import annotations

import importlib.util

from ..errors import InputError


def needs(**extras: tuple[str, ...]) -> None:
    """Check that modules can be imported, without importing them.

    Args:
        extras: Names of modules by the extra of fused-perplexity that installs them.

    Raises:
        InputError: A module is missing; the message names the extras to install.

    Example:
        >>> needs(eval=("json", "no_such_module"))
        Traceback (most recent call last):
        perplexity.errors.InputError: needs no_such_module; install fused-perplexity[eval]
    """
    missing = {
        extra: [name for name in modules if importlib.util.find_spec(name) is None]
        for extra, modules in extras.items()
    }
    names = dict.fromkeys(name for modules in missing.values() for name in modules)
    if names:
        wanted = ",".join(extra for extra, modules in missing.items() if modules)
        raise InputError(f"needs {', '.join(names)}; install fused-perplexity[{wanted}]")
