"""``python tests/monitor/record_faults.py``: small real training runs, healthy and with one fault
each, into faults/.

A two-layer transformer learns CPython's documentation with the fused loss; ten seeds a fault, a CSV
a fault (gzip): seed, step, train_loss, val_loss. A quarter of an hour on 2 cores. What each is and
which signals are right for it: ``FAULTS``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from perplexity import linear_cross_entropy
from perplexity.cli import demo_model as demo

FOLDER = Path(__file__).with_name("faults")
SEEDS = 10
STEPS, EVERY, BATCH, CONTEXT, WIDTH, VOCABULARY = 600, 30, 12, 32, 64, 512
RATE = 4e-3
ONSET = 300  # the step at which a fault begins that is not there from the start


@dataclass(frozen=True)
class Fault:
    """``signals``: any of them is right; ``silent``: no finding above info is right; ``onset``: the
    step it begins at.
    """

    signals: tuple[str, ...]
    words: str
    onset: int = 0
    silent: bool = False


FAULTS = {
    "healthy": Fault((), "nothing is wrong", silent=True),
    "overfitting": Fault(("overfitting",), "2,500 tokens to train on"),
    "rate-x100": Fault(
        ("divergence", "spike"), "a learning rate 100 times too large from step 300 on", ONSET
    ),
    "rate-x100-start": Fault(
        ("plateau", "divergence"), "a learning rate 100 times too large, from the start"
    ),
    "frozen-rate": Fault(("plateau",), "a learning rate that stays at 0 from step 300 on", ONSET),
    "contained": Fault(("leakage-suspected",), "validation text is in the training text, 16 times"),
    "contained-once": Fault(
        (),
        "15 % of validation text is in the training text, once: curves cannot show it",
        silent=True,
    ),
    "shuffled-labels": Fault(("plateau",), "labels are shuffled within the batch"),
    "wrong-tokenizer": Fault(
        ("worse-than-uniform",), "validation text is cut by another tokenizer"
    ),
    "repeated-data": Fault(
        ("leakage-suspected",), "after a restart at step 300 the loader repeats 8 batches", ONSET
    ),
    "nan": Fault(("non-finite",), "a weight becomes NaN at step 300", ONSET),
    "corrupted-batch": Fault(
        ("spike",), "the batches of steps 300 to 307 hold random tokens", ONSET
    ),
}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = (
            torch.nn.Embedding(VOCABULARY, WIDTH),
            torch.nn.Embedding(CONTEXT, WIDTH),
        )
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer(
            "mask", torch.nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False
        )

    def loss(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(batch) + self.places.weight
        hidden = self.norm(self.blocks(hidden, mask=self.mask, is_causal=True))
        return linear_cross_entropy(hidden, self.head.weight, labels)


def texts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and validation tokens, and validation cut by a tokenizer that learnt other text."""
    training, validation, *_ = demo.split(demo.corpus())
    training, validation = ([text.text for text in side] for side in (training, validation))
    tokenizer = demo.train_tokenizer(training, VOCABULARY)
    other = demo.train_tokenizer(
        [Path(module.__file__).read_text() for module in (csv, argparse, copy, io)], VOCABULARY
    )
    encode = lambda by, documents: torch.tensor(  # noqa: E731
        [
            token
            for text in documents
            for token in by(text, add_special_tokens=False, verbose=False)["input_ids"]
        ]
    )
    return encode(tokenizer, training), encode(tokenizer, validation), encode(other, validation)


def run(
    name: str, seed: int, training: torch.Tensor, validation: torch.Tensor, other: torch.Tensor
) -> list[tuple]:
    """Rows (step, train_loss, val_loss or None) of one run."""
    torch.manual_seed(1000 + seed)
    generator = torch.Generator().manual_seed(seed)
    if name == "overfitting":
        training = training[:2500]
    if name == "contained":
        training = torch.cat([training[: 8 * len(validation)], *[validation] * 16])
    if name == "contained-once":
        training = torch.cat([training, validation[: len(validation) * 15 // 100]])
    if name == "wrong-tokenizer":
        validation = other
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    steps = STEPS + (500 if name == "overfitting" else 0)

    def draw(source: torch.Tensor, count: int, by: torch.Generator) -> torch.Tensor:
        starts = torch.randint(0, len(source) - CONTEXT - 1, (count,), generator=by).tolist()
        return torch.stack([source[start : start + CONTEXT + 1] for start in starts])

    fixed = draw(validation, 48, torch.Generator().manual_seed(0))
    rows, repeated, step = [], [], 0
    restarted = name != "repeated-data"
    while step < steps:
        step += 1
        # it crashed, and goes on from the checkpoint of step 300
        if not restarted and step == ONSET + 20:
            restarted, step = True, ONSET
            repeated = [draw(training, BATCH, generator) for _ in range(8)]
        constant = name in ("overfitting", "rate-x100-start")
        share = min(1.0, step / 20) * (1.0 if constant else max(0.1, 1 - step / steps))
        if name == "frozen-rate" and step >= ONSET:
            share = 0.0
        if name == "rate-x100-start" or (name == "rate-x100" and step >= ONSET):
            share *= 100
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        batch = repeated[step % 8] if repeated else draw(training, BATCH, generator)
        if name == "corrupted-batch" and ONSET <= step < ONSET + 8:
            batch = torch.randint(0, VOCABULARY, batch.shape, generator=generator)
        labels = batch[:, 1:]
        if name == "shuffled-labels":
            labels = labels.flatten()[torch.randperm(labels.numel(), generator=generator)].view_as(
                labels
            )
        loss = model.loss(batch[:, :-1], labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if name == "nan" and step == ONSET:
            model.head.weight.data[3, 3] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
        value = None
        if step % EVERY == 0 or step == 1:
            with torch.no_grad():
                value = model.loss(fixed[:, :-1], fixed[:, 1:]).item()
        rows.append((step, loss.item(), value))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(FAULTS))
    options = parser.parse_args()
    # products this small are not worth sharing; give halves of the names to two processes
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    tokens = texts()
    for name in options.names:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("seed", "step", "train_loss", "val_loss"))
        for seed in range(SEEDS):
            for step, train, value in run(name, seed, *tokens):
                writer.writerow(
                    (seed, step, f"{train:.4f}", "" if value is None else f"{value:.4f}")
                )
        with gzip.GzipFile(FOLDER / f"{name}.csv.gz", "wb", mtime=0) as file:
            file.write(text.getvalue().encode())
        print(name, "last:", rows_of(text.getvalue()), file=sys.stderr, flush=True)


def rows_of(text: str) -> str:
    return text.splitlines()[-1]


if __name__ == "__main__":
    main()
