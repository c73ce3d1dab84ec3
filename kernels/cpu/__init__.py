"""Plain PyTorch with the contracts of the kernels, in blocks that stay in the caches: the fallback,
and the fast path on a CPU.
"""
