"""The controls of all comparisons: attention that lacks one part of what KArAt has.

Static heads see neither queries nor keys. `WithoutScores` is KArAt whose scores are all 0, so that S is a learned
constant. `ScaledSoftmax` is softmax with the size of KArAt's S.

`attend_rows` computes O = S V in bounded memory, for any rule that makes rows of S from rows of scores.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from karat_scale.attention.call import compute_dtype, full_precision, output_dtype
from karat_scale.attention.operator import AttentionHeads
from karat_scale.attention.routes import Tiling, plan_tiles, workspace_budget
from karat_scale.attention.softmax import softmax_attention, softmax_scores


class StaticHeads(AttentionHeads):
    """S is a learned constant: `matrix` [h, N, N], the same for every image. It mixes positions and has no function.

    What KArAt gains over softmax counts as the functions' work only where it also gains over this. The matrix starts
    at N(0, 1 / N), so that O has the values' variance.

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        device, dtype: of the matrix.
    """

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens, self.num_heads = num_tokens, num_heads
        self.matrix = nn.Parameter(torch.empty((num_heads, num_tokens, num_tokens), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the matrix again."""
        nn.init.normal_(self.matrix, std=self.num_tokens**-0.5)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of value [B, h, N, d]. Query, key and bias are ignored; a masked pair has S[k, q] = 0."""
        return (self._kept(mask).to(output_dtype(value)) @ value).to(output_dtype(value))

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N], the same for each item."""
        kept = self._kept(mask)
        return kept.expand(query.shape[0], *kept.shape[-3:]).to(output_dtype(query))

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        return 2 * self.num_heads * tokens * tokens * width

    def extra_repr(self) -> str:
        """The settings, in the constructor's names."""
        return f"num_tokens={self.num_tokens}, num_heads={self.num_heads}"

    def _kept(self, mask: Tensor | None) -> Tensor:
        return self.matrix if mask is None else self.matrix * mask


class WithoutScores(AttentionHeads):
    """An operator on A = 0. It has the operator's parameters and its start, but sees neither queries nor keys.

    What KArAt gains over this, it gains by what its functions do with the scores.
    """

    def __init__(self, operator: AttentionHeads) -> None:
        super().__init__()
        self.operator, self.num_heads = operator, operator.num_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of value [B, h, N, d]. Query, key and bias are ignored; the mask is not."""
        nothing = torch.zeros_like(query)
        output: Tensor = self.operator(nothing, nothing, value, None, mask)
        return output

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        nothing = torch.zeros_like(query)
        return self.operator.scores(nothing, nothing, None, mask)

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`. Computed as if the scores were not 0."""
        return self.operator.flops(tokens, width, masked)

    def refusal(self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False) -> str | None:
        """See `AttentionHeads`."""
        return self.operator.refusal(width, device, masked=masked)

    def chosen(
        self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False
    ) -> tuple[str, str | None]:
        """See `AttentionHeads`."""
        return self.operator.chosen(width, device, masked=masked)


class ScaledSoftmax(AttentionHeads):
    """S = g softmax(A), with a learned gain g of each head that starts at sqrt(N).

    A row of softmax sums to 1, so at the start O is a mean of the values, with 1 / N of their variance where these are
    independent. KArAt and `StaticHeads` start with all of it. What they gain over softmax, they may gain by that alone.

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        device, dtype: of `gain` [h].
    """

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens, self.num_heads = num_tokens, num_heads
        self.gain = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the gains to sqrt(N)."""
        self.gain.fill_(self.num_tokens**0.5)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        return self._scaled(softmax_attention(query, key, value, bias, mask))

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        return self._scaled(softmax_scores(query, key, bias, mask))

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        return 4 * self.num_heads * tokens * tokens * width

    def extra_repr(self) -> str:
        """The settings, in the constructor's names."""
        return f"num_tokens={self.num_tokens}, num_heads={self.num_heads}"

    def _scaled(self, heads: Tensor) -> Tensor:
        return heads * self.gain.to(heads.dtype)[:, None, None]


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
