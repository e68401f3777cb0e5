"""Hybrid heads: softmax on a block's first heads, KArAt on the others (arXiv 2503.10632)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from karat_scale.attention.operator import KaratOperator


class HybridHeads(nn.Module):
    """Attention whose first `softmax_heads` heads have no parameters; `operator` owns the rest.

    Raises ValueError when `softmax_heads` is not a positive integer.
    """

    def __init__(self, operator: KaratOperator, softmax_heads: int) -> None:
        super().__init__()
        if not isinstance(softmax_heads, int) or isinstance(softmax_heads, bool) or softmax_heads < 1:
            raise ValueError(f"softmax_heads = {softmax_heads!r}: expected an integer of at least 1")
        self.operator, self.softmax_heads = operator, softmax_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        self._check(query)
        softmax, learned = slice(None, self.softmax_heads), slice(self.softmax_heads, None)
        attn_mask = _join(_of_heads(bias, softmax), _of_heads(mask, softmax), query)
        first = functional.scaled_dot_product_attention(
            query[:, softmax], key[:, softmax], value[:, softmax], attn_mask=attn_mask
        )
        parts = query[:, learned], key[:, learned], value[:, learned]
        return torch.cat((first, self.operator(*parts, _of_heads(bias, learned), _of_heads(mask, learned))), 1)

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """softmax(A) of the first heads and S of the others, [B, h, N, N]."""
        self._check(query)
        softmax, learned = slice(None, self.softmax_heads), slice(self.softmax_heads, None)
        raw = query[:, softmax] @ key[:, softmax].mT / query.shape[-1] ** 0.5
        attn_mask = _join(_of_heads(bias, softmax), _of_heads(mask, softmax), query)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            raw = raw.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            raw = raw + attn_mask
        others = self.operator.scores(
            query[:, learned], key[:, learned], _of_heads(bias, learned), _of_heads(mask, learned)
        )
        # A row that keeps no pair attends to nothing, as in scaled_dot_product_attention.
        return torch.cat((raw.softmax(-1).nan_to_num(0).to(others.dtype), others), 1)

    def extra_repr(self) -> str:
        """The settings, in the constructor's names."""
        return f"softmax_heads={self.softmax_heads}"

    def _check(self, query: Tensor) -> None:
        heads = self.softmax_heads + self.operator.num_heads
        if query.dim() != 4 or query.shape[1] != heads:
            raise ValueError(f"query has shape {list(query.shape)}: expected [B, h, N, d] with h = {heads}")


def _of_heads(tensor: Tensor | None, heads: slice) -> Tensor | None:
    if tensor is None or tensor.dim() < 3 or tensor.shape[-3] == 1:
        return tensor
    return tensor[..., heads, :, :]


def _join(bias: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The two as one `attn_mask` of PyTorch's, which must have N columns."""
    if bias is None:
        return None if mask is None else mask.expand(*mask.shape[:-2], *query.shape[2:3] * 2)
    bias = bias.to(query.dtype)
    joined = bias if mask is None else torch.where(mask, bias, -torch.inf)
    return joined.expand(*joined.shape[:-2], *query.shape[2:3] * 2)
