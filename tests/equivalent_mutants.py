"""Mutants that change nothing a test could observe, each with the reason; `mutants.py` matches them by text."""

# (file, the line before, the line after, why no test can notice)
EQUIVALENT: list[tuple[str, str, str, str]] = []
