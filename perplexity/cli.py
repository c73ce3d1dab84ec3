"""``ppl``: bad input gives one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

from .errors import InputError

# What a subcommand needs beyond torch, by the name of the extra that brings it.
EXTRAS = {
    "eval": ("transformers", "rich"),
    "demo": ("transformers", "tokenizers", "rich", "matplotlib", "tensorboard"),
}


def _eval(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .evaluation import evaluate, models, read_documents, results

    documents = list(read_documents(arguments.text, text_field=arguments.text_field))
    if arguments.json and not os.path.isdir(os.path.dirname(os.path.abspath(arguments.json))):
        raise InputError(f"--json: expected a file in an existing folder, got {arguments.json}")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = models.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    columns = (
        TextColumn("documents"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s  perplexity {task.fields[perplexity]:.2f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(documents), speed=0.0, perplexity=float("nan"))

        def progress(done: int, tokens: int, loss: float) -> None:
            from .metric import exp

            seconds = bar.tasks[task].elapsed or 1e-9
            bar.update(task, completed=done, speed=tokens / seconds, perplexity=exp(loss))

        evaluation = evaluate(
            model,
            tokenizer,
            documents,
            protocol=arguments.protocol,
            context_length=arguments.context_length,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            backend=arguments.backend,
            progress=progress,
        )
    if arguments.json:
        evaluation.save(arguments.json)
    Console().print(results.table(evaluation))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run

    run(arguments.out, steps=arguments.steps)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import report

    return report()


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="ppl", description="Perplexity: evaluate, watch and explain language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("eval", help="loss and perplexity of a model on text")
    command.add_argument("model", help="local Hugging Face model folder")
    command.add_argument("text", nargs="+", help=".txt (a file is a document) or .jsonl (a line is one)")
    command.add_argument("--protocol", default="sliding", choices=["sliding"])
    command.add_argument(
        "--context-length", type=int, metavar="N", help="tokens a window shows (the model's, at most 1024)"
    )
    command.add_argument("--stride", type=int, metavar="N", help="tokens a window moves on (half the context)")
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows at a time (8)")
    command.add_argument("--text-field", default="text", metavar="NAME", help="the text's key in .jsonl lines (text)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    command.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    command.add_argument("--backend", choices=["triton", "torch"], help="of the loss (by device)")
    command.add_argument("--json", metavar="OUT", help="write every number to this file")
    command.set_defaults(run=_eval)

    command = commands.add_parser("demo", help="train, evaluate and plot a small model on real text")
    command.add_argument("--out", default="demo-out", metavar="DIR", help="where model, logs and plot go (demo-out)")
    command.add_argument("--steps", type=int, default=300, metavar="N", help="training steps (300)")
    command.set_defaults(run=_demo)

    command = commands.add_parser("doctor", help="what is installed, which backend runs where, and a self-check")
    command.set_defaults(run=_doctor)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    missing = [name for name in EXTRAS.get(arguments.command, ()) if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise InputError(
                f"{arguments.command}: needs {', '.join(missing)}; install fused-perplexity[{arguments.command}]"
            )
        return arguments.run(arguments)
    except (InputError, ValueError, OSError) as error:
        # ValueError and OSError with a message are bad input met further down: an option, a full disk.
        if not isinstance(error, InputError) and os.environ.get("PERPLEXITY_DEBUG"):
            raise
        print(f"ppl {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
