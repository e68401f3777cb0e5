"""Whole fp32 weights of a model: read from a checkpoint, fitted to another image size, and kept as snapshots.

Weights from a checkpoint are raw or averaged, whatever number of ranks wrote it. A saved state for another image size
has weights, averages and the optimizer's states.

Snapshots keep the weights through training, for the analyses. No retention removes them.

snapshots/
  step-00000000.safetensors   the initial weights
  step-00012500.safetensors   those after the first of `checkpoint.snapshots` equal parts of training, and so on
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karat_scale import __version__
from karat_scale.checkpoint import restore
from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.checkpoint.tensor_storage import describe, save_safetensors
from karat_scale.engine.deepspeed_internals import master_weights, shard_layout
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.shards import Fragment, Pieces
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.models.init_from import take_weights
from karat_scale.models.transfer import teacher_of
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.loading import portable_recipe, text_digest

_SQUARES = "exp_avg_sq"


def fit_state(saved: restore.SavedState, model: nn.Module) -> restore.SavedState:
    """Return `saved` for the image size of `model`, unchanged if it is the same.

    `karat_scale.models.init_from` interpolates everything, weights and moments of gradients. Second moments are
    interpolated by their square roots, so that they stay positive.

    Args:
        model: a whole model of the wanted size. Its values are changed, so it must not be used otherwise.

    Raises:
        RecipeError: the state is of another model.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if shapes == saved.shapes:
        return saved
    fitted = restore.SavedState(
        shapes, scalars=saved.scalars, frozen=saved.frozen, counters=saved.counters, loss_scaler=saved.loss_scaler
    )
    for key, pieces in saved.elementwise.items():
        power = 0.5 if key == _SQUARES else 1.0
        fitted.elementwise[key] = _fit(pieces, saved, model, power, gradients=True)
    if saved.ema is not None:
        fitted.ema = _fit(saved.ema, saved, model)
    fitted.masters = _fit(saved.masters, saved, model)
    fitted.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return fitted


def _fit(
    pieces: Pieces, saved: restore.SavedState, model: nn.Module, power: float = 1.0, gradients: bool = False
) -> Pieces:
    """Return values by parameter name for the model's size; each is raised to `power` while it is interpolated."""
    values = {}
    for name, shape in saved.shapes.items():
        whole = torch.zeros(shape)
        pieces.copy_into(name, whole.view(-1))
        values[name] = whole**power
    # The parameters of an operator that blocks share are also named as buffers, once for each further block.
    own = dict(model.named_buffers())
    for name, buffer in saved.buffers.items():
        if name in own:
            values[name] = buffer.float() if buffer.is_floating_point() else buffer
    take_weights(model, values, new_head=False, gradients=gradients)
    fitted = Pieces()
    for name, parameter in model.named_parameters():
        if name in pieces:  # an optimizer has no states of frozen parameters, or other ones for some
            value = parameter.detach().float().clone() ** (1 / power)
            fitted.add([Fragment.whole(name, value)], value)
    return fitted


def wants_ema(weights: str, recipe: RunRecipe, saved: Mapping[str, Any]) -> bool:
    """Return whether "raw", "ema" or "auto" (what the recipe evaluates) means the averages in a checkpoint."""
    wanted = recipe.train.eval_weights if weights == "auto" else weights
    return bool(saved.get("has_ema")) if wanted == "auto" else wanted == "ema"


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Path, saved: Mapping[str, Any], ema: bool) -> None:
    """Copy a checkpoint's weights into `model`, in place, in the model's dtype.

    In a run with `schedule.image_sizes`, the model has the last size, and weights of another one are interpolated.

    Args:
        model: the model the checkpoint is of, not partitioned.
        checkpoint: the checkpoint's directory, verified.
        saved: the content of `state.json`.
        ema: take the averaged weights, else the raw ones.

    Raises:
        RunDirectoryError: there are no averages in it, it holds another model, or has another teacher.
    """
    if ema and not saved.get("has_ema"):
        raise RunDirectoryError(f"{checkpoint}: has no EMA weights; use --weights raw")
    parameters = dict(model.named_parameters())
    state = restore.read_state(checkpoint, saved)
    try:
        restore.check_teacher(model, saved)
        if saved.get("image_size"):  # of a run whose images grow; the model is of its last size
            state = fit_state(state, model)
        restore.check_shapes({name: tuple(parameter.shape) for name, parameter in parameters.items()}, state.shapes)
        restore.check_buffers(model, state.buffers)
        pieces = state.ema if ema and state.ema is not None else state.masters
        for name, parameter in parameters.items():
            pieces.fill([Fragment.whole(name, parameter)], parameter)
    except (RunDirectoryError, KeyError) as error:
        raise RunDirectoryError(f"checkpoint {checkpoint}: {error.args[0]}") from error
    restore.copy_buffers(model, state.buffers)


def describe_weights(
    recipe: Recipe, saved: Mapping[str, Any], name: str, kind: str, classes: Sequence[str] = ()
) -> dict[str, str]:
    """Return the description that weights always carry, as strings; structured values are JSON, the recipe is YAML.

    `model` and `attention` are what `karat_scale.models.create_model` needs to build the model again.

    Args:
        saved: the checkpoint's `state.json`.
        name: the checkpoint's name.
        kind: "raw" or "ema".
        classes: the class names in the order of the labels, if they are known.
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
    """Return the preprocessing of an RGB image, scaled to [0, 1], in the terms of timm's pretrained_cfg.

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
    """Return top-1 and top-5 in percent, if exactly these weights were evaluated, on images of the recipe's size."""
    if saved.get("image_size") not in (None, 0, recipe.model.image_size):
        return {}
    if saved.get("evaluated_step") != saved["step"] or wants_ema("auto", recipe, saved) != (kind == "ema"):
        return {}
    return {"top1": str(saved["last_top1"]), "top5": str(saved["last_top5"])}


def snapshot_steps(total_steps: int, parts: int) -> frozenset[int]:
    """Step 0 and the last step of each of `parts` equal parts of training; none for 0 parts."""
    return frozenset(round(total_steps * part / parts) for part in range(parts + 1)) if parts else frozenset()


@dataclass(eq=False)
class Snapshots:
    """Takes snapshots of one run, after each step of `steps`."""

    directory: Path
    store: CheckpointStore
    steps: Collection[int]
    engine: Engine
    world: World
    recipe: Recipe
    reporter: Reporter

    def due(self, step: int) -> bool:
        """Return whether there is a snapshot to take after `step` finished steps."""
        return step in self.steps

    def write(self, step: int) -> None:
        """Write the weights after `step` steps; a failure is a warning. Collective.

        They replace those of an earlier start, which may have had another recipe, unless training resumes there.
        Rank 0 holds them whole on the host, the other ranks one parameter at a time.
        """
        self.reporter.beat("snapshot")
        path = self.directory / f"{checkpoint_name(step)}.safetensors"
        is_kept = False
        with suppress(OSError):  # then it is written again
            is_kept = path.is_file() and self.store.pointed("latest") == path.stem
        if self.world.broadcast(is_kept):
            return
        whole = {}
        for name, parameter in whole_masters(self.engine, self.world):
            if self.world.is_main:
                whole[name] = parameter.cpu()
        if not self.world.is_main:
            return
        try:
            self.directory.mkdir(exist_ok=True)
            teacher = teacher_of(self.engine.module)
            saved = {"step": step, "teacher": teacher.digest if teacher else None}
            save_safetensors(self._state(whole), path, describe_weights(self.recipe, saved, path.stem, "raw"))
        except OSError as error:
            self.reporter.warn(f"snapshot {path.name} not saved: {describe(error)}")

    def _state(self, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the plain model's `state_dict`: a module that blocks share is there once for each block."""
        names = {parameter: name for name, parameter in self.engine.module.named_parameters()}
        fp32 = {**whole, **self.engine.frozen}
        state, taken = {}, set()
        for key, value in self.engine.module.state_dict(keep_vars=True).items():
            name = names.get(value)
            if name is None:
                state[key] = value.detach().cpu().contiguous()
            else:
                state[key] = fp32[name].clone() if name in taken else fp32[name]
                taken.add(name)
        return state


def whole_masters(engine: Engine, world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each trainable parameter's fp32 master weight; whole only on rank 0. Collective from stage 1 on.

    Every rank must iterate to the end.
    """
    mine = Pieces()
    for fragments, master in zip(shard_layout(engine.deepspeed), master_weights(engine.deepspeed), strict=True):
        mine.add(fragments, master)
    for name, shape in engine.shapes.items():
        flat = torch.zeros(torch.Size(shape).numel(), device=world.device)
        mine.copy_into(name, flat)
        if engine.stage > 0:
            world.add_up_on_main(flat)
        yield name, flat.view(shape)
