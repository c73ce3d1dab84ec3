"""``ppl demo``: train, evaluate and plot a small model on real text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .extras import needs
from .options import option

if TYPE_CHECKING:
    from ..probe import Probe

LOWER = "--steps"  # the advice when memory runs out


@dataclass(frozen=True, kw_only=True)
class Options:
    """train, evaluate and plot a small model on real text"""

    out: str = option("where model, logs and plot go (%(default)s)", "demo-out", metavar="DIR")
    steps: int = option("training steps (%(default)s)", 300, metavar="N")


def run(options: Options) -> int:
    """Run the demo and write its files into ``--out``; return 0."""
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
    except OSError as error:  # the error of a full disk names no file
        raise InputError(
            f"--out: {options.out} cannot be written ({error.strerror or error})"
        ) from error
    return 0


def evaluated(row: dict[str, float]) -> str:
    """Return the line that reports an evaluation during training.

    Args:
        row: The row of history.jsonl: step, losses in nats a token, perplexities, tokens, seconds.
    """
    return (
        f"step {row['step']:>5}  train loss {row['train_loss']:6.3f}  "
        f"validation loss {row['val_loss']:6.3f}  train perplexity {row['train_perplexity']:8.1f}  "
        f"validation perplexity {row['val_perplexity']:8.1f}  "
        f"{row['tokens'] / row['seconds']:7,.0f} tokens/s"
    )


def probed(probe: Probe) -> str:
    """Return the line that reports the probe of a checkpoint."""
    own, other = (probe.perplexity[f"{whose}_perplexity"] for whose in ("self", "reference"))
    repetition = probe.generation["repetition"] or 0
    return (
        f"step {probe.step:>5}  perplexity of generated text {own:,.1f}, "
        f"of references {other:,.1f}; {repetition:.1%} of a text repeats itself"
    )


def closing(out: Path, context_length: int) -> str:
    """Return the last lines: the files written, and the command that evaluates the model again."""
    return (
        f"written to {out}: model/, history.jsonl, history.csv, tensorboard/, evaluation.json, "
        "diagnosis.json, data-check.json, probe.json, curves.png, report.html (open in a browser)\n"
        f"again, by hand: ppl eval {out}/model {out}/validation.jsonl "
        f"--context-length {context_length} --train {out}/train.jsonl"
    )
