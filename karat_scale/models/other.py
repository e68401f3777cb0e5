"""Other timm models that use timm's own attention, such as PiT or MobileViT, at timm's own sizes."""

import inspect
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

from karat_scale.foundation.errors import RecipeError
from karat_scale.models.host import Host, build_timm, refuse_fields
from karat_scale.models.layers import LayerSize
from karat_scale.models.make_operator import learn
from karat_scale.models.vit import KaratAttention
from karat_scale.recipe import AttentionConfig, ModelConfig


def _build(model: ModelConfig, **options: Any) -> nn.Module:
    refuse_fields(model, "patch_size", "embed_dim", "depth", "num_heads", why="which is built at timm's own sizes")
    with torch.device("meta"):
        taken = inspect.signature(type(timm.create_model(model.name))).parameters
    settings: dict[str, Any] = {"img_size": model.image_size} if "img_size" in taken else {}
    for field, name in (("drop_path", "drop_path_rate"), ("proj_drop", "proj_drop_rate")):
        value = getattr(model, field)
        if name in taken:
            settings[name] = value
        elif value:
            raise RecipeError(f"model.{field} = {value:g} is not supported by {model.name}, which has no {name}; use 0")
    return build_timm(model, model.name, **settings, **options)


def _learn(model: ModelConfig, attention: AttentionConfig, sizes: tuple[LayerSize, ...], **options: Any) -> nn.Module:
    return learn(_build(model, **options), model, attention, sizes, {Attention: KaratAttention})


def _fit(weights: Mapping[str, Tensor], _: nn.Module) -> dict[str, Tensor]:
    return dict(weights)


OTHER = Host(_build, _learn, _fit)
