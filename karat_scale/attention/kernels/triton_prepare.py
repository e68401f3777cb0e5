"""What the forward pass needs first, in one launch: coefficients as tensor cores read them, and U = W^T V or a mask's
bits."""

import triton
import triton.language as tl

from karat_scale.attention.kernels.triton_features import load_pairs, load_projector, load_rows, power_of_two_above


@triton.jit
def prepare_kernel(
    cos_coef,
    sin_coef,
    proj,
    value,
    mask,
    coef,
    coef_scale,
    narrow,
    bits,
    heads,
    mask_heads,
    rank,
    tokens,
    padded_tokens,
    value_b,
    value_h,
    value_n,
    mask_b,
    mask_h,
    mask_n,
    mask_m,
    GRID: tl.constexpr,
    BLOCK_GRID: tl.constexpr,
    RANK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h RANK programs pack the coefficients of one rank each, B h more compute U of one head of one image. With a mask,
    which leaves no use for U, one more for each of its matrices packs its bits instead.

    coef is C [h, 2G, padded N, RANK], cosine and sine by turns, zero in its padding, in units of coef_scale [h]. FAST
    makes these powers of two so that no coefficient exceeds 1 and float16 holds it; else they are 1. narrow is U
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
        _pack(
            cos_coef + (head * rank + unit) * tokens * GRID,
            sin_coef + (head * rank + unit) * tokens * GRID,
            coef + head * (2 * GRID) * padded_tokens * RANK + unit,
            scale,
            # Ranks in the padding have no tokens.
            tl.where(unit < rank, tokens, 0),
            padded_tokens,
            GRID,
            BLOCK_GRID,
            RANK,
            BLOCK_TOKENS,
        )
    elif mask is not None:
        matrix = (tl.program_id(0) - packing).to(tl.int64)
        ours = mask + matrix // mask_heads * mask_b + matrix % mask_heads * mask_h
        _pack_pairs(ours, bits + matrix * 2 * tl.cdiv(tokens, 32) * tokens, tokens, mask_n, mask_m, BLOCK_TOKENS)
    else:
        item = (tl.program_id(0) - packing).to(tl.int64)
        batch = item // heads
        head = item % heads
        _narrow(
            value + batch * value_b + head * value_h,
            proj + head * tokens * rank,
            narrow + item * RANK * VALUE_WIDTH,
            rank,
            tokens,
            value_n,
            RANK,
            VALUE_WIDTH,
            BLOCK_VALUE,
            BLOCK_TOKENS,
            PRECISION,
        )


@triton.jit
def _largest(coef, count):
    largest = tl.zeros((4096,), tl.float32)
    for first in range(0, count, 4096):
        at = first + tl.arange(0, 4096)
        largest = tl.maximum(largest, tl.abs(tl.load(coef + at, mask=at < count, other=0.0).to(tl.float32)))
    return tl.max(largest)


@triton.jit
def _pack(
    cos_coef,
    sin_coef,
    coef,
    scale,
    tokens,
    padded_tokens,
    GRID: tl.constexpr,
    BLOCK_GRID: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    orders = tl.arange(0, BLOCK_GRID)
    for first in range(0, padded_tokens, BLOCK_TOKENS):
        rows = first + tl.arange(0, BLOCK_TOKENS)
        cos = load_rows(cos_coef, rows, GRID, tokens, GRID, BLOCK_GRID).to(tl.float32) / scale
        sin = load_rows(sin_coef, rows, GRID, tokens, GRID, BLOCK_GRID).to(tl.float32) / scale
        keep = (rows[:, None] < padded_tokens) & (orders[None, :] < GRID)
        pointers = coef + (2 * orders[None, :] * padded_tokens + rows[:, None]) * RANK
        tl.store(pointers, cos.to(coef.dtype.element_ty), mask=keep)
        tl.store(pointers + padded_tokens * RANK, sin.to(coef.dtype.element_ty), mask=keep)


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
def _narrow(
    value,
    proj,
    narrow,
    rank,
    tokens,
    value_n,
    RANK: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns, ranks = tl.arange(0, BLOCK_VALUE), tl.arange(0, RANK)
    total = tl.zeros((RANK, BLOCK_VALUE), tl.float32)
    for first in range(0, tokens, BLOCK_TOKENS):
        rows = first + tl.arange(0, BLOCK_TOKENS)
        v = load_rows(value, rows, value_n, tokens, VALUE_WIDTH, BLOCK_VALUE)
        w = load_projector(proj, rows, tokens, rank, RANK).to(v.dtype)
        total = tl.dot(tl.trans(w), v, total, input_precision=PRECISION)
    pointers = narrow + ranks[:, None] * VALUE_WIDTH + columns[None, :]
    tl.store(pointers, total.to(narrow.dtype.element_ty), mask=columns[None, :] < VALUE_WIDTH)
