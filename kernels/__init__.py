"""Device code and its CPU twin: per-token losses from hidden states, one file per kernel.

The folder is installed as ``perplexity.kernels`` and imports torch and triton only; triton is
imported where a kernel is launched. ``sums.py`` defines the numbers that every kernel computes.

Importing the package registers the torch operators (``operators/``). A saved program needs them
before it is loaded.
"""

# transformers imports a library named ``kernels``. From the repository's root that is this folder:
# a second registration of the operators would free the first one's memory.
if __name__ == "perplexity.kernels":
    from . import operators as operators
