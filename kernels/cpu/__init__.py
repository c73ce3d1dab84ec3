"""The same contracts in plain PyTorch, in blocks that stay in the caches: the fallback, and the fast path on a CPU."""
