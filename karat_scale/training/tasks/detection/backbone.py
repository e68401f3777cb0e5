"""The detector: torchvision's Mask R-CNN (He et al., arXiv 1703.06870) on a plain ViT, with KArAt or softmax.

Backbone and heads are ViTDet's (arXiv 2203.16527). In its simple feature pyramid every level is made only of the last
map. KArAt's N is fixed, so tokens attend within windows of the size of the operators. At 224 px the 14 x 14 patches are
one window: N = 196 and no class token. In a larger image, some blocks attend to all of it, by softmax. The optimizer's
groups have layer-wise learning rates in the backbone, and a separate schedule.

Some of torchvision's parts differ here, as a plain ViT at low precision needs. Their strides come from the patch size.
torchvision infers them from the first batch and from rounded quotients. These are wrong for an image that does not fill
the padded input, and for a patch of 14 px. Boxes are float32 whatever the precision: bfloat16 has steps of 2 px from
256 px on.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils._pytree import tree_map
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from karat_scale.engine.optimizers import Groups, parameter_groups
from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.models.hosts import VIT, host_of_name
from karat_scale.models.init_from import take_weights
from karat_scale.recipe import AttentionConfig
from karat_scale.training.tasks.detection.recipe import AdamWConfig, DetectionRecipe

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


# No class token or registers, since they have no place in a map; the pyramid has its own norms.
_OPTIONS = {"class_token": False, "reg_tokens": 0, "global_pool": "", "num_classes": 0, "final_norm": False}
_ABOVE_BLOCKS = ("head.", "norm.", "fc_norm.", "attn_pool.")


def build_vit(recipe: DetectionRecipe, attention: AttentionConfig | None = None) -> VisionTransformer:
    """Return the backbone's ViT for one window, freshly initialised, with the recipe's attention or another.

    Raises:
        RecipeError: it is not a plain ViT, or timm cannot build it at these sizes.
    """
    if host_of_name(recipe.model.name) is not VIT:
        raise RecipeError(
            f"model.name = {recipe.model.name} is not a plain ViT, whose tokens form a map; use one such as "
            "vit_base_patch16_224"
        )
    return cast(VisionTransformer, create_model(recipe.window_model, attention or recipe.attention, **_OPTIONS))


def take_backbone_weights(vit: nn.Module, weights: Mapping[str, Tensor], attention: AttentionConfig | None) -> str:
    """Copy a classifier's weights into the backbone's ViT, in place; returns a line on what was not simply copied.

    The class token and the layers above the blocks are left out. `attention` is as in `take_weights`.

    Raises:
        RecipeError: the weights are of another model.
    """
    below = {name: x for name, x in weights.items() if not name.startswith(_ABOVE_BLOCKS)}
    return take_weights(vit, below, attention=attention)


class ViTBackbone(nn.Module):
    """Maps images [B, 3, S, S] to the maps of a pyramid.

    Args:
        vit: a ViT from `build_vit`. Its attention stays that of one window; its positions are interpolated to the
            image.

    Raises:
        RecipeError: `global_blocks` exceeds the number of blocks, or leaves none to KArAt.
    """

    def __init__(self, vit: VisionTransformer, recipe: DetectionRecipe) -> None:
        super().__init__()
        self.window = recipe.detector.window
        self.side = recipe.model.image_size // recipe.patch_size
        self.global_blocks: frozenset[int] = frozenset()
        if self.side > self.window:
            _check_global_blocks(recipe, len(vit.blocks))
            count, depth = recipe.detector.global_blocks, len(vit.blocks)
            # The last block of each of `count` equal parts, as in ViTDet.
            self.global_blocks = frozenset((part + 1) * depth // count - 1 for part in range(count))
            if recipe.attention.kind != "softmax" and count:  # softmax needs no fixed N
                plain = build_vit(recipe, AttentionConfig())
                for number in self.global_blocks:
                    plain.blocks[number].load_state_dict(vit.blocks[number].state_dict(), strict=False)
                    vit.blocks[number] = plain.blocks[number]
            vit.set_input_size((recipe.model.image_size, recipe.model.image_size))
        self.vit = vit
        self.pyramid = SimpleFeaturePyramid(vit.embed_dim, recipe.detector.channels)
        self.out_channels = recipe.detector.channels

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Return maps by name, as torchvision's detectors expect them."""
        tokens = self.vit.norm_pre(self.vit.patch_embed(images) + self.vit.pos_embed)
        for number, block in enumerate(self.vit.blocks):
            if self.side == self.window or number in self.global_blocks:
                tokens = block(tokens)
            else:
                tokens = join_windows(block(split_windows(tokens, self.window)), self.side, self.window)
        maps: OrderedDict[str, Tensor] = self.pyramid(tokens.transpose(1, 2).unflatten(2, (self.side, self.side)))
        return maps


def split_windows(tokens: Tensor, window: int) -> Tensor:
    """Split tokens [B, P^2, D] of a square map into those of its windows, [B (P / window)^2, window^2, D]."""
    batch, count, width = tokens.shape
    rows = round(count**0.5) // window
    grid = tokens.view(batch, rows, window, rows, window, width).transpose(2, 3)
    return grid.reshape(batch * rows * rows, window * window, width)


def join_windows(tokens: Tensor, side: int, window: int) -> Tensor:
    """Undo `split_windows` for a map of `side` = P rows."""
    rows = side // window
    grid = tokens.view(-1, rows, rows, window, window, tokens.shape[-1]).transpose(2, 3)
    return grid.reshape(-1, side * side, tokens.shape[-1])


def _check_global_blocks(recipe: DetectionRecipe, depth: int) -> None:
    """Raise RecipeError for more blocks than there are, or if none would be left for KArAt."""
    count, learned = recipe.detector.global_blocks, recipe.attention.kind != "softmax"
    most = depth - 1 if learned else depth
    if count > most:
        why = ", and these attend by softmax: no block would keep KArAt" if learned else ""
        raise RecipeError(
            f"detector.global_blocks = {count}, but the model has {depth} blocks{why}; use {most} at most"
        )


def detector_groups(model: Any, optim: AdamWConfig) -> Groups:
    """Return a detector's groups like those of `parameter_groups`.

    The pyramid and the heads are one layer above the last block. So with layer decay d, block n of L has the factor
    d^(L - n), n = 0 .. L - 1, as in ViTDet, and the layers above it have 1. Biases and norms have no weight decay.
    """
    vit = model.backbone.vit
    groups = parameter_groups(vit, optim)
    for group in groups:
        group["lr_scale"] *= optim.layer_decay
    of_vit = set(vit.parameters())
    above = [parameter for parameter in model.parameters() if parameter not in of_vit]
    for decays in (True, False):
        own = [p for p in above if (p.ndim > 1) == decays and p.requires_grad]
        if own:  # else all of them are frozen
            groups.append({"params": own, "weight_decay": optim.weight_decay if decays else 0.0, "lr_scale": 1.0})
    return groups


class StepSchedule:
    """Linear warm-up to `peak_lr`, which is multiplied by `drop_factor` at each of the recipe's `drops`.

    It is also multiplied by `epoch_decay` after each epoch.
    """

    def __init__(self, recipe: DetectionRecipe, steps_per_epoch: int) -> None:
        self._config, self._steps_per_epoch, optim = recipe.schedule, steps_per_epoch, recipe.optim
        total = recipe.train.epochs * steps_per_epoch
        if recipe.schedule.warmup_steps >= total:
            raise RecipeError(
                f"schedule.warmup_steps = {recipe.schedule.warmup_steps}: training has {total} steps; use fewer"
            )
        self._drops = [round(share * total) for share in recipe.schedule.drops]
        self.peak_lr = optim.lr * (recipe.train.global_batch / optim.lr_batch if optim.lr_batch else 1.0)

    def lr(self, step: int) -> float:
        """Return the rate for the update after `step` finished updates."""
        config = self._config
        rate = self.peak_lr * config.drop_factor ** sum(step >= drop for drop in self._drops)
        rate *= config.epoch_decay ** (step // self._steps_per_epoch)
        if step < config.warmup_steps:
            rate *= config.warmup_factor + (1 - config.warmup_factor) * step / config.warmup_steps
        return rate


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
        names: the names of the maps, finest first.
        strides: the strides of the maps in pixels, each twice the one before it.
        output_size: the side of the features.
    """

    def __init__(self, names: Sequence[str], strides: Sequence[float], output_size: int) -> None:
        canonical = _CANONICAL_CELLS * strides[_CANONICAL_LEVEL - _FINEST]
        super().__init__(list(names), output_size, sampling_ratio=2, canonical_scale=canonical)
        coarsest = _FINEST + len(strides) - 1
        self.scales = [1 / stride for stride in strides]
        self.map_levels = initLevelMapper(_FINEST, coarsest, canonical, _CANONICAL_LEVEL)


class Transform(GeneralizedRCNNTransform):
    """Normalises and pads to a square. In evaluation, it first resizes with averaging, as training's jitter does."""

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """Return an image [3, h, w] whose longer side fits; in training, the image unchanged."""
        if self.training:
            return image, target
        scale = self.max_size / max(image.shape[-2:])
        size = [max(round(side * scale), 1) for side in image.shape[-2:]]
        return interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0], target


def _to_float32(_: nn.Module, __: Any, output: Any) -> Any:
    return tree_map(Tensor.float, output)


_RATIOS = (0.5, 1.0, 2.0)


def build_detector(vit: VisionTransformer, recipe: DetectionRecipe) -> MaskRCNN:
    """Return the detector of a recipe, on `vit` from `build_vit`.

    In training it takes float images [3, h, w] in 0 .. 1 with sides of at most `image_size`. In evaluation it takes any
    size, and resizes so that the longer side fits. Both are padded to a square, so N never changes. Labels begin at 1;
    0 is background.
    """
    size, detector = recipe.model.image_size, recipe.detector
    channels, augment = detector.channels, recipe.augment
    strides = [patches * recipe.patch_size for patches in LEVELS.values()]
    maps = list(LEVELS)[:-1], strides[:-1]  # the last is only for proposals
    convolutions = [channels] * 4
    classes = recipe.model.num_classes + 1
    mask_rcnn = MaskRCNN(
        ViTBackbone(vit, recipe),
        rpn_anchor_generator=Anchors(detector.anchor_sizes, _RATIOS, strides),
        rpn_head=RPNHead(channels, len(_RATIOS), conv_depth=2),
        rpn_batch_size_per_image=detector.anchors,
        rpn_pre_nms_top_n_train=detector.candidates_in_training or 2 * detector.proposals,
        rpn_pre_nms_top_n_test=detector.candidates or detector.proposals,
        rpn_post_nms_top_n_train=detector.proposals_in_training or detector.proposals,
        rpn_post_nms_top_n_test=detector.proposals,
        box_roi_pool=RoIAlign(*maps, output_size=7),
        box_head=FastRCNNConvFCHead((channels, 7, 7), convolutions, [detector.box_features], norm_layer=LayerNorm2d),
        box_predictor=FastRCNNPredictor(detector.box_features, classes),
        box_score_thresh=detector.min_score,
        box_batch_size_per_image=detector.rois,
        box_detections_per_img=detector.detections,
        mask_roi_pool=RoIAlign(*maps, output_size=14),
        mask_head=MaskRCNNHeads(channels, convolutions, 1, norm_layer=LayerNorm2d),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes),
    )
    for head in (mask_rcnn.rpn.head, mask_rcnn.roi_heads.box_predictor, mask_rcnn.roi_heads.mask_predictor):
        head.register_forward_hook(_to_float32)
    mask_rcnn.transform = Transform(size, size, list(augment.mean), list(augment.std), size_divisible=size)
    return mask_rcnn
