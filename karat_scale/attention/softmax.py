"""Softmax attention with the arguments of KArAt's, for heads that keep it."""

import torch
from torch import Tensor
from torch.nn import functional


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """softmax(A) V [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=_join(bias, mask, query))


def softmax_scores(query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """softmax(A) [B, h, N, N] of query and key [B, h, N, d]; bias and mask as in `karat_attention`."""
    raw = query @ key.mT / query.shape[-1] ** 0.5
    attn_mask = _join(bias, mask, query)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        raw = raw.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        raw = raw + attn_mask
    # A row that keeps no pair attends to nothing, as in scaled_dot_product_attention.
    weights: Tensor = raw.softmax(-1).nan_to_num(0)
    return weights


def _join(bias: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The two as one `attn_mask` of PyTorch's, which must have N columns."""
    if bias is None:
        return None if mask is None else mask.expand(*mask.shape[:-2], *query.shape[2:3] * 2)
    bias = bias.to(query.dtype)
    joined = bias if mask is None else torch.where(mask, bias, -torch.inf)
    return joined.expand(*joined.shape[:-2], *query.shape[2:3] * 2)
