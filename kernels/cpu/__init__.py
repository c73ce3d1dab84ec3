"""The kernels' contracts in plain PyTorch, in blocks that stay in a CPU's caches."""
