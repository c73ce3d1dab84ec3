"""Processes that tests start."""

import subprocess
import sys

import pytest

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="/proc, /dev/full, limits or signals of Linux"
)

# Seconds after which a process counts as hung. No test waits this long unless something is wrong:
# however busy the machine is, a process that makes progress must come to its end.
HANG = 1800


def run(*command, **options) -> subprocess.CompletedProcess:
    """Run ``command`` and return its status, standard output and standard error as text."""
    options = dict(capture_output=True, text=True, timeout=HANG) | options
    return subprocess.run([str(word) for word in command], **options)


def ppl(*arguments, **options) -> subprocess.CompletedProcess:
    """Run ``ppl`` in a process of its own.

    The fixture ``ppl_here`` costs a tenth of that, for tests that are not about a process.
    """
    return run(sys.executable, "-m", "perplexity", *arguments, **options)


def ppl_after(code: str, *arguments) -> list[str]:
    """Return the command that runs ``code`` and then ``ppl`` in the same process.

    For limits and signals: Python code between fork and exec (``preexec_fn``) may hang in a process
    with threads, as that of the tests is.
    """
    code += "; import sys; from perplexity.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, *map(str, arguments)]
