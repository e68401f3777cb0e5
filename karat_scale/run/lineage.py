"""Which runs a run stems from: by name, and by the digest that `karat ledger` knows their recipes by."""

from pathlib import Path

import yaml

from karat_scale.engine.run_state import TrainState
from karat_scale.recipe import Recipe
from karat_scale.recipe.portable import portable_recipe, text_digest
from karat_scale.run.run_directory import RunDirectory
from karat_scale.run.weights_source import TIMM, export_metadata, locate
from karat_scale.tasks.classification.teacher import FILE

Lineage = dict[str, dict[str, str]]


def lineage(recipe: Recipe, run: Path, state: TrainState) -> Lineage:
    """The runs behind `init_from` and `attention.transfer_from`, by key, where weights say which run they are of."""
    teacher = run_behind(str(run / FILE)) if recipe.attention.transfer_from else {}
    found = {"init_from": state.begun_with, "attention.transfer_from": teacher}
    return {key: behind for key, behind in found.items() if behind}


def run_behind(source: str) -> dict[str, str]:
    """`name` and `recipe_sha256` of the run that readable weights are of; nothing where they do not say.

    Args:
        source: as of `read_weights`.
    """
    if not source or source.startswith(TIMM):
        return {}
    path, checkpoint = locate(source)
    if not checkpoint:
        return _run_of_file(path)
    recipe = RunDirectory(path).recipe()
    return {"name": recipe.run.name, "recipe_sha256": text_digest(portable_recipe(recipe))}


def _run_of_file(path: Path) -> dict[str, str]:
    about = export_metadata(path)
    if not {"recipe", "recipe_sha256"} <= about.keys():
        return {}
    name = yaml.safe_load(about["recipe"])["run"]["name"]
    return {"name": name, "recipe_sha256": about["recipe_sha256"]}
