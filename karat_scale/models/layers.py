"""The attention layers of a model of any architecture, in the order of the forward pass; which are frozen."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from timm.models.convit import GPSA, MHSA
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from karat_scale.foundation.errors import RecipeError

# Every class of attention in timm that this project supports.
KNOWN: tuple[type[nn.Module], ...] = (Attention, GPSA, MHSA, WindowAttention)
# Those that add a learned position bias to the scores.
BIASED: tuple[type[nn.Module], ...] = (WindowAttention,)


class AttentionLayer(NamedTuple):
    """An attention layer, its path in the model, and the block whose `attn` it is."""

    name: str
    block: nn.Module
    attention: Any


@dataclass(frozen=True)
class LayerSize:
    """The size of an attention layer for one image: `sets` sets of N `tokens` with h `heads` of `width` d each.

    A window is a set; other models have one set. `biased`: a bias is added to the scores.
    """

    sets: int
    tokens: int
    heads: int
    width: int
    biased: bool

    @property
    def scores(self) -> int:
        """The number of entries of one head's score matrices."""
        return self.sets * self.tokens**2


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Return all attention layers, learned or not, in order."""
    blocks = ((name, block, getattr(block, "attn", None)) for name, block in model.named_modules())
    return [AttentionLayer(f"{name}.attn", block, attn) for name, block, attn in blocks if isinstance(attn, KNOWN)]


def refuse_dropout(attention: Any) -> None:
    """Raise ValueError if a layer that becomes KArAt has dropout of its attention matrix."""
    if attention.attn_drop.p:
        raise ValueError("attn_drop has no meaning for KArAt: the attention matrix is never formed")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the block of each attention layer, in order."""
    return [layer.block for layer in attention_layers(model)]


@torch.no_grad()
def measure_layers(model: nn.Module, image_size: int) -> tuple[LayerSize, ...]:
    """Return the size of each attention layer, from a forward pass of one image; the model is on the meta device."""
    shapes: list[torch.Size] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes.append(inputs[0].shape)

    layers = attention_layers(model)
    hooks = [layer.attention.register_forward_pre_hook(note) for layer in layers]
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))  # of its stem
    model(torch.empty(1, channels, image_size, image_size, device="meta"))
    for hook in hooks:
        hook.remove()
    return tuple(_size(layer.attention, *shape) for layer, shape in zip(layers, shapes, strict=True))


def _size(attention: Any, sets: int, tokens: int, width: int) -> LayerSize:
    heads = attention.num_heads
    return LayerSize(sets, tokens, heads, width // heads, isinstance(attention, BIASED))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the model's blocks if they are of one or two kinds, so that what one compiles serves many; else []."""
    blocks = blocks_of(model)
    kinds = len({_kind(block) for block in blocks})
    return blocks if kinds <= 2 and kinds < len(blocks) else []


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What the compiler takes for constant: classes, shapes, and plain attributes such as the rate of a drop path."""
    modules = tuple(
        (name, type(module), tuple((key, repr(value)) for key, value in vars(module).items() if _is_plain(key, value)))
        for name, module in block.named_modules()
    )
    return modules, tuple((name, p.shape, p.requires_grad) for name, p in block.named_parameters())


def _is_plain(key: str, value: Any) -> bool:
    return not key.startswith("_") and (isinstance(value, int | float | str | tuple | None) or is_dataclass(value))


def freeze(model: nn.Module, patterns: Sequence[str]) -> str:
    """Turn off the gradient of the parameters whose names match one of the patterns, as in a shell.

    Returns a line about it. A parameter that blocks share has its name from the first of them.

    Raises:
        RecipeError: a pattern matches no parameter, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            raise RecipeError(
                f"train.freeze = {pattern}: matches no parameter; names are like {', '.join([*parameters][:4])}"
            )
        for name in matched:
            parameters[name].requires_grad_(False)
    frozen = sum(parameter.numel() for parameter in parameters.values() if not parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters.values())
    if frozen == total:
        raise RecipeError(f"train.freeze = [{', '.join(patterns)}] leaves no parameter to train; freeze fewer")
    return f"{frozen:,} of {total:,} parameters are frozen"
