"""Mutants that change nothing a test could observe, each with the reason; `mutants.py` matches them by text."""

# (file, the line before, the line after, why no test can notice)
EQUIVALENT = [
    (
        "perplexity/monitor/signals.py",
        "return now - before > max(digest.settings.rise, digest.settings.standard_errors * error)",
        "return now - before >= max(digest.settings.rise, digest.settings.standard_errors * error)",
        "a mean of losses equals a threshold with probability zero, and either verdict is right there",
    ),
]
