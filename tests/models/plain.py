"""The modular Fourier operator written out, for hosts' layers."""

import torch
from torch import Tensor

from karat_scale.attention import KaratOperator


def learned_attention(operator: KaratOperator, scores: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return S [B, h, N, N] of A [B, h, N, N], in A's dtype; pairs that are not kept take no part."""
    cos_coef, sin_coef, proj = (x.detach().to(scores) for x in (operator.cos_coef, operator.sin_coef, operator.proj))
    kept = torch.ones_like(scores) if keep is None else keep.to(scores)
    angles = scores.unsqueeze(-1) * torch.arange(1, cos_coef.shape[-1] + 1).to(scores)
    units = torch.einsum("bhkqm,hpqm,bhkq->bhkp", angles.cos(), cos_coef, kept.expand_as(scores))
    units = units + torch.einsum("bhkqm,hpqm,bhkq->bhkp", angles.sin(), sin_coef, kept.expand_as(scores))
    return units @ proj.mT * kept
