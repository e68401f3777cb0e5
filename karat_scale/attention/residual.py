"""Softmax with a learned correction: S = softmax(A) + g S_learned, where each head's gate g starts at 0.

Ours, not the paper's: it applies to attention what ReZero (arXiv 2003.04887) applies to a layer.
"""

import torch
from torch import Tensor, nn

from karat_scale.attention.heads import AttentionHeads
from karat_scale.attention.softmax import softmax_attention, softmax_scores


class ResidualHeads(nn.Module):
    """Heads that equal softmax exactly at the start. Their `gate` [h] learns how much `operator` adds.

    At g = 0 only the gate has a gradient; the operator's own parameters have one from the second step on. The cost is
    that of softmax attention and of the operator.
    """

    def __init__(self, operator: AttentionHeads) -> None:
        super().__init__()
        self.operator, self.num_heads = operator, operator.num_heads
        like = next(operator.parameters())
        self.gate = nn.Parameter(torch.zeros(operator.num_heads, device=like.device, dtype=like.dtype))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return O [B, h, N, d] for query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        learned: Tensor = self.operator(query, key, value, bias, mask)
        return softmax_attention(query, key, value, bias, mask) + self._gate(learned) * learned

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return S [B, h, N, N], both parts together."""
        learned = self.operator.scores(query, key, bias, mask)
        return softmax_scores(query, key, bias, mask).to(learned.dtype) + self._gate(learned) * learned

    def _gate(self, like: Tensor) -> Tensor:
        return self.gate.to(like.dtype)[:, None, None]
