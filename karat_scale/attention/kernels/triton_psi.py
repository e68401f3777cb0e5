"""The Triton kernels of O = psi(A) V, and the first and the last kernel of the modular operator's passes.

psi(x) = c + sum_m a_m cos(m x) + b_m sin(m x) is a function of one score. Its kernels walk along tiles as
FlashAttention-2 does (arXiv 2307.08691), without its softmax. They store nothing of N x N, and the backward pass
computes scores and harmonics again. No sum runs across programs.

The first kernel of the modular operator makes in one launch what its forward pass needs: coefficients as tensor cores
read them, and U = W^T V or the bits of a mask. The last kernel of its backward pass adds the partial sums of dC and dW,
always in the same order.
"""

import triton
import triton.language as tl

from karat_scale.attention.kernels.triton_features import (
    add_product,
    load_pairs,
    load_projector,
    load_rows,
    pair_scores,
    place,
    power_of_two_above,
    rotate,
    scaled,
    sine_cosine,
    store_rows,
)


@triton.jit
def _psi_and_slope(scores, psi, GRID: tl.constexpr, FAST: tl.constexpr):
    """psi(A) and psi'(A) of a tile. The compiler leaves out what a kernel does not use."""
    sin_step, cos_step = sine_cosine(scores, FAST)
    sin, cos = sin_step, cos_step
    learned = tl.full(cos.shape, 0.0, tl.float32) + tl.load(psi)
    slope = tl.zeros(cos.shape, tl.float32)
    for m in tl.static_range(GRID):
        by_cos, by_sin = tl.load(psi + 1 + m), tl.load(psi + 1 + GRID + m)
        learned += cos * by_cos + sin * by_sin
        slope += (cos * by_sin - sin * by_cos) * (m + 1)
        if m + 1 < GRID:
            sin, cos = rotate(sin, cos, sin_step, cos_step)
    return learned, slope


@triton.jit
def psi_forward_kernel(
    query, key, value, psi, output,
    heads, tokens, scale,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, output_b, output_h, output_n,
    GRID: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_WALKED: tl.constexpr,
    SCALED_FIRST: tl.constexpr, FAST: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes a query tile of O of one head of one image.

    psi is float32 [h, 2 GRID + 1]: c, then a_m, then b_m. Strides and constants are as in `forward_kernel`.
    """
    tile, _, _, batch, head = place(tokens, heads, BLOCK_OWN)
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
        learned = _psi_and_slope(pair_scores(q, k, scale, SCALED_FIRST, SCORES), psi, GRID, FAST)[0]
        total = add_product(total, learned, v, PRECISION)
    output += batch * output_b + head * output_h
    store_rows(output, rows, output_n, tokens, total, VALUE_WIDTH, BLOCK_VALUE)


@triton.jit
def psi_grad_query_kernel(
    query, key, value, psi, grad_output, grad_query, partial,
    heads, tokens, scale,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, output_b, output_h, output_n,
    grad_b, grad_h, grad_n,
    GRID: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_WALKED: tl.constexpr,
    SCALED_FIRST: tl.constexpr, FAST: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a query tile of one head of one image, and the tile's part of the gradient of psi.

    With P = dO V^T: dA = P psi'(A), dQ = dA K / sqrt(d), and dc, da_m, db_m are sums of P, P cos(m A), P sin(m A).
    partial is float32 [B, h, tiles, 2 GRID + 1].
    """
    tile, tiles, item, batch, head = place(tokens, heads, BLOCK_OWN)
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
    query, key, value, psi, grad_output, grad_key, grad_value,
    heads, tokens, scale,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, output_b, output_h, output_n,
    grad_b, grad_h, grad_n, by_value_b, by_value_h, by_value_n,
    GRID: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_WALKED: tl.constexpr,
    SCALED_FIRST: tl.constexpr, FAST: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK = dA^T Q / sqrt(d) and dV = psi(A)^T dO of a key tile of one head of one image."""
    tile, _, _, batch, head = place(tokens, heads, BLOCK_OWN)
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
        learned, slope = _psi_and_slope(pair_scores(k, q, scale, SCALED_FIRST, SCORES), psi, GRID, FAST)
        by_value = add_product(by_value, learned, upstream, PRECISION)
        pairs = tl.dot(v, tl.trans(upstream), input_precision=PRECISION)
        total = add_product(total, pairs * slope, q, PRECISION)
    grad_key += batch * grad_b + head * grad_h
    grad_value += batch * by_value_b + head * by_value_h
    store_rows(grad_key, keys, grad_n, tokens, total * scale, WIDTH, BLOCK_WIDTH)
    store_rows(grad_value, keys, by_value_n, tokens, by_value, VALUE_WIDTH, BLOCK_VALUE)


@triton.jit
def prepare_kernel(
    cos_coef, sin_coef, proj, value, mask, coef, coef_scale, narrow, bits,
    heads, mask_heads, rank, tokens, padded_tokens,
    value_b, value_h, value_n, mask_b, mask_h, mask_n, mask_m,
    GRID: tl.constexpr, BLOCK_GRID: tl.constexpr, RANK: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Packs the coefficients, and computes U or, with a mask, packs the mask's bits.

    h RANK programs pack the coefficients of one rank each. Without a mask, B h more programs compute U of one head of
    one image each. With a mask, U is not used, and one more program for each of the mask's matrices packs its bits.

    coef is C [h, 2G, padded N, RANK], cosine and sine alternating, zero in its padding, in units of coef_scale [h].
    FAST makes these powers of two so that no coefficient exceeds 1 and float16 holds it; else they are 1. narrow is U
    [B, h, RANK, dv]. bits are those of mask [B or 1, mask_heads, N, N] in int32, [.., .., 2, N / 32, N]: words of 32
    keys for each query, then words of 32 queries for each key.
    """
    packing = heads * RANK
    if tl.program_id(0) < packing:
        head = (tl.program_id(0) // RANK).to(tl.int64)
        unit = tl.program_id(0) % RANK
        scale = 1.0
        if FAST:
            # Each program finds its head's largest coefficient for itself: that is quicker than one more launch.
            scale = power_of_two_above(
                tl.maximum(
                    _largest(cos_coef + head * rank * tokens * GRID, rank * tokens * GRID),
                    _largest(sin_coef + head * rank * tokens * GRID, rank * tokens * GRID),
                )
            )
        tl.store(coef_scale + head, scale)
        cos_coef += (head * rank + unit) * tokens * GRID
        sin_coef += (head * rank + unit) * tokens * GRID
        coef += head * (2 * GRID) * padded_tokens * RANK + unit
        # Ranks in the padding have no tokens.
        there = tl.where(unit < rank, tokens, 0)
        orders = tl.arange(0, BLOCK_GRID)
        for first in range(0, padded_tokens, BLOCK_TOKENS):
            rows = first + tl.arange(0, BLOCK_TOKENS)
            cos = load_rows(cos_coef, rows, GRID, there, GRID, BLOCK_GRID).to(tl.float32) / scale
            sin = load_rows(sin_coef, rows, GRID, there, GRID, BLOCK_GRID).to(tl.float32) / scale
            keep = (rows[:, None] < padded_tokens) & (orders[None, :] < GRID)
            pointers = coef + (2 * orders[None, :] * padded_tokens + rows[:, None]) * RANK
            tl.store(pointers, cos.to(coef.dtype.element_ty), mask=keep)
            tl.store(pointers + padded_tokens * RANK, sin.to(coef.dtype.element_ty), mask=keep)
    elif mask is not None:
        matrix = (tl.program_id(0) - packing).to(tl.int64)
        ours = mask + matrix // mask_heads * mask_b + matrix % mask_heads * mask_h
        _pack_pairs(ours, bits + matrix * 2 * tl.cdiv(tokens, 32) * tokens, tokens, mask_n, mask_m, BLOCK_TOKENS)
    else:
        item = (tl.program_id(0) - packing).to(tl.int64)
        batch, head = item // heads, item % heads
        value += batch * value_b + head * value_h
        proj += head * tokens * rank
        columns, ranks = tl.arange(0, BLOCK_VALUE), tl.arange(0, RANK)
        total = tl.zeros((RANK, BLOCK_VALUE), tl.float32)
        for first in range(0, tokens, BLOCK_TOKENS):
            rows = first + tl.arange(0, BLOCK_TOKENS)
            v = load_rows(value, rows, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
            w = load_projector(proj, rows, tokens, rank, RANK).to(v.dtype)
            total = tl.dot(tl.trans(w), v, total, input_precision=PRECISION)
        pointers = narrow + item * RANK * VALUE_WIDTH + ranks[:, None] * VALUE_WIDTH + columns[None, :]
        tl.store(pointers, total.to(narrow.dtype.element_ty), mask=columns[None, :] < VALUE_WIDTH)


@triton.jit
def _largest(coef, count):
    largest = tl.zeros((4096,), tl.float32)
    for first in range(0, count, 4096):
        at = first + tl.arange(0, 4096)
        largest = tl.maximum(largest, tl.abs(tl.load(coef + at, mask=at < count, other=0.0).to(tl.float32)))
    return tl.max(largest)


@triton.jit
def _pack_pairs(mask, bits, tokens, mask_n, mask_m, BLOCK_TOKENS: tl.constexpr):
    places = tl.arange(0, 32)
    words = tl.cdiv(tokens, 32)
    for word in range(0, words):
        others = word * 32 + places
        for first in range(0, tokens, BLOCK_TOKENS):
            rows = first + tl.arange(0, BLOCK_TOKENS)
            of_queries = load_pairs(mask, rows[:, None], others[None, :], mask_n, mask_m, tokens).to(tl.int32)
            of_keys = load_pairs(mask, others[None, :], rows[:, None], mask_n, mask_m, tokens).to(tl.int32)
            at = bits + word * tokens + rows
            tl.store(at, tl.sum(of_queries << places[None, :], 1), mask=rows < tokens)
            tl.store(at + words * tokens, tl.sum(of_keys << places[None, :], 1), mask=rows < tokens)


@triton.jit
def reduce_kernel(
    coef_partial, proj_partial, grad_cos, grad_sin, grad_proj,
    coef_parts, proj_parts, heads, rank, tokens, padded_tokens,
    FEATURES: tl.constexpr, GRID: tl.constexpr, RANK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program adds one token tile of one feature of one head; the feature after the last, 2G, is W.

    coef_partial is [coef_parts, h, FEATURES, padded N, RANK], dC; proj_partial is
    [proj_parts, h, N, RANK], dW. The results have the shapes of cos_coef [h, r, N, G] and proj [h, N, r].
    """
    tiles = tl.cdiv(tokens, BLOCK_ROWS)
    rows = tl.program_id(0) % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = tl.program_id(0) // tiles % (2 * GRID + 1)
    head = (tl.program_id(0) // (tiles * (2 * GRID + 1))).to(tl.int64)
    ranks = tl.arange(0, RANK)
    keep = (rows[:, None] < tokens) & (ranks[None, :] < rank)
    total = tl.zeros((BLOCK_ROWS, RANK), tl.float32)
    if feature == 2 * GRID:
        pointers = proj_partial + head * tokens * RANK
        pointers += rows[:, None] * RANK + ranks[None, :]
        for _ in range(0, proj_parts):
            total += tl.load(pointers, mask=keep, other=0.0)
            pointers += heads * tokens * RANK
        target_proj = grad_proj + (head * tokens + rows[:, None]) * rank + ranks[None, :]
        tl.store(target_proj, total.to(grad_proj.dtype.element_ty), mask=keep)
    else:
        pointers = coef_partial + (head * FEATURES + feature) * padded_tokens * RANK
        pointers += rows[:, None] * RANK + ranks[None, :]
        for _ in range(0, coef_parts):
            total += tl.load(pointers, mask=keep, other=0.0)
            pointers += heads * FEATURES * padded_tokens * RANK
        target = ((head * rank + ranks[None, :]) * tokens + rows[:, None]) * GRID + feature // 2
        if feature % 2 == 0:
            tl.store(grad_cos + target, total.to(grad_cos.dtype.element_ty), mask=keep)
        else:
            tl.store(grad_sin + target, total.to(grad_sin.dtype.element_ty), mask=keep)
