"""The size of a checkpoint, before it is written."""

from karat_scale.engine.precision import PRECISIONS
from karat_scale.recipe import RunRecipe


def checkpoint_bytes(parameters: int, stage: int, has_ema: bool, weight_bytes: int) -> int:
    """Return the bytes of a checkpoint of a model with so many parameters, with all that AdamW keeps.

    stage: of ZeRO. weight_bytes: of a parameter in the module. From stage 1 on the fp32 weights are apart from these.
    """
    fp32_tensors = 3 + has_ema  # weights, two moments, averages
    return parameters * (4 * fp32_tensors + (weight_bytes if stage else 0))


def planned_bytes(recipe: RunRecipe, stage: int, parameters: int) -> int:
    """Return the bytes of a checkpoint of a run of this recipe."""
    weights = PRECISIONS[recipe.train.precision].weights
    return checkpoint_bytes(parameters, stage, recipe.train.ema_decay > 0, weights.itemsize)
