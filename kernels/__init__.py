"""Device code and its CPU twin: per-token loss straight from hidden states, one file a kernel.

Installed as ``perplexity.kernels``; imports torch and triton only, triton only where a kernel is
launched. What the numbers mean that every kernel computes is said in ``sums.py``.

Importing it registers the torch operators (``operators/``), which a saved program needs before it
is loaded.
"""

# transformers imports a library named ``kernels``, which from the repository's root is this folder:
# operators registered a second time would take the first ones' memory away.
if __name__ == "perplexity.kernels":
    from . import operators as operators
