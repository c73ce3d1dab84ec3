"""``--json OUT``, of every command that has it: a file, or ``-`` for standard output.

With ``-`` standard output holds the JSON and nothing else: tables and notes go to standard error.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..files import write_text
from . import tables

if TYPE_CHECKING:
    from ..terminal import Console

STANDARD_OUTPUT = "-"
TO_STANDARD_OUTPUT = "; - is standard output"  # the end of each help text
JSON_HELP = f"write every number to this file{TO_STANDARD_OUTPUT}"


def json_file(out: str | None) -> dict[str, str | None]:
    """Return the file of ``--json`` for ``check_outputs``; of standard output, None."""
    return {"--json": None if out == STANDARD_OUTPUT else out}


def write_json(out: str | None, text: str) -> None:
    """Write JSON to the file of ``--json``, or to standard output; without the option, nowhere."""
    if out == STANDARD_OUTPUT:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    elif out:
        write_text(out, text + "\n", "--json")


def console_beside(out: str | None) -> Console:
    """Return the console for tables and notes, which leaves standard output to ``--json -``."""
    return tables.console(errors=out == STANDARD_OUTPUT)
