"""Count of the functions and files that a reader has to follow: `python bench/support/trips.py`.

A trip is one call of the public API. Its second run is observed with `sys.setprofile`. Counted are
the distinct functions of the project that are called, the files they are in, and the changes of
file from one call to the next. Comprehensions and lambdas belong to the function around them.
`--list TRIP` prints the calls of a trip.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [str(ROOT / name) + os.sep for name in ("perplexity", "kernels")]

TOKENS, VOCABULARY, DIMENSION = 8, 64, 16


def loss(backend: str) -> Callable[[], None]:
    import torch

    from perplexity import linear_cross_entropy

    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, DIMENSION, requires_grad=True)
    weight = torch.randn(VOCABULARY, DIMENSION, requires_grad=True)
    target = torch.randint(VOCABULARY, (TOKENS,))
    return lambda: linear_cross_entropy(hidden, weight, target, backend=backend).backward()


def evaluation() -> Callable[[], None]:
    from tiny_models import build_model, build_tokenizer

    from perplexity import evaluate

    tokenizer = build_tokenizer(bos=True)
    model = build_model(len(tokenizer))
    return lambda: evaluate(model, tokenizer, ["The loss is a mean over tokens, not over batches."])


def monitoring(folder: str) -> Callable[[], None]:
    from perplexity.cli import main

    rows = [f"{step},{4 - step / 400:.4f},{4.1 - step / 420:.4f}" for step in range(0, 400, 10)]
    history = Path(folder) / "history.csv"
    history.write_text("\n".join(["step,train_loss,val_loss", *rows]) + "\n", encoding="utf-8")

    def run() -> None:
        with redirect_stdout(io.StringIO()):
            main(["monitor", str(history)])

    return run


def calls(trip: Callable[[], None]) -> list[tuple[str, str]]:
    """Return (file, function) of every call of the project's functions, in order."""
    trip()
    seen: list[tuple[str, str]] = []

    def note(frame, event, _):
        code = frame.f_code
        if (
            event == "call"
            and code.co_filename.startswith(tuple(PACKAGES))
            and code.co_name != "<module>"
        ):
            name = code.co_qualname if hasattr(code, "co_qualname") else code.co_name
            seen.append((os.path.relpath(code.co_filename, ROOT), name.split(".<locals>.<")[0]))

    sys.setprofile(note)
    try:
        trip()
    finally:
        sys.setprofile(None)
    return seen


def changes_of_file(seen: list[tuple[str, str]]) -> int:
    return sum(before[0] != after[0] for before, after in itertools.pairwise(seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory() as folder:
        trips = {
            "loss and backward, torch": lambda: loss("torch"),
            "loss and backward, triton": lambda: loss("triton"),
            "evaluate one document": evaluation,
            "ppl monitor": lambda: monitoring(folder),
        }
        parser.add_argument("--list", choices=list(trips), help="print the calls of one trip")
        options = parser.parse_args()
        if options.list:
            for file, function in calls(trips[options.list]()):
                print(f"{file}  {function}")
            return
        print("| trip | functions | files | changes of file |\n| --- | ---: | ---: | ---: |")
        for name, make in trips.items():
            seen = calls(make())
            files = {file for file, _ in seen}
            print(f"| {name} | {len(set(seen))} | {len(files)} | {changes_of_file(seen)} |")


if __name__ == "__main__":
    main()
