"""Start a model from the weights of another: other classes, another image size, softmax weights for KArAt.

Some differences between models do not show in weights, only in recipes: heads, and functions without parameters.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from karat_scale.foundation.errors import RecipeError, one_line
from karat_scale.models.factory import host_of, layer_sizes
from karat_scale.models.init_operators import OPERATOR, operators_for, spread_operator
from karat_scale.models.prefix_tokens import fit_prefix, is_sincos_2d, prefix_tokens
from karat_scale.recipe import AttentionConfig, ModelConfig

# Keys of an operator that can differ while all parameters have the same names and shapes.
_OF_OPERATORS = ("basis", "form", "simplex", "base", "range", "grid", "degree")
_FIX = "use the model and attention sections it was trained with"
_PATCHES = "patch_embed.proj.weight"
_POSITIONS = "pos_embed"


@torch.no_grad()
def take_weights(model: nn.Module, weights: Mapping[str, Tensor], new_head: bool = True) -> str:
    """Copy weights into a model, in place, adapted to its image size and classes.

    Position embeddings, the patch embedding and the attention operators are interpolated. Prefix tokens that the model
    does not have are left out; those that only the model has keep their values. The operators of a KArAt model keep
    theirs if the weights are a softmax model's, and with `new_head` so does a classifier of another number of classes.

    Args:
        model: freshly initialised, not partitioned.
        weights: a state dict of timm's or ours, by parameter name.
        new_head: True if the classes may differ, and computed positions may replace learned ones; else the
            weights are of this model at another image size.

    Returns:
        A log line: what was interpolated, and what keeps its values.

    Raises:
        RecipeError: the weights are of another model; one line names the first parameter that differs.
    """
    own = model.state_dict()
    left = set()
    _check_axes(weights, own)
    _check_values(weights, own)
    there = prefix_tokens(weights)
    keeps_positions = new_head and _has_fixed_positions(model) and not _are_fixed(weights)
    weights, notes = fit_prefix(model, weights)
    notes += _patch_note(weights, own)
    weights = _fit(model, weights)
    _check_depth(weights, own)
    if keeps_positions:
        weights = {**weights, _POSITIONS: own[_POSITIONS]}
        notes.append("its position embedding is left out, since the model's is fixed (model.pos_embed)")
    if any(OPERATOR in name for name in own):
        if any(OPERATOR in name for name in weights):
            weights = spread_operator(model, weights)
            operators, grids = operators_for(model, weights, there)
            notes += [f"interpolated from {grid.height} x {grid.width} patches" for grid in grids]
            weights = {**weights, **operators}
        else:
            left |= {name for name in own if OPERATOR in name}
            notes.append("the attention operators keep their initial values, since the weights have none")
    heads = _classifiers(model)
    head = {name for name in {**own, **weights} if name.startswith(tuple(f"{head}." for head in heads))}
    bias = f"{heads[0]}.bias"
    classes = [len(w[bias]) if bias in w else 0 for w in (weights, own)]
    if new_head and classes[0] != classes[1]:
        left |= head
        weights = {name: tensor for name, tensor in weights.items() if name not in head}
        notes.append(f"the head is new: the weights have {classes[0]} classes, the model {classes[1]}")
    _check(weights, {name: tensor for name, tensor in own.items() if name not in left})
    for name, tensor in weights.items():
        own[name].copy_(tensor)
    return "; ".join(notes)


def _fit(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return host_of(model).fit(weights, model)
    except Exception as error:  # timm's conversions expect complete weights, and can raise anything
        reason = one_line(error)
        raise RecipeError(f"the weights cannot be adapted to a {type(model).__name__}: {reason}; {_FIX}") from error


def _classifiers(model: Any) -> list[str]:
    """Return the names of the layers that give logits; a distilled model has two."""
    found = model.get_classifier()
    layers = found if isinstance(found, tuple) else (found,)
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def _patch_note(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    if _PATCHES not in weights or _PATCHES not in own:
        return []
    there, here = (" x ".join(map(str, state[_PATCHES].shape[2:])) for state in (weights, own))
    return [f"the patch embedding is resampled from {there} pixels"] if there and there != here else []


def _check_axes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that tensors to adapt have the expected axes; timm's old patch embeddings are matrices."""
    for name, tensor in own.items():
        axes = weights[name].dim() if name in weights else tensor.dim()
        if axes != tensor.dim() and not (name == _PATCHES and axes == 2):
            raise _other_shape(name, weights[name], tensor)


def _check_values(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            raise RecipeError(f"{name} in the weights is {tensor.dtype}, not floating point; use other weights")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise RecipeError(f"{name} in the weights has numbers that are not finite; use other weights")


def _has_fixed_positions(model: Any) -> bool:
    positions = getattr(model, _POSITIONS, None)
    return isinstance(positions, nn.Parameter) and not positions.requires_grad


def _are_fixed(weights: Mapping[str, Tensor]) -> bool:
    return _POSITIONS in weights and is_sincos_2d(weights[_POSITIONS])


def _check_depth(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    there, here = _blocks(weights), _blocks(own)
    if there and here and there != here and there == set(range(len(there))):
        raise RecipeError(
            f"the weights have {len(there)} blocks, the model has {len(here)}; use model.depth={len(there)}"
        )


def _blocks(state: Mapping[str, Tensor]) -> set[int]:
    """Return the numbers of a ViT's blocks."""
    return {int(found[1]) for found in map(re.compile(r"blocks\.(\d+)\.").match, state) if found}


def _check(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for names, what in ((expected.keys() - weights.keys(), "lack"), (weights.keys() - expected.keys(), "have")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            other = "which the model has" if what == "lack" else "which the model lacks"
            raise RecipeError(f"the weights {what} {min(names)}{more}, {other}; {_FIX}")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise _other_shape(name, weights[name], tensor)


def _other_shape(name: str, there: Tensor, here: Tensor) -> RecipeError:
    return RecipeError(f"{name} is {list(there.shape)} in the weights and {list(here.shape)} in the model; {_FIX}")


def check_heads(there: ModelConfig, here: ModelConfig) -> None:
    """Raise RecipeError if weights of the same widths have another number of heads."""
    for theirs, ours in zip(layer_sizes(there), layer_sizes(here), strict=False):
        if theirs.heads != ours.heads:
            same_width = (there.name, there.embed_dim) == (here.name, here.embed_dim)
            fix = f"model.num_heads={theirs.heads}" if same_width else "the model section they were trained with"
            raise RecipeError(
                f"the weights are of {there.name} with {theirs.heads} heads per layer, the model has {ours.heads}; "
                f"use {fix}"
            )


def differences(there: tuple[ModelConfig, AttentionConfig], here: tuple[ModelConfig, AttentionConfig]) -> list[str]:
    """Return the differences in how the same parameters are used: `attention.base = silu in the weights, zero here`."""
    pairs = [("model.name", there[0].name, here[0].name)]
    if there[1].kind == here[1].kind == "karat":
        pairs += [(f"attention.{key}", getattr(there[1], key), getattr(here[1], key)) for key in _OF_OPERATORS]
    return [
        f"{key} = {_text(theirs)} in the weights, {_text(ours)} here" for key, theirs, ours in pairs if theirs != ours
    ]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
