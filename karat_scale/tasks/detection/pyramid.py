"""The simple feature pyramid of ViTDet (Li et al., arXiv 2203.16527): every level is made only of the last map."""

from collections import OrderedDict

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

LEVELS = {"0": 0.25, "1": 0.5, "2": 1.0, "3": 2.0, "pool": 4.0}
"""Strides in patches, by torchvision's names: 4, 8, 16, 32 and 64 px for patches of 16 px."""


class SimpleFeaturePyramid(nn.Module):
    """Turns a ViT's map [B, D, H, W] into maps [B, channels, ...] with sides of 4, 2, 1, 1/2 and 1/4 times its own.

    Larger maps come from transposed convolutions, smaller ones from pooling. Each is followed by a 1 x 1 and a 3 x 3
    convolution with layer norms. The last, only for proposals, is the fourth subsampled.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        quarter = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2),
            LayerNorm2d(width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, kernel_size=2, stride=2),
        )
        half = nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)
        scales = ((quarter, width // 4), (half, width // 2), (nn.Identity(), width), (nn.MaxPool2d(2), width))
        self.levels = nn.ModuleList(nn.Sequential(scale, *_convolutions(inner, channels)) for scale, inner in scales)
        self.last = LastLevelMaxPool()

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """Return the maps by torchvision's names, finest first."""
        maps, names = self.last([level(x) for level in self.levels], [x], list(LEVELS)[:-1])
        return OrderedDict(zip(names, maps, strict=True))


def _convolutions(width: int, channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width, channels, kernel_size=1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(channels),
    ]
