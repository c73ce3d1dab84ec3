"""Each logger's shape, written here as the logger writes it, and every loss that it holds."""

import json
import math
import os
import sqlite3
from pathlib import Path

import pytest

from perplexity.errors import InputError
from perplexity.monitor import diagnose, read_history
from perplexity.monitor.names import reading_of
from perplexity.monitor.readers import read_histories
from perplexity.monitor.readers.cells import number

TRAIN = [3.5, 3.25, 3.0]
HIGHER = [3.6, 3.35, 3.1]


def lines(template: str, values=TRAIN, first: int = 1) -> str:
    """One line a loss: N is its number, X the loss, Y a loss of 0.1 more."""
    return "".join(
        template.replace("N", str(step)).replace("X", str(loss)).replace("Y", f"{loss + 0.1:.4g}")
        + "\n"
        for step, loss in enumerate(values, first)
    )


def objects(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TITAN = "[rank0]:[titan] 2026-11-01 10:00:00,000 - root - INFO - "
BAR = " 10%|█         | N0/400 [00:05<08:15,  2.00it/s]"
# (logger, file, text, training losses, validation losses by set, steps of training)
FILES = [
    # --- console text that counts, names or evaluates in other ways
    (
        "fairseq: label smoothing, base 2 by its perplexity, steps of an epoch, a validation's progress",
        "a.log",
        "".join(
            f"| epoch 00{epoch}  {at} / 9 loss={bits + 1}, nll_loss={bits}, ppl={2**bits:.3f}, lr=0.1\n"
            f"| epoch 00{epoch} | valid on 'valid' subset  1 / 2 loss=9.5\n"
            f"| epoch 00{epoch} | valid on 'valid' subset | loss 9 | nll_loss {bits + 1} | ppl {2 ** (bits + 1):.2f}\n"
            for epoch, at, bits in ((1, 4, 3.5), (1, 8, 3.25), (2, 4, 3.0), (2, 8, 2.75))
        ),
        [bits * math.log(2) for bits in (3.5, 3.25, 3.0, 2.75)],
        {"": [bits * math.log(2) for bits in (4.5, 4.25, 4.0, 3.75)]},
        [4, 8, 12, 16],
    ),
    (
        "mmengine, behind a date that is no count",
        "a.log",
        lines("11/27 10:00:00 - mmengine - INFO - Epoch(train) [1][ N/547]  lr: 1e-4  loss: X"),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "a bar that shows its new count before its new loss",
        "a.log",
        "Epoch 0:   6%|# | 1/9 [00:01<00:09,  2.00s/it, loss=3.500]\r"
        "Epoch 0:  11%|## | 2/9 [00:02<00:09,  2.00s/it, loss=3.500]\r"
        "Epoch 0:  11%|## | 2/9 [00:02<00:09,  2.00s/it, loss=3.250]\r"
        "Epoch 0:  33%|### | 3/9 [00:03<00:09,  2.00s/it, loss=3.250]\r"
        "Epoch 0:  33%|### | 3/9 [00:03<00:09,  2.00s/it, loss=3.000]\n",
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "transformers, slower than a step a second",
        "a.log",
        "".join(
            f" 10%|# | {n}/400 [00:05<08:15,  2.00s/it]\n{{'loss': '{x}', 'epoch': '0.1'}}\n"
            for n, x in zip((20, 30, 40), TRAIN, strict=True)
        ),
        TRAIN,
        {},
        [20, 30, 40],
    ),
    (
        "transformers with tokens a second, which have the time in each row",
        "a.log",
        lines("{'loss': X, 'learning_rate': 1e-4, 'train_runtime': 5.0, 'epoch': 0.0N}"),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "DeepSpeed's examples, an evaluation under its heading",
        "a.log",
        lines("Epoch: 0, Step: N, Rank: 0, loss = X")
        + "***** Evaluating perplexity, Epoch 1/2 *****\nppl: 22.2, loss: 3.1\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "Marian",
        "a.log",
        lines(
            "[2026-11-01 10:00:00] Ep. 1 : Up. N : Sen. 5,529,093 : Cost X : Time 8.42s\n"
            "[2026-11-01 10:00:00] [valid] Ep. 1 : Up. N : cross-entropy : 67.9 : new best\n"
            "[2026-11-01 10:00:00] [valid] Ep. 1 : Up. N : ce-mean-words : Y : stalled 1 times (last best: 1.0)"
        ),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "OpenNMT: perplexities alone, and an epoch before the count",
        "a.log",
        "".join(
            f"Epoch  1,  {n}/  725; acc: 0.0; ppl: {math.exp(x):.5f}; 5 s\n"
            for n, x in enumerate(TRAIN, 1)
        )
        + f"Validation perplexity: {math.exp(3.1):.5f}\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "llama.cpp",
        "a.log",
        lines("train_opt_callback: iter=     N sample=7/560 sched=0.7 loss=X dt=00:04:59 |-->"),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "llama2.c",
        "a.log",
        lines("N | loss X | lr 1e-4 | 8.5ms | mfu 0.2%") + "step 3: train loss 3.2, val loss 3.1\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "TensorFlow's Estimator",
        "a.log",
        lines("INFO:tensorflow:loss = X, step = N (1.2 sec)")
        + "INFO:tensorflow:Saving dict for global step 3: accuracy = 0.2, global_step = 3, loss = 3.1\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "an evaluation by iterations beside steps",
        "a.log",
        lines("iter N0 | step N: loss X, iter time: 1.00 ms") + "iter 30: val loss 3.1\n",
        TRAIN,
        {"": [3.1]},
        [10, 20, 30],
    ),
    (
        "scores of three splits beside a loss",
        "a.log",
        lines("Epoch: 00N, Loss: X, Train: 0.1786, Val: 0.1140, Test: 0.1120"),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "a sentence",
        "a.log",
        lines("[Iteration N] 9.5 records/second. Loss is X."),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "ranks of a pipeline without a loss",
        "a.log",
        lines("[rank0]: step: N loss: -1.0\n[rank7]: step: N loss: X", [*TRAIN, 2.75]),
        [*TRAIN, 2.75],
        {},
        [1, 2, 3, 4],
    ),
    # --- tables
    (
        "decimal commas in quotes",
        "a.csv",
        "step,loss,val_loss\n" + lines('N,"X","Y"').replace(".", ","),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "a step, a clock and a value without a header",
        "a.csv",
        lines("N,170000000N.5,X"),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "fastai, whose bars were drawn over",
        "a.txt",
        "epoch  train_loss  valid_loss  time\n"
        + lines("Epoch N/3 : |--| 0% [0/9 00:00<00:00]\rN  X  Y  12:34"),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "losses of evaluation in a file of that name, with those of training",
        "eval_log.csv",
        "step,train_loss,eval_loss\n" + lines("N,X,Y"),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    # --- JSON
    (
        "epochs of evaluations among steps",
        "a.jsonl",
        lines('{"epoch": N, "num_updates": N0, "loss": X}\n{"epoch": N, "valid_loss": Y}'),
        TRAIN,
        {"": HIGHER},
        [10, 20, 30],
    ),
    (
        "Comet",
        "a.json",
        json.dumps(
            [
                {"metricName": name, "metricValue": str(value), "step": step}
                for name, values in (("loss", TRAIN), ("eval_loss", HIGHER))
                for step, value in enumerate(values, 1)
            ]
        ),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "ClearML",
        "a.json",
        json.dumps(
            {"loss": {"train": {"x": [1, 2, 3], "y": TRAIN}, "eval": {"x": [3], "y": [3.1]}}}
        ),
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "a hosted notebook's output, line by line",
        "a.log",
        json.dumps(
            [
                {"stream_name": "stdout", "time": n, "data": f"step {n}: loss {x}\n"}
                for n, x in enumerate(TRAIN, 1)
            ]
        ),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "a notebook's table",
        "a.ipynb",
        json.dumps(
            {
                "cells": [
                    {
                        "source": [],
                        "outputs": [
                            {
                                "data": {
                                    "text/html": [
                                        "<table><thead><tr><th>Step</th><th>Training Loss</th></tr></thead><tbody>",
                                        *(
                                            f"<tr>\n<td>{n}</td>\n<td>{x}</td>\n</tr>"
                                            for n, x in enumerate(TRAIN, 1)
                                        ),
                                        "</tbody></table>",
                                    ]
                                }
                            }
                        ],
                    }
                ]
            }
        ),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    # --- console text
    (
        "Megatron-LM",
        "a.log",
        lines(
            " [2026-11-01 10:00:00] iteration        N/     400 | consumed samples:          256 | "
            "elapsed time per iteration (ms): 512.3 | learning rate: 3.000000E-04 | lm loss: X | "
            "z_loss: 1.0E-02 | loss scale: 1.0 | grad norm: 0.512 | number of nan iterations:   0 |"
        )
        + "-----\n validation loss at iteration 3 on validation set | lm loss value: 3.1E+00 | "
        "lm loss PPL: 2.2E+01 |\n"
        " validation loss at iteration 3 on test set | lm loss value: 3.2E+00 | lm loss PPL: 9 |\n",
        TRAIN,
        {"": [3.1], "test": [3.2]},
        [1, 2, 3],
    ),
    (
        "NeMo, which repeats the last evaluation",
        "a.log",
        lines(
            "Training epoch 0, iteration N/99 | lr: 1e-4 | global_step: N | reduced_train_loss: X | "
            "consumed_samples: 8 | val_loss: 3.4"
        ),
        TRAIN,
        {"": [3.4]},
        [1, 2, 3],
    ),
    (
        "torchtitan, coloured",
        "a.log",
        lines(
            f"\x1b[36m{TITAN}\x1b[31mstep:  N  \x1b[32mloss:  X  \x1b[33mgrad_norm:  0.5  "
            "\x1b[34mmemory: 10.00GiB(12.00%)  tps: 5,000  mfu: 20.00%\x1b[39m"
        )
        + f"{TITAN}validate step: 3  loss:  3.1000  memory: 10.00GiB(12.00%)  tps: 5,000\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "two ranks in one log",
        "a.log",
        "".join(
            f"[rank{r}]:step: {n}  loss: {x + r - 0.5}\n"
            for n, x in enumerate(TRAIN, 1)
            for r in (0, 1)
        ),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "nanochat's fine-tuning",
        "a.log",
        lines(
            "Step 0000N | Validation loss: Y\nStep 0000N/00400 | Training loss: X| lrm: 1.0| num_tokens: 12,345"
        ),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "nanoGPT",
        "a.log",
        "step 0: train loss 10.9, val loss 10.95\n"
        + lines("iter N: loss X, time 1.00ms, mfu -100.00%", first=0),
        TRAIN,
        {"": [10.95]},
        [0, 1, 2],
    ),
    (
        "build-nanogpt",
        "log.txt",
        "0 val 10.5\n0 hella 0.24\n" + lines("N train X", first=0),
        TRAIN,
        {"": [10.5]},
        [0, 1, 2],
    ),
    (
        "modded-nanogpt behind its program",
        "a.txt",
        "val_loss_every : int = 125\nloss = 0.0\n    val_loss = 0.0\nstep = 0\nfor step in range(10): pass\n"
        "step:0/400 val_loss:10.8 train_time:0ms step_avg:nanms\n"
        + lines("step:N/400 train_loss:X train_time:1ms step_avg:1ms")
        + "step:3/400 val_loss:3.1 val_bpb:1.2 train_time:1ms\n",
        TRAIN,
        {"": [10.8, 3.1]},
        [1, 2, 3],
    ),
    (
        "llm.c",
        "a.log",
        "val loss 10.9\n"
        + lines(
            "step    N/19560 | loss X (+nanz)| norm 15.33 (-1.2z)| lr 8.57e-07 | 1234.5 ms | 424242 tok/s"
        )
        + "val loss 3.1\n",
        TRAIN,
        {"": [10.9, 3.1]},
        [1, 2, 3],
    ),
    (
        "llm.c's file",
        "main.log",
        "s:1 tel:11.0\ns:1 eval:0.2463\n" + lines("s:N trl:X lr:0 norm:1"),
        TRAIN,
        {"": [11.0]},
        [1, 2, 3],
    ),
    (
        "OLMo-core",
        "a.log",
        lines(
            "2026-11-01 10:00:00.000\thost:0\tconsole_logger:80\tINFO\t[step=N/400,epoch=1,eta=1h]\n"
            "    optim/total grad norm=1.2\n    train/CE loss=X\n    train/PPL=30.1\n    train/Z loss=0.01"
        )
        + "    eval/lm/c4_en-validation/CE loss=3.1\n    eval/lm/c4_en-validation/PPL=22.2\n"
        "    eval/lm/pile-validation/CE loss=3.2\n",
        TRAIN,
        {"c4_en-validation": [3.1], "pile-validation": [3.2]},
        [1, 2, 3],
    ),
    (
        "transformers",
        "a.log",
        lines("{'loss': 'X', 'grad_norm': nan, 'learning_rate': '1e-05', 'epoch': '0.01'}")
        + "{'eval_loss': 3.1, 'eval_runtime': 1.2, 'epoch': 0.01}\n"
        "{'train_runtime': 12.3, 'train_loss': 3.25, 'epoch': 0.01}\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "transformers with its progress bar",
        "a.log",
        lines(f"\r{BAR}\r              \r{{'loss': X, 'epoch': 0.01}}")
        + "\r 12%|█▎ | 2/16 [00:00<00:01, 9it/s]\x1b[A\n{'eval_loss': 3.1, 'epoch': 0.01}\n",
        TRAIN,
        {"": [3.1]},
        [10, 20, 30],
    ),
    (
        "axolotl",
        "a.log",
        lines("[2026-01-01 10:00:00,000] [INFO] [axolotl.train] [RANK:0] {'loss': X, 'epoch': N}"),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "Composer",
        "a.log",
        lines(
            "[epoch=1][batch=N/400]:\n\t Train time/token: 1000\n\t Train loss/train/total: X\n"
            "\t Train metrics/train/LanguageCrossEntropy: 9"
        )
        + "[Eval batch=2/2] Eval on eval data:\n\t Eval metrics/eval/LanguageCrossEntropy: 3.1\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "nanotron",
        "a.log",
        lines(
            "[default0]:07/30/2024 10:00:00 [INFO|DP=0|PP=0|TP=0|host]: iteration: N / 100 | "
            "consumed_tokens: 16K | tokens_per_sec: 12.3K | lm_loss: X | lr: 0.0003 | grad_norm: 6.2"
        ),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "picotron",
        "a.log",
        lines("[rank 0] Step: N     | Loss: X | Tokens/s:   1.2K | Tokens:  16K | MFU: 12.3%"),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "verl",
        "a.log",
        lines("\x1b[36m(TaskRunner pid=1)\x1b[0m step:N - train/loss:X - train/lr(1e-3):0.01")
        + "step:3 - val/loss:3.1\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "prime-rl",
        "a.log",
        lines("10:00:00 SUCCESS Step N | Time: 1.23s | Loss: X | Grad. Norm: 1.2 | MFU: 12.3%"),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "litgpt",
        "a.log",
        lines("Epoch 1 | iter N step N | loss train: X, val: n/a | iter time: 1.45 ms (step)")
        + "iter 3: val loss 3.1000, val time: 1.45 ms\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "torchtune",
        "a.log",
        lines("Step N | loss:X lr:2e-05 tokens_per_second_per_gpu:123.4"),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "Lightning's bar",
        "a.log",
        "".join(
            f"\rEpoch 0:  {n}%|▏ | {n}/100 [00:05<08:15,  2.00it/s, v_num=0, train_loss={x}]"
            for n, x in enumerate(TRAIN, 1)
        )
        + "\n",
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "Keras",
        "a.log",
        lines(
            "Epoch N/3\n\r1/10 ━━ 9s 1s/step - loss: 9.0\r10/10 ━━━━ 1s 2ms/step - accuracy: 0.1 - loss: X - val_loss: Y"
        ),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "MaxText",
        "a.log",
        lines("completed step: N, seconds: 1.234, TFLOP/s/device: 123.4, loss: X")
        + "eval metrics after step: 3, loss=3.1\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "an epoch a line",
        "a.log",
        lines("[Epoch N/3] Train Loss: X | Val Loss: Y | Best val loss: 1.0 | Time: 3.2s"),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "logging",
        "a.log",
        lines("2026-11-01 10:00:00,123 INFO train.py:45 - epoch 1 step N loss X lr 0.0001")
        + "2026 - [eval] step=3 loss=3.1 ppl=22.2\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "steps without a name",
        "a.log",
        lines("177614235N.542 N000/20000 train_loss: X train_time: 0.1m tok/s: 8000")
        + "1776143229.403 3000/20000 val_loss: 3.1 val_bpb: 1.1\n"
        "1776143355.743 diagnostic quantized val_loss:3.5 val_bpb:1.2 eval_time:6424ms\n",
        TRAIN,
        {"": [3.1]},
        [1000, 2000, 3000],
    ),
    (
        "counts in brackets",
        "a.log",
        lines("Train: 0 [  N0/400 (  2%)]  Loss: X  LR: 1e-4"),
        TRAIN,
        {},
        [10, 20, 30],
    ),
    (
        "PyTorch's language model",
        "a.log",
        "".join(
            f"| epoch   {epoch} |   {n}00/ 500 batches | lr 20.00 | ms/batch 1.2 | loss {loss} | ppl 9.0\n"
            + (
                f"----\n| end of epoch   {epoch} | time: 1.2s | valid loss {loss} | valid ppl 9\n"
                if n == 2
                else ""
            )
            for epoch, n, loss in ((1, 1, 3.5), (1, 2, 3.25), (2, 1, 3.0), (2, 2, 2.75))
        ),
        [3.5, 3.25, 3.0, 2.75],
        {"": [3.25, 2.75]},
        [100, 200, 300, 400],
    ),
    (
        "batches of an epoch",
        "a.log",
        "".join(
            f"ep: {ep}, batch: {n}, time: 9.17, loss: {4 - ep / 2 - n / 80}\n"
            for ep in (0, 1)
            for n in (20, 40)
        ),
        [3.75, 3.5, 3.25, 3.0],
        {},
        [20, 40, 60, 80],
    ),
    (
        "MLX",
        "a.log",
        "Iter 1: Val loss 3.6, Val took 0.010s\n"
        + lines(
            "Iter N: Train loss X, Learning Rate 1.000e-05, It/sec 1.2, Trained Tokens 123, Peak mem 3.2 GB"
        ),
        TRAIN,
        {"": [3.6]},
        [1, 2, 3],
    ),
    (
        "BigScience's Megatron",
        "a.log",
        lines(
            "[default7]: iteration  N/  115311 | consumed tokens: 8192 | lm loss: X | grad norm: 0.1 |"
        )
        + "[default7]:valid loss at iteration 3 | lm loss value: 3.1E+00 | lm loss PPL: 1E+01 |\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    # --- tables
    (
        "transformers in a notebook",
        "a.txt",
        "Step\tTraining Loss\tValidation Loss\n10\t3.5\tNo log\n20\t3.25\t3.35\n30\t3.0\t3.1\n",
        TRAIN,
        {"": HIGHER[1:]},
        [10, 20, 30],
    ),
    (
        "Markdown",
        "a.md",
        "| Epoch | Train Loss | Val Loss |\n|---|:--|--:|\n" + lines("| N | X | Y |"),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "semicolons and decimal commas",
        "a.csv",
        "step;loss;val_loss\n1;3,5;\n2;3,25;\n3;3,0;3,1\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    (
        "pandas' index",
        "a.csv",
        ",loss,val_loss\n" + lines("N,X,Y", first=0),
        TRAIN,
        {"": HIGHER},
        [0, 1, 2],
    ),
    ("a preamble", "a.csv", "# run 7\n# lr 3e-4\nstep,loss\n" + lines("N,X"), TRAIN, {}, [1, 2, 3]),
    (
        "columns by blanks",
        "a.dat",
        "# step   train_loss\n" + lines("  N   X"),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    ("no header", "a.csv", lines("N,X"), TRAIN, {}, [1, 2, 3]),
    ("losses alone", "losses.txt", lines("X"), TRAIN, {}, [1, 2, 3]),
    (
        "cells that are none",
        "a.csv",
        "step,loss,tokens,elapsed\n1,3.5,1.2B,0:01:02\n2,None,x,\n3,N/A,,\n4,3.25,x,\n5,No log,,\n6,3.0,3B,1m 2s\n",
        TRAIN,
        {},
        [1, 4, 6],
    ),
    (
        "a header again",
        "a.csv",
        "step,loss\n1,3.5\nstep,loss,val_loss\n2,3.25,3.3\nstep,val_loss,loss\n3,3.1,3.0\n",
        TRAIN,
        {"": [3.3, 3.1]},
        [1, 2, 3],
    ),
    (
        "steps of an epoch",
        "a.csv",
        "epoch,iter,loss\n0,0,3.5\n0,1,3.25\n1,0,3.0\n1,1,2.75\n2,0,2.5\n2,1,2.25\n",
        [3.5, 3.25, 3.0, 2.75, 2.5, 2.25],
        {},
        [0, 1, 2, 3, 4, 5],
    ),
    (
        "W&B's export",
        "w.csv",
        '"train/global_step","a - eval/loss","a - eval/loss__MIN","a - eval/loss__MAX"\n'
        + lines('"N","X","0","9"'),
        [],
        {"": TRAIN},
        [],
    ),
    (
        "TensorBoard's export, a clock that goes back",
        "run-version_0_val-tag-loss.csv",
        "Wall time,Step,Value\n3.0,1,3.5\n1.0,2,3.25\n2.0,3,3.0\n",
        [],
        {"": TRAIN},
        [],
    ),
    (
        "TensorBoard's JSON",
        "run-.-tag-train_loss.json",
        "[[3.0,1,3.5],[1.0,2,3.25],[2.0,3,3.0]]",
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "a measure a row",
        "a.csv",
        "run_id,metric,step,value\n" + lines("r,train_loss,N,X\nr,val_loss,N,Y"),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    ("a file of validation", "val_log.csv", "step,loss\n" + lines("N,X"), [], {"": TRAIN}, []),
    (
        "Lightning's rows",
        "metrics.csv",
        "epoch,step,train_loss_epoch,train_loss_step,val_loss\n"
        + lines("0,N,,X,")
        + "0,3,,,3.1\n0,3,9.0,,\n",
        TRAIN,
        {"": [3.1]},
        [1, 2, 3],
    ),
    # --- JSON
    (
        "LLaMA-Factory",
        "trainer_log.jsonl",
        lines(
            '{"current_steps": N0, "total_steps": 100, "loss": X, "lr": 1e-4, "epoch": 0.1, "elapsed_time": "0:00:32"}'
        )
        + '{"current_steps": 30, "eval_loss": 3.1, "epoch": 0.3}\n',
        TRAIN,
        {"": [3.1]},
        [10, 20, 30],
    ),
    (
        "ms-swift",
        "logging.jsonl",
        lines(
            '{"loss": X, "epoch": 0.1, "global_step/max_steps": "N0/2000", "elapsed_time": "1m 2s"}'
        ),
        TRAIN,
        {},
        [10, 20, 30],
    ),
    (
        "lingua",
        "metrics.jsonl",
        lines('{"global_step": N, "optim/lr": 1, "optim/total_tokens": 100, "loss/out": X}'),
        TRAIN,
        {},
        [1, 2, 3],
    ),
    (
        "MLflow's JSON",
        "a.json",
        json.dumps(
            {
                "metrics": [
                    {"key": "train_loss", "value": x, "timestamp": n, "step": n}
                    for n, x in enumerate(TRAIN)
                ]
            }
        ),
        TRAIN,
        {},
        [0, 1, 2],
    ),
    (
        "Keras' history",
        "history.json",
        json.dumps({"loss": TRAIN, "val_loss": HIGHER, "accuracy": [0.1, 0.2, 0.3]}),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "lists of losses",
        "a.json",
        json.dumps({"train_losses": TRAIN, "val_losses": HIGHER}),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "pandas' JSON",
        "a.json",
        json.dumps(
            {"step": {"0": 10, "1": 20, "2": 30}, "loss": dict(zip("012", TRAIN, strict=True))}
        ),
        TRAIN,
        {},
        [10, 20, 30],
    ),
    (
        "a list by split",
        "a.json",
        json.dumps(
            {
                "train": [{"step": n, "loss": x} for n, x in enumerate(TRAIN)],
                "val": [{"step": 2, "loss": 3.1}],
            }
        ),
        TRAIN,
        {"": [3.1]},
        [0, 1, 2],
    ),
    (
        "all of one measure, then all of another",
        "a.json",
        json.dumps(
            [{"step": n, "loss": x} for n, x in enumerate(TRAIN)]
            + [{"step": n, "eval_loss": x} for n, x in enumerate(HIGHER)]
        ),
        TRAIN,
        {"": HIGHER},
        [0, 1, 2],
    ),
    (
        "objects in objects",
        "a.jsonl",
        lines('{"step": N, "train": {"loss": X}, "val": {"loss": Y}}'),
        TRAIN,
        {"": HIGHER},
        [1, 2, 3],
    ),
    (
        "several sets",
        "a.jsonl",
        lines(
            '{"step": N, "loss": X, "eval_wiki_loss": Y, "eval_c4_loss": 4, "eval_wiki_runtime": 1}'
        ),
        TRAIN,
        {"wiki": HIGHER, "c4": [4.0] * 3},
        [1, 2, 3],
    ),
    (
        "a set without a name is the main one",
        "a.jsonl",
        lines('{"step": N, "val_loss/wiki": 4, "val_loss": Y, "test_loss": 5}'),
        [],
        {"": HIGHER, "wiki": [4.0] * 3, "test": [5.0] * 3},
        [],
    ),
    (
        "lines that are none",
        "a.jsonl",
        "oops\n" + lines('{"step": N, "loss": X}') + '{"step": 4, "loss":\n',
        TRAIN,
        {},
        [1, 2, 3],
    ),
]


@pytest.mark.parametrize(
    ("file", "text", "train", "sets", "steps"),
    [row[1:] for row in FILES],
    ids=[row[0] for row in FILES],
)
def test_every_loss_of_a_logger(tmp_path, file, text, train, sets, steps):
    (tmp_path / file).write_text(text)
    history = read_history(tmp_path / file)
    assert history.train_loss.tolist() == pytest.approx(train)
    assert history.train_step.tolist() == steps
    found = {name: losses.tolist() for name, (_, losses) in history.validation.items()}
    if not sets.keys() - {history.main_set} or "" in sets:
        assert history.main_set == next(iter(sets), "")
    assert found.keys() == sets.keys()
    for name, losses in sets.items():
        assert found[name] == pytest.approx(losses)


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("a.log", lines("train | iter: N/ 9 | rl_loss: X | lr: 1e-4"), "names seen: rl_loss"),
        ("a.csv", "step,perplexity\n" + lines("N,X"), "perplexity --unit perplexity reads it"),
    ],
    ids=["an unknown loss on lines", "a perplexity that does not say of which text"],
)
def test_what_is_not_read_is_named(tmp_path, file, text, named):
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=named):
        read_history(tmp_path / file)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.log", "a.txt", "a", "a.out"])
def test_content_says_what_a_name_does_not(tmp_path, name):
    for text in (
        "step,loss\n" + lines("N,X"),
        lines('{"step": N, "loss": X}'),
        lines("step N loss X"),
        json.dumps([{"step": n, "loss": x} for n, x in enumerate(TRAIN, 1)]),
    ):
        if name == "a.jsonl" and not text.startswith("{"):
            continue  # what is named so is JSON lines or broken
        (tmp_path / name).write_text(text)
        assert read_history(tmp_path / name).train_loss.tolist() == TRAIN, text


def test_the_log_formats(tmp_path):
    """All losses of one run in every shape of a folder that stands beside the project."""
    folder = os.environ.get("PERPLEXITY_LOG_FORMATS")
    if not folder:
        pytest.skip("PERPLEXITY_LOG_FORMATS names no folder")
    expected = {"caps.csv": (120, 0), "keras.csv": (16, 16), "modded-nanogpt.txt": (0, 16)}
    train_only = [
        "dvclive",
        "history.parquet",
        "j_nanotron.jsonl",
        "j_primerl.jsonl",
        "losses.txt",
        "olmo.log",
        "run-train_loss-tag-loss.csv",
    ]
    wrong = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name == "README.md":
            continue
        history = read_history(path)
        alone = path.name in train_only or path.name.startswith("wandb_export")
        counts = len(history.train_loss), sum(len(of) for of, _ in history.validation.values())
        right = expected.get(path.name, (400, 0 if alone else 16))
        # The same run in all; how many digits there are is the logger's.
        ends = [3.4316] if counts[0] >= 400 else []
        near = not ends or history.train_loss[-1] == pytest.approx(ends[0], abs=1e-4)
        if counts != right or not near:
            wrong[path.name] = counts, history.train_loss[-1:]
    assert wrong == {}


def mlflow(path: Path, runs=("a",)) -> Path:
    with sqlite3.connect(path) as base:
        base.execute(
            "CREATE TABLE metrics (key TEXT, value FLOAT, timestamp BIGINT, run_uuid TEXT, step BIGINT, is_nan BOOLEAN)"
        )
        base.execute("CREATE TABLE runs (run_uuid TEXT, name TEXT)")
        for run in runs:
            base.execute("INSERT INTO runs VALUES (?, ?)", (f"id-{run}", run))
            for key, values in (("train_loss", [*TRAIN, 0.0]), ("val_loss", HIGHER)):
                for step, value in enumerate(values):
                    row = (key, value, 1000 + step, f"id-{run}", step, int(value == 0.0))
                    base.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", row)
    base.close()
    return path


def trackio(path: Path, runs=("a",)) -> Path:
    with sqlite3.connect(path) as base:
        base.execute(
            "CREATE TABLE metrics (id INTEGER PRIMARY KEY, timestamp TEXT, run_name TEXT, step INTEGER, metrics TEXT)"
        )
        for step, loss in enumerate([*TRAIN, math.nan]):
            for run in runs:
                row = json.dumps(
                    {"train/loss": loss} | ({"eval/loss": HIGHER[step]} if step < 3 else {})
                )
                base.execute(
                    "INSERT INTO metrics (timestamp, run_name, step, metrics) VALUES ('t', ?, ?, ?)",
                    (run, step, row),
                )
    base.close()
    return path


@pytest.mark.parametrize("make", [mlflow, trackio])
def test_databases(tmp_path, make):
    history = read_history(make(tmp_path / "one.db"))
    assert history.train_loss.tolist()[:3] == TRAIN and math.isnan(history.train_loss[3])
    assert history.of("val_loss")[1].tolist() == HIGHER
    two = make(tmp_path / "two.db", runs=("a", "b"))
    assert list(read_histories(two)) == ["a", "b"]
    with pytest.raises(InputError, match="expected one run, got 2: a, b; --run NAME chooses one"):
        read_history(two)
    assert read_history(two, run="b").of("val_loss")[1].tolist() == HIGHER
    with pytest.raises(InputError, match="run: expected one of a, b, got 'c'"):
        read_history(two, run="c")
    (tmp_path / "broken.db").write_bytes(two.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"broken\.db: expected an SQLite file"):
        read_history(tmp_path / "broken.db")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE x (y)").connection.close()
    with pytest.raises(InputError, match="expected a table of metrics"):
        read_history(tmp_path / "other.db")


def test_parquet_and_its_runs(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    columns = {"_step": [1, 2, 3], "train/loss": TRAIN, "note": ["x"] * 3}
    write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read_history(tmp_path / "a.parquet").train_loss.tolist() == TRAIN
    write_table(pyarrow.table(columns | {"run_name": ["a", "b", "a"]}), tmp_path / "b.parquet")
    runs = read_histories(tmp_path / "b.parquet")
    assert {run: list(of.train_loss) for run, of in runs.items()} == {"a": [3.5, 3.0], "b": [3.25]}


FOLDERS = {
    "DVCLive": {
        "dvclive/plots/metrics/train/loss.tsv": "step\tloss\n" + lines("N\tX"),
        "dvclive/plots/metrics/eval/loss.tsv": "timestamp\tstep\tloss\n" + lines("170000N\tN\tY"),
        "dvclive/metrics.json": '{"train": {"loss": 9}}',
    },
    "MLflow": {
        "mlruns/0/meta.yaml": "x: y\n",
        "mlruns/0/abc/metrics/train_loss": lines("170000000000N X N"),
        "mlruns/0/abc/metrics/val/loss": lines("170000000000N Y N"),
    },
    "Lightning": {
        "lightning_logs/version_0/hparams.yaml": "lr: 1\n",
        "lightning_logs/version_0/metrics.csv": "epoch,step,train_loss,val_loss\n"
        + lines("0,N,X,\n0,N,,Y"),
    },
    "transformers' checkpoints": {
        "checkpoint-2/trainer_state.json": '{"log_history": [{"step": 1, "loss": 3.5}]}',
        "checkpoint-10/trainer_state.json": json.dumps(
            {
                "log_history": [{"step": n, "loss": x} for n, x in enumerate(TRAIN, 1)]
                + [{"step": n, "eval_loss": x} for n, x in enumerate(HIGHER, 1)]
            }
        ),
    },
    "LLaMA-Factory": {
        "trainer_log.jsonl": lines(
            '{"current_steps": N, "loss": X}\n{"current_steps": N, "eval_loss": Y}'
        ),
        "all_results.json": '{"train_loss": 9.0}',
    },
    "a file a split": {
        "train.csv": "step,loss\n" + lines("N,X"),
        "val.csv": "step,loss\n" + lines("N,Y"),
    },
    "TensorBoard's exports": {
        "run-a_train-tag-loss.csv": "Wall time,Step,Value\n" + lines("1.0,N,X"),
        "run-a_val-tag-loss.csv": "Wall time,Step,Value\n" + lines("1.0,N,Y"),
    },
    "a log and other things": {
        "train.log": lines("step N loss X\n[val] step N loss Y"),
        "config.json": '{"lr": 1e-4}',
        "requirements.txt": "torch\n",
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name):
    for place, text in FOLDERS[name].items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    history = read_history(tmp_path)
    assert history.train_loss.tolist() == TRAIN
    assert history.train_step.tolist() == [1, 2, 3]
    assert history.of("val_loss")[0].tolist() == [1, 2, 3]
    assert history.of("val_loss")[1].tolist() == pytest.approx(HIGHER)


def test_several_runs_of_a_folder(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "log.csv").write_text("step,loss\n" + lines("N,X"))
    assert list(read_histories(tmp_path)) == ["a", "b"]
    with pytest.raises(InputError, match="expected one run, got 2: a, b"):
        read_history(tmp_path)


def test_wandb_folders_and_halves_of_a_run(tmp_path, monkeypatch):
    """The link latest-run made one run two, and a run that was resumed offline is two folders."""
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    stamps = iter(("20260101_000000", "20260101_000001", "20260101_000002"))

    def part(run: str, first: int, last: int, **keywords) -> None:
        of = wandb.init(project="p", id=run, dir=str(tmp_path), settings=settings, **keywords)
        for step in range(first, last):
            of.log({"train/loss": 3 - step / 100}, step=step)
        of.finish()
        wandb.teardown()
        # A folder is named by its second: its name is made another, so that no test waits for one.
        (made,) = (
            each
            for each in (tmp_path / "wandb").glob(f"offline-run-*-{run}")
            if "2026010" not in each.name
        )
        target = made.with_name(f"offline-run-{next(stamps)}-{run}")
        made.rename(target)
        latest = tmp_path / "wandb" / "latest-run"
        latest.unlink(missing_ok=True)
        latest.symlink_to(target.name)

    part("one", 0, 10)
    for folder in (tmp_path, tmp_path / "wandb", tmp_path / "wandb" / "latest-run"):
        assert len(read_history(folder).train_step) == 10, folder
    part("one", 10, 20, resume="allow")
    assert read_history(tmp_path / "wandb").train_step.tolist() == list(range(20))
    part("two", 0, 5)
    assert list(read_histories(tmp_path / "wandb")) == ["one", "two"]


def test_tensorboard_runs_and_a_clock_that_jumps(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for run in ("a", "b"):
        for split, shift in (("train", 0.0), ("val", 0.125)):
            with SummaryWriter(str(tmp_path / run / split)) as writer:
                for step in range(6):
                    clock = 1000.0 + step - 100 * (step == 3)
                    writer.add_scalar("loss", 3.0 + shift, step, walltime=clock)
    runs = read_histories(tmp_path)
    assert list(runs) == ["a", "b"]
    for history in runs.values():
        assert history.train_step.tolist() == history.of("val_loss")[0].tolist() == list(range(6))
        assert set(history.of("val_loss")[1]) == {3.125}


def test_ranks_that_write_one_file(tmp_path):
    """Every second row went back: 397 of 398 rows were restarts."""
    path = tmp_path / "a.csv"
    pairs = [(step + ahead, 3 - step / 1000) for step in range(0, 1000, 10) for ahead in (20, 0)]
    path.write_text("step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in pairs))
    history = read_history(path)
    assert "2 writers of one run" in history.notes[0]
    assert history.digest().restarts_seen == 0 and len(history.train_step) == 102
    runs = [(step, 3 - step / 1000) for _ in range(20) for step in range(0, 360, 10)]
    path.write_text("step,val_loss\n" + "".join(f"{step},{loss}\n" for step, loss in runs))
    assert read_history(path).notes == []  # 20 runs behind each other


@pytest.mark.parametrize("ends_at", [0.95, 0.2])
def test_losses_of_unknown_level_are_not_compared(tmp_path, ends_at):
    """Their scale is a guess: neither a gap nor a leak may be told of them."""
    rows = [{"step": n, "loss": 2 + 2 * math.exp(-n / 60)} for n in range(1, 301)]
    for row in rows[9::10]:
        row["val/bpb"] = 1 + (ends_at - 1) * row["step"] / 300
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {
        bytes_per_token: {
            finding.signal
            for finding in diagnose(
                read_history(path, bytes_per_token=bytes_per_token).digest(), vocabulary_size=3
            ).findings
        }
        & {"generalisation-gap", "leakage-suspected"}
        for bytes_per_token in (None, 4.5)
    }
    assert not told[None] and told[4.5]


def test_bits_per_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"step": n, "train/loss": 3.0} for n in range(1, 41)]
    for row in rows[9::10]:
        row["val/bpb"] = 1.0 + row["step"] / 1000
    path.write_text(objects(*rows))
    exact = read_history(path, bytes_per_token=4.5)
    assert exact.of("val_loss")[1][0] == pytest.approx(1.01 * math.log(2) * 4.5)
    assert not exact.unscaled and not exact.notes
    scaled = read_history(path)
    assert scaled.unscaled == {"val_loss"} and "--bytes-per-token" in scaled.notes[0]
    # The median of the first 3 evaluations, at step 20, is the training loss there.
    assert scaled.of("val_loss")[1] == pytest.approx(
        [3 * (1 + n / 1000) / 1.02 for n in (10, 20, 30, 40)]
    )
    with pytest.raises(InputError, match="bytes_per_token: expected more than 0"):
        read_history(path, bytes_per_token=0.0)


def test_patterns_of_ones_own(tmp_path):
    path = tmp_path / "a.log"
    path.write_text(lines("at N we see X as the number") + "c4 scored 3.1 at 3\n")
    with pytest.raises(InputError, match="--pattern"):
        read_history(path)
    patterns = [
        r"at (?P<step>\d+) we see (?P<train_loss>\S+)",
        r"(?P<set>\w+) scored (?P<val_loss>\S+) at (?P<step>\d+)",
    ]
    history = read_history(path, patterns=patterns)
    assert history.train_loss.tolist() == TRAIN and history.main_set == "c4"
    for wrong, word in (
        (r"(", "a regular expression"),
        (r"(?P<x>.)", "groups named"),
        (r"a", "none of a loss"),
    ):
        with pytest.raises(InputError, match=f"--pattern: expected .*{word}"):
            read_history(path, patterns=[wrong])


def test_what_looks_like_a_loss_and_is_not_read_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(objects({"step": 1, "train_mean_nll": 2.0, "test/nll": 2.5, "lr": 1.0}))
    with pytest.raises(
        InputError,
        match=r"names seen: step, train_mean_nll, test/nll.*--tag train_loss=train_mean_nll",
    ):
        read_history(path)
    tags = {"train_loss": "train_mean_nll", "val_loss/test": "test/nll"}
    history = read_history(path, tags=tags)
    assert history.train_loss.tolist() == [2.0] and history.main_set == "test"
    path.write_text(
        objects({"step": 1, "loss": 2.0, "aux_loss": 1.0, "val_kl": 3, "loss_scale": 1.0})
    )
    assert read_history(path).notes == [
        "not read, though they look like losses: aux_loss (--tag train_loss=aux_loss)"
    ]


def test_what_is_left_out_is_said_with_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "step,loss,lr\n1,3.0,constant\n2,x,constant\n3\n4,3.0,1,9\ninf,3.0,1\n5,2.5,1\n"
    )
    history = read_history(path)
    assert history.train_loss.tolist() == [3.0, 2.5]
    assert history.notes == [
        "line 5: expected 3 cells, got 4; left out",
        "line 3: expected a number for loss, got 'x'; 1 cell left out",
        "line 2: expected a number for lr, got 'constant'; 2 cells left out",
        "line 6: expected a finite step, got inf; left out",
    ]


@pytest.mark.parametrize(
    ("name", "measure", "unit"),
    [
        ("Step", "step", ""),
        ("_step", "step", ""),
        ("trainLoss", "train_loss", "nats"),
        ("lm loss", "train_loss", "nats"),
        ("loss_metrics/global_avg_loss", "train_loss", "nats"),
        ("loss_metrics/global_max_loss", None, None),
        ("train/PPL", "train_loss", "perplexity"),
        ("val/bpb", "val_loss", "bits per byte"),
        ("eval/paloma/c4_en/loss", "val_loss/paloma/c4_en", "nats"),
        ("val_loss/dataloader_idx_0", "val_loss/dataloader_idx_0", "nats"),
        ("validation/wiki/lm_loss", "val_loss/wiki", "nats"),
        ("test_loss", "val_loss/test", "nats"),
        ("best_val_loss", None, None),
        ("val_aux_loss", None, None),
        ("eval_rewards/loss", None, None),
        ("loss_scale", None, None),
        ("lm loss vs samples", None, None),
        ("optim/LR (group 0)", "lr", ""),
        ("lr-AdamW/pg1", "lr", ""),
        ("num_input_tokens_seen", "tokens", ""),
        ("x" * 300, None, None),
    ],
)
def test_names(name, measure, unit):
    found = reading_of(name)
    assert (found.measure, found.unit) == (measure, unit) if measure else found is None


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("3.5", 3.5),
        (" -1e-3 ", -1e-3),
        ("nan", math.nan),
        ("5,000", 5000),
        ("1.2B", 1.2e9),
        ("16K", 16e3),
        ("10/6000", 10),
        ("0:01:02", 62),
        ("1 day, 0:00:01", 86401),
        ("1m 2s", 62),
        ("tensor(3.5, device='cuda:0')", 3.5),
        ("None", None),
        ("N/A", None),
        ("No log", None),
        ("", None),
        ("constant", "broken"),
        (True, "broken"),
        ([1], "broken"),
        (10**400, "broken"),
        ("9" * 5000, "broken"),
    ],
)
def test_cells(cell, value):
    if value == "broken":
        with pytest.raises(ValueError):
            number(cell)
    else:
        assert number(cell) == pytest.approx(value, nan_ok=True)
