"""Build a recipe's model, and give KArAt to a timm model that is already built, which may be trained."""

import copy
from typing import Any, Literal

import torch
from torch import nn

from karat_scale.foundation.errors import RecipeError, one_line
from karat_scale.models import hosts
from karat_scale.models.layers import LayerSize, attention_layers, freeze, measure_layers
from karat_scale.models.operators import learn
from karat_scale.models.transfer import TransferredAttention
from karat_scale.recipe import AttentionConfig, ModelConfig, Recipe

_CLASSES = {own: ours for host in (hosts.OTHER, *hosts.HOSTS.values()) for own, ours in host.classes.items()}


def swap_attention(network: Any, attention: AttentionConfig, image_size: int | tuple[int, int] = 224) -> None:
    """Replace softmax in a timm model's attention layers, in place. All weights stay as they are.

    Operators are added, on the device and in the dtype of their layers. With `residual=True`, the model computes what
    it computed before, until it is trained.

    Args:
        network: a timm ViT, ConViT (its last blocks), Swin, or another model with timm's attention.
        attention: the kind of attention, as in a recipe.
        image_size: side of the images in pixels, or height and width; the operators are made for this number of tokens.

    Raises:
        RecipeError: the section names softmax, the model has none of these attention layers,
            it does not take images of this size, the section needs square images, or as `learn`.
    """
    if not attention.learns:  # the default
        raise RecipeError("attention.kind = softmax is what the model has; use karat, or another kind that learns")
    name = type(network).__name__
    model = ModelConfig(name=name)
    hosts.check_attention(network, model)
    if not any(type(module) in _CLASSES for module in network.modules()):
        raise RecipeError(f"this {name} has learned attention already")
    if not isinstance(image_size, int) and image_size[0] != image_size[1]:
        _refuse_modes(attention, image_size)
    try:
        sizes = measure_layers(copy.deepcopy(network).to("meta", torch.float32).eval(), image_size)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"image_size = {image_size} does not fit {name}: {one_line(error)}; pass the model's own image_size"
        ) from error
    learn(network, model, attention, sizes, _CLASSES)
    for _, _, layer in attention_layers(network):
        if hasattr(layer, "operator"):
            layer.operator.to(layer.qkv.weight.device, layer.qkv.weight.dtype)


def _refuse_modes(attention: AttentionConfig, image_size: tuple[int, int]) -> None:
    """Raise RecipeError if a section makes its operators from the modes of a square of patches."""
    for section in attention.sections:
        for name, value, other in (("form", "smooth", "modular"), ("init", "softmax_like", "variance_preserving")):
            if getattr(section, name) == value and section.form != "full_rank":
                raise RecipeError(
                    f"attention.{name} = {value} needs square images, but image_size = {image_size}; use "
                    f"attention.{name}={other}"
                )


def create_model(model: ModelConfig, attention: AttentionConfig, **options: Any) -> nn.Module:
    """Build the timm model a recipe names, with softmax or KArAt attention.

    A model with `attention.transfer_from` has its own parameters, and computes only after `give_teacher`.

    Args:
        options: options of timm's model that override the named model's, such as `class_token=False`.

    Raises:
        RecipeError: timm does not know the name, the model's attention is not supported, or the model does not support
            the sizes or the kind of attention in the recipe.
    """
    host = hosts.host_of_name(model.name)
    if host is not hosts.VIT:
        hosts.refuse_fields(model, "pool", "pos_embed", "weight_init", why="which is not a plain ViT")
    if attention.transfer_from:
        check_transfers(model.name)
        return hosts.build_vit(model, TransferredAttention, **options)
    if not attention.learns and not attention.blocks:
        return host.softmax(model, **options)
    return host.learn(model, attention, host.sizes(model, **options), **options)


def outline(recipe: Recipe) -> nn.Module:
    """Return the model that a recipe trains, on the meta device: all shapes, no values. Raises as training would."""
    with hosts.shapes_alone():
        model = create_model(recipe.model, recipe.attention)
    if recipe.train.freeze:
        freeze(model, recipe.train.freeze)
    return model


def layer_sizes(model: ModelConfig) -> tuple[LayerSize, ...]:
    """Return the sizes of the attention layers of a recipe's model, in order. Raises like `create_model`."""
    return hosts.host_of_name(model.name).sizes(model)


def check_transfers(name: str) -> None:
    """Raise RecipeError unless the model of a name supports attention transfer."""
    if hosts.host_of_name(name) is not hosts.VIT:
        raise RecipeError(
            f"model.name = {name!r}: attention can be transferred only between plain ViTs; use a vit_* or deit*"
        )


def parameter_count(model: nn.Module) -> int:
    """Return the number of trainable scalars; a parameter shared by several modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def no_weight_decay_names(model: nn.Module, decay_karat: bool | Literal["all"]) -> set[str]:
    """Return the parameters without weight decay: timm's exceptions, biases, norms, and KArAt's unless requested.

    decay_karat: `optim.karat_weight_decay`.
    """
    theirs: Any = getattr(model, "no_weight_decay", set)
    exempt = set(theirs())
    for name, parameter in model.named_parameters():
        is_karat = ".operator." in name
        if (is_karat and not decay_karat) or (parameter.ndim <= 1 and not (is_karat and decay_karat == "all")):
            exempt.add(name)
    return exempt
