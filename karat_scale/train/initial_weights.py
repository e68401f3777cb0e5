"""`init_from`: the weights a new run begins with, from a run, a file, or timm."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from karat_scale.errors import RecipeError, UserError
from karat_scale.models import create_model
from karat_scale.models.init_from import take_weights
from karat_scale.train.checkpoint.weights import load_weights
from karat_scale.train.distributed import World
from karat_scale.train.run_directory import RunDirectory

TIMM = "timm:"
Take = Callable[[nn.Module, Mapping[str, Tensor]], str]


def initialise(model: nn.Module, source: str, world: World, take: Take = take_weights) -> str:
    """Give a freshly built model the weights of `source` on every rank; returns a line about it. Collective.

    Args:
        take: copies weights into the model and returns what was not simply copied.

    Raises:
        UserError: they cannot be had, or are of another model; on all ranks alike.
    """
    line, problem = "", None
    try:
        notes = take(model, read_weights(source))
        line = f"begins with the weights of {source}" + (f"; {notes}" if notes else "")
    except UserError as error:
        problem = str(error).removeprefix(f"{source}: ")
    problem = next((p for p in world.gather(problem) if p is not None), None)
    if problem is not None:
        raise RecipeError(f"init_from = {source}: {problem}")
    return line


def read_weights(source: str) -> dict[str, Tensor]:
    """Whole weights by parameter name, averaged ones where there are any.

    Args:
        source: a run's directory (its best checkpoint), a checkpoint in one, a .safetensors or .pth file of
            `karat export` or timm, or `timm:NAME`.

    Raises:
        UserError: there is no such thing, or it cannot be read.
    """
    if source.startswith(TIMM):
        return _weights_of_timm(source.removeprefix(TIMM))
    path = Path(source)
    if (path / "recipe.yaml").is_file():
        return _weights_of_run(path, "best")
    if path.parent.name == "checkpoints" and path.is_dir():
        return _weights_of_run(path.parent.parent, path.name)
    if path.is_file():
        return _weights_of_file(path)
    raise RecipeError("neither a run's directory, nor a checkpoint in one, nor a file, nor timm:NAME")


def _weights_of_run(run: Path, checkpoint: str) -> dict[str, Tensor]:
    directory = RunDirectory(run)
    recipe = directory.recipe()
    name = directory.store.find_intact(checkpoint)
    saved = directory.store.state(name)
    model = create_model(recipe.model, recipe.attention)
    load_weights(model, directory.store.root / name, saved, ema=saved["has_ema"])
    weights: dict[str, Tensor] = model.state_dict()
    return weights


def _weights_of_file(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_state_dict(str(path), use_ema=True, weights_only=True)
    except Exception as error:  # torch, pickle and safetensors have many
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"not a file of weights that is safe to read: {reason}") from error
    if not (isinstance(weights, dict) and all(isinstance(x, Tensor) for x in weights.values())):
        raise RecipeError("no state dict: expected tensors by parameter name")
    return weights


def _weights_of_timm(name: str) -> dict[str, Tensor]:
    if not timm.is_model_pretrained(name):
        known = dict.fromkeys(found.partition(".")[0] for found in timm.list_pretrained())
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {TIMM}{close[0]}?" if close else "`timm.list_pretrained('vit*')` lists them"
        raise RecipeError(f"timm has no weights of that name; {hint}")
    try:
        weights: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub and what carries it have many
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"cannot be fetched: {reason}; fetch them where there is a network (HF_HOME names the cache) or name a file"
        ) from error
    return weights
