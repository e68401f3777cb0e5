"""The backward kernels of H, which recompute scores: dA = sum_m m (dH b_m^T) cos(m A) - m (dH a_m^T) sin(m A).

With z = exp(i A) that is the real part of sum_m m dH (b_m + i a_m)^T z^m, evaluated by Horner's rule: the tensor cores
add the next order to z times the sum so far, so that registers do not grow with G. No sum runs across programs: what
several of them add to goes through partial sums.
"""

import triton
import triton.language as tl

from karat_scale.attention.kernels.triton_features import (
    base_derivative,
    half_harmonic_step,
    load_kept,
    load_pairs,
    load_rows,
    next_half_harmonic,
    pair_scores,
    place,
    rotate,
    scaled,
    sine_cosine,
    store_rows,
)


@triton.jit
def _add_order(real, imag, order, dh, pointers, apart, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    at = pointers + 2 * (order - 1) * apart
    by_cos, by_sin = tl.load(at), tl.load(at + apart)
    upstream = (dh * order).to(dh.dtype)
    if KEYS_FIRST:
        upstream = tl.trans(upstream)
        real = tl.dot(by_sin, upstream, real, input_precision=PRECISION)
        imag = tl.dot(by_cos, upstream, imag, input_precision=PRECISION)
    else:
        real = tl.dot(upstream, tl.trans(by_sin), real, input_precision=PRECISION)
        imag = tl.dot(upstream, tl.trans(by_cos), imag, input_precision=PRECISION)
    return real, imag


@triton.jit
def _grad_scores(
    dh, pointers, apart, sin, cos,
    KEYS_FIRST: tl.constexpr, GRID: tl.constexpr, UNROLL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dA of a tile of dH and of the coefficients at `pointers`, given sin(A) and cos(A).

    These are of keys and queries if KEYS_FIRST, else of queries and keys; a pair where both are 0 has dA = 0. `apart`
    is the distance between features. UNROLL writes all harmonics out, else a loop keeps the code short.
    """
    real = tl.zeros(sin.shape, tl.float32)
    imag = tl.zeros(sin.shape, tl.float32)
    if UNROLL:
        for step in tl.static_range(GRID):
            if step > 0:
                real, imag = real * cos - imag * sin, real * sin + imag * cos
            real, imag = _add_order(real, imag, GRID - step, dh, pointers, apart, KEYS_FIRST, PRECISION)
    else:
        for step in tl.range(0, GRID):
            real, imag = real * cos - imag * sin, real * sin + imag * cos
            real, imag = _add_order(real, imag, GRID - step, dh, pointers, apart, KEYS_FIRST, PRECISION)
    return real * cos - imag * sin


@triton.jit
def grad_query_kernel(
    query, key, bias, bits, coef, coef_scale, grad_hidden, grad_scale, grad_base, grad_query,
    heads, tokens, padded_tokens, scale,
    query_b, query_h, query_n, key_b, key_h, key_n, bias_b, bias_h, bias_n, bias_m, bits_b, bits_h,
    grad_b, grad_h, grad_n,
    GRID: tl.constexpr, UNROLL: tl.constexpr, BASE: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr, SCALED_FIRST: tl.constexpr,
    FAST: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one query tile of one head of one image; arguments as in `forward_kernel` and `readout_kernel`."""
    tile, _, item, batch, head = place(tokens, heads, BLOCK_QUERY)
    dtype = query.dtype.element_ty
    query += batch * query_b + head * query_h
    key += batch * key_b + head * key_h
    grad_query += batch * grad_b + head * grad_h
    coef += head * (2 * GRID) * padded_tokens * RANK
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    if bits is not None:
        bits += batch * bits_b + head * bits_h

    ranks = tl.arange(0, RANK)
    rows = tile * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    q = scaled(load_rows(query, rows, query_n, tokens, WIDTH, BLOCK_WIDTH), scale, SCALED_FIRST)
    dh = load_rows(grad_hidden + item * tokens * RANK, rows, RANK, tokens, RANK, RANK)
    coef_unit = tl.load(coef_scale + head)
    if BASE != "zero":
        dh_sum = tl.load(grad_base + item * tokens + rows, mask=rows < tokens, other=0.0)
    total = tl.zeros((BLOCK_QUERY, BLOCK_WIDTH), tl.float32)
    for first in range(0, tokens, BLOCK_KEY):
        keys = first + tl.arange(0, BLOCK_KEY)
        k = load_rows(key, keys, key_n, tokens, WIDTH, BLOCK_WIDTH)
        scores = pair_scores(q, k, scale, SCALED_FIRST, SCORES)
        if bias is not None:
            scores += load_pairs(bias, rows[:, None], keys[None, :], bias_n, bias_m, tokens).to(tl.float32)
        if bits is not None:
            keep = load_kept(bits, rows, first, tokens, BLOCK_KEY)
            scores = tl.where(keep, scores, 0.0)
        sin, cos = sine_cosine(scores, FAST)
        if bits is not None:
            cos = tl.where(keep, cos, 0.0)
        pointers = coef + keys[:, None] * RANK + ranks[None, :]
        grad_scores = _grad_scores(dh, pointers, padded_tokens * RANK, sin, cos, False, GRID, UNROLL, PRECISION)
        if BASE != "zero":
            by_base = base_derivative(scores, BASE) * dh_sum[:, None]
            if bits is not None:
                by_base = tl.where(keep, by_base, 0.0)
            grad_scores = grad_scores * coef_unit + by_base
        total = tl.dot(grad_scores.to(dtype), k, total, input_precision=PRECISION)
    unit = tl.load(grad_scale + item)
    if BASE == "zero":
        unit *= coef_unit
    total *= scale * unit
    store_rows(grad_query, rows, grad_n, tokens, total, WIDTH, BLOCK_WIDTH)


@triton.jit
def grad_key_kernel(
    query, key, bias, bits, coef, coef_scale, grad_hidden, grad_scale, grad_base, grad_key, grad_bias,
    partial,
    batches, batches_per_part, heads, tokens, padded_tokens, scale,
    query_b, query_h, query_n, key_b, key_h, key_n, bias_b, bias_h, bias_n, bias_m, bits_b, bits_h,
    grad_b, grad_h, grad_n,
    KEY: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, GRID: tl.constexpr,
    UNROLL: tl.constexpr, BASE: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr, SCALED_FIRST: tl.constexpr,
    FAST: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one key tile of one head, for one part of the batch.

    These are dK (if KEY), dC of one of GROUPS groups of GROUP harmonics (if not 0) and, unless None, the bias's.

    partial is dC [parts, h, GROUPS, 2 GROUP, padded N, RANK] in float32, cosine and sine alternating. grad_bias is
    [parts, h, N, N] in float32, summed over one part of the batch.
    """
    tiles = tl.cdiv(tokens, BLOCK_KEY)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % GROUPS
    head = (tl.program_id(0) // (tiles * GROUPS) % heads).to(tl.int64)
    part = (tl.program_id(0) // (tiles * GROUPS * heads)).to(tl.int64)
    first_batch = part * batches_per_part
    dtype = query.dtype.element_ty
    feature: tl.constexpr = coef.dtype.element_ty
    query += head * query_h
    key += head * key_h
    coef += head * (2 * GRID) * padded_tokens * RANK

    ranks = tl.arange(0, RANK)
    keys = tile * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    pointers = coef + keys[:, None] * RANK + ranks[None, :]
    totals = ()
    for _ in tl.static_range(2 * GROUP):
        totals = totals + (tl.zeros((BLOCK_KEY, RANK), tl.float32),)
    unit = 1.0
    for offset in range(0, tl.minimum(batches_per_part, batches - first_batch).to(tl.int32)):
        batch = first_batch + offset
        item = batch * heads + head
        k = scaled(load_rows(key + batch * key_b, keys, key_n, tokens, WIDTH, BLOCK_WIDTH), scale, SCALED_FIRST)
        item_unit = tl.load(grad_scale + item)
        if FAST and GROUP > 0:
            # The sums are kept in units of the current image.
            rescaled = ()
            for f in tl.static_range(2 * GROUP):
                rescaled = rescaled + (totals[f] * (unit / item_unit),)
            totals = rescaled
            unit = item_unit
        total = tl.zeros((BLOCK_KEY, BLOCK_WIDTH), tl.float32)
        for first in range(0, tokens, BLOCK_QUERY):
            rows = first + tl.arange(0, BLOCK_QUERY)
            q = load_rows(query + batch * query_b, rows, query_n, tokens, WIDTH, BLOCK_WIDTH)
            dh = load_rows(grad_hidden + item * tokens * RANK, rows, RANK, tokens, RANK, RANK)
            scores = pair_scores(k, q, scale, SCALED_FIRST, SCORES)
            if bias is not None:
                ours = bias + batch * bias_b + head * bias_h
                scores += load_pairs(ours, rows[None, :], keys[:, None], bias_n, bias_m, tokens).to(tl.float32)
            if bits is not None:
                ours = bits + batch * bits_b + head * bits_h + tl.cdiv(tokens, 32) * tokens
                keep = load_kept(ours, keys, first, tokens, BLOCK_QUERY)
                scores = tl.where(keep, scores, 0.0)
            sin_step, cos_step = sine_cosine(scores, FAST)
            if bits is not None:
                cos_step = tl.where(keep, cos_step, 0.0)
            if KEY:
                grad_scores = _grad_scores(
                    dh, pointers, padded_tokens * RANK, sin_step, cos_step, True, GRID, UNROLL, PRECISION
                )
                if BASE != "zero":
                    dh_sum = tl.load(grad_base + item * tokens + rows, mask=rows < tokens, other=0.0)
                    by_base = base_derivative(scores, BASE) * dh_sum[None, :]
                    if bits is not None:
                        by_base = tl.where(keep, by_base, 0.0)
                    grad_scores = grad_scores * tl.load(coef_scale + head) + by_base
                if grad_bias is not None:
                    scores_unit = item_unit
                    if BASE == "zero":
                        scores_unit = item_unit * tl.load(coef_scale + head)
                    inside = (rows[None, :] < tokens) & (keys[:, None] < tokens)
                    sums_at = (part * heads + head) * tokens * tokens + rows[None, :] * tokens + keys[:, None]
                    so_far = tl.load(grad_bias + sums_at, mask=inside & (offset > 0), other=0.0)
                    tl.store(grad_bias + sums_at, so_far + grad_scores * scores_unit, mask=inside)
                total = tl.dot(grad_scores.to(dtype), q, total, input_precision=PRECISION)
            if GROUP > 0:
                sums = ()
                if HALF:
                    sin, cos = sin_step.to(tl.float16), cos_step.to(tl.float16)
                    twice = half_harmonic_step(sin)
                    sin_before, cos_before = tl.zeros(sin.shape, tl.float16), tl.full(cos.shape, 1.0, tl.float16)
                    if bits is not None:
                        cos_before = tl.where(keep, cos_before, 0.0)
                    for m in tl.static_range(GROUP):
                        sums = sums + (tl.dot(cos, dh, totals[2 * m]), tl.dot(sin, dh, totals[2 * m + 1]))
                        if m + 1 < GROUP:
                            sin_next, cos_next = next_half_harmonic(sin_before, cos_before, sin, cos, twice)
                            sin_before, cos_before, sin, cos = sin, cos, sin_next, cos_next
                else:
                    sin, cos = sin_step, cos_step
                    if GROUPS > 1:
                        sin, cos = sine_cosine(scores * (group * GROUP + 1).to(tl.float32), FAST)
                        if bits is not None:
                            cos = tl.where(keep, cos, 0.0)
                    for m in tl.static_range(GROUP):
                        by_cos = tl.dot(cos.to(feature), dh, totals[2 * m], input_precision=PRECISION)
                        by_sin = tl.dot(sin.to(feature), dh, totals[2 * m + 1], input_precision=PRECISION)
                        sums = sums + (by_cos, by_sin)
                        if m + 1 < GROUP:
                            sin, cos = rotate(sin, cos, sin_step, cos_step)
                totals = sums
        if KEY:
            # Loaded here, since the loop has no register to spare.
            total *= scale * tl.load(grad_scale + item)
            if BASE == "zero":
                total *= tl.load(coef_scale + head)
            store_rows(grad_key + batch * grad_b + head * grad_h, keys, grad_n, tokens, total, WIDTH, BLOCK_WIDTH)
        if grad_bias is not None:
            # The next image adds to what this one stored.
            tl.debug_barrier()
    block = ((part * heads + head) * GROUPS + group) * (2 * GROUP)
    for f in tl.static_range(2 * GROUP):
        sums = totals[f] * unit
        store_rows(partial + (block + f) * padded_tokens * RANK, keys, RANK, padded_tokens, sums, RANK, RANK)
