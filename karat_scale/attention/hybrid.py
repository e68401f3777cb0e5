"""Softmax beside KArAt, in other heads or in the same.

Hybrid heads: softmax on a block's first heads, KArAt on the others (arXiv 2503.10632).

Residual heads: softmax with a learned correction, S = softmax(A) + g S_learned, where each head's gate g starts at 0.
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


class HybridHeads(nn.Module):
    """Attention whose first `softmax_heads` heads use softmax and have no parameters; `operator` computes the others.

    Raises ValueError when `softmax_heads` is not a positive integer.
    """

    def __init__(self, operator: AttentionHeads | ResidualHeads, softmax_heads: int) -> None:
        super().__init__()
        if not isinstance(softmax_heads, int) or isinstance(softmax_heads, bool) or softmax_heads < 1:
            raise ValueError(f"softmax_heads = {softmax_heads!r}: expected an integer of at least 1")
        self.operator, self.softmax_heads = operator, softmax_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return O [B, h, N, d] for query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        self._check(query)
        alone, others = zip(*map(self._split, (query, key, value, bias, mask)), strict=True)
        return torch.cat((softmax_attention(*alone), self.operator(*others)), 1)

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return softmax(A) of the first heads and S of the others, [B, h, N, N]."""
        self._check(query)
        alone, others = zip(*map(self._split, (query, key, bias, mask)), strict=True)
        learned = self.operator.scores(*others)
        return torch.cat((softmax_scores(*alone).to(learned.dtype), learned), 1)

    def extra_repr(self) -> str:
        """Return the settings, with the constructor's names."""
        return f"softmax_heads={self.softmax_heads}"

    def _split(self, tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the parts of softmax's heads and of the others, of a tensor [..., h or 1, N, d or N]."""
        if tensor is None or tensor.dim() < 3 or tensor.shape[-3] == 1:
            return tensor, tensor
        # Its backward pass writes each gradient once, where slices would fill and add a whole tensor each.
        alone, others = tensor.split((self.softmax_heads, self.operator.num_heads), -3)
        return alone, others

    def _check(self, query: Tensor) -> None:
        heads = self.softmax_heads + self.operator.num_heads
        if query.dim() != 4 or query.shape[1] != heads:
            raise ValueError(f"query has shape {list(query.shape)}: expected [B, h, N, d] with h = {heads}")
