"""``ppl demo``: the main job end to end on real text: split, tokenizer, training with the fused loss, evaluation, checks."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import time
from collections import Counter
from pathlib import Path

import torch

from ..errors import InputError, theirs
from ..losses import linear_cross_entropy
from ..metric import exp

LOOKED_AT = 40  # steps of a run whose checkpoints are worth a probe on the way
SEED = 20_241
VOCABULARY = 2048
CONTEXT = 256
BATCH = 8
NGRAM = 13
VALIDATION_SHARE = 0.1


def corpus() -> dict[str, str]:
    """CPython's documentation topics: name to text, as shipped with this interpreter."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def split(documents: dict[str, str]) -> tuple[dict[str, str], dict[str, str], int]:
    """Training and validation documents by hash of the name, and the paragraphs dropped from training.

    Topics quote each other: a training paragraph that shares a 13-gram of words with validation is dropped.
    """
    chosen = {
        name
        for name in documents
        if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < 1000 * VALIDATION_SHARE
    }
    validation = {name: text for name, text in documents.items() if name in chosen}
    known = set().union(*map(ngrams, validation.values()))
    training, dropped = {}, 0
    for name, text in documents.items():
        if name in chosen:
            continue
        kept = []
        for paragraph in text.split("\n\n"):
            # A 13-gram may straddle two paragraphs: looked for in the text as it will be joined.
            if ngrams("\n\n".join([*kept, paragraph])) & known:
                dropped += 1
            else:
                kept.append(paragraph)
        if any(map(str.strip, kept)):
            training[name] = "\n\n".join(kept)
    return training, validation, dropped


def train_tokenizer(texts, vocabulary: int = VOCABULARY):
    """A byte-level BPE of ``vocabulary`` entries with a BOS token, trained on ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def build_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def unigram_loss(training_ids: list[int], validation_ids: list[int]) -> float:
    """Nats a validation token under add-one smoothed counts of training."""
    counts = Counter(training_ids)
    total = len(training_ids) + VOCABULARY
    return -sum(math.log((counts[token] + 1) / total) for token in validation_ids) / len(validation_ids)


def train(model, stream: torch.Tensor, steps: int, validate, record, look) -> None:
    """AdamW with warm-up and cosine decay; the loss goes from hidden states to a scalar without logits.

    validate: a loss, every twelfth of the run; record: takes a step's row; look: is called with the step after each of three
    quarters, in a run of LOOKED_AT steps or more.
    """
    from rich.progress import track

    from ..terminal import Console

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.02),
    )
    every = max(1, steps // 12)
    generator = torch.Generator().manual_seed(SEED)
    started = time.perf_counter()
    for step in track(range(1, steps + 1), "training", console=Console(stderr=True), transient=True):
        starts = torch.randint(0, len(stream) - CONTEXT - 1, (BATCH,), generator=generator).tolist()
        batch = torch.stack([stream[start : start + CONTEXT + 1] for start in starts])
        model.train()
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        loss = linear_cross_entropy(hidden, model.lm_head.weight, batch[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        row = {
            "step": step,
            "train_loss": loss.item(),
            "train_perplexity": exp(loss.item()),
            "lr": rate,
            "grad_norm": norm.item(),
            "tokens": step * BATCH * CONTEXT,
        }
        if step == 1 or step % every == 0 or step == steps:
            row["val_loss"] = validate()
            row["val_perplexity"] = exp(row["val_loss"])
        row["seconds"] = time.perf_counter() - started
        record(row)
        if step in {steps * quarter // 4 for quarter in (1, 2, 3)} and steps >= LOOKED_AT:
            look(step)


def run(out: str | Path, *, steps: int = 300) -> dict:
    """Train, evaluate and plot into the folder ``out``; prints what it does and returns the summary it writes."""
    import transformers
    from rich.table import Table
    from torch.utils.tensorboard import SummaryWriter

    from .. import models
    from ..data_checks import Text, check_data
    from ..evaluation import Document, evaluate
    from ..files import write_text
    from ..json_files import to_json
    from ..monitor import diagnose, read_history
    from ..probe import GenerationSettings, Probe, Prompt, probe
    from ..report.html import write_report
    from ..report.plots import loss_curves
    from ..terminal import Console
    from . import check_data as check_data_command
    from . import eval as eval_command
    from . import monitor as monitor_command
    from . import probe as probe_command
    from . import tables

    if steps < 1:
        raise InputError(f"--steps: expected at least 1, got {steps}")
    transformers.utils.logging.disable_progress_bar()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for log in (out / "tensorboard").glob("events.out.*"):
        log.unlink()  # an earlier run's: TensorBoard would draw both as one
    console = Console(soft_wrap=True)
    torch.manual_seed(SEED)

    documents = corpus()
    text_hash = hashlib.sha256("\0".join(documents.values()).encode()).hexdigest()
    training, validation, dropped = split(documents)
    overlap = len(set().union(*map(ngrams, training.values())) & set().union(*map(ngrams, validation.values())))
    console.print(
        f"corpus: {len(documents)} topics of Python's documentation (sha256 {text_hash[:16]}); "
        f"{len(training)} to train on, {len(validation)} to validate on\n"
        f"split: {dropped} training paragraphs that share a {NGRAM}-gram with validation dropped; overlap that remains: "
        f"{overlap or 'none'}"
    )
    valid_documents = [Document(name, text, "validation") for name, text in validation.items()]
    write_text(
        out / "validation.jsonl",
        "".join(json.dumps({"id": d.id, "text": d.text, "domain": d.domain}) + "\n" for d in valid_documents),
    )
    write_text(
        out / "train.jsonl",
        "".join(json.dumps({"id": name, "text": text, "domain": "train"}) + "\n" for name, text in training.items()),
    )

    tokenizer = train_tokenizer(training.values())
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    training_ids = [token for text in training.values() for token in [tokenizer.bos_token_id, *encode(text)]]
    validation_ids = [token for text in validation.values() for token in encode(text)]
    baselines = {"uniform": math.log(VOCABULARY), "unigram": unigram_loss(training_ids, validation_ids)}
    model = build_model()
    console.print(
        f"model: Llama architecture, {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {VOCABULARY}; "
        f"{len(training_ids):,} training and {len(validation_ids):,} validation tokens; {steps} steps of {BATCH * CONTEXT:,} tokens"
    )

    score = lambda: evaluate(model, tokenizer, valid_documents, context_length=CONTEXT, stride=CONTEXT - 1)  # noqa: E731
    history: list[dict] = []
    prompts = [Prompt(d.id, d.text, document=True) for d in valid_documents]
    settings = GenerationSettings(max_new_tokens=96)
    probes: list[Probe] = []

    def look(step: int) -> None:
        probes.append(probe(model, tokenizer, prompts, settings=settings, name="the model", step=step))
        own, other = (probes[-1].perplexity[f"{whose}_perplexity"] for whose in ("self", "reference"))
        console.print(
            f"step {step:>5}  it writes text of perplexity {own:,.1f} and reads with {other:,.1f}; "
            f"{probes[-1].generation['repetition'] or 0:.1%} of a text repeats itself"
        )

    writer = SummaryWriter(str(out / "tensorboard"))
    with (out / "history.jsonl").open("w", encoding="utf-8") as log:

        def record(row: dict) -> None:
            history.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            for key, tag in (
                ("train_loss", "train/loss"),
                ("train_perplexity", "train/perplexity"),
                ("val_loss", "eval/loss"),
                ("val_perplexity", "eval/perplexity"),
                ("lr", "train/lr"),
            ):
                if key in row:
                    writer.add_scalar(tag, row[key], row["step"])
            if "val_loss" in row:
                console.print(
                    f"step {row['step']:>5}  train loss {row['train_loss']:6.3f}  validation loss {row['val_loss']:6.3f}  "
                    f"train perplexity {row['train_perplexity']:8.1f}  validation perplexity {row['val_perplexity']:8.1f}  "
                    f"{row['tokens'] / row['seconds']:7,.0f} tokens/s"
                )

        train(model, torch.tensor(training_ids), steps, lambda: score().loss, record, look)
    writer.close()
    table = io.StringIO(newline="")
    columns = ["step", "train_loss", "val_loss", "lr", "grad_norm", "tokens", "seconds"]
    rows = csv.DictWriter(table, columns, extrasaction="ignore")
    rows.writeheader()
    rows.writerows(history)
    write_text(out / "history.csv", table.getvalue())

    with theirs(f"--out: {out / 'model'} cannot be written"):
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    model, tokenizer = models.load(out / "model")
    evaluation = evaluate(model, tokenizer, valid_documents, context_length=CONTEXT)
    evaluation.save(out / "evaluation.json")
    loss_curves(
        history,
        out / "curves.png",
        baselines=baselines,
        title=f"Python's documentation, {steps} steps: validation perplexity {evaluation.perplexity:.1f}",
    )
    console.print(eval_command.summary(evaluation), soft_wrap=False)
    tables.print_notes(evaluation.notes, console)

    closing = Table(title="What that means", title_justify="left")
    closing.add_column("predictor")
    closing.add_column("loss (nats)", justify="right")
    closing.add_column("perplexity", justify="right")
    closing.add_column("in plain words")
    for name, loss in (
        ("knows nothing (uniform)", baselines["uniform"]),
        ("knows how often each token comes (unigram)", baselines["unigram"]),
        ("the model just trained", evaluation.loss),
    ):
        closing.add_row(name, f"{loss:.3f}", f"{exp(loss):,.1f}", f"as if choosing among about {exp(loss):,.0f} tokens")
    console.print(closing, soft_wrap=False)
    curves = read_history(out / "history.jsonl")
    digest = curves.digest()
    diagnosis = diagnose(digest, vocabulary_size=VOCABULARY, total_steps=steps)
    diagnosis.save(out / "diagnosis.json")
    console.print(monitor_command.view(digest, diagnosis))
    check = check_data(
        (Text(name, text, "train") for name, text in training.items()),
        (Text(name, text, "validation") for name, text in validation.items()),
        tokenizer=tokenizer,
        embedding=VOCABULARY,
        interval=0.05,
    )
    check.save(out / "data-check.json")
    console.print(check_data_command.view(check), soft_wrap=False)
    last = probe(
        model,
        tokenizer,
        prompts,
        settings=settings,
        diagnosis=diagnosis.to_dict(),
        name="the model",
        step=steps,
    )
    probes.append(last)
    last.save(out / "probe.json")
    console.print(probe_command.view(last), soft_wrap=False)
    shown = json.loads(evaluation.to_json()) | {"source": "of the validation text"}
    title = f"Python's documentation, {steps} steps"
    write_report(
        out / "report.html",
        curves,
        digest,
        diagnosis,
        vocabulary_size=VOCABULARY,
        evaluations=[shown],
        data_checks=[check.to_dict() | {"source": "of the demo's split"}],
        probes=[found.to_dict() | {"source": "of the demo's checkpoints"} for found in probes],
        title=title,
    )
    summary = {
        "text_sha256": text_hash,
        "steps": steps,
        "dropped_paragraphs": dropped,
        "remaining_overlap": overlap,
        "uniform_loss": baselines["uniform"],
        "unigram_loss": baselines["unigram"],
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "verdict": diagnosis.verdict,
        "leaked_fraction": check.leaked_fraction,
        "probe_verdict": last.verdict,
        "probe_health": last.health_score,
    }
    write_text(out / "summary.json", to_json(summary) + "\n")
    console.print(
        f"written to {out}: model/, history.jsonl, history.csv, tensorboard/, evaluation.json, diagnosis.json, data-check.json, "
        "probe.json, curves.png, report.html (open it in a browser)\n"
        f"again, by hand: ppl eval {out}/model {out}/validation.jsonl --context-length {CONTEXT} "
        f"--train {out}/train.jsonl"
    )
    return summary
