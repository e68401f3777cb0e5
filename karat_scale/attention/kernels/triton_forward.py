"""The forward kernel: H = sum_f f(A) C_f^T and O = H (W^T V), key tile by key tile, with no softmax state."""

import triton
import triton.language as tl

from karat_scale.attention.kernels.triton_features import load_rows, rotate, sine_cosine, store_rows


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    coef,
    proj,
    output,
    hidden,
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
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    GRID: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes a query tile of one head of one image.

    coef is C [h, 2G, padded N, RANK], cosine and sine by turns; proj is W [h, padded N, RANK]; both are zero in
    their padding, so that keys beyond N add nothing. hidden is H [B, h, N, RANK]. Strides are those of batch (_b),
    head (_h) and token (_n).
    """
    tiles = tl.cdiv(tokens, BLOCK_QUERY)
    tile = tl.program_id(0) % tiles
    item = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = item // heads, item % heads
    dtype = query.dtype.element_ty
    query += batch * query_b + head * query_h
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    output += batch * output_b + head * output_h
    coef += head * (2 * GRID) * padded_tokens * RANK
    proj += head * padded_tokens * RANK
    hidden += item * tokens * RANK

    rows = tile * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    ranks = tl.arange(0, RANK)
    q = load_rows(query, rows, query_n, tokens, WIDTH, BLOCK_WIDTH)
    units = tl.zeros((BLOCK_QUERY, RANK), tl.float32)
    readout = tl.zeros((RANK, BLOCK_VALUE), tl.float32)
    for first in range(0, tokens, BLOCK_KEY):
        keys = first + tl.arange(0, BLOCK_KEY)
        k = load_rows(key, keys, key_n, tokens, WIDTH, BLOCK_WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        sin_step, cos_step = sine_cosine(scores, FAST)
        sin, cos = sin_step, cos_step
        unit_pointers = keys[:, None] * RANK + ranks[None, :]
        for m in tl.static_range(GRID):
            cos_units = tl.load(coef + (2 * m) * padded_tokens * RANK + unit_pointers)
            sin_units = tl.load(coef + (2 * m + 1) * padded_tokens * RANK + unit_pointers)
            units = tl.dot(cos.to(dtype), cos_units, units, input_precision=PRECISION)
            units = tl.dot(sin.to(dtype), sin_units, units, input_precision=PRECISION)
            if m + 1 < GRID:
                sin, cos = rotate(sin, cos, sin_step, cos_step)
        w = tl.load(proj + unit_pointers)
        v = load_rows(value, keys, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
        readout = tl.dot(tl.trans(w), v, readout, input_precision=PRECISION)
    units = units.to(dtype)
    store_rows(hidden, rows, RANK, tokens, units, RANK, RANK)
    read = tl.dot(units, readout.to(dtype), input_precision=PRECISION)
    store_rows(output, rows, output_n, tokens, read, VALUE_WIDTH, BLOCK_VALUE)
