"""Softmax with a learned correction: S = softmax(A) + g S_learned, where each head's gate g starts at 0.

Ours, not the paper's: what ReZero (arXiv 2003.04887) does to a layer, done to attention.
"""

import torch
from torch import Tensor, nn

from karat_scale.attention.heads import AttentionHeads
from karat_scale.attention.softmax import softmax_attention, softmax_scores


class ResidualHeads(nn.Module):
    """Heads that are softmax's exactly at the start, and whose `operator` joins as far as its `gate` [h] learns.

    At g = 0 the operator's own parameters have no gradient and the gate has, so these follow one step behind. Costs
    softmax attention and the operator.
    """

    def __init__(self, operator: AttentionHeads) -> None:
        super().__init__()
        self.operator, self.num_heads = operator, operator.num_heads
        like = next(operator.parameters())
        self.gate = nn.Parameter(torch.zeros(operator.num_heads, device=like.device, dtype=like.dtype))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        learned: Tensor = self.operator(query, key, value, bias, mask)
        return softmax_attention(query, key, value, bias, mask) + self._gate(learned) * learned

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N], both parts."""
        learned = self.operator.scores(query, key, bias, mask)
        return softmax_scores(query, key, bias, mask).to(learned.dtype) + self._gate(learned) * learned

    def _gate(self, like: Tensor) -> Tensor:
        return self.gate.to(like.dtype)[:, None, None]
