"""Hugging Face Trainer with the fused loss and the monitor: ``python examples/trainer.py``."""

import argparse
import tempfile

import torch
from common import VOCABULARY, Text, small_model
from transformers import Trainer, TrainingArguments

from perplexity import Monitor
from perplexity.integrations.transformers import PerplexityCallback, use_fused_loss

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()

model = small_model()
use_fused_loss(model)  # the one line: no logits from here on
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=max(1, options.steps // 20),
        eval_strategy="steps",
        eval_steps=max(1, options.steps // 4),
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    callback = PerplexityCallback(
        Monitor(vocabulary_size=VOCABULARY, stop_on="danger", on_finding=print)
    )
    trainer = Trainer(model, arguments, train_dataset=Text("train"), eval_dataset=Text("valid"))
    callback.attach(trainer)
    trainer.train()
    metrics = trainer.evaluate()
verdict = callback.monitor.diagnose().verdict
print(f"perplexity {metrics['eval_perplexity']:.2f} of all tokens; {verdict}")
