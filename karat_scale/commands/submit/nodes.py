"""Compute how many of a job's nodes can train a recipe. slurm/launch.sh asks before it starts the ranks.

python -m karat_scale.commands.submit.nodes NODES RANKS_PER_NODE COMMAND RECIPE [key=value ...]

COMMAND is train or detect.
"""

import sys
from contextlib import suppress

from karat_scale.data.plan import micro_batch_of
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe.loading import load_recipe
from karat_scale.recipe.schema import RunRecipe


def most_nodes(recipe: RunRecipe, nodes: int, ranks_per_node: int) -> int:
    """Return the largest number of nodes, up to `nodes`, over whose ranks the global batch divides.

    If there is none, return `nodes`: the trainer then reports the problem with the batch.
    """
    for count in range(nodes, 0, -1):
        with suppress(RecipeError):
            micro_batch_of(recipe, count * ranks_per_node)
            return count
    return nodes


def read(command: str, recipe: str, overrides: list[str]) -> RunRecipe:
    """Return the recipe of a command. Raises RecipeError as `load_recipe`."""
    if command == "detect":
        from karat_scale.training.tasks.detection.recipe import DetectionRecipe

        return load_recipe(recipe, overrides, DetectionRecipe)
    return load_recipe(recipe, overrides)


if __name__ == "__main__":
    print(most_nodes(read(sys.argv[3], sys.argv[4], sys.argv[5:]), int(sys.argv[1]), int(sys.argv[2])))
