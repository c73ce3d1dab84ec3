"""Time and memory of an evaluation beside its peers: ``python bench/evaluation.py``.

One text goes through ``evaluate``, lm-evaluation-harness' rolling log-likelihood (one and two
windows in a batch), Hugging Face's guide to perplexity, ``model(input_ids, labels=input_ids)``, and
through the body and ``token_nll`` alone, which is what an evaluation cannot do without. The
providers run in turn on this CPU, each in a process of its own (support/evaluation_cost.py), with a
head that is large beside its body and with a body that is large beside its head. Measured are
tokens a second, tokenising included, the seconds of what a run does once (the check of a model),
and the memory beyond the model. The results go to bench/results/cpu-<name>-evaluation.json. Nothing
is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

from environment import RESULTS, SUPPORT, commit, cpu_name, now, numbers_of, slug, version, write

sys.path.insert(0, str(SUPPORT))
from evaluation_cost import CONTEXT, MODELS, PROVIDERS

SCRIPT = SUPPORT / "evaluation_cost.py"  # prints bytes, seconds, loss, tokens and fixed seconds
NAMES = {
    "ours": "perplexity.evaluate",
    "alone": "body and token_nll alone",
    "plain": "model(input_ids, labels=input_ids)",
    "guide": "Hugging Face's guide, stride 1,024",
    "lm-eval-1": "lm-eval, rolling, batch size 1",
    "lm-eval-2": "lm-eval, rolling, batch size 2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"cpu-{slug(cpu_name())}-evaluation.json"
    )
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for model in MODELS:
        runs = {provider: [] for provider in PROVIDERS}
        for _ in range(options.rounds):
            for provider, measured in runs.items():
                measured.append(numbers_of(SCRIPT, provider, model, str(options.windows)))
        for provider, measured in runs.items():
            peaks, seconds, losses, tokens, fixed = zip(*measured, strict=True)
            rows.append(
                dict(
                    model=model,
                    provider=provider,
                    tokens_a_second=statistics.median(
                        n / s for n, s in zip(tokens, seconds, strict=True)
                    ),
                    seconds_once=statistics.median(fixed),
                    peak_bytes=int(statistics.median(peaks)),
                    loss=losses[0],
                    tokens=int(tokens[0]),
                )
            )
    write(
        dict(
            device=cpu_name(),
            cores=os.cpu_count(),
            torch=version("torch"),
            transformers=version("transformers"),
            lm_eval=version("lm_eval"),
            date=now(),
            commit=commit(),
            models=MODELS,
            context_length=CONTEXT,
            rows=rows,
        ),
        options.out,
    )
    for row in rows:
        ours = next(
            other
            for other in rows
            if other["provider"] == "ours" and other["model"] == row["model"]
        )
        print(
            f"{row['model']:10}  {NAMES[row['provider']]:36} {row['tokens_a_second']:8,.0f} tokens/s "
            f"(ours {ours['tokens_a_second'] / row['tokens_a_second']:.2f} ×)  "
            f"{row['peak_bytes'] / 2**20:7,.0f} MiB  {row['seconds_once']:5.2f} s once  loss {row['loss']:.6f}"
        )
    print(options.out)


if __name__ == "__main__":
    main()
