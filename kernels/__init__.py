"""Device code and its CPU twin: per-token loss straight from hidden states, one file a kernel.

Installed as ``perplexity.kernels``; imports torch and triton only, triton only where a kernel is launched. What the
numbers mean that every kernel computes is said in ``sums.py``.
"""
