"""Hybrid heads: softmax on a block's first heads, KArAt on the others (arXiv 2503.10632)."""

import torch
from torch import Tensor, nn

from karat_scale.attention.heads import AttentionHeads
from karat_scale.attention.residual import ResidualHeads
from karat_scale.attention.softmax import softmax_attention, softmax_scores


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
        (first, *its_scores), (others, *their_scores) = self._parts(bias, mask)
        alone = softmax_attention(query[:, first], key[:, first], value[:, first], *its_scores)
        return torch.cat((alone, self.operator(query[:, others], key[:, others], value[:, others], *their_scores)), 1)

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return softmax(A) of the first heads and S of the others, [B, h, N, N]."""
        self._check(query)
        (first, *its_scores), (others, *their_scores) = self._parts(bias, mask)
        learned = self.operator.scores(query[:, others], key[:, others], *their_scores)
        alone = softmax_scores(query[:, first], key[:, first], *its_scores)
        return torch.cat((alone.to(learned.dtype), learned), 1)

    def extra_repr(self) -> str:
        """Return the settings, with the constructor's names."""
        return f"softmax_heads={self.softmax_heads}"

    def _parts(self, bias: Tensor | None, mask: Tensor | None) -> list[tuple[slice, Tensor | None, Tensor | None]]:
        """Return the slices of softmax's heads and of the others, with their bias and mask."""
        heads = slice(None, self.softmax_heads), slice(self.softmax_heads, None)
        return [(part, _of_heads(bias, part), _of_heads(mask, part)) for part in heads]

    def _check(self, query: Tensor) -> None:
        heads = self.softmax_heads + self.operator.num_heads
        if query.dim() != 4 or query.shape[1] != heads:
            raise ValueError(f"query has shape {list(query.shape)}: expected [B, h, N, d] with h = {heads}")


def _of_heads(tensor: Tensor | None, heads: slice) -> Tensor | None:
    if tensor is None or tensor.dim() < 3 or tensor.shape[-3] == 1:
        return tensor
    return tensor[..., heads, :, :]
