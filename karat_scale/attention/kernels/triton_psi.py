"""The kernels of O = psi(A) V with psi(x) = c + sum_m a_m cos(m x) + b_m sin(m x), a function of each score alone.

They walk along tiles as FlashAttention-2 does (arXiv 2307.08691), without its softmax: nothing of N x N is stored, and
the backward pass computes scores and harmonics again. No sum runs across programs.
"""

import triton
import triton.language as tl

from karat_scale.attention.kernels.triton_features import (
    add_product,
    load_rows,
    pair_scores,
    rotate,
    scaled,
    sine_cosine,
    store_rows,
)


@triton.jit
def psi_forward_kernel(
    query,
    key,
    value,
    psi,
    output,
    heads,
    tokens,
    scale,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    GRID: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_WALKED: tl.constexpr,
    SCALED_FIRST: tl.constexpr,
    FAST: tl.constexpr,
    SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes a query tile of O of one head of one image.

    psi is float32 [h, 2 GRID + 1]: c, then a_m, then b_m. Strides and constants are as in `forward_kernel`.
    """
    tiles = tl.cdiv(tokens, BLOCK_OWN)
    tile = tl.program_id(0) % tiles
    item = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = item // heads, item % heads
    query += batch * query_b + head * query_h
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    psi += head * (2 * GRID + 1)

    rows = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    q = scaled(load_rows(query, rows, query_n, tokens, WIDTH, BLOCK_WIDTH), scale, SCALED_FIRST)
    total = tl.zeros((BLOCK_OWN, BLOCK_VALUE), tl.float32)
    for first in range(0, tokens, BLOCK_WALKED):
        keys = first + tl.arange(0, BLOCK_WALKED)
        k = load_rows(key, keys, key_n, tokens, WIDTH, BLOCK_WIDTH)
        v = load_rows(value, keys, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
        sin_step, cos_step = sine_cosine(pair_scores(q, k, scale, SCALED_FIRST, SCORES), FAST)
        sin, cos = sin_step, cos_step
        learned = tl.full(cos.shape, 0.0, tl.float32) + tl.load(psi)
        for m in tl.static_range(GRID):
            learned += cos * tl.load(psi + 1 + m) + sin * tl.load(psi + 1 + GRID + m)
            if m + 1 < GRID:
                sin, cos = rotate(sin, cos, sin_step, cos_step)
        total = add_product(total, learned, v, PRECISION)
    output += batch * output_b + head * output_h
    store_rows(output, rows, output_n, tokens, total, VALUE_WIDTH, BLOCK_VALUE)


@triton.jit
def psi_grad_query_kernel(
    query,
    key,
    value,
    psi,
    grad_output,
    grad_query,
    partial,
    heads,
    tokens,
    scale,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    grad_b,
    grad_h,
    grad_n,
    GRID: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_WALKED: tl.constexpr,
    SCALED_FIRST: tl.constexpr,
    FAST: tl.constexpr,
    SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of a query tile of one head of one image, and the tile's part of the gradient of psi.

    With P = dO V^T: dA = P psi'(A), dQ = dA K / sqrt(d), and dc, da_m, db_m are sums of P, P cos(m A), P sin(m A).
    partial is float32 [B, h, tiles, 2 GRID + 1].
    """
    tiles = tl.cdiv(tokens, BLOCK_OWN)
    tile = tl.program_id(0) % tiles
    item = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = item // heads, item % heads
    query += batch * query_b + head * query_h
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    grad_output += batch * output_b + head * output_h
    psi += head * (2 * GRID + 1)
    partial += (item * tiles + tile) * (2 * GRID + 1)

    rows = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    q = scaled(load_rows(query, rows, query_n, tokens, WIDTH, BLOCK_WIDTH), scale, SCALED_FIRST)
    upstream = load_rows(grad_output, rows, output_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
    total = tl.zeros((BLOCK_OWN, BLOCK_WIDTH), tl.float32)
    whole = tl.zeros((BLOCK_OWN,), tl.float32)
    sums = ()
    for _ in tl.static_range(2 * GRID):
        sums = sums + (tl.zeros((BLOCK_OWN,), tl.float32),)
    for first in range(0, tokens, BLOCK_WALKED):
        keys = first + tl.arange(0, BLOCK_WALKED)
        k = load_rows(key, keys, key_n, tokens, WIDTH, BLOCK_WIDTH)
        v = load_rows(value, keys, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
        sin_step, cos_step = sine_cosine(pair_scores(q, k, scale, SCALED_FIRST, SCORES), FAST)
        pairs = tl.dot(upstream, tl.trans(v), input_precision=PRECISION)
        sin, cos = sin_step, cos_step
        slope = tl.zeros(cos.shape, tl.float32)
        whole += tl.sum(pairs, 1)
        more = ()
        for m in tl.static_range(GRID):
            slope += (cos * tl.load(psi + 1 + GRID + m) - sin * tl.load(psi + 1 + m)) * (m + 1)
            more = more + (sums[2 * m] + tl.sum(pairs * cos, 1), sums[2 * m + 1] + tl.sum(pairs * sin, 1))
            if m + 1 < GRID:
                sin, cos = rotate(sin, cos, sin_step, cos_step)
        sums = more
        total = add_product(total, pairs * slope, k, PRECISION)
    grad_query += batch * grad_b + head * grad_h
    store_rows(grad_query, rows, grad_n, tokens, total * scale, WIDTH, BLOCK_WIDTH)
    tl.store(partial, tl.sum(whole))
    for m in tl.static_range(GRID):
        tl.store(partial + 1 + m, tl.sum(sums[2 * m]))
        tl.store(partial + 1 + GRID + m, tl.sum(sums[2 * m + 1]))


@triton.jit
def psi_grad_key_kernel(
    query,
    key,
    value,
    psi,
    grad_output,
    grad_key,
    grad_value,
    heads,
    tokens,
    scale,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    grad_b,
    grad_h,
    grad_n,
    by_value_b,
    by_value_h,
    by_value_n,
    GRID: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_WALKED: tl.constexpr,
    SCALED_FIRST: tl.constexpr,
    FAST: tl.constexpr,
    SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK = dA^T Q / sqrt(d) and dV = psi(A)^T dO of a key tile of one head of one image."""
    tiles = tl.cdiv(tokens, BLOCK_OWN)
    tile = tl.program_id(0) % tiles
    item = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = item // heads, item % heads
    query += batch * query_b + head * query_h
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    grad_output += batch * output_b + head * output_h
    psi += head * (2 * GRID + 1)

    keys = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    k = scaled(load_rows(key, keys, key_n, tokens, WIDTH, BLOCK_WIDTH), scale, SCALED_FIRST)
    v = load_rows(value, keys, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
    total = tl.zeros((BLOCK_OWN, BLOCK_WIDTH), tl.float32)
    by_value = tl.zeros((BLOCK_OWN, BLOCK_VALUE), tl.float32)
    for first in range(0, tokens, BLOCK_WALKED):
        rows = first + tl.arange(0, BLOCK_WALKED)
        q = load_rows(query, rows, query_n, tokens, WIDTH, BLOCK_WIDTH)
        upstream = load_rows(grad_output, rows, output_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
        sin_step, cos_step = sine_cosine(pair_scores(k, q, scale, SCALED_FIRST, SCORES), FAST)
        sin, cos = sin_step, cos_step
        learned = tl.full(cos.shape, 0.0, tl.float32) + tl.load(psi)
        slope = tl.zeros(cos.shape, tl.float32)
        for m in tl.static_range(GRID):
            by_cos, by_sin = tl.load(psi + 1 + m), tl.load(psi + 1 + GRID + m)
            learned += cos * by_cos + sin * by_sin
            slope += (cos * by_sin - sin * by_cos) * (m + 1)
            if m + 1 < GRID:
                sin, cos = rotate(sin, cos, sin_step, cos_step)
        by_value = add_product(by_value, learned, upstream, PRECISION)
        pairs = tl.dot(v, tl.trans(upstream), input_precision=PRECISION)
        total = add_product(total, pairs * slope, q, PRECISION)
    grad_key += batch * grad_b + head * grad_h
    grad_value += batch * by_value_b + head * by_value_h
    store_rows(grad_key, keys, grad_n, tokens, total * scale, WIDTH, BLOCK_WIDTH)
    store_rows(grad_value, keys, by_value_n, tokens, by_value, VALUE_WIDTH, BLOCK_VALUE)
