"""The trained model that a run's attention is transferred from, kept in the run, so that the run needs no other.

RUN/teacher.safetensors is a file of `karat export`: weights, and the sections that build their model. A checkpoint
names its teacher by the weights' digest, and resumes with no other.
"""

from pathlib import Path

from torch import nn

from karat_scale.checkpoint.weights import load_weights, wants_ema
from karat_scale.foundation.errors import RecipeError, UserError
from karat_scale.foundation.trust import require_trust
from karat_scale.models import create_model
from karat_scale.models.factory import check_transfers
from karat_scale.models.init_from import take_weights
from karat_scale.models.transfer import Teacher, give_teacher
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.weights_file import read_exported, write_weights

FILE = "teacher.safetensors"


def keep_teacher(recipe: Recipe, run: Path) -> None:
    """Copy the weights of `attention.transfer_from`, if any, into a run: those that `karat eval` would take.

    A run keeps the teacher that it began with.

    Raises:
        RecipeError: no such run, none of its checkpoints will do, or it sees images otherwise than this recipe.
    """
    source = recipe.attention.transfer_from
    if not source or ((run / FILE).is_file() and not RunDirectory(run).begins_anew(recipe)):
        return
    try:
        directory = RunDirectory(source)
        theirs = directory.recipe()
        require_trust(theirs.attention.basis, directory.recipe_file)
        _check_fits(theirs, recipe)
        name = directory.store.find_intact("best")
        kind = "ema" if wants_ema("auto", theirs, directory.store.state(name)) else "raw"
        write_weights(directory, theirs, name, kind, run / FILE)
    except UserError as error:
        raise RecipeError(f"attention.transfer_from = {source}: {error}") from error


def build_model(recipe: Recipe, run: Path) -> nn.Module:
    """The recipe's model, freshly initialised, with the teacher that the run keeps, if it needs one.

    Raises:
        RecipeError: the model cannot be built, or the teacher's matrices are not of its shape.
        RunDirectoryError: the teacher's file is missing or damaged.
    """
    model = create_model(recipe.model, recipe.attention)
    if recipe.attention.transfer_from:
        teacher = Teacher(read_exported(run / FILE, recipe.attention.implementation))
        give_teacher(model, teacher, recipe.attention.transfer_from, recipe.attention.transfer_heads)
    return model


def _check_fits(theirs: Recipe, ours: Recipe) -> None:
    check_transfers(theirs.model.name)
    if theirs.attention.transfer_from:
        raise RecipeError(f"it has its matrices from {theirs.attention.transfer_from}; name that run")
    for key in ("mean", "std"):
        there, here = getattr(theirs.augment, key), getattr(ours.augment, key)
        if there != here:
            raise RecipeError(f"it was trained with augment.{key} = {list(there)}; use the same, not {list(here)}")


def trained_classifier(trained: Recipe, recipe: Recipe, directory: RunDirectory, name: str, use_ema: bool) -> nn.Module:
    """Return a checkpoint's model; interpolated if `recipe` has another image size than it was trained at.

    Args:
        trained: the recipe that the run was trained with.
        recipe: with what the evaluation overrides.
        name: the checkpoint's, which is intact.
    """
    as_trained = recipe.changed(model__image_size=trained.model.image_size)
    model = build_model(as_trained, directory.path)
    load_weights(model, directory.store.root / name, directory.store.state(name), use_ema)
    if as_trained.model == recipe.model:
        return model
    resized = build_model(recipe, directory.path)
    take_weights(resized, model.state_dict(), new_head=False)
    return resized
