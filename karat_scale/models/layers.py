"""The attention layers of a model of any architecture, and the prefix tokens that come before its patches.

The layers are in the order of the forward pass. Some of a model's parameters may be frozen.

Class, distillation and register tokens are converted between models. A token is a vector and usually a position, and
both are added before the first block. So if only one of two models has positions for such tokens, the sum is kept. Some
position embeddings are computed, not learned.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from timm.models.convit import GPSA, MHSA
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor, nn

from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import ModelConfig

# Every class of attention in timm that this project supports.
KNOWN: tuple[type[nn.Module], ...] = (Attention, GPSA, MHSA, WindowAttention)
# The classes that add a learned position bias to the scores.
BIASED: tuple[type[nn.Module], ...] = (WindowAttention,)


class AttentionLayer(NamedTuple):
    """An attention layer, its path in the model, and the block that it is in, which may have several."""

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
    modules, found = dict(model.named_modules()), []
    for name, module in modules.items():
        if isinstance(attn := getattr(module, "attn", None), KNOWN):
            around = modules[name.rpartition(".attns.")[0]]  # of two branches of one block
            block = around if isinstance(around, ParallelThingsBlock) else module
            found.append(AttentionLayer(f"{name}.attn", block, attn))
    return found


def refuse_dropout(attention: Any) -> None:
    """Raise ValueError if a layer that becomes KArAt has dropout of its attention matrix."""
    if attention.attn_drop.p:
        raise ValueError("attn_drop has no meaning for KArAt: the attention matrix is never formed")


def cannot_be_built(model: ModelConfig, error: Exception) -> RecipeError:
    """Return one line about an error of timm or of the model."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RecipeError(f"model.name = {model.name!r} cannot be built with these sizes: {reason}")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks with attention layers, in order."""
    return list(dict.fromkeys(layer.block for layer in attention_layers(model)))


@torch.no_grad()
def measure_layers(model: nn.Module, image_size: int | tuple[int, int]) -> tuple[LayerSize, ...]:
    """Return the size of each attention layer, from a forward pass of one image; the model is on the meta device.

    Raises RecipeError if blocks share one layer.
    """
    shapes: list[torch.Size] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes.append(inputs[0].shape)

    layers = attention_layers(model)
    hooks = [layer.attention.register_forward_pre_hook(note) for layer in layers]
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))  # of its stem
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    model(torch.empty(1, channels, *sides, device="meta"))
    for hook in hooks:
        hook.remove()
    if len(shapes) != len(layers):
        raise RecipeError(f"blocks of this {type(model).__name__} share an attention layer; give each its own")
    sizes = []
    for layer, (sets, tokens, width) in zip(layers, shapes, strict=True):
        heads = layer.attention.num_heads
        sizes.append(LayerSize(sets, tokens, heads, width // heads, isinstance(layer.attention, BIASED)))
    return tuple(sizes)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the model's blocks if they are of one or two kinds, so that one's compiled code serves many; else []."""
    blocks = blocks_of(model)
    kinds = len({_kind(block) for block in blocks})
    return blocks if kinds <= 2 and kinds < len(blocks) else []


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Return what the compiler takes for constant: classes, shapes, and plain attributes such as a drop path's rate."""
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


# timm's parameters [1, n, D], in timm's order before the patches, and their names in messages.
_TOKENS = {"cls_token": "class token", "dist_token": "distillation token", "reg_token": "register tokens"}
_HEAD_DIST = "head_dist."


def prefix_tokens(state: Mapping[str, Tensor]) -> list[str]:
    """Return every prefix token of a state dict as its parameter and number, such as `reg_token.3`."""
    return [f"{name}.{number}" for name in _TOKENS if name in state for number in range(state[name].shape[1])]


def fit_prefix(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict with a model's prefix tokens and their positions; the operators do not change.

    Tokens that only the model has keep their values; those that only the weights have are left out.

    Args:
        model: a model; if its positions are not [1, tokens, D], the weights do not change.
        weights: a state dict with timm's names.

    Returns:
        The weights, and what was left out or is new.

    Raises:
        RecipeError: the positions are not those of a square of patches, or are of another width.
    """
    own = model.state_dict()
    there, here = prefix_tokens(weights), prefix_tokens(own)
    positions = own.get("pos_embed")
    is_converted_by_timm = "register_tokens" in weights  # DINOv2's names
    if positions is None or positions.dim() != 3 or "pos_embed" not in weights or is_converted_by_timm:
        return dict(weights), []
    if there == here and weights["pos_embed"].shape == positions.shape:
        return dict(weights), []
    for name in ("pos_embed", *_TOKENS):
        if name in weights and weights[name].shape[2] != positions.shape[2]:
            width = f"a width of {weights[name].shape[2]} in the weights and {positions.shape[2]} in the model"
            raise RecipeError(f"{name} has {width}; use the model section it was trained with")
    embedded_there, embedded_here = (_embedded(state, len(tokens)) for state, tokens in ((weights, there), (own, here)))
    vectors: dict[str, list[Tensor]] = {}
    prefix = []
    for place, token in enumerate(here):
        is_taken = token in there
        state, embedded = (weights, embedded_there) if is_taken else (own, embedded_here)
        name, number = token.split(".")
        vector = state[name][:, int(number), None]
        at = there.index(token) if is_taken else place
        position = state["pos_embed"][:, at, None] if embedded else torch.zeros_like(vector)
        vectors.setdefault(name, []).append(vector if embedded_here else vector + position)
        prefix += [position] if embedded_here else []
    patches = weights["pos_embed"][:, embedded_there:]
    fitted = {name: x for name, x in weights.items() if name not in _TOKENS}
    fitted |= {name: torch.cat(parts, 1) for name, parts in vectors.items()}
    fitted["pos_embed"] = torch.cat((*prefix, patches), 1)
    # If the model has a distillation token, this token has a separate classifier.
    fitted = {name: x for name, x in fitted.items() if not name.startswith(_HEAD_DIST) or name in own}
    fitted |= {name: x for name, x in own.items() if name.startswith(_HEAD_DIST) and name not in fitted}
    notes = [f"without its {name}" for name in _named(set(there) - set(here))]
    return fitted, notes + [f"with a new {name}" for name in _named(set(here) - set(there))]


def _embedded(state: Mapping[str, Tensor], tokens: int) -> int:
    """Return the number of prefix tokens with a position: all, or none as with timm's `no_embed_class`."""
    positions = state["pos_embed"].shape[1]
    for count in (tokens, 0):
        if positions > count and math.isqrt(positions - count) ** 2 == positions - count:
            return count
    raise RecipeError(
        f"pos_embed in the weights has {positions} positions: not {tokens} prefix tokens and a square of "
        "patches; use the model it was trained with"
    )


def _named(tokens: set[str]) -> list[str]:
    return [text for name, text in _TOKENS.items() if any(token.startswith(name) for token in tokens)]


def sincos_2d(height: int, width: int, dim: int, temperature: float = 10_000.0) -> Tensor:
    """Return sines and cosines of a grid's coordinates, float32 [height * width, dim], row by row.

    For column x and row y: sin(x w_k), cos(x w_k), sin(y w_k), cos(y w_k) with w_k = temperature^(-k / (K - 1)),
    k = 0 .. K - 1, K = dim / 4 (MoCo v3, arXiv 2104.02057; so in arXiv 2205.01580). Raises ValueError unless dim is a
    multiple of 4 and at least 8.
    """
    if dim % 4 or dim < 8:
        raise ValueError(f"sines and cosines of positions need a width of 8, 12, 16, ..., not {dim}")
    quarter = dim // 4
    # In float64, so that they do not depend on device or precision.
    exponent = torch.arange(quarter, dtype=torch.float64, device="cpu") / (quarter - 1)
    frequencies = temperature**-exponent
    rows = torch.arange(height, dtype=torch.float64, device="cpu").repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64, device="cpu").repeat(height)
    x, y = torch.outer(columns, frequencies), torch.outer(rows, frequencies)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def is_sincos_2d(positions: Tensor) -> bool:
    """Return True if the last positions of [1, N, D], a square of patches, are `sincos_2d`'s, also in bfloat16."""
    side, dim = math.isqrt(positions.shape[1]), positions.shape[2]
    if dim % 4 or dim < 8:
        return False
    patches = positions[0, -side * side :].float()
    return torch.allclose(patches, sincos_2d(side, side, dim).to(patches.device), atol=1e-2)
