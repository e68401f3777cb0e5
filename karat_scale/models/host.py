"""A host: a family of timm models that can use KArAt. It defines how a model is built and which layers become KArAt."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.naflexvit import NaFlexVit
from timm.models.pit import ConvEmbedding
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from karat_scale.foundation.errors import RecipeError
from karat_scale.models.layers import KNOWN, LayerSize, attention_layers, measure_layers
from karat_scale.recipe import ModelConfig

# Pools patches into the classifier's input, once and after all blocks, so it is not between tokens.
_POOLS = ("AttentionPoolLatent", "AttentionPool2d")


@dataclass(frozen=True)
class Host:
    """A family of models.

    Attributes:
        build: returns timm's model for a recipe's `model` section and options of timm's.
        learn: (model, attention, sizes of all attention layers, options): the model with KArAt where it is supported.
        fit: adapts a state dict of this model at another image size, or from another library, to the model's own names.
        blocks_are_alike: the attention layers of each model are of the same size.
    """

    build: Callable[..., nn.Module]
    learn: Callable[..., nn.Module]
    fit: Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]
    blocks_are_alike: bool = False

    def softmax(self, model: ModelConfig, **options: Any) -> nn.Module:
        """Return timm's own model.

        Raises:
            RecipeError: it cannot be built at these sizes, or its attention is not supported.
        """
        network = self.build(model, **options)
        check_attention(network, model)
        _check_patches(network, model)
        return network

    @functools.cache  # noqa: B019  # hosts are few and live as long as the program
    def sizes(self, model: ModelConfig, **options: Any) -> tuple[LayerSize, ...]:
        """Return the sizes of the model's attention layers. Raises like `softmax`."""
        if self.blocks_are_alike and model.depth and model.depth > 1:
            return self.sizes(model.changed(depth=1), **options) * model.depth
        with shapes_alone():
            network = self.softmax(model, **options).eval()
            try:
                return measure_layers(network, model.image_size)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise cannot_be_built(model, error) from error


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Build models on the meta device, and leave out what gives their tensors values."""
    with torch.device("meta"), _WithoutValues():
        yield


class _WithoutValues(TorchFunctionMode):
    """Skips in-place operations on the meta device, where torch works out each one in Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and args[0].is_meta and not any(isinstance(other, Tensor) for other in args[1:]):
            return args[0]
        return func(*args, **(kwargs or {}))


_FILLS = {
    getattr(Tensor, f"{name}_") for name in ("add", "clamp", "erfinv", "fill", "mul", "normal", "uniform", "zero")
}


def build_timm(model: ModelConfig, name: str, **settings: Any) -> nn.Module:
    """Return timm's model `name`, freshly initialised, with the recipe's classes unless `settings` override them.

    Raises:
        RecipeError: timm cannot build it.
    """
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, **{"num_classes": model.num_classes, **settings})
        return network
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise cannot_be_built(model, error) from error


def cannot_be_built(model: ModelConfig, error: Exception) -> RecipeError:
    """Return one line about an error of timm or of the model."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RecipeError(f"model.name = {model.name!r} cannot be built with these sizes: {reason}")


def refuse_fields(model: ModelConfig, *fields: str, why: str) -> None:
    """Raise RecipeError if the recipe sets a key that this host's models do not support."""
    for field in fields:
        value = getattr(model, field)
        if value is not None:
            raise RecipeError(f"model.{field} = {value} is not supported by {model.name}, {why}; remove it")


def check_attention(network: nn.Module, model: ModelConfig) -> None:
    """Raise RecipeError for a model of which not all attention can be replaced."""
    if getattr(network, "dynamic_img_size", False) or isinstance(network, NaFlexVit):
        raise RecipeError(
            f"model.name = {model.name!r} accepts images of any size, but KArAt needs a fixed number of tokens; use a "
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
            f"model.name = {model.name!r}: {what} cannot be replaced with KArAt; use a model with timm's "
            "own Attention in each block, a convit_* or a swin_* (docs/models.md)"
        )


def _check_patches(network: Any, model: ModelConfig) -> None:
    """Check that patches tile the image: pixels beyond the last whole patch would be dropped silently."""
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
    """Check the same for PiT, whose patches overlap."""
    (side, *_), (step, *_) = conv.kernel_size, conv.stride
    rest = (model.image_size - side) % step
    if rest:
        raise RecipeError(
            f"model.image_size = {model.image_size} does not fit {model.name}'s patches, {side} pixels wide, "
            f"{step} apart; use {model.image_size - rest}"
        )
