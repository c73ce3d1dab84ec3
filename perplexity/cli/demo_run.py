"""Run of ``ppl demo``: a small model from text to report, by public functions in README's order."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import models
from ..data_checks import check_data
from ..data_checks.checks import write_texts
from ..data_checks.index import NGRAM
from ..errors import InputError, theirs
from ..evaluation import evaluate, read_documents, read_result
from ..files import write_text
from ..integrations.tracking import TensorBoardTracker
from ..json_files import to_json
from ..losses import linear_cross_entropy
from ..monitor import Monitor, read_history
from ..nats import exp
from ..probe import GenerationSettings, probe, read_prompts
from . import check_data as check_data_command
from . import eval as eval_command
from . import monitor as monitor_command
from . import probe as probe_command
from . import tables
from .demo import closing, evaluated, probed
from .demo_model import CONTEXT, VOCABULARY, build_model, corpus, split, train_tokenizer

SEED = 20_241
BATCH = 8
EVALUATIONS = 12  # during training
FEWEST_TO_PROBE = 40  # steps: a shorter run is probed at its end only
COLUMNS = ("step", "train_loss", "val_loss", "lr", "grad_norm", "tokens", "seconds")


def train(model, tokens: torch.Tensor, steps: int) -> Iterator[dict[str, float]]:
    """Train with AdamW, warm-up and cosine decay, and yield the measures of each step.

    The fused loss is computed from hidden states, without logits in memory.

    Args:
        model: A transformers causal model.
        tokens: Token ids [n] of the training text.
        steps: Number of steps, each of ``BATCH`` sequences of ``CONTEXT`` tokens.
    """
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.52 + 0.5 * math.cos(math.pi * step / steps)),
    )
    generator = torch.Generator().manual_seed(SEED)
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(tokens) - CONTEXT - 1, (BATCH,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + CONTEXT + 1] for start in starts])
        model.train()
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        loss = linear_cross_entropy(hidden, model.lm_head.weight, batch[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        measures: dict[str, float] = {"train_loss": loss.item(), "grad_norm": float(norm)}
        measures |= {"lr": float(schedule.get_last_lr()[0]), "tokens": step * BATCH * CONTEXT}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield measures


def run(out: str | Path, *, steps: int = 300) -> dict:
    """Train, evaluate, diagnose, check and probe a model, and write all files of the demo.

    Args:
        out: Folder of the files, created where it does not exist.
        steps: Training steps, 300 by default.

    Returns:
        The content of summary.json.

    Raises:
        InputError: ``steps`` is below 1, or a file cannot be written.
    """
    import transformers
    from rich.progress import track
    from torch.utils.tensorboard import SummaryWriter

    from ..report.html import write_report
    from ..report.plots import run_curves

    if steps < 1:
        raise InputError(f"--steps: expected at least 1, got {steps}")
    transformers.utils.logging.disable_progress_bar()
    out, console = Path(out), tables.console()
    out.mkdir(parents=True, exist_ok=True)
    for log in (out / "tensorboard").glob("events.out.*"):
        log.unlink()  # TensorBoard would draw the curves of an earlier run as part of this one's
    torch.manual_seed(SEED)

    documents = corpus()
    text_hash = hashlib.sha256("\0".join(documents.values()).encode()).hexdigest()
    training, validation, dropped, overlap = split(documents)
    write_texts(out / "train.jsonl", training)
    write_texts(out / "validation.jsonl", validation)
    held_out = list(read_documents([out / "validation.jsonl"]))
    prompts = list(read_prompts(out / "validation.jsonl"))
    tokenizer, model = train_tokenizer(text.text for text in training), build_model()
    plain = dict(add_special_tokens=False, verbose=False)
    encoded = tokenizer([text.text for text in training], **plain)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in (tokenizer.bos_token_id, *ids)])
    console.print(
        f"corpus: {len(documents)} topics of Python's documentation (sha256 {text_hash[:16]}); "
        f"{len(training)} to train on, {len(validation)} to validate on\n"
        f"split: {dropped} training paragraphs that share a {NGRAM}-gram with validation dropped; "
        f"overlap that remains: {overlap or 'none'}\n"
        f"model: Llama architecture, {model.num_parameters():,} parameters, "
        f"vocabulary {VOCABULARY}; {len(tokens):,} training tokens; "
        f"{steps} steps of {BATCH * CONTEXT:,} tokens",
        soft_wrap=True,
    )

    # The fused loss trains; the monitor, a history and TensorBoard follow.
    writer = SummaryWriter(str(out / "tensorboard"))
    tracker = TensorBoardTracker(writer)
    monitor = Monitor(VOCABULARY, total_steps=steps, on_finding=tracker.finding)
    asked: dict[str, Any] = dict(settings=GenerationSettings(max_new_tokens=96), name="the model")
    every, quarters = max(1, steps // EVALUATIONS), {steps * part // 4 for part in (1, 2, 3)}
    rows, probes, started = [], [], time.perf_counter()
    console_of_progress = tables.console(errors=True)
    trained = track(
        train(model, tokens, steps), "training", steps, console=console_of_progress, transient=True
    )
    with (out / "history.jsonl").open("w", encoding="utf-8") as history_file:
        for step, measures in enumerate(trained, 1):
            if step == 1 or step % every == 0 or step == steps:
                scored = evaluate(model, tokenizer, held_out, stride=CONTEXT - 1)
                measures["val_loss"] = scored.loss
            tracker.log(step, **measures)
            measures["seconds"] = time.perf_counter() - started
            monitor.log(step, **measures)
            rows.append(_row(step, measures))
            history_file.write(json.dumps(rows[-1]) + "\n")
            history_file.flush()  # for those who follow the file
            if "val_loss" in measures:
                console.print(evaluated(rows[-1]), soft_wrap=True)
            if step in quarters and steps >= FEWEST_TO_PROBE:
                probes.append(probe(model, tokenizer, prompts, step=step, **asked))
                console.print(probed(probes[-1]), soft_wrap=True)
    writer.close()
    table = [COLUMNS, *([row.get(name, "") for name in COLUMNS] for row in rows)]
    write_text(out / "history.csv", "".join(",".join(map(str, line)) + "\n" for line in table))

    # The checkpoint is evaluated as `ppl eval` would.
    with theirs(f"--out: {out / 'model'} cannot be written"):
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    model, tokenizer = models.load(out / "model")
    evaluation = evaluate(model, tokenizer, held_out)
    evaluation.save(out / "evaluation.json")
    console.print(eval_command.summary(evaluation))
    tables.print_notes(evaluation.notes, console)

    # What the curves mean, whether the data can be trusted, and what the model writes.
    diagnosis = monitor.diagnose()
    diagnosis.save(out / "diagnosis.json")
    console.print(monitor_command.view(monitor.digest, diagnosis))
    vocabulary = dict(tokenizer=tokenizer, embedding=VOCABULARY)
    check = check_data(training, validation, interval=0.05, **vocabulary)
    check.save(out / "data-check.json")
    console.print(check_data_command.view(check))
    asked["diagnosis"] = diagnosis.to_dict()
    probes.append(probe(model, tokenizer, prompts, step=steps, **asked))
    probes[-1].save(out / "probe.json")
    console.print(probe_command.view(probes[-1]))

    history = read_history(out / "history.jsonl")
    title = f"Python's documentation, {steps} steps"
    curves = history, monitor.digest, diagnosis
    run_curves(*curves, out / "curves.png", vocabulary_size=VOCABULARY, title=title)
    write_report(
        out / "report.html",
        *curves,
        vocabulary_size=VOCABULARY,
        evaluations=[read_result(out / "evaluation.json") | {"source": "of the validation text"}],
        data_checks=[check.to_dict() | {"source": "of the demo's split"}],
        probes=[each.to_dict() | {"source": "of the demo's checkpoints"} for each in probes],
        title=title,
    )
    summary = {
        "text_sha256": text_hash,
        "steps": steps,
        "dropped_paragraphs": dropped,
        "remaining_overlap": overlap,
        "uniform_loss": evaluation.baselines["uniform"]["loss"],
        "unigram_loss": evaluation.baselines["unigram"]["loss"],
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "verdict": diagnosis.verdict,
        "leaked_fraction": check.leaked_fraction,
        "probe_verdict": probes[-1].verdict,
        "probe_health": probes[-1].health_score,
    }
    write_text(out / "summary.json", to_json(summary) + "\n")
    console.print(closing(out, CONTEXT), soft_wrap=True)
    return summary


def _row(step: int, measures: dict[str, float]) -> dict[str, float]:
    """Return a row of history.jsonl: the measures, and the perplexity of each loss."""
    losses = {name: value for name, value in measures.items() if name.endswith("_loss")}
    perplexities = {name.replace("loss", "perplexity"): exp(loss) for name, loss in losses.items()}
    return {"step": step} | measures | perplexities
