"""The backward pass of O = H U with U = W^T V, or of O = S V under a mask, in one launch: dH, dV and parts of dW."""

import triton
import triton.language as tl

from karat_scale.attention.kernels.triton_features import (
    add_product,
    load_kept,
    load_projector,
    load_rows,
    power_of_two_above,
    store_rows,
)


@triton.jit
def readout_kernel(
    hidden,
    narrow,
    proj,
    value,
    bits,
    grad_output,
    grad_value,
    grad_hidden,
    grad_scale,
    grad_base,
    partial,
    batches,
    batches_per_part,
    heads,
    rank,
    tokens,
    value_b,
    value_h,
    value_n,
    bits_b,
    bits_h,
    output_b,
    output_h,
    output_n,
    grad_b,
    grad_h,
    grad_n,
    RANK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
