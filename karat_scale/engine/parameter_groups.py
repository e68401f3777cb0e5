"""A model's trainable parameters in groups of one weight decay and one share of the learning rate."""

from collections.abc import Collection
from typing import Any

from timm.models import group_parameters
from torch import nn

from karat_scale.errors import RecipeError
from karat_scale.models import no_weight_decay_names
from karat_scale.recipe import OptimConfig

Groups = list[dict[str, Any]]
"""Optimizer groups: `params`, `weight_decay`, and `lr_scale`, by which the schedule's rate is multiplied."""


def parameter_groups(model: nn.Module, optim: OptimConfig, apart: Collection[str] = ()) -> Groups:
    """The groups of a model's trainable parameters.

    With `optim.layer_decay` d the layer that is n layers below the head has the scale d^n. An operator learns at the
    rate of its block, and one that blocks share at that of the last.

    Args:
        apart: names of parameters to leave out.
    """
    exempt = no_weight_decay_names(model, optim.karat_weight_decay)
    scales = layer_scales(model, optim.layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in apart:
            decays = name not in exempt
            new = {"params": [], "weight_decay": optim.weight_decay if decays else 0.0, "lr_scale": scales[name]}
            groups.setdefault((scales[name], decays), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def layer_scales(model: Any, decay: float) -> dict[str, float]:
    """What each parameter's rate is multiplied by; layers are timm's: the stem, each block, and the head.

    Raises:
        RecipeError: timm does not say what the model's layers are.
    """
    if decay == 1.0:
        return {name: 1.0 for name, _ in model.named_parameters()}
    if not hasattr(model, "group_matcher"):
        raise RecipeError(
            f"optim.layer_decay = {decay:g}: timm names no layers of a {type(model).__name__}; use optim.layer_decay=1"
        )
    layers: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last_names = {parameter: name for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters():
        if (last := last_names[parameter]) != name:  # beside it are parameters that its attention layer alone has
            of_layer = last.partition("operator.")[0]
            layers[name] = next(layer for other, layer in layers.items() if other.startswith(of_layer))
    top = max(layers.values())
    return {name: decay ** (top - layer) for name, layer in layers.items()}
