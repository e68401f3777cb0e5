"""The controls of all comparisons.

Attention that sees neither queries nor keys, KArAt whose scores are all 0, so that S is a learned constant, and softmax
with the size of KArAt's S.
"""

import torch
from torch import Tensor, nn

from karat_scale.attention.call import output_dtype
from karat_scale.attention.heads import AttentionHeads
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
