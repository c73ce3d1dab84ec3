"""Mutants that no test can notice, each with the reason; ``mutants.py`` matches source lines."""

# (file, the line before, the line after, why no test can notice)
EQUIVALENT = [
    *(
        (
            "perplexity/data_checks/index.py",
            "inside = ((keys >> np.uint64(20)) & np.uint64(self._mask)) == 0",
            f"inside = ((keys >> np.uint64({bits})) & np.uint64(self._mask)) == 0",
            "all bits of a hash are equally random: other n-grams are kept, as many as before",
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
        'FLATTEN=target.backend == "cuda" and not target.own_accumulator,',
        'FLATTEN=target.backend != "cuda" and not target.own_accumulator,',
        "whether the compiler flattens a loop: the interpreter never does, results are the same",
    ),
    (
        "perplexity/monitor/validation.py",
        "return now - before > max(digest.settings.rise, digest.settings.standard_errors * error)",
        "return now - before >= max(digest.settings.rise, digest.settings.standard_errors * error)",
        "a mean of losses equals a threshold with probability zero; either verdict is right there",
    ),
    (
        "perplexity/monitor/readers/tensorboard.py",
        "while place + 12 <= size:",
        "while place + 12 < size:",
        "a file that ends 12 bytes behind a record holds no further whole one, read or not",
    ),
    (
        "perplexity/monitor/digest.py",
        "if at > place and (of_evaluation or not math.isfinite(value)):",
        "if at >= place and (of_evaluation or not math.isfinite(value)):",
        "a call with no losses changes nothing: time only",
    ),
    (
        "kernels/gpu/linear_kl.py",
        "partials = p_head[0].new_empty((DIVERGENCE_ROWS, spans, here), dtype=torch.float32)",
        "partials = p_head[1].new_empty((DIVERGENCE_ROWS, spans, here), dtype=torch.float32)",
        "an empty tensor of a stated dtype, on the one device that both matrices are on",
    ),
    (
        "perplexity/evaluation/baselines.py",
        "if loss > uniform * (1 + ROUNDING):",
        "if loss >= uniform * (1 + ROUNDING):",
        "a loss equals the bound with probability zero",
    ),
]
