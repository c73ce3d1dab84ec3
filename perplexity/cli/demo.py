"""``ppl demo``: train, evaluate and plot a small model on real text."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from .extras import needs
from .options import option

LOWER = "--steps"  # where memory ends


@dataclass(frozen=True, kw_only=True)
class Options:
    """train, evaluate and plot a small model on real text"""

    out: str = option("where model, logs and plot go (%(default)s)", "demo-out", metavar="DIR")
    steps: int = option("training steps (%(default)s)", 300, metavar="N")


def run(options: Options) -> int:
    """Run the demo into its folder."""
    needs(
        demo=(
            *("transformers", "tokenizers", "rich", "scipy", "pyarrow"),
            *("matplotlib", "tensorboard", "plotly", "xxhash"),
        )
    )
    from . import demo_run

    try:
        demo_run.run(options.out, steps=options.steps)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk's names no file
        raise InputError(f"--out: {options.out} cannot be written ({error.strerror or error})") from error
    return 0
