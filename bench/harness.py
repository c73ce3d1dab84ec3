"""lm-evaluation-harness with and without logits: ``python bench/harness.py``.

Each of its Hugging Face model and ours scores one batch of 8 texts of 1,024 tokens with a
vocabulary of 128,256, in a process of its own. Measured are the time, and the rise of the high-water
mark of memory above what the loaded model takes. The results go to
bench/results/cpu-<name>-harness.json. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from environment import RESULTS, SUPPORT, commit, cpu_name, now, slug, version, write

ONE = """
import json, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from tiny_models import build_tokenizer
from peak_memory import high_water, reset_high_water
from lm_eval.models.huggingface import HFLM
from perplexity.integrations.lm_eval import FusedHFLM
torch.manual_seed(0)
sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
config = LlamaConfig(vocab_size=128_256, max_position_embeddings=1024, **sizes)
model = LlamaForCausalLM(config).eval()
kind = {"hf": HFLM, "fused-hf": FusedHFLM}[NAME]
scorer = kind(pretrained=model, tokenizer=build_tokenizer(bos=True), batch_size=8)
ids = torch.randint(128_256, (8, 1025)).tolist()
requests = [(None, row[:1], row[1:]) for row in ids]
scorer._loglikelihood_tokens([(None, [1], [2])], disable_tqdm=True)
reset_high_water()
before, begin = high_water(), time.perf_counter()
answers = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
seconds = time.perf_counter() - begin
print(json.dumps(dict(mib=(high_water() - before) / 2**20, seconds=seconds, loss=answers[0][0])))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"cpu-{slug(cpu_name())}-harness.json"
    )
    options = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])}
    measured = {}
    for name in ("hf", "fused-hf"):
        command = [sys.executable, "-c", f"NAME = {name!r}\n{ONE}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        measured[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, measured[name])
    ratio = measured["fused-hf"]["mib"] / measured["hf"]["mib"]
    print(f"memory {ratio:.3f} of the harness's own")
    results = dict(
        device=cpu_name(),
        date=now(),
        commit=commit(),
        lm_eval=version("lm_eval"),
        torch=version("torch"),
        measured=measured,
        memory_ratio=ratio,
    )
    write(results, options.out)


if __name__ == "__main__":
    main()
