"""The last launch of the backward pass: it adds the partial sums of dC and dW, always in the same order."""

import triton
import triton.language as tl


@triton.jit
def reduce_kernel(
    coef_partial,
    proj_partial,
    grad_cos,
    grad_sin,
    grad_proj,
    coef_parts,
    proj_parts,
    heads,
    rank,
    tokens,
    padded_tokens,
    FEATURES: tl.constexpr,
    GRID: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
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
