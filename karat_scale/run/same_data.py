"""A run keeps the data it began with: its cursor counts their images, its labels number their classes."""

from collections.abc import Sequence

from karat_scale.data.digest import class_order_digest
from karat_scale.engine.run_state import RunState
from karat_scale.errors import RunDirectoryError
from karat_scale.recipe import RunRecipe


def keep_data(state: RunState, images: int, classes: Sequence[str], recipe: RunRecipe, is_branch: bool) -> str:
    """Let `state` say which data it is of.

    Args:
        images: of the training split.
        classes: their names, in the order of the labels.
        is_branch: the state is of another run, which may have had other data.

    Returns:
        How the data differ from those the state had, where they may; else nothing.

    Raises:
        RunDirectoryError: they differ and `resume.allow` does not list data.path.
    """
    order = class_order_digest(classes)
    differences = []
    if state.train_images not in (0, images):
        differences.append(f"{images:,} training images where it had {state.train_images:,}")
    if state.class_order_sha256 not in ("", order):
        differences.append("other classes")
    said = " and ".join(differences)
    if said and not is_branch and not {"data", "data.path"} & set(recipe.resume.allow):
        raise RunDirectoryError(
            f"run.dir = {recipe.run.dir}: data.path is not of the data that its run began with, it has {said}; put "
            "data.path right, add resume.allow=[data.path], or choose another run.dir"
        )
    state.train_images, state.class_order_sha256 = images, order
    return said
