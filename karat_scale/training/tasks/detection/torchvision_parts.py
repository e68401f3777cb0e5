"""torchvision's parts of Mask R-CNN, where a plain ViT at low precision needs them to differ.

Their strides come from the patch size. torchvision infers them from the first batch and from rounded quotients, which
an image that does not fill the padded input, or a patch of 14 px, makes wrong. Boxes are float32 whatever the
precision: bfloat16 has steps of 2 px from 256 px on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

Target = dict[str, Tensor]
_FINEST, _CANONICAL_LEVEL, _CANONICAL_CELLS = 2, 4, 14


class Anchors(AnchorGenerator):
    """Anchors at the cells of maps with these strides in pixels."""

    def __init__(self, sizes: Sequence[int], ratios: Sequence[float], strides: Sequence[float]) -> None:
        super().__init__(tuple((size,) for size in sizes), (tuple(ratios),) * len(sizes))
        self._strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image, float32 [n, 4]: the same for all."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self._strides]
        anchors = torch.cat(self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class RoIAlign(MultiScaleRoIAlign):
    """Features of regions, each from the map on which it spans about 14 cells (Lin et al., arXiv 1612.03144, eq. 1).

    Args:
        names: of the maps, finest first; strides: theirs in pixels, each twice the one before it.
        output_size: side of the features.
    """

    def __init__(self, names: Sequence[str], strides: Sequence[float], output_size: int) -> None:
        canonical = _CANONICAL_CELLS * strides[_CANONICAL_LEVEL - _FINEST]
        super().__init__(list(names), output_size, sampling_ratio=2, canonical_scale=canonical)
        coarsest = _FINEST + len(strides) - 1
        self.scales = [1 / stride for stride in strides]
        self.map_levels = initLevelMapper(_FINEST, coarsest, canonical, _CANONICAL_LEVEL)


class Transform(GeneralizedRCNNTransform):
    """Normalises and pads to a square. In evaluation, it first resizes as training's jitter does: it averages."""

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """Return an image [3, h, w] whose longer side fits; in training, as it is."""
        if self.training:
            return image, target
        scale = self.max_size / max(image.shape[-2:])
        size = [max(round(side * scale), 1) for side in image.shape[-2:]]
        return interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0], target


class ProposalHead(RPNHead):
    """Objectness and boxes of the anchors, float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return both for each map."""
        logits, boxes = super().forward(x)
        return [one.float() for one in logits], [one.float() for one in boxes]


class BoxPredictor(FastRCNNPredictor):
    """Classes and boxes of regions, float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return both for features [n, d]."""
        scores, boxes = super().forward(x)
        return scores.float(), boxes.float()


class MaskPredictor(MaskRCNNPredictor):
    """Masks of regions for each class, float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes, 2 h, 2 w] for features [n, channels, h, w]."""
        logits: Tensor = super().forward(x)
        return logits.float()
