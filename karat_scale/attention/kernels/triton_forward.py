"""The forward kernel: H = sum_f f(A) C_f^T, key tile by key tile, and O = H U or, under a mask, O = S V."""

import triton
import triton.language as tl

from karat_scale.attention.kernels.triton_features import (
    add_product,
    base_value,
    half_harmonic_step,
    load_kept,
    load_pairs,
    load_projector,
    load_rows,
    next_half_harmonic,
    pair_scores,
    rotate,
    scaled,
    sine_cosine,
    store_rows,
)


@triton.jit
def forward_kernel(
    query,
    key,
    bias,
    bits,
    coef,
    coef_scale,
    narrow,
    proj,
    value,
    output,
    hidden,
    heads,
    rank,
    tokens,
    padded_tokens,
    scale,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    bias_b,
    bias_h,
    bias_n,
    bias_m,
    bits_b,
    bits_h,
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    GRID: tl.constexpr,
    HALF: tl.constexpr,
    BASE: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    SCALED_FIRST: tl.constexpr,
    FAST: tl.constexpr,
    SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes a query tile of one head of one image.

    coef, coef_scale, narrow and bits are `prepare_kernel`'s; hidden is H [B, h, N, RANK]. With bits, those of a mask, S
    is cut: narrow is None, and proj and value are read. Strides are those of batch (_b), head (_h), token (_n) and, of
    the bias [B, h, N, N] or None, key (_m). HALF computes harmonics in float16. SCALED_FIRST multiplies the
    query by the scale in place of the scores, which is exact for powers of two. SCORES and PRECISION are the input
    precisions of A = Q K^T and of all other products.
    """
    tiles = tl.cdiv(tokens, BLOCK_QUERY)
    tile = tl.program_id(0) % tiles
    item = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = item // heads, item % heads
    query += batch * query_b + head * query_h
    key += batch * key_b + head * key_h
    output += batch * output_b + head * output_h
    coef += head * (2 * GRID) * padded_tokens * RANK
    hidden += item * tokens * RANK
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    if bits is not None:
        bits += batch * bits_b + head * bits_h

    rows = tile * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    ranks = tl.arange(0, RANK)
    q = scaled(load_rows(query, rows, query_n, tokens, WIDTH, BLOCK_WIDTH), scale, SCALED_FIRST)
    units = tl.zeros((BLOCK_QUERY, RANK), tl.float32)
    base = tl.zeros((BLOCK_QUERY,), tl.float32)
    for first in range(0, tokens, BLOCK_KEY):
        keys = first + tl.arange(0, BLOCK_KEY)
        k = load_rows(key, keys, key_n, tokens, WIDTH, BLOCK_WIDTH)
        scores = pair_scores(q, k, scale, SCALED_FIRST, SCORES)
        if bias is not None:
            scores += load_pairs(bias, rows[:, None], keys[None, :], bias_n, bias_m, tokens).to(tl.float32)
        if bits is not None:
            # The sine and the base activation of zero are zero, only the cosine is not.
            keep = load_kept(bits, rows, first, tokens, BLOCK_KEY)
            scores = tl.where(keep, scores, 0.0)
        if BASE != "zero":
            base += tl.sum(base_value(scores, BASE), 1)
        pointers = coef + keys[:, None] * RANK + ranks[None, :]
        sin_step, cos_step = sine_cosine(scores, FAST)
        if bits is not None:
            cos_step = tl.where(keep, cos_step, 0.0)
        if HALF:
            sin, cos = sin_step.to(tl.float16), cos_step.to(tl.float16)
            step = half_harmonic_step(sin)
            sin_before, cos_before = tl.zeros(sin.shape, tl.float16), tl.full(cos.shape, 1.0, tl.float16)
            if bits is not None:
                cos_before = tl.where(keep, cos_before, 0.0)
            for m in tl.static_range(GRID):
                units = tl.dot(cos, tl.load(pointers + 2 * m * padded_tokens * RANK), units)
                units = tl.dot(sin, tl.load(pointers + (2 * m + 1) * padded_tokens * RANK), units)
                if m + 1 < GRID:
                    sin_next, cos_next = next_half_harmonic(sin_before, cos_before, sin, cos, step)
                    sin_before, cos_before, sin, cos = sin, cos, sin_next, cos_next
        else:
            dtype: tl.constexpr = coef.dtype.element_ty
            sin, cos = sin_step, cos_step
            for m in tl.static_range(GRID):
                cos_units = tl.load(pointers + 2 * m * padded_tokens * RANK)
                sin_units = tl.load(pointers + (2 * m + 1) * padded_tokens * RANK)
                units = tl.dot(cos.to(dtype), cos_units, units, input_precision=PRECISION)
                units = tl.dot(sin.to(dtype), sin_units, units, input_precision=PRECISION)
                if m + 1 < GRID:
                    sin, cos = rotate(sin, cos, sin_step, cos_step)
    if FAST:
        units *= tl.load(coef_scale + head)
    if BASE != "zero":
        units += base[:, None]
    store_rows(hidden, rows, RANK, tokens, units, RANK, RANK)
    if bits is None:
        u = load_rows(narrow + item * RANK * VALUE_WIDTH, ranks, VALUE_WIDTH, RANK, VALUE_WIDTH, BLOCK_VALUE)
        read = tl.dot(units.to(u.dtype), u, input_precision=PRECISION)
    else:
        read = tl.zeros((BLOCK_QUERY, BLOCK_VALUE), tl.float32)
        for first in range(0, tokens, BLOCK_KEY):
            keys = first + tl.arange(0, BLOCK_KEY)
            v = load_rows(value + batch * value_b + head * value_h, keys, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
            w = load_projector(proj + head * tokens * rank, keys, tokens, rank, RANK).to(v.dtype)
            keep = load_kept(bits, rows, first, tokens, BLOCK_KEY)
            learned = tl.dot(units.to(w.dtype), tl.trans(w), input_precision=PRECISION)
            read = add_product(read, tl.where(keep, learned, 0.0), v, PRECISION)
    store_rows(output, rows, output_n, tokens, read, VALUE_WIDTH, BLOCK_VALUE)
