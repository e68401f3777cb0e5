"""Position embeddings that are computed, not learned."""

import math

import torch
from torch import Tensor


def sincos_2d(height: int, width: int, dim: int, temperature: float = 10_000.0) -> Tensor:
    """Return sines and cosines of a grid's coordinates, float32 [height * width, dim], row by row.

    Of column x and row y: sin(x w_k), cos(x w_k), sin(y w_k), cos(y w_k) with w_k = temperature^(-k / (K - 1)),
    k = 0 .. K - 1, K = dim / 4 (MoCo v3, arXiv 2104.02057; so in arXiv 2205.01580). Raises ValueError unless dim is a
    multiple of 4 and at least 8.
    """
    if dim % 4 or dim < 8:
        raise ValueError(f"pos_embed = sincos2d needs a width of 8, 12, 16, ..., not {dim}")
    quarter = dim // 4
    # In float64, so that they do not depend on device or precision.
    exponent = torch.arange(quarter, dtype=torch.float64, device="cpu") / (quarter - 1)
    frequencies = temperature**-exponent
    rows = torch.arange(height, dtype=torch.float64, device="cpu").repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64, device="cpu").repeat(height)
    x, y = torch.outer(columns, frequencies), torch.outer(rows, frequencies)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def is_sincos_2d(positions: Tensor) -> bool:
    """True if the last positions of [1, N, D], those of a square of patches, are these, also if rounded to bfloat16."""
    side, dim = math.isqrt(positions.shape[1]), positions.shape[2]
    if dim % 4 or dim < 8:
        return False
    patches = positions[0, -side * side :].float()
    return torch.allclose(patches, sincos_2d(side, side, dim).to(patches.device), atol=1e-2)
