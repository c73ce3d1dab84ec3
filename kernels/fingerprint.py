"""A hash of the device code, written beside what was measured of it or compiled from it, so that drift is seen."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

FILES = (
    "sums.py",
    "dispatch.py",
    "gpu/launch.py",
    "gpu/logit_tile.py",
    "gpu/linear_nll.py",
    "gpu/linear_nll_chunked.py",
    "gpu/linear_statistics.py",
    "gpu/linear_nll_grad.py",
    "gpu/nll.py",
    "gpu/linear_kl.py",
)


def _code(source: str) -> str:
    """Return source without docstrings, comments, imports and blank lines.

    Rewording a comment changes no kernel, and neither does moving a file.
    """
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            part: ast.stmt = node.body[0]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            part = node
        else:
            continue
        left_out.update(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    kept = (line.split("  # ")[0].rstrip() for number, line in lines if number not in left_out)
    return "\n".join(line for line in kept if line and not line.lstrip().startswith("#"))


def kernels_hash() -> str:
    """16 hexadecimal digits of the files with kernels and their launchers."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(_code((Path(__file__).parent / name).read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]
