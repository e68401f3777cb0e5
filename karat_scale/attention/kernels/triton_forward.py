"""The Triton kernels of H = sum_f f(A) C_f^T and its output O, forward, and of the backward pass from O to H, V and W.

The forward kernel goes through the keys tile by tile. O = H U with U = W^T V or, under a mask, O = S V. The readout
kernel is the backward pass of this last step: one launch gives dH, dV and parts of dW.
"""

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
    place,
    power_of_two_above,
    rotate,
    scaled,
    sine_cosine,
    store_rows,
)


@triton.jit
def forward_kernel(
    query, key, bias, bits, coef, coef_scale, narrow, proj, value, output, hidden,
    heads, rank, tokens, padded_tokens, scale,
    query_b, query_h, query_n, key_b, key_h, key_n, bias_b, bias_h, bias_n, bias_m, bits_b, bits_h,
    value_b, value_h, value_n, output_b, output_h, output_n,
    GRID: tl.constexpr, HALF: tl.constexpr, BASE: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_QUERY: tl.constexpr, BLOCK_KEY: tl.constexpr, SCALED_FIRST: tl.constexpr, FAST: tl.constexpr,
    SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes a query tile of one head of one image.

    coef, coef_scale, narrow and bits are `prepare_kernel`'s; hidden is H [B, h, N, RANK]. The bits of a mask cut S:
    then narrow is None, and proj and value are read. Strides are those of batch (_b), head (_h), token (_n) and, of the
    bias [B, h, N, N] or None, key (_m). HALF computes harmonics in float16. SCALED_FIRST multiplies the query by the
    scale in place of the scores, which is exact for powers of two. SCORES and PRECISION are the input precisions of
    A = Q K^T and of all other products.
    """
    tile, _, item, batch, head = place(tokens, heads, BLOCK_QUERY)
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


@triton.jit
def readout_kernel(
    hidden, narrow, proj, value, bits, grad_output, grad_value, grad_hidden, grad_scale, grad_base, partial,
    batches, batches_per_part, heads, rank, tokens,
    value_b, value_h, value_n, bits_b, bits_h, output_b, output_h, output_n, grad_b, grad_h, grad_n,
    RANK: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program takes one head of one part of the batch, image by image.

    grad_hidden is dH [B, h, N, RANK] in units of grad_scale [B, h]; FAST makes these powers of two such that float16
    holds it, else they are 1. grad_base [B, h, N] is the sum of dH over ranks in these units, or None.
    partial is dW [parts, h, N, RANK] in float32, summed over one part of the batch. The bits of a mask cut
    S = H W^T and dS = dO V^T; without them U and dU stand for all pairs.
    """
    head = (tl.program_id(0) % heads).to(tl.int64)
    part = (tl.program_id(0) // heads).to(tl.int64)
    first_batch = part * batches_per_part
    dtype = value.dtype.element_ty
    ranks = tl.arange(0, RANK)
    proj += head * tokens * rank
    partial += (part * heads + head) * tokens * RANK

    for offset in range(0, tl.minimum(batches_per_part, batches - first_batch).to(tl.int32)):
        batch = first_batch + offset
        item = batch * heads + head
        upstream = grad_output + batch * output_b + head * output_h
        values = value + batch * value_b + head * value_h
        units = hidden + item * tokens * RANK
        largest = tl.zeros((BLOCK_ROWS, BLOCK_VALUE), tl.float32)
        if bits is None:
            u = load_rows(narrow + item * RANK * VALUE_WIDTH, ranks, VALUE_WIDTH, RANK, VALUE_WIDTH, BLOCK_VALUE)
            sizes = tl.sum(tl.abs(u.to(tl.float32)), 1)
            grad_narrow = tl.zeros((RANK, BLOCK_VALUE), tl.float32)
        else:
            of_queries = bits + batch * bits_b + head * bits_h
            of_keys = of_queries + tl.cdiv(tokens, 32) * tokens
            sizes = tl.zeros((RANK,), tl.float32)
        for first in range(0, tokens, BLOCK_ROWS):
            rows = first + tl.arange(0, BLOCK_ROWS)
            g = load_rows(upstream, rows, output_n, tokens, VALUE_WIDTH, BLOCK_VALUE).to(dtype)
            if FAST:
                largest = tl.maximum(largest, tl.abs(g.to(tl.float32)))
            if bits is None:
                h = load_rows(units, rows, RANK, tokens, RANK, RANK)
                grad_narrow = tl.dot(tl.trans(h), g, grad_narrow, input_precision=PRECISION)
            elif FAST:
                v = load_rows(values, rows, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
                w = load_projector(proj, rows, tokens, rank, RANK)
                by_row = tl.sum(tl.abs(v.to(tl.float32)), 1)
                sizes += tl.sum(tl.abs(w.to(tl.float32)) * by_row[:, None], 0)
        scale = 1.0
        if FAST:
            # By Hoelder's inequality no entry of dH exceeds 4 of these units: the gradient of scores, a sum of less
            # than 16384 products of these with coefficients, fits into float16 too.
            scale = power_of_two_above(tl.max(largest) * tl.max(sizes)) * 0.25
        tl.store(grad_scale + item, scale)
        if bits is None:
            du = grad_narrow.to(dtype)
        for first in range(0, tokens, BLOCK_ROWS):
            rows = first + tl.arange(0, BLOCK_ROWS)
            g = load_rows(upstream, rows, output_n, tokens, VALUE_WIDTH, BLOCK_VALUE).to(dtype)
            v = load_rows(values, rows, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
            w = load_projector(proj, rows, tokens, rank, RANK).to(dtype)
            if bits is None:
                dh = tl.dot(g, tl.trans(u), input_precision=PRECISION)
                dv = tl.dot(w, du, input_precision=PRECISION)
                dw = tl.dot(v, tl.trans(du), input_precision=PRECISION)
            else:
                dh = tl.zeros((BLOCK_ROWS, RANK), tl.float32)
                dv = tl.zeros((BLOCK_ROWS, BLOCK_VALUE), tl.float32)
                dw = tl.zeros((BLOCK_ROWS, RANK), tl.float32)
                for other in range(0, tokens, BLOCK_ROWS):
                    others = other + tl.arange(0, BLOCK_ROWS)
                    # The rows as queries of the others, then as their keys.
                    keep = load_kept(of_queries, rows, other, tokens, BLOCK_ROWS)
                    other_v = load_rows(values, others, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
                    other_w = load_projector(proj, others, tokens, rank, RANK).to(dtype)
                    ds = tl.where(keep, tl.dot(g, tl.trans(other_v), input_precision=PRECISION), 0.0)
                    dh = add_product(dh, ds, other_w, PRECISION)
                    keep = load_kept(of_keys, rows, other, tokens, BLOCK_ROWS)
                    other_g = load_rows(upstream, others, output_n, tokens, VALUE_WIDTH, BLOCK_VALUE).to(dtype)
                    other_h = load_rows(units, others, RANK, tokens, RANK, RANK)
                    learned = tl.where(keep, tl.dot(w, tl.trans(other_h), input_precision=PRECISION), 0.0)
                    dv = add_product(dv, learned, other_g, PRECISION)
                    ds = tl.where(keep, tl.dot(v, tl.trans(other_g), input_precision=PRECISION), 0.0)
                    dw = add_product(dw, ds, other_h, PRECISION)
            dh *= 1.0 / scale
            if grad_base is not None:
                tl.store(grad_base + item * tokens + rows, tl.sum(dh, 1), mask=rows < tokens)
            store_rows(grad_hidden + item * tokens * RANK, rows, RANK, tokens, dh, RANK, RANK)
            store_rows(grad_value + batch * grad_b + head * grad_h, rows, grad_n, tokens, dv, VALUE_WIDTH, BLOCK_VALUE)
            pointers = partial + rows[:, None] * RANK + ranks[None, :]
            inside = (rows[:, None] < tokens) & (ranks[None, :] < rank)
            so_far = tl.load(pointers, mask=inside & (offset > 0), other=0.0)
            tl.store(pointers, so_far + dw, mask=inside)
        # The next image adds to what this one stored.
        tl.debug_barrier()
