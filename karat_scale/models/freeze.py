"""Freeze parameters."""

import fnmatch
from collections.abc import Sequence

from torch import nn

from karat_scale.errors import RecipeError


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
