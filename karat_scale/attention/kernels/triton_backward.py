"""The backward kernels, which recompute scores and harmonics: dA = sum_f (dH S_f^T) f(A), dC_f = f(A)^T dH.

S_f are the slopes of the learned functions, such that their derivative is sum_f S_f f(x): m b_m beside cos(m x)
and -m a_m beside sin(m x). No sum runs across programs: what several of them add to goes through partial sums.
"""

import triton
import triton.language as tl

from karat_scale.attention.kernels.triton_features import load_rows, rotate, sine_cosine, store_rows


@triton.jit
def grad_side_kernel(
    own,
    other,
    grad_hidden,
    slopes,
    grad_own,
    heads,
    tokens,
    padded_tokens,
    scale,
    own_b,
    own_h,
    own_n,
    other_b,
    other_h,
    other_n,
    grad_b,
    grad_h,
    grad_n,
    OWN_IS_QUERY: tl.constexpr,
    GRID: tl.constexpr,
    UNROLL: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of query (own = query, other = key) or of key (the reverse): one program, one tile of own.

    grad_hidden is dH [B, h, N, RANK]; slopes are S [h, 2G, padded N, RANK], zero in their padding.
    """
    tiles = tl.cdiv(tokens, BLOCK_OWN)
    tile = tl.program_id(0) % tiles
    item = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = item // heads, item % heads
    dtype = own.dtype.element_ty
    own += batch * own_b + head * own_h
    other += batch * other_b + head * other_h
    grad_own += batch * grad_b + head * grad_h
    slopes += head * (2 * GRID) * padded_tokens * RANK
    grad_hidden += item * tokens * RANK

    ranks = tl.arange(0, RANK)
    rows = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    x = load_rows(own, rows, own_n, tokens, WIDTH, BLOCK_WIDTH)
    total = tl.zeros((BLOCK_OWN, BLOCK_WIDTH), tl.float32)
    if OWN_IS_QUERY:
        upstream = load_rows(grad_hidden, rows, RANK, tokens, RANK, RANK)
    for first in range(0, tokens, BLOCK_OTHER):
        columns = first + tl.arange(0, BLOCK_OTHER)
        y = load_rows(other, columns, other_n, tokens, WIDTH, BLOCK_WIDTH)
        scores = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale
        sin_step, cos_step = sine_cosine(scores, FAST)
        sin, cos = sin_step, cos_step
        grad_scores = tl.zeros((BLOCK_OWN, BLOCK_OTHER), tl.float32)
        if OWN_IS_QUERY:
            pointers = slopes + columns[:, None] * RANK + ranks[None, :]
        else:
            pointers = slopes + rows[:, None] * RANK + ranks[None, :]
            upstream = load_rows(grad_hidden, columns, RANK, tokens, RANK, RANK)
        for m in tl.range(0, GRID, loop_unroll_factor=UNROLL):
            cos_slopes = tl.load(pointers + (2 * m) * padded_tokens * RANK)
            sin_slopes = tl.load(pointers + (2 * m + 1) * padded_tokens * RANK)
            if OWN_IS_QUERY:
                grad_scores += tl.dot(upstream, tl.trans(cos_slopes), input_precision=PRECISION) * cos
                grad_scores += tl.dot(upstream, tl.trans(sin_slopes), input_precision=PRECISION) * sin
            else:
                grad_scores += tl.dot(cos_slopes, tl.trans(upstream), input_precision=PRECISION) * cos
                grad_scores += tl.dot(sin_slopes, tl.trans(upstream), input_precision=PRECISION) * sin
            sin, cos = rotate(sin, cos, sin_step, cos_step)
        total = tl.dot(grad_scores.to(dtype), y, total, input_precision=PRECISION)
    store_rows(grad_own, rows, grad_n, tokens, total * scale, WIDTH, BLOCK_WIDTH)


@triton.jit
def grad_coef_kernel(
    query,
    key,
    grad_hidden,
    partial,
    batches,
    batches_per_part,
    heads,
    tokens,
    padded_tokens,
    scale,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dC of one key tile, one group of harmonics, one head, summed over one part of the batch.

    partial is [parts, h, GROUPS, 2 GROUP, padded N, RANK] in float32, cosine and sine by turns.
    """
    tiles = tl.cdiv(tokens, BLOCK_KEY)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % GROUPS
    head = (tl.program_id(0) // (tiles * GROUPS) % heads).to(tl.int64)
    part = (tl.program_id(0) // (tiles * GROUPS * heads)).to(tl.int64)
    first_batch = part * batches_per_part
    dtype = query.dtype.element_ty
    query += head * query_h
    key += head * key_h

    keys = tile * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    totals = ()
    for _ in tl.static_range(2 * GROUP):
        totals = totals + (tl.zeros((BLOCK_KEY, RANK), tl.float32),)
    for offset in range(0, tl.minimum(batches_per_part, batches - first_batch).to(tl.int32)):
        batch = first_batch + offset
        k = load_rows(key + batch * key_b, keys, key_n, tokens, WIDTH, BLOCK_WIDTH)
        upstream_rows = grad_hidden + (batch * heads + head) * tokens * RANK
        for first in range(0, tokens, BLOCK_QUERY):
            rows = first + tl.arange(0, BLOCK_QUERY)
            q = load_rows(query + batch * query_b, rows, query_n, tokens, WIDTH, BLOCK_WIDTH)
            upstream = load_rows(upstream_rows, rows, RANK, tokens, RANK, RANK)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            sin_step, cos_step = sine_cosine(scores, FAST)
            sin, cos = sin_step, cos_step
            if GROUPS > 1:
                sin, cos = sine_cosine(scores * (group * GROUP + 1).to(tl.float32), FAST)
            sums = ()
            for m in tl.static_range(GROUP):
                by_cos = tl.dot(cos.to(dtype), upstream, totals[2 * m], input_precision=PRECISION)
                by_sin = tl.dot(sin.to(dtype), upstream, totals[2 * m + 1], input_precision=PRECISION)
                sums = sums + (by_cos, by_sin)
                if m + 1 < GROUP:
                    sin, cos = rotate(sin, cos, sin_step, cos_step)
            totals = sums
    block = ((part * heads + head) * GROUPS + group) * (2 * GROUP)
    for f in tl.static_range(2 * GROUP):
        store_rows(partial + (block + f) * padded_tokens * RANK, keys, RANK, padded_tokens, totals[f], RANK, RANK)
