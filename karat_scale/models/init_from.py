"""Weights of one model as the beginning of another: other classes, another image size, softmax's for KArAt."""

import math
from collections.abc import Iterator, Mapping

import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from karat_scale.attention import KaratOperator
from karat_scale.errors import RecipeError
from karat_scale.models.interpolate import TokenGrid, resize_operator, square_grid, tokens_of

OPERATOR = ".operator."


@torch.no_grad()
def take_weights(model: VisionTransformer, weights: Mapping[str, Tensor], new_head: bool = True) -> str:
    """Copy weights into a model, in place, fitted to its image size and classes.

    Position embeddings, the patch embedding and the attention operators are interpolated. Where the model has no class
    token, what belongs to theirs is left out. The operators of a KArAt
    model stay as they are when the weights are a softmax model's, and with `new_head` so does a classifier of another
    number of classes.

    Args:
        model: freshly initialised, not partitioned.
        weights: a state dict of timm's or ours, by parameter name.
        new_head: whether the classes may differ.

    Returns:
        What was interpolated and what was left as it was, for a log line.

    Raises:
        RecipeError: the weights are of another model; one line names the first parameter that tells.
    """
    own = model.state_dict()
    notes = []
    left = set()
    loses_class_token = model.cls_token is None and "cls_token" in weights
    if loses_class_token:
        weights = _without_class_token(weights)
        notes.append("without its class token")
    weights = checkpoint_filter_fn(dict(weights), model)
    if any(OPERATOR in name for name in weights):
        operators, grid = _operators_for(model, weights, loses_class_token)
        is_resized = (grid.height, grid.width) != model.patch_embed.grid_size
        notes += [f"interpolated from {grid.height} x {grid.width} patches"] if is_resized else []
        weights = {**weights, **operators}
    elif any(OPERATOR in name for name in own):
        left |= {name for name in own if OPERATOR in name}
        notes.append("the attention operators are left at their start, for the weights have none")
    head = {name for name in own if name.startswith("head.")}
    classes = [len(w["head.bias"]) if "head.bias" in w else 0 for w in (weights, own)]
    if new_head and classes[0] != classes[1]:
        left |= head
        weights = {name: tensor for name, tensor in weights.items() if name not in head}
        notes.append(f"the head is new: {classes[0]} classes there, {classes[1]} here")
    _check(weights, {name: tensor for name, tensor in own.items() if name not in left})
    for name, tensor in weights.items():
        own[name].copy_(tensor)
    return "; ".join(notes)


def _operators(model: VisionTransformer) -> Iterator[tuple[str, KaratOperator]]:
    """Every block's operator with its parameters' prefix; one that blocks share comes once for each."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, KaratOperator):
            yield f"{name}.", module


def _grid_of(model: VisionTransformer) -> TokenGrid:
    return TokenGrid(model.num_prefix_tokens, *model.patch_embed.grid_size)


def _without_class_token(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the operators': these are cut where they are fitted to the model's grid."""
    kept = {name: tensor for name, tensor in weights.items() if name != "cls_token"}
    positions = kept["pos_embed"].shape[1]
    if math.isqrt(positions) ** 2 != positions:  # its own is the first
        kept["pos_embed"] = kept["pos_embed"][:, 1:]
    return kept


def _operators_for(
    model: VisionTransformer, weights: Mapping[str, Tensor], loses_class_token: bool
) -> tuple[dict[str, Tensor], TokenGrid]:
    """The operators' tensors for the model's grid, and the grid they came from."""
    resized: dict[str, Tensor] = {}
    taken: dict[int, tuple[str, dict[str, Tensor]]] = {}
    new = old = _grid_of(model)
    for prefix, operator in _operators(model):
        tensors = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        first, shared = taken.setdefault(id(operator), (prefix, tensors))
        if any(not torch.equal(shared[name], x) for name, x in tensors.items() if name in shared):
            raise RecipeError(
                f"{first} and {prefix} differ there and are one here (attention.mode = universal); "
                "use attention.mode=blockwise"
            )
        try:
            old = square_grid(tokens_of(operator, tensors), new.prefix + loses_class_token)
            tensors = resize_operator(operator, tensors, old, new)
        except ValueError as error:
            raise RecipeError(f"{prefix}{error}; use the attention section it was trained with") from error
        resized |= {prefix + name: x for name, x in tensors.items()}
    return resized, old


def _check(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    mend = "use the model and attention sections it was trained with"
    for names, what in ((expected.keys() - weights.keys(), "lack"), (weights.keys() - expected.keys(), "have")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            other = "which the model has" if what == "lack" else "which the model lacks"
            raise RecipeError(f"the weights {what} {min(names)}{more}, {other}; {mend}")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            sizes = f"{list(weights[name].shape)} there and {list(tensor.shape)} here"
            raise RecipeError(f"{name} is {sizes}; {mend}")
