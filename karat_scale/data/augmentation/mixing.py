"""Mixup and cutmix between neighbours of a global batch, and label smoothing.

timm mixes sample i with sample b - 1 - i, which ties the result to the size of a micro batch. Here samples 2i
and 2i + 1 mix, and kind, lambda and box come from (seed, epoch, global batch): an even slice of a batch mixes
as it does inside the whole.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from karat_scale.data.plan import batch_seed
from karat_scale.recipe import AugmentConfig


@dataclass(frozen=True)
class MixParams:
    """How a global batch is mixed. lam: the share of the sample itself. box: top, bottom, left, right in pixels."""

    kind: Literal["none", "mixup", "cutmix"]
    lam: float = 1.0
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


class Mixer:
    """Mixes images and labels of a batch and smooths the labels.

    Mixup: arXiv 1710.09412. Cutmix: arXiv 1905.04899, lambda corrected for a box cut by the border. With both
    on, `mix_switch_prob` is the probability of cutmix.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, seed: int) -> None:
        self._augment = augment
        self._num_classes = num_classes
        self._seed = seed

    def params(self, epoch: int, batch: int, height: int, width: int) -> MixParams:
        """Return how global batch `batch` of `epoch` mixes images of this size."""
        augment = self._augment
        if not augment.mixes:
            return MixParams("none")
        # RandomState is the numpy generator whose stream is frozen for good.
        rng = np.random.RandomState(batch_seed(self._seed, epoch, batch) % 2**32)
        mix, switch = rng.rand(2)
        if mix >= augment.mix_prob:
            return MixParams("none")
        cut = augment.cutmix > 0 and (augment.mixup == 0 or switch < augment.mix_switch_prob)
        if not cut:
            return MixParams("mixup", float(rng.beta(augment.mixup, augment.mixup)))
        lam = float(rng.beta(augment.cutmix, augment.cutmix))
        return cut_box(lam, height, width, np.random.RandomState(rng.randint(2**31)))

    def targets(self, labels: torch.Tensor, mix: MixParams) -> torch.Tensor:
        """Return smoothed and mixed targets, float32 [b, classes], of labels, int64 [b]."""
        smoothing = self._augment.label_smoothing
        off = smoothing / self._num_classes
        targets = torch.full((len(labels), self._num_classes), off, dtype=torch.float32, device=labels.device)
        targets.scatter_(1, labels[:, None], 1 - smoothing + off)
        return targets if mix.kind == "none" else targets * mix.lam + _partners(targets) * (1 - mix.lam)


def cut_box(lam: float, height: int, width: int, rng: np.random.RandomState) -> MixParams:
    """Draw the box of cutmix around a random pixel: a share 1 - lam of the image, less what the border cuts off."""
    side = math.sqrt(1 - lam)
    rows, columns = int(height * side), int(width * side)
    y, x = int(rng.randint(height)), int(rng.randint(width))
    top, bottom = max(y - rows // 2, 0), min(y + (rows + 1) // 2, height)
    left, right = max(x - columns // 2, 0), min(x + (columns + 1) // 2, width)
    share = (bottom - top) * (right - left) / (height * width)
    return MixParams("cutmix", 1 - share, (top, bottom, left, right))


def mixed(images: torch.Tensor, mix: MixParams) -> torch.Tensor:
    """Return float [b, 3, H, W] mixed in pairs, so b must be even; the input does not change."""
    if mix.kind == "none":
        return images
    if mix.kind == "mixup":
        return images * mix.lam + _partners(images) * (1 - mix.lam)
    top, bottom, left, right = mix.box
    result = images.clone()
    result[..., top:bottom, left:right] = _partners(images[..., top:bottom, left:right])
    return result


def _partners(rows: torch.Tensor) -> torch.Tensor:
    """Return the row that each row mixes with: rows 1, 0, 3, 2, ..."""
    partners: torch.Tensor = rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return partners
