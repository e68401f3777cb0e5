"""A control: softmax with the size of KArAt's S."""

import torch
from torch import Tensor, nn

from karat_scale.attention.heads import AttentionHeads
from karat_scale.attention.softmax import softmax_attention, softmax_scores


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
