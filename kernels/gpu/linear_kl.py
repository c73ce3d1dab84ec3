"""KL divergence per token between two heads over one vocabulary, without the N × V logits.

With a the logits of P, b those of Q, each softcap · tanh(logit_scale · (hidden @ weightᵀ + bias) /
softcap), and m_p, m_q their maxima:

    p = exp(a − m_p) / s_p, and q likewise
    gap = Σ_v exp(a − m_p) · ((a − m_p) − (b − m_q)), in which no constant cancels
    KL(P‖Q) = Σ_v p_v · (log p_v − log q_v) = gap / s_p − log s_p + log s_q

    ∂KL/∂b = q − p        ∂KL/∂a = p · ((log p − log q) − KL)

The five numbers of a token, (m_p, s_p, m_q, s_q, gap), are running values over a span of the
vocabulary. ``merge_divergence`` folds the spans in plain PyTorch on vectors, for both backends. The
gradient kernel recomputes both tiles of logits and writes the tile of one side's logit gradient.
The vendor's library multiplies with it (``chunks``).

Cost: 2·N·V·(D_p + D_q) operations forward, again that and 4·N·V·D for each side's gradients;
temporary memory 20 · ceil(V / SPAN) · N bytes forward, one block of logit gradients backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..chunks import WHOLE, accumulate_gradients, gradient_block, written_whole
from ..dispatch import DEFAULT, PLAIN, TRITON_LIMIT, Plan, Rule, describable
from ..sums import DIVERGENCE_ROWS, Head, divergence_vectors, merge_divergence
from .launch import launch, load_row, target_of, widen_products
from .linear_nll import GROUP, SPAN, span_and_row
from .logit_tile import (
    apply_rule,
    column_parts,
    described,
    head_arguments,
    logit_tile,
    product_tile,
    tile_configuration,
    vectorised,
)


@triton.jit
def _fold(
    sums,  # of the columns before: p_maximum, p_sum, q_maximum, q_sum, gap
    a,  # float32 [BLOCK_N, columns], logits of P, −inf past V
    b,  # likewise of Q
):
    """Return the sums with these columns added."""
    p_maximum, p_sum, q_maximum, q_sum, gap = sums
    p_new = tl.maximum(p_maximum, tl.max(a, axis=1))
    q_new = tl.maximum(q_maximum, tl.max(b, axis=1))
    # All logits may be −inf (a bias may hold −inf): any finite reference avoids inf − inf.
    p_reference = tl.where(p_new == -float("inf"), 0.0, p_new)
    q_reference = tl.where(q_new == -float("inf"), 0.0, q_new)
    a -= p_reference[:, None]
    b -= q_reference[:, None]
    p_decay = tl.exp(p_maximum - p_reference)
    exponentials = tl.exp(a)
    # The old gap refers to the old maxima, and both maxima may have moved.
    p_moved = p_maximum - p_reference
    q_moved = tl.where(q_maximum == -float("inf"), 0.0, q_maximum) - q_reference
    moved = tl.where(p_decay * p_sum > 0.0, p_decay * (gap + p_sum * (p_moved - q_moved)), 0.0)
    gap = moved + tl.sum(tl.where(exponentials > 0.0, exponentials * (a - b), 0.0), axis=1)
    p_sum = p_sum * p_decay + tl.sum(exponentials, axis=1)
    q_sum = q_sum * tl.exp(q_maximum - q_reference) + tl.sum(tl.exp(b), axis=1)
    return p_new, p_sum, q_new, q_sum, gap


@triton.jit(do_not_specialize=["N", "spans"])
def _kl_partials_kernel(
    p_hidden_ptr,  # [N, D_p], all four descriptors where DESCRIBED
    p_weight_ptr,  # [V, D_p]
    p_bias_ptr,  # [V]
    q_hidden_ptr,  # [N, D_q]
    q_weight_ptr,  # [V, D_q]
    q_bias_ptr,  # [V]
    partials_ptr,  # float32 [5, spans, N]: m_p, s_p, m_q, s_q, gap
    N,
    V,
    spans,
    p_D,
    q_D,
    p_hidden_stride_n,
    p_hidden_stride_d,
    p_weight_stride_v,
    p_weight_stride_d,
    p_bias_stride,
    q_hidden_stride_n,
    q_hidden_stride_d,
    q_weight_stride_v,
    q_weight_stride_d,
    q_bias_stride,
    p_logit_scale,
    p_softcap,
    q_logit_scale,
    q_softcap,
    P_HAS_BIAS: tl.constexpr,
    P_HAS_SOFTCAP: tl.constexpr,
    P_EVEN_D: tl.constexpr,
    Q_HAS_BIAS: tl.constexpr,
    Q_HAS_SOFTCAP: tl.constexpr,
    Q_EVEN_D: tl.constexpr,
    FLUSH: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PARTS: tl.constexpr,  # number of parts in which a pair of tiles is summed
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    span, first_row = span_and_row(N, spans, GROUP, BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_N)
    exists = rows < N

    nothing = tl.zeros([BLOCK_N], dtype=tl.float32)
    sums = nothing - float("inf"), nothing, nothing - float("inf"), nothing, nothing
    for start in range(span * SPAN, min(span * SPAN + SPAN, V), BLOCK_V):
        p_accumulator = product_tile(
            hidden_ptr=p_hidden_ptr,
            weight_ptr=p_weight_ptr,
            first_row=first_row,
            first_column=start,
            N=N,
            V=V,
            D=p_D,
            hidden_stride_n=p_hidden_stride_n,
            hidden_stride_d=p_hidden_stride_d,
            weight_stride_v=p_weight_stride_v,
            weight_stride_d=p_weight_stride_d,
            EVEN_D=P_EVEN_D,
            WIDEN=WIDEN,
            PRECISION=PRECISION,
            BLOCK_N=BLOCK_N,
            BLOCK_V=BLOCK_V,
            BLOCK_D=BLOCK_D,
            DESCRIBED=DESCRIBED,
        )
        q_accumulator = product_tile(
            hidden_ptr=q_hidden_ptr,
            weight_ptr=q_weight_ptr,
            first_row=first_row,
            first_column=start,
            N=N,
            V=V,
            D=q_D,
            hidden_stride_n=q_hidden_stride_n,
            hidden_stride_d=q_hidden_stride_d,
            weight_stride_v=q_weight_stride_v,
            weight_stride_d=q_weight_stride_d,
            EVEN_D=Q_EVEN_D,
            WIDEN=WIDEN,
            PRECISION=PRECISION,
            BLOCK_N=BLOCK_N,
            BLOCK_V=BLOCK_V,
            BLOCK_D=BLOCK_D,
            DESCRIBED=DESCRIBED,
        )
        p_parts = column_parts(p_accumulator, PARTS)
        q_parts = column_parts(q_accumulator, PARTS)
        for part in tl.static_range(PARTS):
            columns = start + part * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
            read = tl.minimum(columns, V - 1)
            a = apply_rule(
                logits=p_parts[part],
                bias_ptr=p_bias_ptr,
                columns=read,
                bias_stride=p_bias_stride,
                logit_scale=p_logit_scale,
                softcap=p_softcap,
                HAS_BIAS=P_HAS_BIAS,
                HAS_SOFTCAP=P_HAS_SOFTCAP,
                FLUSH=FLUSH,
            )
            b = apply_rule(
                logits=q_parts[part],
                bias_ptr=q_bias_ptr,
                columns=read,
                bias_stride=q_bias_stride,
                logit_scale=q_logit_scale,
                softcap=q_softcap,
                HAS_BIAS=Q_HAS_BIAS,
                HAS_SOFTCAP=Q_HAS_SOFTCAP,
                FLUSH=FLUSH,
            )
            inside = (columns < V)[None, :]
            sums = _fold(
                sums, tl.where(inside, a, -float("inf")), tl.where(inside, b, -float("inf"))
            )
    p_maximum, p_sum, q_maximum, q_sum, gap = sums

    plane = spans.to(tl.int64) * N
    partials_ptr += span.to(tl.int64) * N + rows
    tl.store(partials_ptr, p_maximum, mask=exists)
    tl.store(partials_ptr + plane, p_sum, mask=exists)
    tl.store(partials_ptr + 2 * plane, q_maximum, mask=exists)
    tl.store(partials_ptr + 3 * plane, q_sum, mask=exists)
    tl.store(partials_ptr + 4 * plane, gap, mask=exists)


@triton.jit(do_not_specialize=["N", "N_all", "first_column"])
def _kl_gradient_kernel(
    p_hidden_ptr,  # [N, D_p]
    p_weight_ptr,  # [V, D_p]
    p_bias_ptr,  # [V]
    q_hidden_ptr,  # [N, D_q]
    q_weight_ptr,  # [V, D_q]
    q_bias_ptr,  # [V]
    # float32 [6, N_all], offset to the first token: m_p, log s_p, m_q, log s_q, KL, upstream
    vectors_ptr,
    gradient_ptr,  # [N, columns_here]
    N,
    N_all,
    V,
    first_column,
    columns_here,
    p_D,
    q_D,
    p_hidden_stride_n,
    p_hidden_stride_d,
    p_weight_stride_v,
    p_weight_stride_d,
    p_bias_stride,
    q_hidden_stride_n,
    q_hidden_stride_d,
    q_weight_stride_v,
    q_weight_stride_d,
    q_bias_stride,
    p_logit_scale,
    p_softcap,
    q_logit_scale,
    q_softcap,
    P_HAS_BIAS: tl.constexpr,
    P_HAS_SOFTCAP: tl.constexpr,
    P_EVEN_D: tl.constexpr,
    Q_HAS_BIAS: tl.constexpr,
    Q_HAS_SOFTCAP: tl.constexpr,
    Q_EVEN_D: tl.constexpr,
    FOR_P: tl.constexpr,  # which side's logits the gradient is of
    FLUSH: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    first_row = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_N
    first_local_column = (tl.program_id(0) // row_blocks) * BLOCK_V
    rows = first_row + tl.arange(0, BLOCK_N)
    local_columns = first_local_column + tl.arange(0, BLOCK_V)
    exists = rows < N
    a = logit_tile(
        hidden_ptr=p_hidden_ptr,
        weight_ptr=p_weight_ptr,
        bias_ptr=p_bias_ptr,
        first_row=first_row,
        first_column=first_column + first_local_column,
        N=N,
        V=V,
        D=p_D,
        hidden_stride_n=p_hidden_stride_n,
        hidden_stride_d=p_hidden_stride_d,
        weight_stride_v=p_weight_stride_v,
        weight_stride_d=p_weight_stride_d,
        bias_stride=p_bias_stride,
        logit_scale=p_logit_scale,
        softcap=p_softcap,
        HAS_BIAS=P_HAS_BIAS,
        HAS_SOFTCAP=P_HAS_SOFTCAP,
        FLUSH=FLUSH,
        EVEN_D=P_EVEN_D,
        WIDEN=WIDEN,
        PRECISION=PRECISION,
        BLOCK_N=BLOCK_N,
        BLOCK_V=BLOCK_V,
        BLOCK_D=BLOCK_D,
    )
    b = logit_tile(
        hidden_ptr=q_hidden_ptr,
        weight_ptr=q_weight_ptr,
        bias_ptr=q_bias_ptr,
        first_row=first_row,
        first_column=first_column + first_local_column,
        N=N,
        V=V,
        D=q_D,
        hidden_stride_n=q_hidden_stride_n,
        hidden_stride_d=q_hidden_stride_d,
        weight_stride_v=q_weight_stride_v,
        weight_stride_d=q_weight_stride_d,
        bias_stride=q_bias_stride,
        logit_scale=q_logit_scale,
        softcap=q_softcap,
        HAS_BIAS=Q_HAS_BIAS,
        HAS_SOFTCAP=Q_HAS_SOFTCAP,
        FLUSH=FLUSH,
        EVEN_D=Q_EVEN_D,
        WIDEN=WIDEN,
        PRECISION=PRECISION,
        BLOCK_N=BLOCK_N,
        BLOCK_V=BLOCK_V,
        BLOCK_D=BLOCK_D,
    )
    plane = N_all.to(tl.int64)
    vectors_ptr += rows
    log_p = a - load_row(vectors_ptr, 0, plane, exists)[:, None]
    log_p -= load_row(vectors_ptr, 1, plane, exists)[:, None]
    log_q = b - load_row(vectors_ptr, 2, plane, exists)[:, None]
    log_q -= load_row(vectors_ptr, 3, plane, exists)[:, None]
    p = tl.exp(log_p)
    if FOR_P:
        divergence = load_row(vectors_ptr, 4, plane, exists)[:, None]
        gradient = tl.where(p > 0.0, p * ((log_p - log_q) - divergence), 0.0)
    else:
        gradient = tl.exp(log_q) - p
    gradient *= load_row(vectors_ptr, 5, plane, exists)[:, None]
    if FOR_P:
        if P_HAS_SOFTCAP:
            capped = a * (1.0 / p_softcap)
            gradient *= tl.fma(-capped, capped, 1.0)
        gradient *= p_logit_scale
    else:
        if Q_HAS_SOFTCAP:
            capped = b * (1.0 / q_softcap)
            gradient *= tl.fma(-capped, capped, 1.0)
        gradient *= q_logit_scale
    tl.store(
        gradient_ptr + rows[:, None] * columns_here + local_columns[None, :],
        gradient.to(gradient_ptr.dtype.element_ty),
        mask=exists[:, None] & (local_columns < columns_here)[None, :],
    )


def _arguments(
    p_head: Head, q_head: Head, rules: tuple[Rule, Rule], may_describe: bool = False
) -> tuple[dict, dict, dict]:
    """Return arguments, constants and options of both kernels."""
    # Dicts of values of any type.
    target, arguments, constants = target_of(p_head[0]), {}, {}  # type: ignore[var-annotated]
    for prefix, head, rule in zip("pq", (p_head, q_head), rules, strict=True):
        side_arguments, side_constants = head_arguments(*head, rule)
        vocabulary = side_arguments.pop("V")
        arguments |= {f"{prefix}_{name}": value for name, value in side_arguments.items()}
        constants |= {f"{prefix.upper()}_{name}": value for name, value in side_constants.items()}
    matrices = [arguments[f"{side}_{name}_ptr"] for side in "pq" for name in ("hidden", "weight")]
    # One tile size for both sides: of the side that leaves less room.
    dtype = max((matrix.dtype for matrix in matrices), key=lambda dtype: dtype.itemsize)
    describes = may_describe and all(describable(target, matrix) for matrix in matrices)
    tiles, options = tile_configuration(
        target, dtype, all(map(vectorised, matrices)), "divergence", describes
    )
    constants |= dict(
        P_EVEN_D=arguments["p_D"] % tiles["BLOCK_D"] == 0,
        Q_EVEN_D=arguments["q_D"] % tiles["BLOCK_D"] == 0,
        WIDEN=any(widen_products(target, matrix.dtype) for matrix in matrices),
        PRECISION=target.float32_products,
        FLUSH=target.backend == "cuda",
        **tiles,
    )
    if describes:
        arguments = described(described(arguments, tiles, "p_"), tiles, "q_")
    if may_describe:
        constants["DESCRIBED"] = describes
    return arguments | dict(V=vocabulary), constants, options


def linear_kl(
    p_head: Head,
    q_head: Head,
    p_rule: Rule = PLAIN,
    q_rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
) -> torch.Tensor:
    """Return the five rows of every token, float32 [5, N].

    A head is hidden [N, D], weight [V, D] and bias [V]. The plan's ``memory_limit`` bounds the
    partial rows, in bytes.
    """
    tokens, vocabulary = p_head[0].shape[0], p_head[1].shape[0]
    spans = triton.cdiv(vocabulary, SPAN)
    size = max(1, (plan.memory_limit or TRITON_LIMIT) // (4 * DIVERGENCE_ROWS * spans))
    chunks = []
    for start in range(0, tokens, size):
        heads = [(head[0][start : start + size], *head[1:]) for head in (p_head, q_head)]
        arguments, constants, options = _arguments(
            *heads,  # type: ignore[call-arg, misc, arg-type]  # two heads
            (p_rule, q_rule),
            may_describe=True,
        )
        here = heads[0][0].shape[0]
        partials = p_head[0].new_empty((DIVERGENCE_ROWS, spans, here), dtype=torch.float32)
        launch(
            _kl_partials_kernel,
            (triton.cdiv(here, constants["BLOCK_N"]) * spans,),
            arguments | dict(partials_ptr=partials, N=here, spans=spans),
            constants | dict(SPAN=SPAN, GROUP=GROUP, PARTS=4 if constants["DESCRIBED"] else 1),
            options,
        )
        chunks.append(merge_divergence(partials))
    return (
        torch.cat(chunks, dim=1)
        if chunks
        else p_head[0].new_empty((DIVERGENCE_ROWS, 0), dtype=torch.float32)
    )


def linear_kl_grad(
    upstream: torch.Tensor,
    rows: torch.Tensor,
    p_head: Head,
    q_head: Head,
    p_rule: Rule = PLAIN,
    q_rule: Rule = PLAIN,
    plan: Plan = DEFAULT,
    *,
    p_needs: tuple[bool, bool, bool] = (True, True, True),
    q_needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of hidden, weight and bias of P, then of Q.

    They follow from ``upstream`` [N] and the forward's ``rows`` [5, N].
    """
    vectors = divergence_vectors(upstream, rows)
    arguments, constants, options = _arguments(p_head, q_head, (p_rule, q_rule))
    tokens = p_head[0].shape[0]
    sides = [(True, p_head, p_needs), (False, q_head, q_needs)]
    memory_limit = plan.memory_limit or TRITON_LIMIT
    blocks = []
    for _, head, needs in sides:
        size = head[0].element_size()
        block = gradient_block(*head[:2], needs, memory_limit, per_logit=size)
        blocks.append(written_whole(block, size, memory_limit))
    most = max(
        (
            block[0] * stride
            for (block, stride), (_, _, needs) in zip(blocks, sides, strict=True)
            if any(needs)
        ),
        default=0,
    )
    gradients = []
    for (for_p, head, needs), (block, stride) in zip(sides, blocks, strict=True):
        if not any(needs):
            gradients += [None] * 3
            continue
        buffer = None  # freed first: else two buffers are in memory together
        buffer = head[0].new_empty(most)

        def logit_gradient(
            chunk: slice, columns: slice, for_p=for_p, buffer=buffer, stride=stride
        ) -> torch.Tensor:
            count, real = chunk.stop - chunk.start, columns.stop - columns.start
            width = min(stride, -(-real // WHOLE) * WHOLE)
            out = buffer[: count * width].view(count, width)
            here = {name: arguments[name][chunk] for name in ("p_hidden_ptr", "q_hidden_ptr")}
            tiles = triton.cdiv(count, constants["BLOCK_N"]) * triton.cdiv(
                width, constants["BLOCK_V"]
            )
            launch(
                _kl_gradient_kernel,
                (tiles,),
                arguments
                | here
                | dict(
                    vectors_ptr=vectors[:, chunk],
                    gradient_ptr=out,
                    N=count,
                    N_all=tokens,
                    first_column=columns.start,
                    columns_here=width,
                ),
                constants | dict(FOR_P=for_p),
                options,
            )
            return out[:, :real]

        gradients += accumulate_gradients(
            logit_gradient,
            *head,
            needs=needs,
            block=block,
        )  # type: ignore[arg-type]  # the list begins with Nones
    return tuple(gradients)
