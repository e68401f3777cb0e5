"""A plain ViT, with KArAt or softmax, as a detector's backbone (ViTDet, arXiv 2203.16527).

KArAt's N is fixed, so tokens attend within windows of the size of the operators. At 224 px the 14 x 14
patches are one window: N = 196 and no class token. In a larger image, some blocks see all of it, by softmax.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import cast

from timm.models import VisionTransformer
from torch import Tensor, nn

from karat_scale.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.models.factory import host_of_name
from karat_scale.models.init_from import take_weights
from karat_scale.models.vit import VIT
from karat_scale.recipe import AttentionConfig
from karat_scale.tasks.detection.pyramid import SimpleFeaturePyramid
from karat_scale.tasks.detection.recipe import DetectionRecipe

# No class token or registers, since they have no place in a map; the pyramid has its own norms.
_OPTIONS = {"class_token": False, "reg_tokens": 0, "global_pool": "", "num_classes": 0, "final_norm": False}
_ABOVE_BLOCKS = ("head.", "norm.", "fc_norm.")


def build_vit(recipe: DetectionRecipe) -> VisionTransformer:
    """Return the backbone's ViT for one window, freshly initialised.

    Raises:
        RecipeError: it is not a plain ViT, or timm cannot build it at these sizes.
    """
    return _create(recipe, recipe.attention)


def _create(recipe: DetectionRecipe, attention: AttentionConfig) -> VisionTransformer:
    if host_of_name(recipe.model.name) is not VIT:
        raise RecipeError(
            f"model.name = {recipe.model.name} is not a plain ViT, whose tokens form a map; use one such as "
            "vit_base_patch16_224"
        )
    return cast(VisionTransformer, create_model(recipe.window_model, attention, **_OPTIONS))


def take_backbone_weights(vit: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Copy a classifier's weights into the backbone's ViT, in place; returns a line on what was not simply copied.

    The class token and the layers above the blocks are left out.

    Raises:
        RecipeError: the weights are of another model.
    """
    return take_weights(vit, {name: x for name, x in weights.items() if not name.startswith(_ABOVE_BLOCKS)})


class ViTBackbone(nn.Module):
    """Maps images [B, 3, S, S] to the maps of a pyramid.

    Args:
        vit: from `build_vit`. Its attention stays that of one window; its positions are interpolated to the image.

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
            self.global_blocks = _evenly_spread(recipe.detector.global_blocks, len(vit.blocks))
            _let_attend_by_softmax(vit, recipe, self.global_blocks)
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
    count, learned = recipe.detector.global_blocks, recipe.attention.kind == "karat"
    most = depth - 1 if learned else depth
    if count > most:
        why = ", and these attend by softmax: no block would keep KArAt" if learned else ""
        raise RecipeError(
            f"detector.global_blocks = {count}, but the model has {depth} blocks{why}; use {most} at most"
        )


def _evenly_spread(count: int, depth: int) -> frozenset[int]:
    """Return the last block of each of `count` equal parts, as in ViTDet."""
    return frozenset((part + 1) * depth // count - 1 for part in range(count))


def _let_attend_by_softmax(vit: VisionTransformer, recipe: DetectionRecipe, blocks: frozenset[int]) -> None:
    """Give these blocks attention without a fixed N, with their query, key and value."""
    if recipe.attention.kind == "softmax" or not blocks:
        return
    plain = _create(recipe, AttentionConfig())
    for number in blocks:
        plain.blocks[number].load_state_dict(vit.blocks[number].state_dict(), strict=False)
        vit.blocks[number] = plain.blocks[number]
