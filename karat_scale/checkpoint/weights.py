"""Whole fp32 weights out of a checkpoint, raw or averaged, whatever number of ranks wrote it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karat_scale import __version__
from karat_scale.checkpoint.resize import fit_state
from karat_scale.checkpoint.restore import check_buffers, check_shapes, check_teacher, copy_buffers
from karat_scale.checkpoint.saved_state import read_state
from karat_scale.engine.shards import Fragment
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.loading import portable_recipe, text_digest


def wants_ema(weights: str, recipe: RunRecipe, saved: Mapping[str, Any]) -> bool:
    """Whether "raw", "ema" or "auto" (what the recipe evaluates) means the averages in a checkpoint."""
    wanted = recipe.train.eval_weights if weights == "auto" else weights
    return bool(saved.get("has_ema")) if wanted == "auto" else wanted == "ema"


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Path, saved: Mapping[str, Any], ema: bool) -> None:
    """Copy a checkpoint's weights into `model`, in place, in the model's dtype.

    In a run with `schedule.image_sizes`, the model has the last size, and weights of another one are interpolated.

    Args:
        model: the model the checkpoint is of, not partitioned.
        checkpoint: its directory, verified.
        saved: its `state.json`.
        ema: take the averaged weights, else the raw ones.

    Raises:
        RunDirectoryError: there are no averages in it, it holds another model, or has another teacher.
    """
    if ema and not saved.get("has_ema"):
        raise RunDirectoryError(f"{checkpoint}: has no EMA weights; use --weights raw")
    parameters = dict(model.named_parameters())
    state = read_state(checkpoint, saved)
    try:
        check_teacher(model, saved)
        if saved.get("image_size"):  # of a run whose images grow; the model is of its last size
            state = fit_state(state, model)
        check_shapes({name: tuple(parameter.shape) for name, parameter in parameters.items()}, state.shapes)
        check_buffers(model, state.buffers)
        pieces = state.ema if ema and state.ema is not None else state.masters
        for name, parameter in parameters.items():
            pieces.fill([Fragment(name, 0, 0, parameter.numel())], parameter)
    except (RunDirectoryError, KeyError) as error:
        raise RunDirectoryError(f"checkpoint {checkpoint}: {error.args[0]}") from error
    copy_buffers(model, state.buffers)


def describe_weights(
    recipe: Recipe, saved: Mapping[str, Any], name: str, kind: str, classes: Sequence[str] = ()
) -> dict[str, str]:
    """What is said of weights wherever they go, as strings; structured values are JSON, the recipe is YAML.

    `model` and `attention` are what `karat_scale.models.create_model` needs to build the model again.

    Args:
        saved: the checkpoint's `state.json`.
        name: the checkpoint's.
        kind: "raw" or "ema".
        classes: names in the order of the labels, where they are known.
    """
    text = portable_recipe(recipe)
    return {
        "format": "pt",
        "karat_scale": __version__,
        "checkpoint": name,
        "step": str(saved["step"]),
        "weights": kind,
        "model": json.dumps(recipe.model.model_dump(mode="json")),
        "attention": json.dumps(recipe.attention.model_dump(mode="json")),
        "preprocessing": json.dumps(preprocessing(recipe)),
        "recipe": text,
        "recipe_sha256": text_digest(text),
        **({"classes": json.dumps(list(classes))} if classes else {}),
        **({"teacher": saved["teacher"]} if saved.get("teacher") else {}),
        **_accuracy(recipe, saved, kind),
    }


def preprocessing(recipe: Recipe) -> dict[str, Any]:
    """What an RGB image, scaled to [0, 1], goes through before the model, in the terms of timm's pretrained_cfg.

    The short side is resized to input_size / crop_pct pixels and the centre is cropped.
    """
    return {
        "input_size": [3, recipe.model.image_size, recipe.model.image_size],
        "interpolation": recipe.augment.interpolation,
        "crop_pct": recipe.augment.eval_crop,
        "crop_mode": "center",
        "mean": list(recipe.augment.mean),
        "std": list(recipe.augment.std),
    }


def _accuracy(recipe: Recipe, saved: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Top-1 and top-5 in percent, where these very weights were evaluated, on images of the recipe's size."""
    if saved.get("image_size") not in (None, 0, recipe.model.image_size):
        return {}
    if saved.get("evaluated_step") != saved["step"] or wants_ema("auto", recipe, saved) != (kind == "ema"):
        return {}
    return {"top1": str(saved["last_top1"]), "top5": str(saved["last_top5"])}
