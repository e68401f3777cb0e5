"""O = S V for any rule that computes rows of S from rows of scores, in bounded memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from karat_scale.attention.call import compute_dtype, full_precision, output_dtype
from karat_scale.attention.tiles import Tiling, plan_tiles, workspace_budget

# Rows of S [..., n, N] from scores [..., n, N] and, with a mask, from what takes part [..., n, N]. A rule holds the
# parameters of its call: the backward pass computes rows again, and the module may have other parameters by then.
Rule = Callable[[Tensor, Tensor | None], Tensor]
# Tensors of the size of the scores that a rule holds at once, roughly.
HELD = 4
_plans = False


@contextmanager
def planning() -> Iterator[None]:
    """Let `attend_rows` compute only the first row of O, and return it for all rows.

    The number of tiles follows from the batch and the device, so a trace of them would fit no other batch.
    """
    global _plans  # not a context variable, which torch.compile cannot trace
    before, _plans = _plans, True
    try:
        yield
    finally:
        _plans = before


def attend_rows(
    rule: Rule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """O [B, h, N, d] = rule(A) V with A = Q K^T / sqrt(d) + bias, a tile of query rows at a time.

    The backward pass computes each tile again, so nothing of N x N stays. Parameters of the rule learn. Scores and S
    are float32, or float64 where an input is. The result has the dtype that PyTorch's attention would have.
    `whole` makes one tile of everything, which a tracer can record for any batch.
    """
    dtype = compute_dtype(query, key, value, bias)
    batch, heads, tokens, _ = query.shape
    with full_precision(query.device):
        q, k, v = (x.to(dtype) for x in (query, key, value))
        if whole or batch == 0:
            tiling = Tiling([slice(None)], [slice(None)])
        elif _plans:
            tiling = Tiling([slice(0, 1)], [slice(0, 1)])
        else:
            tiling = plan_tiles(batch, tokens, heads * key.shape[2] * HELD, workspace_budget(query.device))

        def attend(items: slice, rows: slice) -> Tensor:
            scores, keep = _scores(q, k, bias, mask, items, rows)
            return rule(scores, keep) @ v[items]

        def again(items: slice, rows: slice) -> Tensor:
            if not torch.is_grad_enabled():
                return attend(items, rows)
            output: Tensor = checkpoint(attend, items, rows, use_reentrant=False, preserve_rng_state=False)
            return output

        parts = [torch.cat([again(items, rows) for rows in tiling.rows], 2) for items in tiling.batches]
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        if _plans and not whole:
            output = output.expand_as(v).clone()
    return output.to(output_dtype(value))


def rows_of_scores(
    rule: Rule, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """S [B, h, N, N], whole, for analysis: `attend_rows` with the same arguments is S @ value."""
    dtype = compute_dtype(query, key, bias)
    with full_precision(query.device):
        everything = slice(0, query.shape[0]), slice(0, query.shape[2])
        learned = rule(*_scores(query.to(dtype), key.to(dtype), bias, mask, *everything))
    return learned.to(output_dtype(query))


def _scores(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, items: slice, rows: slice
) -> tuple[Tensor, Tensor | None]:
    scores = query[items, :, rows] @ key[items].mT / query.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + _tile(bias, items, rows).to(scores.dtype)
    if mask is None:
        return scores, None
    keep = _tile(mask, items, rows)
    # The score of a masked pair may be infinite, and harmonics of infinity are nan.
    return scores.masked_fill(~keep, 0), keep


def _tile(pairs: Tensor, items: slice, rows: slice) -> Tensor:
    """The tile of a tensor that broadcasts to [B, h, N, N]."""
    if pairs.dim() > 1 and pairs.shape[-2] > 1:
        pairs = pairs[..., rows, :]
    return pairs[items] if pairs.dim() > 3 and pairs.shape[0] > 1 else pairs
