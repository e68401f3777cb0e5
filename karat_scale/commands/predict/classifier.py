"""A trained classifier with what its predictions need: from a run, or from what `karat export` wrote."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from karat_scale.checkpoint.weights import wants_ema
from karat_scale.commands.analyze.trained_run import open_run
from karat_scale.foundation.errors import RunDirectoryError, UserError
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import validate_recipe
from karat_scale.training.initial_weights import locate
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.weights_file import read_exported, read_facts


@dataclass(frozen=True)
class Classifier:
    """A model, the recipe that it was trained with, its class names, and which weights these are."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    checkpoint: str
    weights: str

    @property
    def device(self) -> torch.device:
        """A GPU if the recipe allows it and there is one."""
        use_cuda = self.recipe.run.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if use_cuda else "cpu")

    def class_name(self, label: int) -> str:
        """Return the name of a label; its number where the run recorded no names."""
        return self.classes[label] if label < len(self.classes) else str(label)


def open_classifier(source: str, checkpoint: str, weights: str) -> Classifier:
    """Open a run's directory, a folder of `karat export` or its safetensors file.

    Args:
        checkpoint: of a run: best, latest, or a name.
        weights: raw, ema, or auto, which is the choice of `karat eval`. An exported folder holds one kind.

    Raises:
        UserError: there is nothing like that, it is damaged, or it has no such weights.
    """
    try:
        path, inside = locate(source)
    except UserError:
        raise RunDirectoryError(f"{source}: neither a run's directory nor a folder of karat export; name one") from None
    if inside:
        return _of_run(path, checkpoint if checkpoint != "best" else inside, weights)
    return _of_export(path, checkpoint, weights)


def _of_run(path: Path, checkpoint: str, weights: str) -> Classifier:
    run = open_run(path, weights=weights, checkpoint=checkpoint)
    kind = "ema" if wants_ema(weights, run.recipe, run.store.state(run.chosen)) else "raw"
    return Classifier(run.model(), run.recipe, RunDirectory(path).classes(), run.chosen, kind)


def _of_export(path: Path, checkpoint: str, weights: str) -> Classifier:
    facts = read_facts(path)
    if facts.checkpoint is None or facts.weights is None or facts.recipe is None:
        raise RunDirectoryError(f"{path}: not a whole file of karat export; export the run again")
    held = {"checkpoint": facts.checkpoint, "weights": facts.weights}
    recipe = validate_recipe(facts.recipe, str(path))
    if recipe.attention.transfer_from:
        raise RunDirectoryError(f"{path}: its attention needs its teacher, which the run keeps; name the run instead")
    wanted = {"checkpoint": (checkpoint, "best"), "weights": (weights, "auto")}
    for option, (asked, default) in wanted.items():
        if asked not in (default, held[option]):
            raise RunDirectoryError(
                f"--{option} {asked}: {path} holds {held[option]} only; leave out --{option}, or name the run"
            )
    return Classifier(read_exported(path), recipe, facts.classes, **held)
