"""A classifier with the weights of a run's checkpoint."""

from torch import nn

from karat_scale.checkpoint.weights import load_weights
from karat_scale.models.init_from import take_weights
from karat_scale.recipe import Recipe
from karat_scale.run.run_directory import RunDirectory
from karat_scale.tasks.classification.teacher import build_model


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
