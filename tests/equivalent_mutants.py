"""Mutants that change nothing a test could observe, each with the reason; `mutants.py` matches them
by text.
"""

NVIDIA = " # type: ignore[operator] # cuda's arch is an int"

# (file, the line before, the line after, why no test can notice)
EQUIVALENT = [
    *(
        (
            "perplexity/data_checks/index.py",
            "inside = ((found >> np.uint64(20)) & np.uint64(self._mask)) == 0",
            f"inside = ((found >> np.uint64({bits})) & np.uint64(self._mask)) == 0",
            "all bits of a hash are equally random: another part of the n-grams is kept, of the same size",
        )
        for bits in (19, 21)
    ),
    (
        "perplexity/scoring/stream.py",
        'if self.device.type == "cuda":',
        'if self.device.type != "cuda":',
        "torch.cuda.empty_cache does nothing before CUDA is used; on a GPU it only returns memory",
    ),
    (
        "kernels/gpu/nll.py",
        "and logits.stride(1) == 1",
        "or logits.stride(1) == 1",
        "the size of a tile and a limit of registers: speed only",
    ),
    (
        "kernels/gpu/linear_nll.py",
        'return dict(FLATTEN=target.backend == "cuda" and target.arch < 100, PARTS=4)' + NVIDIA,
        'return dict(FLATTEN=target.backend != "cuda" and target.arch < 100, PARTS=4)' + NVIDIA,
        "whether the compiler flattens a loop: the interpreter has no such choice, results are the same",
    ),
    (
        "perplexity/monitor/signals.py",
        "return now - before > max(digest.settings.rise, digest.settings.standard_errors * error)",
        "return now - before >= max(digest.settings.rise, digest.settings.standard_errors * error)",
        "a mean of losses equals a threshold with probability zero, and either verdict is right there",
    ),
    (
        "perplexity/monitor/readers/tensorboard.py",
        "while place + 12 <= size:",
        "while place + 12 < size:",
        "a file that ends 12 bytes behind a record holds no further whole one: read or not, its end is missed",
    ),
    (
        "perplexity/monitor/history.py",
        "if at > place:",
        "if at >= place:",
        "no losses are given on in a call of its own: time only",
    ),
    (
        "kernels/gpu/linear_kl.py",
        "partials = p_head[0].new_empty((DIVERGENCE_ROWS, spans, here), dtype=torch.float32)",
        "partials = p_head[1].new_empty((DIVERGENCE_ROWS, spans, here), dtype=torch.float32)",
        "an empty tensor of a stated dtype, on the one device that both matrices are on",
    ),
    (
        "perplexity/evaluation/evaluator.py",
        'if summary["loss"] > uniform * (1 + ROUNDING):',
        'if summary["loss"] >= uniform * (1 + ROUNDING):',
        "a loss equals the bound with probability zero",
    ),
]
