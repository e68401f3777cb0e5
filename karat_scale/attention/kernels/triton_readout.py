"""The backward pass of O = H U with U = W^T V, in one launch: dH, dV and parts of dW."""

import triton
import triton.language as tl

from karat_scale.attention.kernels.triton_features import load_rows, power_of_two_above, store_rows


@triton.jit
def readout_kernel(
    hidden,
    narrow,
    proj,
    value,
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
    partial is dW [parts, h, N, RANK] in float32, summed over one part of the batch.
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
        u = load_rows(narrow + item * RANK * VALUE_WIDTH, ranks, VALUE_WIDTH, RANK, VALUE_WIDTH, BLOCK_VALUE)
        grad_narrow = tl.zeros((RANK, BLOCK_VALUE), tl.float32)
        largest = tl.zeros((BLOCK_ROWS, BLOCK_VALUE), tl.float32)
        for first in range(0, tokens, BLOCK_ROWS):
            rows = first + tl.arange(0, BLOCK_ROWS)
            g = load_rows(upstream, rows, output_n, tokens, VALUE_WIDTH, BLOCK_VALUE).to(dtype)
            h = load_rows(hidden + item * tokens * RANK, rows, RANK, tokens, RANK, RANK)
            grad_narrow = tl.dot(tl.trans(h), g, grad_narrow, input_precision=PRECISION)
            if FAST:
                largest = tl.maximum(largest, tl.abs(g.to(tl.float32)))
        scale = 1.0
        if FAST:
            # By Hoelder's inequality no entry of dH exceeds 4 of these units: the gradient of scores, a sum of less
            # than 16384 products of these with coefficients, fits into float16 too.
            sizes = tl.sum(tl.abs(u.to(tl.float32)), 1)
            scale = power_of_two_above(tl.max(largest) * tl.max(sizes)) * 0.25
        tl.store(grad_scale + item, scale)
        du = grad_narrow.to(dtype)
        for first in range(0, tokens, BLOCK_ROWS):
            rows = first + tl.arange(0, BLOCK_ROWS)
            g = load_rows(upstream, rows, output_n, tokens, VALUE_WIDTH, BLOCK_VALUE).to(dtype)
            dh = tl.dot(g, tl.trans(u), input_precision=PRECISION) * (1.0 / scale)
            if grad_base is not None:
                tl.store(grad_base + item * tokens + rows, tl.sum(dh, 1), mask=rows < tokens)
            store_rows(grad_hidden + item * tokens * RANK, rows, RANK, tokens, dh, RANK, RANK)
            inside = (rows[:, None] < tokens) & (ranks[None, :] < rank)
            w = tl.load(proj + rows[:, None] * rank + ranks[None, :], mask=inside, other=0.0).to(dtype)
            dv = tl.dot(w, du, input_precision=PRECISION)
            store_rows(grad_value + batch * grad_b + head * grad_h, rows, grad_n, tokens, dv, VALUE_WIDTH, BLOCK_VALUE)
            v = load_rows(value + batch * value_b + head * value_h, rows, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
            pointers = partial + rows[:, None] * RANK + ranks[None, :]
            so_far = tl.load(pointers, mask=inside & (offset > 0), other=0.0)
            tl.store(pointers, tl.dot(v, tl.trans(du), so_far, input_precision=PRECISION), mask=inside)
        # The next image adds to what this one stored.
        tl.debug_barrier()
