"""What S depends on: how much of it changes with the query and with the image, and how large it is.

Attention that gives each query the same row, or each image the same matrix, mixes positions as a constant would. So
these shares say how far a comparison with softmax is about learned functions of the scores at all.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from karat_scale.models.attention_matrices import watched
from karat_scale.models.layers import attention_layers

FIGURES = ("by_query", "by_image", "beyond_pi", "frobenius_norm")
"""Of a block: the shares of S's energy that depend on the query and on the image, the share of scores with |A| > pi,
and the mean Frobenius norm of S."""


class Content:
    """Sums over images of one model's S and A, by block; of matrices only their sum over images is kept, by head."""

    def __init__(self, blocks: int) -> None:
        self._matrices: list[Tensor | float] = [0.0] * blocks
        self._sums = np.zeros((blocks, 4))
        self._images, self._count = np.zeros(blocks), np.zeros(blocks)
        self._pairs = np.zeros(blocks)

    def add(self, block: int, raw: Tensor, learned: Tensor, images: int | None = None) -> None:
        """Add A and S [B, h, N, N] of one block.

        images: their number, where B is a multiple of it. Windows of one image differ by what they may see, so a window
        is compared with the same window of the other images.
        """
        learned = learned.double()
        queries, images = learned.shape[2], images or len(learned)
        self._matrices[block] = self._matrices[block] + learned.unflatten(0, (images, -1)).sum(0)
        energy = learned.square().sum()
        # The part of each column of S that all queries share.
        shared = queries * learned.mean(2).square().sum()
        norms = torch.linalg.matrix_norm(learned).sum()
        beyond = (raw.abs() > math.pi).sum()
        self._sums[block] += torch.stack((energy, shared, norms, beyond.double())).cpu().numpy()
        self._images[block] += images
        self._count[block] += learned.shape[:2].numel()
        self._pairs[block] += raw.numel()

    def means(self) -> list[Tensor | float]:
        """Return the mean of S over images [B / images, h, N, N] of each block, float64."""
        return [matrix / n for matrix, n in zip(self._matrices, self._images, strict=True)]

    def figures(self) -> npt.NDArray[np.float64]:
        """Return `FIGURES` of each block [L, 4]."""
        energy, shared, norms, beyond = self._sums.T
        same = [float(torch.as_tensor(x).square().sum()) / n for x, n in zip(self._matrices, self._images, strict=True)]
        shares = 1 - shared / energy, 1 - np.array(same) / energy, beyond / self._pairs
        return np.stack((*shares, norms / self._count), 1)


@torch.no_grad()
def content_of(model: nn.Module, forward: Callable[[Tensor], object], images: Tensor) -> dict[str, list[float]]:
    """Return `FIGURES`, each as a list over blocks, of normalised images [B, 3, H, W].

    `forward` calls the model, and perhaps more. The forward pass is not compiled.
    """
    content = Content(len(attention_layers(model)))
    with torch.compiler.set_stance("force_eager"), watched(model, partial(content.add, images=len(images))):
        forward(images)
    values = content.figures().round(6).T.tolist()
    return dict(zip(FIGURES, values, strict=True))
