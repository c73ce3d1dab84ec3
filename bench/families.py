"""Comparison of transformers' causal families with their own logits: ``python bench/families.py``.

Each family is built small (family_configs.py) in a process of its own. The loss of ``evaluate`` is
compared with the model's own logits in float64, and the loss and gradients of ``use_fused_loss``
with the model's own. The rows go to bench/results/families.json and the table to docs/families.md.
A sweep takes three minutes of one core. ``--table`` rewrites the table from the results file alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

from environment import HERE, RESULTS, commit, now, one_line, version, write
from family_configs import build, families, tokenizer

RESULT = RESULTS / "families.json"
TABLE = HERE.parent / "docs" / "families.md"
SECONDS, BYTES = 90, 12 << 30  # the most that one family may take
TEXTS = [
    "The cat sat on the mat, and the dog lay by the door until the rain had gone over the hills.",
    "A loss of three nats is a choice among twenty.",
    "caf\u00e9, na\u00efve, \u4f60\u597d: bytes are not characters",
]
# Context and stride of ``evaluate``; None: the defaults for the model.
WINDOWS = [(None, None), (24, 24 - 1), (16, 8)]
# In float32 the loss of a row in a batch is off by 1e-6 from that of the row alone, a gradient by
# 1e-5 of the largest. A head with an unknown rule is off by 1e-2 and more at these weights.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-3


def own_nll(model, ids: list[int], context: int, stride: int) -> list[float]:
    """Return −log p of every token but the first, from the model's own logits, in float64."""
    import torch

    nll, scored, begin = [], 1, 0
    while scored < len(ids):
        end = min(begin + context, len(ids))
        read = torch.tensor([ids[begin : end - 1]])
        logits = model(input_ids=read).logits
        if logits.shape[1] != read.shape[1]:  # the model returns those of the last position alone
            parts = [model(input_ids=read[:, : k + 1]).logits for k in range(read.shape[1])]
            logits = torch.cat(parts, 1)
        target = torch.tensor(ids[scored:end])
        nll += torch.nn.functional.cross_entropy(
            logits[0, scored - begin - 1 :].double(), target, reduction="none"
        ).tolist()
        begin, scored = begin + stride, end
    return nll


def compare_evaluate(model) -> dict:
    """Compare the loss of ``evaluate`` with the model's own logits, at several windows."""
    import torch

    from perplexity import evaluate

    tokens, largest = tokenizer(), 0.0
    for context, stride in WINDOWS:
        options = {} if context is None else dict(context_length=context, stride=stride)
        got = evaluate(model, tokens, TEXTS, **options)
        own = []
        with torch.no_grad():
            for text in TEXTS:
                ids = [tokens.bos_token_id, *tokens(text)["input_ids"]]
                own += own_nll(model, ids, got.context_length, got.stride)
        expected = sum(own) / len(own)
        difference = abs(got.loss - expected) / max(1.0, expected)
        if got.tokens != len(own) or not difference <= LOSS_TOLERANCE:
            message = (
                f"{got.loss:.6g} over {got.tokens} tokens, expected {expected:.6g} over "
                f"{len(own)}; context {got.context_length}, stride {got.stride}"
            )
            return dict(outcome="wrong", difference=difference, message=message)
        largest = max(largest, difference)
    return dict(outcome="equal", difference=largest)


def batch() -> dict:
    """Return two rows of bytes with labels, some of which are ignored."""
    import torch

    tokens = tokenizer()
    rows = [[tokens.bos_token_id, *tokens(text)["input_ids"][:31]] for text in TEXTS[:2]]
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[0, :4] = labels[1, -3:] = -100
    return dict(input_ids=ids, labels=labels)


def training_step(model, **arguments) -> tuple:
    """Return the loss of ``batch`` and all gradients, with the same dropout in each call."""
    import torch

    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    loss = getattr(model(**batch(), **arguments), "loss", None)
    if loss is None:
        raise TypeError("no loss of labels")
    loss.backward()
    parameters = model.named_parameters()
    return loss.item(), {name: p.grad.double() for name, p in parameters if p.grad is not None}


def compare_fused(model) -> dict:
    """Compare loss and gradients of ``use_fused_loss`` with the model's own, in training mode."""
    import torch

    from perplexity.integrations.transformers import use_fused_loss

    model.train()
    cases, own = [{}, dict(num_items_in_batch=torch.tensor(50))], []
    for arguments in [*cases]:
        try:
            own.append(training_step(model, **arguments))
        except Exception as error:
            if not arguments:
                message = f"the model's own loss fails: {said(error)}"
                return dict(outcome="not comparable", message=message)
            cases.remove(arguments)  # Trainer passes such a model no number of items either
    largest = 0.0
    with use_fused_loss(model):
        for arguments, (expected, gradients) in zip(cases, own, strict=True):
            loss, fused = training_step(model, **arguments)
            difference = abs(loss - expected) / max(1.0, abs(expected))
            what = "loss"
            scale = max(gradient.abs().max().item() for gradient in gradients.values())
            for name in gradients.keys() | fused.keys():
                pair = fused.get(name), gradients.get(name)
                # No gradient in one of them and zeros in the other are equal.
                one, other = (torch.zeros(()) if part is None else part for part in pair)
                off = (one - other).abs().max().item() / scale
                if not off <= GRADIENT_TOLERANCE:
                    difference, what = max(difference, off), f"gradient of {name}"
                largest = max(largest, off)
            if what != "loss" or not difference <= LOSS_TOLERANCE:
                message = f"{what}: {loss:.6g}, expected {expected:.6g}"
                return dict(outcome="wrong", difference=difference, message=message)
            largest = max(largest, difference)
    return dict(outcome="equal", difference=largest)


def study(family: str) -> dict:
    """Return the row of one family."""
    row = dict(family=family, architecture=families()[family], built=None)
    try:
        model = build(family)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["architecture"] = type(model).__name__
        import torch

        with torch.no_grad():
            logits = model(input_ids=batch()["input_ids"]).logits
        if not logits.isfinite().all():
            raise ValueError("the model's own logits are not finite")
        row["spread"] = float(f"{logits.float().std().item():.3g}")
    except Exception as error:
        return row | dict(built=said(error))
    for name, compare in (("evaluate", compare_evaluate), ("fused", compare_fused)):
        row[name] = outcome(compare, model)
    return row


def outcome(compare, model) -> dict:
    from perplexity.errors import InputError

    try:
        return compare(model)
    except InputError as error:
        return dict(outcome="refused", message=one_line(error).partition(": ")[2])
    except Exception as error:
        return dict(outcome="crashed", message=said(error))


def said(error: Exception) -> str:
    """Return the error's first line and the place in the code where it was raised."""
    if os.environ.get("FAMILIES_TRACEBACK"):
        traceback.print_exception(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{one_line(error)[:200]} ({Path(last.filename).name}:{last.lineno})"


def _child(family: str, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    warnings.simplefilter("ignore")
    started = time.process_time()
    row = study(family)
    row["seconds"] = round(time.process_time() - started, 2)
    pipe.send(row)
    pipe.close()


def in_a_process(family: str) -> dict:
    """Return the row of ``study`` from a process that is killed after ``SECONDS``."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, theirs))
    process.start()
    theirs.close()
    row = dict(family=family, architecture=families()[family], built=None)
    try:
        if not ours.poll(SECONDS):
            return row | dict(built=f"not finished after {SECONDS} seconds")
        return ours.recv()
    except EOFError:
        process.join()
        return row | dict(built=f"its process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


COMPARED = {"evaluate": "`evaluate`", "fused": "`use_fused_loss`"}
OUTCOMES = ("equal", "refused", "not comparable", "crashed", "wrong")


def table(results: dict) -> str:
    """Return the text of docs/families.md for the content of a results file."""
    rows = results["rows"]
    built = [row for row in rows if not row["built"]]
    lines = [
        "# Model families",
        "",
        f"Written by `python bench/families.py` with transformers {results['transformers']} and "
        f"torch {results['torch']}: {len(built)} of {len(rows)} families with a causal head, built "
        "small with random weights. The loss of `evaluate` is compared with the model's own logits "
        "in float64, at three choices of context and stride. The loss and every gradient of "
        "`use_fused_loss` are compared with the model's own, in training mode. A number is the "
        "largest difference: of a loss, relative; of a gradient, to the model's largest. Equal is "
        f"at most {LOSS_TOLERANCE:.0e} of the loss and {GRADIENT_TOLERANCE:.0e} of the gradient.",
        "",
        "| | " + " | ".join(OUTCOMES) + " |",
        "| --- |" + " ---: |" * len(OUTCOMES),
    ]
    for name, title in COMPARED.items():
        counts = [sum(row[name]["outcome"] == outcome for row in built) for outcome in OUTCOMES]
        lines.append(f"| {title} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "| family | class | `evaluate` | `use_fused_loss` |", "| --- | --- | --- | --- |"]
    for row in built:
        cells = [row["family"], row["architecture"], *(_cell(row[name]) for name in COMPARED)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Not built", "", "| family | class | reason |", "| --- | --- | --- |"]
    for row in rows:
        if row["built"]:
            lines.append(f"| {row['family']} | {row['architecture']} | {_escaped(row['built'])} |")
    return "\n".join(lines) + "\n"


def _cell(compared: dict) -> str:
    if compared["outcome"] == "equal":
        return f"{compared['difference']:.0e}"
    return f"{compared['outcome']}: {_escaped(compared['message'])}"


def _escaped(message: str) -> str:
    return message.replace("|", "\\|").replace("<", "&lt;")


def sweep(names: list[str]) -> list[dict]:
    """Return the rows of families, in order."""
    import torch
    import transformers

    import perplexity.integrations.transformers  # noqa: F401 (imported once, for all processes)

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    for name in names:
        rows.append(in_a_process(name))
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict) -> str:
    if row["built"]:
        return f"{row['family']:24} not built: {row['built']}"
    parts = []
    for name in ("evaluate", "fused"):
        compared = row[name]
        difference = f" {compared['difference']:.1e}" if "difference" in compared else ""
        parts.append(f"{name} {compared['outcome']}{difference} {compared.get('message', '')}")
    return f"{row['family']:26} {row['seconds']:4.1f} s  " + " | ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="families to study; all by default")
    parser.add_argument("--draw", type=int, metavar="N", help="N families drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results file; all families have one already")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    options = parser.parse_args()
    if options.table:
        TABLE.write_text(table(json.loads(RESULT.read_text())))
        return
    names = options.families or sorted(families())
    if options.draw:
        names = sorted(random.Random(options.seed).sample(names, options.draw))
    rows = sweep(names)
    versions = {package: version(package) for package in ("torch", "transformers")}
    results = versions | dict(date=now(), commit=commit(), rows=rows)
    everything = names == sorted(families())
    if options.out or everything:
        write(results, options.out or RESULT)
    if everything and not options.out:
        TABLE.write_text(table(results))
    outcomes = [row[name]["outcome"] for row in rows for name in COMPARED if name in row]
    sys.exit("wrong" in outcomes)


if __name__ == "__main__":
    main()
