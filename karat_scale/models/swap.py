"""Give KArAt to a timm model that is already built, and perhaps trained."""

import copy
from typing import Any

import torch
from timm.layers import Attention
from timm.models.convit import MHSA
from timm.models.swin_transformer import WindowAttention
from torch import nn

from karat_scale.foundation.errors import RecipeError, one_line
from karat_scale.models.convit import KaratMHSA
from karat_scale.models.host import check_attention
from karat_scale.models.layers import measure_layers
from karat_scale.models.make_operator import learn
from karat_scale.models.swin import KaratWindowAttention
from karat_scale.models.vit import KaratAttention
from karat_scale.recipe import AttentionConfig, ModelConfig

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    Attention: KaratAttention,
    MHSA: KaratMHSA,
    WindowAttention: KaratWindowAttention,
}


def swap_attention(network: Any, attention: AttentionConfig, image_size: int = 224) -> None:
    """Replace softmax in a timm model's attention layers, in place. All weights stay; operators are added.

    With `residual=True`, the model computes what it computed before, until it is trained.

    Args:
        network: a timm ViT, ConViT (its last blocks), Swin, or another model with timm's attention.
        attention: the kind of attention, as in a recipe.
        image_size: side of the images in pixels; the operators are made for this number of tokens.

    Raises:
        RecipeError: the section names softmax, the model has none of these attention layers,
            it does not take images of this size, or as `learn`.
    """
    if attention.kind == "softmax":  # the default
        raise RecipeError("attention.kind = softmax is what the model has; use karat, or another kind that learns")
    name = type(network).__name__
    check_attention(network, ModelConfig(name=name, image_size=image_size))
    if not any(type(module) in _CLASSES for module in network.modules()):
        raise RecipeError(f"this {name} has learned attention already")
    try:
        sizes = measure_layers(copy.deepcopy(network).to("meta", torch.float32).eval(), image_size)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"image_size = {image_size} does not fit {name}: {one_line(error)}; pass image_size="
        ) from error
    learn(network, ModelConfig(name=name, image_size=image_size), attention, sizes, _CLASSES)
    parameter = next(network.parameters())
    network.to(parameter.device, parameter.dtype)
