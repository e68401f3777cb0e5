"""Compute how many of a job's nodes can train a recipe. slurm/launch.sh asks before it starts the ranks.

python -m karat_scale.submit.nodes NODES RANKS_PER_NODE RECIPE [key=value ...]
"""

import sys
from contextlib import suppress

from karat_scale.data.plan import micro_batch_of
from karat_scale.errors import RecipeError
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe


def most_nodes(recipe: Recipe, nodes: int, ranks_per_node: int) -> int:
    """Return the largest number of nodes, up to `nodes`, over whose ranks the global batch divides.

    If there is none, return `nodes`: the trainer then reports the problem with the batch.
    """
    for count in range(nodes, 0, -1):
        with suppress(RecipeError):
            micro_batch_of(recipe, count * ranks_per_node)
            return count
    return nodes


if __name__ == "__main__":
    print(most_nodes(load_recipe(sys.argv[3], sys.argv[4:]), int(sys.argv[1]), int(sys.argv[2])))
