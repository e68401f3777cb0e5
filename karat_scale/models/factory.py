"""From the recipe's `model` and `attention` sections to a model."""

import difflib
from typing import Any

import timm
from timm.models import VisionTransformer
from torch import nn

from karat_scale.errors import RecipeError
from karat_scale.models.transfer import TransferredAttention
from karat_scale.models.vit import OWN_SIZES, build_vit, create_vit
from karat_scale.recipe import AttentionConfig, ModelConfig


def create_model(model: ModelConfig, attention: AttentionConfig, **options: Any) -> VisionTransformer:
    """Build the timm model a recipe names, with softmax or KArAt attention.

    One with `attention.transfer_from` has its own parameters and computes after `give_teacher`.

    Args:
        options: of timm's VisionTransformer, in place of the named model's own, such as `class_token=False`.

    Raises:
        RecipeError: the name is unknown to timm, is not a plain ViT, or cannot take the sizes asked for.
    """
    names = [*OWN_SIZES, *timm.list_models("vit_*")]
    base_name = model.name.partition(".")[0]
    if base_name not in names:
        close = difflib.get_close_matches(base_name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; `timm.list_models('vit_*')` lists the valid ones"
        raise RecipeError(f"model.name = {model.name!r}: no such vision transformer in timm{hint}")
    if attention.transfer_from:
        return build_vit(model, TransferredAttention, **options)
    return create_vit(model, attention, **options)


def parameter_count(model: nn.Module) -> int:
    """Trainable scalars; a parameter shared by several modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def no_weight_decay_names(model: VisionTransformer, decay_karat: bool) -> set[str]:
    """Parameters that get no weight decay: what timm exempts, biases and norms, and KArAt's own unless asked."""
    exempt = set(model.no_weight_decay())
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 or (".operator." in name and not decay_karat):
            exempt.add(name)
    return exempt
