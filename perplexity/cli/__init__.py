"""``ppl``: one parser over the commands, each of which has a file with options, work and tables.

The module of a command has ``Options``, a dataclass (``options.py``), and ``run``, which takes one
and returns the exit status. ``parts.py`` declares the options that several commands share. No
module imports torch or an extra before its command runs.

Bad input is reported in one line on stderr, with exit status 2. A bug of this project is a
traceback and exit status 3.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import textwrap
import traceback
from types import ModuleType

from .. import __version__
from ..errors import InputError, out_of_memory, visible
from .options import add_options, parsed

# Commands by task, each with an example.
TASKS = {
    "Evaluate": {
        "eval": "ppl eval gpt2 validation.jsonl --json a.json",
        "compare": "ppl compare a.json b.json",
    },
    "Train": {
        "check-data": "ppl check-data --train train.jsonl --valid validation.jsonl",
        "monitor": "ppl monitor run.jsonl --follow",
        "report": "ppl report run.jsonl -o report.html",
    },
    "Generate": {
        "probe": "ppl probe gpt2 prompts.jsonl",
        "ask": "ppl ask gpt2 texts.jsonl --template question.txt",
    },
    "Begin": {
        "demo": "ppl demo --out demo-out",
        "doctor": "ppl doctor",
    },
}
COMMANDS = tuple(name for commands in TASKS.values() for name in commands)
WIDTH = 80  # columns of the help
# Errors of a write to a full or broken disk, or to a terminal that has gone.
NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {visible(message)} (see {self.prog} --help)\n")


def _parser(asked: str | None) -> argparse.ArgumentParser:
    """Return the parser, with the options of the command that is asked for."""
    modules = {
        name: importlib.import_module(f".{name.replace('-', '_')}", __name__) for name in COMMANDS
    }
    about = {name: module.Options.__doc__ for name, module in modules.items()}
    parser = _OneLineParser(
        prog="ppl",
        usage="ppl COMMAND ...",
        description=_by_task(about),
        epilog="ppl COMMAND --help lists a command's options.\n\n"
        "Exit status: 0 done; 1 a finding (--fail-on) or a loss that is not finite;\n"
        "2 bad input, in one line; 3 a bug of ours, with its traceback; 130 interrupted;\n"
        "141 the output's reader has gone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ppl {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog="ppl", help=argparse.SUPPRESS
    )
    for task in TASKS.values():
        for name, example in task.items():
            text = about[name]
            command = commands.add_parser(
                name, description=f"{text[0].upper()}{text[1:]}.", epilog=f"Example: {example}"
            )
            if name == asked:
                add_options(command, modules[name].Options)
            command.set_defaults(module=modules[name])
    return parser


def _by_task(about: dict[str, str]) -> str:
    """Return the commands' summaries and examples by task, for the help."""
    lines = ["Evaluate language models, watch their training, and explain both."]
    for task, commands in TASKS.items():
        lines += ["", f"{task}:"]
        for name, example in commands.items():
            summary = textwrap.wrap(about[name], WIDTH - 15)
            lines += [f"  {name:12} {summary[0]}", *(f"{'':15}{line}" for line in summary[1:])]
            lines.append(f"{'':15}$ {example}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name.

    Args:
        argv: The arguments; None reads the process's own.

    Returns:
        The exit status: 0 done, 1 a finding or a loss that is not finite, 2 bad input, 3 a bug of
        this project, 130 interrupted, 141 the reader of the output has gone.

    Raises:
        SystemExit: The parser printed help, the version or a wrong argument.

    Example:
        >>> main(["report", "history.jsonl", "--png", "out.txt"])  # with a line on stderr
        2
    """
    words = sys.argv[1:] if argv is None else argv
    asked = next((word for word in words if not word.startswith("-")), None)
    arguments = _parser(asked).parse_args(words)
    # A terminal that cannot show a character shows a question mark instead of failing.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    module = arguments.module
    try:
        status = module.run(parsed(module.Options, arguments))
        if sys.stdout is not None:
            sys.stdout.flush()  # a failing write fails here, not at the interpreter's end
        return status
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        _drop_output()
        return 141
    except SystemExit as error:
        # rich exits with status 1 on a broken pipe, which is the status of a finding
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
            f"ppl {arguments.command}: this is a bug in fused-perplexity, not in your input; "
            "please report it with the traceback above",
            file=sys.stderr,
        )
        return 3


def _bad_input(error: Exception, module: ModuleType) -> str | None:
    """Return the message for an error that the user can mend; None for a bug."""
    if isinstance(error, InputError) or (isinstance(error, OSError) and error.filename is not None):
        return str(error)
    if out_of_memory(error):
        return f"out of memory; lower {getattr(module, 'LOWER', 'the size of the input')}"
    if isinstance(error, OSError) and error.errno in NO_MORE:
        # A failing write to a file names the file: without a name it is standard output.
        _drop_output()
        return f"standard output cannot be written ({error.strerror})"
    return None


def _drop_output() -> None:
    """Discard buffered standard output, which the interpreter would write again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
