"""What a check of the data may find."""

SIGNALS = (
    *("leakage", "shared-passages", "repeated-validation", "validation-size", "distribution-shift", "unknown-tokens"),
    *("ids-beyond-embedding", "unseen-tokens", "round-trip-loss", "tokenizer-fit", "overlap-unknown"),
)
