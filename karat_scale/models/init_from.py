"""Weights of one model as the beginning of another: other classes, another image size, softmax's for KArAt."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from karat_scale.attention import KaratOperator
from karat_scale.errors import RecipeError
from karat_scale.models.factory import host_of
from karat_scale.models.interpolate import TokenGrid, resize_operator, square_grid, tokens_of

OPERATOR = ".operator."


@torch.no_grad()
def take_weights(model: nn.Module, weights: Mapping[str, Tensor], new_head: bool = True) -> str:
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
    loses_class_token = "cls_token" in weights and getattr(model, "cls_token", weights) is None
    if loses_class_token:
        weights = _without_class_token(weights)
        notes.append("without its class token")
    weights = host_of(model).fit(weights, model)
    if any(OPERATOR in name for name in weights):
        operators, grids = _operators_for(model, weights, loses_class_token)
        notes += [f"interpolated from {grid.height} x {grid.width} patches" for grid in grids]
        weights = {**weights, **operators}
    elif any(OPERATOR in name for name in own):
        left |= {name for name in own if OPERATOR in name}
        notes.append("the attention operators are left at their start, for the weights have none")
    heads = _classifiers(model)
    head = {name for name in {**own, **weights} if name.startswith(tuple(f"{head}." for head in heads))}
    bias = f"{heads[0]}.bias"
    classes = [len(w[bias]) if bias in w else 0 for w in (weights, own)]
    if new_head and classes[0] != classes[1]:
        left |= head
        weights = {name: tensor for name, tensor in weights.items() if name not in head}
        notes.append(f"the head is new: {classes[0]} classes there, {classes[1]} here")
    _check(weights, {name: tensor for name, tensor in own.items() if name not in left})
    for name, tensor in weights.items():
        own[name].copy_(tensor)
    return "; ".join(notes)


def _classifiers(model: Any) -> list[str]:
    """The names of the layers that give logits; a distilled model has two."""
    found = model.get_classifier()
    layers = found if isinstance(found, tuple) else (found,)
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def _operators(model: nn.Module) -> Iterator[tuple[str, KaratOperator]]:
    """Every block's operator with its parameters' prefix; one that blocks share comes once for each."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, KaratOperator):
            yield f"{name}.", module


def _without_class_token(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the operators': these are cut where they are fitted to the model's grid."""
    kept = {name: tensor for name, tensor in weights.items() if name != "cls_token"}
    positions = kept["pos_embed"].shape[1]
    if math.isqrt(positions) ** 2 != positions:  # its own is the first
        kept["pos_embed"] = kept["pos_embed"][:, 1:]
    return kept


def _operators_for(
    model: nn.Module, weights: Mapping[str, Tensor], loses_class_token: bool
) -> tuple[dict[str, Tensor], list[TokenGrid]]:
    """The operators' tensors for the model's grids, and the other grids that some came from."""
    resized: dict[str, Tensor] = {}
    taken: dict[int, tuple[str, dict[str, Tensor]]] = {}
    others: list[TokenGrid] = []
    prefix_tokens = getattr(model, "num_prefix_tokens", 0)
    for prefix, operator in _operators(model):
        tensors = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        first, shared = taken.setdefault(id(operator), (prefix, tensors))
        if any(not torch.equal(shared[name], x) for name, x in tensors.items() if name in shared):
            raise RecipeError(
                f"{first} and {prefix} differ there and are one here (attention.mode = universal); "
                "use attention.mode=blockwise"
            )
        try:
            new = square_grid(operator.num_tokens, prefix_tokens)
            old = square_grid(tokens_of(operator, tensors), prefix_tokens + loses_class_token)
            tensors = resize_operator(operator, tensors, old, new)
        except ValueError as error:
            raise RecipeError(f"{prefix}{error}; use the attention section it was trained with") from error
        resized |= {prefix + name: x for name, x in tensors.items()}
        is_resized = (old.height, old.width) != (new.height, new.width)
        others += [old] if is_resized and old not in others else []
    return resized, others


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
