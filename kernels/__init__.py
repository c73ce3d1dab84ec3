"""Device code: per-token loss straight from hidden states, one file a kernel.

Installed as ``perplexity.kernels``; imports torch and triton only, triton only where a kernel is launched. Importing it
registers the torch operators (``operators.py``), which a saved program needs before it is loaded.

Every kernel speaks of the same five per-token sums over the vocabulary, rows of one ``[5, N]`` tensor. With logits
``z[n, v]`` and class weights ``w[v]`` (1 where there are none):

===============  ==========================================  =====================================
row              value                                       what needs it
===============  ==========================================  =====================================
``MAX``          m = max_v z                                 a reference point, not differentiated
``SUM_EXP``      s = Σ_v exp(z − m)                          everything
``TARGET``       z at the target                             everything
``LOGIT_SUM``    Σ_v w · (z − m)                             label smoothing
``EXP_SHIFT``    u = Σ_v exp(z − m) · (z − m)                entropy
===============  ==========================================  =====================================

From them, per token: ``logsumexp = m + log s``, ``nll = (m − z_target) + log s``, ``entropy = log s − u / s``. A loss is
then arithmetic on vectors of N, which autograd differentiates, and a kernel only has to know the derivative of the sums:

    ∂/∂z = exp(z − m) · (g_SUM_EXP + g_EXP_SHIFT · (1 + z − m)) + g_TARGET · [v = target] + g_LOGIT_SUM · w

The maximum counts as a constant: every quantity above is independent of the reference point it is computed from, so
moving m changes nothing and its derivative is left out exactly. Keeping m and s apart, and not their sum, and taking
every sum from m, is what keeps 1e-7 of relative precision at logits of 1e4. (Σ w · log s − LOGIT_SUM is a loss; LOGIT_SUM
alone moves with m.)

A token whose target is ``ignore_index`` has the sums (0, 1, 0, 0, 0): its loss, logsumexp and entropy are 0 and it
has no gradient. A target outside [0, V) gives NaN in ``TARGET``.
"""

MAX, SUM_EXP, TARGET, LOGIT_SUM, EXP_SHIFT = range(5)
SUMS = 5

# transformers imports a library named ``kernels``, which from the repository's root is this folder: operators registered a
# second time would take the first ones' memory away.
if __name__ == "perplexity.kernels":
    from . import operators as operators
