"""`init_from`: the weights a new run begins with."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from karat_scale.engine.distributed import World
from karat_scale.errors import RecipeError, UserError
from karat_scale.models.init_from import check_heads, differences, take_weights
from karat_scale.recipe import RunRecipe
from karat_scale.run.weights_source import read_weights

Take = Callable[[nn.Module, Mapping[str, Tensor]], str]


def initialise(model: nn.Module, recipe: RunRecipe, world: World, take: Take = take_weights) -> str:
    """Give a recipe's freshly built model the weights of its `init_from` on every rank; returns a line. Collective.

    Args:
        take: copies weights into the model and returns what was not simply copied.

    Raises:
        UserError: they cannot be had, or are of another model; on all ranks alike.
    """
    source = recipe.init_from
    line, problem = "", None
    try:
        notes = _take(model, recipe, take)
        line = "; ".join([f"begins with the weights of {source}", *notes])
    except UserError as error:
        problem = str(error).removeprefix(f"{source}: ")
    problem = next((p for p in world.gather(problem) if p is not None), None)
    if problem is not None:
        raise RecipeError(f"init_from = {source}: {problem}")
    return line


def _take(model: nn.Module, recipe: RunRecipe, take: Take) -> list[str]:
    weights, origin = read_weights(recipe.init_from)
    if origin is not None:
        check_heads(origin.model, recipe.model)
    notes = take(model, weights)
    differing = [] if origin is None else differences(origin, (recipe.model, recipe.attention))
    return [*([notes] if notes else []), *differing]
