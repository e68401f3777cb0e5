"""A ViT in torch alone, for measuring attention in whole training steps where timm is not installed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from karat_scale.attention import FourierKaratOperator

# width D, heads h; all have 12 blocks, patches of 16 px and a class token
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
DEPTH, PATCH, IMAGE, CLASSES = 12, 16, 224, 1000
TOKENS = (IMAGE // PATCH) ** 2 + 1


class Block(nn.Module):
    """Pre-norm attention and MLP; `operator` is KArAt's, or None for softmax by SDPA."""

    def __init__(self, width: int, heads: int, operator: nn.Module | None) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.operator = operator
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, D] to tokens [B, N, D]."""
        batch, count, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attend: Callable[..., Tensor] = self.operator or nn.functional.scaled_dot_product_attention
        heads = attend(*qkv.unbind(0))
        tokens = tokens + self.out(heads.transpose(1, 2).reshape(batch, count, width))
        output: Tensor = tokens + self.mlp(self.norm2(tokens))
        return output


class PlainViT(nn.Module):
    """ViT/16 at 224 px with softmax (`grid` None) or blockwise Fourier-KArAt of grid G and rank 12."""

    def __init__(self, size: str, grid: int | None, implementation: str = "auto", depth: int = DEPTH) -> None:
        super().__init__()
        width, heads = SIZES[size]

        def operator() -> nn.Module | None:
            if grid is None:
                return None
            return FourierKaratOperator(TOKENS, heads, rank=12, grid=grid, implementation=implementation)

        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, TOKENS, width))
        self.blocks = nn.Sequential(*(Block(width, heads, operator()) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, 224, 224] to logits [B, 1000]."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)[:, 0]))
        return logits
