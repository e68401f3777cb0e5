"""The control of all comparisons: attention that sees neither queries nor keys."""

import torch
from torch import Tensor, nn

from karat_scale.attention.heads import AttentionHeads
from karat_scale.attention.precision import output_dtype


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
