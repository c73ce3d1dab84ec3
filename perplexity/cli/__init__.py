"""``ppl``: a file a command (its options, what it does, its tables) over one parser.

Bad input is one line on stderr and exit status 2; a bug of ours is a traceback and exit status 3. A
module of a command has ``Options``, a dataclass (``options.py``), and ``run``, which takes one.
None imports torch or an extra before it runs.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from types import ModuleType

from .. import __version__
from ..errors import InputError, out_of_memory, visible
from .options import add_options, parsed

COMMANDS = ("eval", "compare", "check-data", "probe", "ask", "monitor", "report", "demo", "doctor")
# What a full or broken disk, or a terminal that is gone, answers to a write.
NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {visible(message)} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="ppl",
        description="Perplexity: evaluate, watch and explain language models.",
        epilog="Exit status: 0 done; 1 a finding (--fail-on) or a loss that is not finite; 2 bad input, in one line; "
        "3 a bug of ours, with its traceback; 130 interrupted; 141 the output's reader has gone.",
    )
    parser.add_argument("--version", action="version", version=f"ppl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
        help = module.Options.__doc__
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        add_options(command, module.Options)
        command.set_defaults(module=module)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command that ``argv``, else the process's own arguments, names and return its exit
    status.
    """
    arguments = _parser().parse_args(argv)
    # A terminal that cannot show a character shows another, and nothing is lost.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    module = arguments.module
    try:
        status = module.run(parsed(module.Options, arguments))
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is met here, not at the interpreter's end
        return status
    except BrokenPipeError:  # the reader, head say, has seen enough
        _drop_output()
        return 141
    except SystemExit as error:
        # rich's own answer to it is status 1, a finding's
        if isinstance(error.__context__, BrokenPipeError):
            return 141
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = _bad_input(error, module)
        if line is not None:
            print(f"ppl {arguments.command}: {visible(' '.join(line.split()))}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(
            f"ppl {arguments.command}: this is a bug in fused-perplexity, not in your input; please report it with the "
            "traceback above",
            file=sys.stderr,
        )
        return 3


def _bad_input(error: Exception, module: ModuleType) -> str | None:
    """Return what to tell of an error that the user can mend, None of a bug."""
    if isinstance(error, InputError) or (isinstance(error, OSError) and error.filename is not None):
        return str(error)
    if out_of_memory(error):
        return f"out of memory; lower {getattr(module, 'LOWER', 'the size of the input')}"
    if isinstance(error, OSError) and error.errno in NO_MORE:
        # Files are written under their names: what is left is the terminal, or where it is
        # redirected to.
        _drop_output()
        return f"standard output cannot be written ({error.strerror})"
    return None


def _drop_output() -> None:
    """Send what standard output still holds nowhere: the interpreter would try it again at its
    end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
