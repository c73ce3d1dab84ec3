"""``ppl``: bad input is one line on stderr and exit status 2; a bug of ours is a traceback and exit status 3."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import math
import os
import sys
import traceback

from .errors import InputError, out_of_memory, visible

# What a full or broken disk, or a terminal that is gone, answers to a write.
NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What to lower where memory ends.
LOWER = {
    "eval": "--batch-size or --context-length",
    "compare": "--batch-size or --context-length",
    "check-data": "--memory-limit or --workers",
    "probe": "--batch-size or --max-new-tokens",
    "ask": "--batch-size",
    "demo": "--steps",
}

# What a subcommand needs beyond torch; the extra that brings it has the subcommand's name, but for EXTRA_OF.
EXTRA_OF = {"compare": "eval", "check-data": "data", "ask": "probe"}
EXTRAS = {
    "eval": ("transformers", "rich", "scipy"),
    "compare": ("transformers", "rich", "scipy"),
    "check-data": ("xxhash", "transformers", "rich", "scipy"),
    "probe": ("transformers", "rich", "scipy", "pyarrow", "xxhash", "sacrebleu", "rouge_score"),
    "ask": ("transformers", "rich", "scipy"),
    "monitor": ("rich", "pyarrow"),
    "report": ("rich", "pyarrow", "matplotlib", "plotly"),
    "demo": ("transformers", "tokenizers", "rich", "scipy", "pyarrow", "matplotlib", "tensorboard", "plotly", "xxhash"),
}


def _eval(arguments: argparse.Namespace) -> int:
    from .evaluation.commands import run_eval

    return run_eval(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from .evaluation.commands import run_compare

    return run_compare(arguments)


def _check_data(arguments: argparse.Namespace) -> int:
    from .data_checks.commands import run_check_data

    return run_check_data(arguments)


def _probe(arguments: argparse.Namespace) -> int:
    from .probe.commands import run_probe

    return run_probe(arguments)


def _ask(arguments: argparse.Namespace) -> int:
    from .probe.commands import run_ask

    return run_ask(arguments)


def _monitor(arguments: argparse.Namespace) -> int:
    from .monitor.commands import run_monitor

    return run_monitor(arguments)


def _report(arguments: argparse.Namespace) -> int:
    from .report.commands import run_report

    return run_report(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run

    try:
        run(arguments.out, steps=arguments.steps)
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk's names no file
        raise InputError(f"--out: {arguments.out} cannot be written ({error.strerror or error})") from error
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import report

    return report()


def _integer(text: str) -> int:
    """Read a whole number of 64 bits: a longer one overflows somewhere further down."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number of 64 bits, got {text[:40]!r}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text[:40]!r}")
    return value


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {visible(message)} (see {self.prog} --help)\n")


DTYPES = ("auto", "float32", "bfloat16", "float16")
TEXT_HELP = (
    ".txt (a file is a document), .jsonl (a line is one), .parquet, a datasets folder, token ids in .bin or .npy; "
    ".txt and .jsonl also with .gz or .zst; - is standard input"
)


def _text_options(command: argparse.ArgumentParser) -> None:
    """How a text is read, cut into tokens and windows, and scored."""
    command.add_argument(
        "--protocol",
        default="sliding",
        choices=["sliding", "lm-eval", "llama.cpp"],
        help="how text is windowed (sliding)",
    )
    command.add_argument(
        "--context-length", type=_integer, metavar="N", help="tokens a window shows (by protocol and model)"
    )
    command.add_argument(
        "--stride", type=_integer, metavar="N", help="tokens a sliding window moves on (half the context)"
    )
    command.add_argument(
        "--bos", default="auto", choices=["auto", "always", "never"], help="BOS before a document, never two (auto)"
    )
    command.add_argument(
        "--special-text",
        choices=["tokens", "text"],
        help="how special tokens in the text are read (by protocol; sliding: tokens)",
    )
    command.add_argument("--batch-size", type=_integer, metavar="N", help="windows at a time (by their length)")
    _reader_options(command)
    _model_options(command)
    command.add_argument("--journal", metavar="DIR", help="the same command again goes on where a killed one stopped")


def _model_options(command: argparse._ActionsContainer) -> None:
    """Where and how a model runs."""
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    command.add_argument(
        "--device-map", choices=["auto"], help="auto: spread the model over all devices by their memory (accelerate)"
    )
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of the model on the hub")
    command.add_argument("--dtype", default="auto", choices=DTYPES)
    command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    command.add_argument("--backend", choices=["triton", "torch"], help="of the loss (by device)")


def _question_options(command: argparse._ActionsContainer) -> None:
    """What a judge is asked, and which words are its answers."""
    command.add_argument("--template", metavar="FILE", help="the question, with {text} where the text goes")
    command.add_argument(
        "--yes", default="yes", metavar="WORD", help="the answer that counts, by its first token (yes)"
    )
    command.add_argument("--no", default="no", metavar="WORD", help="the other one (no)")


def _reader_options(command: argparse._ActionsContainer) -> None:
    """What a file's format leaves open."""
    command.add_argument("--text-column", default="text", metavar="NAME", help="of .jsonl, .parquet, datasets (text)")
    command.add_argument("--domain-column", default="domain", metavar="NAME", help="for a table by domain (domain)")
    command.add_argument("--id-column", default="id", metavar="NAME", help="names documents (id)")
    command.add_argument("--split", metavar="NAME", help="of a datasets folder that has several")
    command.add_argument("--token-dtype", default="uint16", choices=["uint16", "uint32"], help="of .bin files (uint16)")
    command.add_argument(
        "--separator", type=_integer, metavar="ID", help="ends a document in .bin and .npy (BOS, else EOS)"
    )
    command.add_argument("--stdin", default="txt", choices=["txt", "jsonl"], help="what - is (txt)")


def _history_options(command: argparse.ArgumentParser) -> None:
    """How a training history is read and judged."""
    command.add_argument(
        "--vocabulary-size", type=_integer, metavar="V", help="entries of the vocabulary, to know the uniform loss"
    )
    command.add_argument(
        "--total-steps", type=_integer, metavar="N", help="the run's budget, for projections and time left"
    )
    command.add_argument("--unit", default="nats", choices=["nats", "bits", "perplexity"], help="of the losses (nats)")
    command.add_argument(
        "--tag", action="append", metavar="MEASURE=NAME", help="what a measure was logged as, e.g. val_loss=dev/ce"
    )


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="ppl",
        description="Perplexity: evaluate, watch and explain language models.",
        epilog="Exit status: 0 done; 1 a finding (--fail-on) or a loss that is not finite; 2 bad input, in one line; "
        "3 a bug of ours, with its traceback; 130 interrupted; 141 the output's reader has gone.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("eval", help="loss and perplexity of a model on text")
    command.add_argument("model", help="Hugging Face model folder or name")
    command.add_argument("text", nargs="+", help=TEXT_HELP)
    _text_options(command)
    command.add_argument(
        "--score-special", action="store_true", default=None, help="score special tokens in the text, too"
    )
    command.add_argument("--json", metavar="OUT", help="write every number to this file")
    command.add_argument("--per-token", metavar="OUT.parquet", help="a row a token: text, loss, entropy, rank")
    command.add_argument("--per-document", metavar="OUT.parquet", help="a row a document: loss, tokens, bytes")
    command.add_argument("--calibration", action="store_true", help="whether the model is as often right as it is sure")
    command.add_argument("--reliability", metavar="OUT.png", help="the same, drawn: .png or .svg")
    command.add_argument("--baseline", metavar="FILE", help="another evaluation's --json, shown beside this one")
    command.add_argument("--train", nargs="+", metavar="P", help="training text: ppl check-data beside the evaluation")
    command.set_defaults(run=_eval)

    command = commands.add_parser("compare", help="two evaluations, paired by document; or two models on one text")
    command.add_argument("a", help="a result of ppl eval --json, or with TEXT a model: the reference")
    command.add_argument("b", help="the same, to compare with it")
    command.add_argument("text", nargs="*", help=TEXT_HELP)
    command.add_argument(
        "--measure", default="loss", choices=["loss", "bits-per-byte"], help="of two results: nats a token (loss)"
    )
    _text_options(command)
    command.add_argument("--revision-b", metavar="REV", help="branch, tag or commit of the second model on the hub")
    command.add_argument("--dtype-b", choices=DTYPES, help="of the second model (--dtype)")
    command.add_argument("--json", metavar="OUT", help="write every number to this file")
    command.set_defaults(run=_compare)

    command = commands.add_parser(
        "check-data", help="leakage, sizes, vocabulary and tokenizer of training and validation"
    )
    command.add_argument("--train", nargs="+", metavar="P", help=TEXT_HELP)
    command.add_argument("--valid", nargs="+", metavar="P", help="the same; it is held in memory")
    command.add_argument(
        "--tokenizer", metavar="DIR", help="counts tokens, unknown ones among them; alone: its fingerprint"
    )
    command.add_argument(
        "--embedding-size",
        type=_integer,
        metavar="V",
        help="rows of the model's embedding (vocab_size of DIR/config.json)",
    )
    command.add_argument(
        "--unit",
        default="auto",
        choices=["auto", "document", "paragraph", "line"],
        help="what counts as a document (paragraphs where --valid is one .txt file)",
    )
    command.add_argument(
        "--near",
        type=_number,
        default=0.25,
        metavar="J",
        help="Jaccard similarity of 4-word shingles that is a copy (0.25)",
    )
    command.add_argument(
        "--interval",
        type=_number,
        default=0.01,
        metavar="R",
        help="wanted of the perplexity's 95 %% interval, ± (0.01)",
    )
    command.add_argument("--memory-limit", type=_integer, default=1024, metavar="MIB", help="of the tables (1024)")
    command.add_argument("--workers", type=_integer, default=1, metavar="N", help="processes over --train (1)")
    command.add_argument("--journal", metavar="DIR", help="the same command again goes on where a killed one stopped")
    command.add_argument("--write-clean", metavar="OUT", help="validation without what leaked: .jsonl or .txt")
    command.add_argument(
        "--write-split", metavar="DIR", help="train.jsonl and valid.jsonl of --train, cut by hash, no leaks"
    )
    command.add_argument("--valid-fraction", type=_number, default=0.02, metavar="F", help="of --write-split (0.02)")
    command.add_argument("--json", metavar="OUT", help="write every number to this file")
    command.add_argument("--fail-on", choices=["info", "warning", "danger"], help="exit with 1 on a finding as severe")
    _reader_options(command)
    command.set_defaults(run=_check_data)

    probe = commands.add_parser(
        "probe", help="what the model generates: repetition, reference metrics, one health score"
    )
    command = probe.add_argument_group("asked")
    command.add_argument("model", help="Hugging Face model folder or name")
    command.add_argument(
        "prompts",
        help=".jsonl with prompt and, where known, reference (or a list); .txt, a line each; or text to cut prompts from, as ppl "
        "eval reads it; - is standard input",
    )
    command.add_argument("--limit", type=_integer, default=64, metavar="N", help="prompts, evenly over the file (64)")
    command.add_argument("--prompt-column", default="prompt", metavar="NAME", help="of .jsonl (prompt)")
    command.add_argument("--reference-column", default="reference", metavar="NAME", help="of .jsonl (reference)")
    command = probe.add_argument_group("generation")
    command.add_argument("--samples", type=_integer, metavar="N", help="texts a prompt (4; greedy 1)")
    command.add_argument(
        "--max-new-tokens", type=_integer, metavar="N", help="where a text is cut off (128, or half the context)"
    )
    command.add_argument("--temperature", type=_number, default=1.0, metavar="T", help="of sampling; 0 is greedy (1)")
    command.add_argument("--top-p", type=_number, default=1.0, metavar="P", help="probability that is sampled from (1)")
    command.add_argument("--top-k", type=_integer, default=0, metavar="K", help="tokens that are sampled from (0: all)")
    command.add_argument("--seed", type=_integer, default=0, metavar="N", help="of sampling (0)")
    command.add_argument("--prompt-tokens", type=_integer, default=32, metavar="N", help="of a document to cut (32)")
    command.add_argument("--chat", action="store_true", help="put prompts through the tokenizer's chat template")
    command.add_argument("--batch-size", type=_integer, default=64, metavar="N", help="texts generated at a time (64)")
    command = probe.add_argument_group("beside it")
    command.add_argument("--judge", metavar="MODEL", help="a model that is asked yes or no about each text")
    _question_options(command)
    command.add_argument("--embeddings", metavar="DIR", help="a sentence-transformers folder, for coherence")
    command.add_argument(
        "--eval", metavar="FILE", help="this model's ppl eval --json, where prompts have no references"
    )
    command.add_argument("--history", metavar="FILE", help="of its training run, as for ppl monitor")
    command.add_argument(
        "--scorer", action="append", metavar="MODULE:CLASS", help="a benchmark of your own, into the health score"
    )
    command.add_argument("--weight", action="append", metavar="PART=W", help="of the health score's parts")
    command.add_argument(
        "--step", type=_integer, metavar="N", help="of the checkpoint (from a folder's name, checkpoint-N)"
    )
    _reader_options(probe.add_argument_group("reading"))
    _model_options(probe.add_argument_group("the models"))
    command = probe.add_argument_group("output")
    command.add_argument("--json", metavar="OUT", help="write every number and text to this file")
    command.add_argument("--fail-on", choices=["info", "warning", "danger"], help="exit with 1 on a finding as severe")
    probe.set_defaults(run=_probe)

    command = commands.add_parser("ask", help="Ask-LLM: how probable a model holds yes, asked about each text")
    command.add_argument("model", help="Hugging Face folder or name of the model that is asked")
    command.add_argument("text", nargs="+", help=TEXT_HELP)
    _question_options(command)
    command.add_argument("--plain", action="store_true", help="no chat template, though the tokenizer has one")
    command.add_argument("--batch-size", type=_integer, metavar="N", help="texts at a time (by their length)")
    _reader_options(command)
    _model_options(command)
    command.add_argument("--journal", metavar="DIR", help="the same command again goes on where a killed one stopped")
    command.add_argument("--out", metavar="OUT.jsonl", help="a line a text: its id and p_yes; .jsonl or .parquet")
    command.add_argument("--json", metavar="OUT", help="write the means to this file")
    command.set_defaults(run=_ask)

    command = commands.add_parser("monitor", help="what the loss curves of a training run mean")
    command.add_argument(
        "history", help=".csv, .jsonl, trainer_state.json, a TensorBoard folder or a W&B offline run (.wandb)"
    )
    _history_options(command)
    command.add_argument("--json", metavar="OUT", help="write verdict, score and findings to this file")
    command.add_argument("--fail-on", choices=["info", "warning", "danger"], help="exit with 1 on a finding as severe")
    command.add_argument("--follow", action="store_true", help="go on reading as the file grows, until interrupted")
    command.add_argument(
        "--interval", type=_number, default=5.0, metavar="S", help="seconds between looks with --follow (5)"
    )
    command.add_argument("--polls", type=_integer, metavar="N", help="end --follow after so many looks")
    command.add_argument(
        "--on-finding", metavar="COMMAND", help="with --follow: run for each new finding (PPL_SIGNAL, ...)"
    )
    command.set_defaults(run=_monitor)

    command = commands.add_parser("report", help="a run's curves and what they mean, as a page and as plots")
    command.add_argument("history", help="as for ppl monitor")
    command.add_argument("-o", "--output", metavar="OUT.html", help="one file that needs no network")
    command.add_argument("--png", metavar="OUT.png", help="loss and perplexity side by side")
    command.add_argument("--svg", metavar="OUT.svg", help="the same, to scale")
    command.add_argument("--eval", action="append", metavar="FILE", help="a result of ppl eval --json to show beside")
    command.add_argument("--data", action="append", metavar="FILE", help="a result of ppl check-data --json, likewise")
    command.add_argument(
        "--probe", action="append", metavar="FILE", help="of ppl probe --json; of several checkpoints: a trend"
    )
    command.add_argument("--title", help="of the page and the plots")
    _history_options(command)
    command.set_defaults(run=_report)

    command = commands.add_parser("demo", help="train, evaluate and plot a small model on real text")
    command.add_argument("--out", default="demo-out", metavar="DIR", help="where model, logs and plot go (demo-out)")
    command.add_argument("--steps", type=_integer, default=300, metavar="N", help="training steps (300)")
    command.set_defaults(run=_demo)

    command = commands.add_parser("doctor", help="what is installed, which backend runs where, and a self-check")
    command.set_defaults(run=_doctor)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a terminal that cannot show a character shows another, and nothing is lost
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    needed = EXTRAS.get(arguments.command, ())
    if getattr(arguments, "train", None):
        needed = dict.fromkeys((*needed, *EXTRAS["check-data"]))
    if getattr(arguments, "reliability", None):
        needed = (*needed, "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    try:
        if missing:
            extra = EXTRA_OF.get(arguments.command, arguments.command)
            if arguments.command == "eval":
                extra += "".join(
                    f",{other}" for other, name in (("data", "xxhash"), ("report", "matplotlib")) if name in missing
                )
            raise InputError(f"{arguments.command}: needs {', '.join(missing)}; install fused-perplexity[{extra}]")
        status = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is met here, not at the interpreter's end
        return status
    except BrokenPipeError:  # the reader, head say, has seen enough
        _drop_output()
        return 141
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich's own answer to it is status 1, a finding's
            return 141
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = _bad_input(error, arguments.command)
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


def _bad_input(error: Exception, command: str) -> str | None:
    """Return what to tell of an error that the user can mend, None of a bug."""
    if isinstance(error, InputError) or (isinstance(error, OSError) and error.filename is not None):
        return str(error)
    if out_of_memory(error):
        return f"out of memory; lower {LOWER.get(command, 'the size of the input')}"
    if isinstance(error, OSError) and error.errno in NO_MORE:
        # Files are written under their names: what is left is the terminal, or where it is redirected to.
        _drop_output()
        return f"standard output cannot be written ({error.strerror})"
    return None


def _drop_output() -> None:
    """Send what standard output still holds nowhere: the interpreter would try it again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
