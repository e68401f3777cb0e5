"""How many nodes of those that SLURM gives can cut a recipe's global batch."""

import subprocess
import sys

import pytest

from karat_scale.commands.submit.nodes import most_nodes
from karat_scale.recipe.loading import load_recipe
from tests.conftest import karat_environment

RECIPE = ("imagenet_vit_tiny_g3b", "data.path=/shards")


@pytest.mark.parametrize(
    ("overrides", "nodes", "taken"),
    [
        ((), 4, 4),
        ((), 3, 2),  # 12 ranks do not divide 128
        ((), 31, 16),  # mixup wants pairs, so 32 nodes would be too many
        (("augment.mixup=0", "augment.cutmix=0"), 33, 32),
        (("train.global_batch=130",), 3, 3),  # no number of nodes fixes that
    ],
)
def test_the_largest_number_of_nodes_that_the_batch_divides(overrides: tuple[str, ...], nodes: int, taken: int) -> None:
    name, *rest = RECIPE
    assert most_nodes(load_recipe(name, [*rest, *overrides]), nodes, ranks_per_node=4) == taken


@pytest.mark.parametrize("recipe", [("train", *RECIPE), ("detect", "coco_mask_rcnn_vit_base", "data.path=/coco")])
def test_the_launch_wrapper_gets_a_number(recipe: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "karat_scale.commands.submit.nodes", "3", "4", *recipe, "train.global_batch=96"]
    done = subprocess.run(command, env=karat_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
