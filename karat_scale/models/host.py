"""What every family of timm's models, a host of KArAt, answers: how it is built, and what of it becomes KArAt."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.naflexvit import NaFlexVit
from timm.models.pit import ConvEmbedding
from torch import Tensor, nn

from karat_scale.errors import RecipeError
from karat_scale.models.layers import KNOWN, LayerSize, attention_layers, measure_layers
from karat_scale.recipe import ModelConfig

# Pools patches into the classifier's input, once and after all blocks: no layer between tokens.
_POOLS = ("AttentionPoolLatent", "AttentionPool2d")


@dataclass(frozen=True)
class Host:
    """A family of models.

    Attributes:
        build: the model of a recipe's `model` section, and of options of timm's, as timm has it.
        learn: (model, attention, sizes of all attention layers, options): with KArAt in the layers that take it.
        fit: a state dict, of this model at another image size or from another library, by the model's own names.
    """

    build: Callable[..., nn.Module]
    learn: Callable[..., nn.Module]
    fit: Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]

    def softmax(self, model: ModelConfig, **options: Any) -> nn.Module:
        """The model as timm has it.

        Raises:
            RecipeError: it cannot be built at these sizes, or its attention is none that is known here.
        """
        network = self.build(model, **options)
        _check_attention(network, model)
        _check_patches(network, model)
        return network

    @functools.cache  # noqa: B019  # hosts are few and live as long as the program
    def sizes(self, model: ModelConfig, **options: Any) -> tuple[LayerSize, ...]:
        """The sizes of the model's attention layers; raises as `softmax`."""
        with torch.device("meta"):
            network = self.softmax(model, **options).eval()
            try:
                return measure_layers(network, model.image_size)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise cannot_be_built(model, error) from error


def build_timm(model: ModelConfig, name: str, **settings: Any) -> nn.Module:
    """timm's model `name`, freshly initialised, with the recipe's classes unless `settings` say else.

    Raises:
        RecipeError: timm cannot build it.
    """
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, **{"num_classes": model.num_classes, **settings})
        return network
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise cannot_be_built(model, error) from error


def cannot_be_built(model: ModelConfig, error: Exception) -> RecipeError:
    """One line about what timm, or the model itself, objects to."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RecipeError(f"model.name = {model.name!r} cannot be built as asked: {reason}")


def refuse_fields(model: ModelConfig, *fields: str, why: str) -> None:
    """Raises RecipeError where the recipe gives what this host's models have of their own."""
    for field in fields:
        value = getattr(model, field)
        if value is not None:
            raise RecipeError(f"model.{field} = {value} cannot hold for {model.name}, {why}; leave it out")


def _check_attention(network: nn.Module, model: ModelConfig) -> None:
    if getattr(network, "dynamic_img_size", False) or isinstance(network, NaFlexVit):
        raise RecipeError(
            f"model.name = {model.name!r} takes images of any size, but KArAt needs a fixed number of tokens; use a "
            "model of one size, such as vit_small_patch16_224"
        )
    known = {id(layer.attention) for layer in attention_layers(network)}
    others = {
        f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}"
        for module in network.modules()
        if id(module) not in known
        and (isinstance(module, KNOWN) or re.search(r"Attention|Attn", type(module).__name__))
        and type(module).__name__ not in _POOLS
    }
    if others or not known:
        what = f"its attention, {min(others)}," if others else f"the attention of a {type(network).__name__}"
        raise RecipeError(
            f"model.name = {model.name!r}: {what} is none that KArAt can take the place of; use a model with timm's "
            "own Attention in each block, a convit_* or a swin_* (docs/models.md)"
        )


def _check_patches(network: Any, model: ModelConfig) -> None:
    """Pixels beyond the last whole patch would be dropped in silence."""
    embed = getattr(network, "patch_embed", None)
    if isinstance(embed, ConvEmbedding):
        _check_overlapping(embed.conv, model)
    if isinstance(embed, PatchEmbed) and model.image_size % embed.patch_size[0]:
        side = embed.patch_size[0]
        nearest = max(model.image_size // side, 1) * side
        raise RecipeError(
            f"model.image_size = {model.image_size} is not a multiple of the patch size of {model.name}, {side}; "
            f"use {nearest}"
        )


def _check_overlapping(conv: nn.Conv2d, model: ModelConfig) -> None:
    """The same of PiT, whose patches overlap."""
    (side, *_), (step, *_) = conv.kernel_size, conv.stride
    rest = (model.image_size - side) % step
    if rest:
        raise RecipeError(
            f"model.image_size = {model.image_size} is no whole number of {model.name}'s patches, {side} pixels wide, "
            f"{step} apart; use {model.image_size - rest}"
        )
