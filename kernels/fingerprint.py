"""A hash of the device code, written beside what was measured of it or compiled from it, so that drift is seen."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

FILES = (
    "launch.py",
    "logit_tile.py",
    "linear_nll.py",
    "linear_nll_chunked.py",
    "linear_statistics.py",
    "linear_nll_grad.py",
    "nll.py",
    "linear_kl.py",
)


def _code(source: str) -> str:
    """Source without docstrings, comment lines and blank lines: rewording a comment changes no kernel."""
    documentation = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            documentation.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    kept = (line.split("  # ")[0].rstrip() for number, line in lines if number not in documentation)
    return "\n".join(line for line in kept if line and not line.lstrip().startswith("#"))


def kernels_hash() -> str:
    """16 hexadecimal digits of the files with kernels and their launchers."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(_code((Path(__file__).parent / name).read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]
