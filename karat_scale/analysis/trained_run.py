"""A run directory as an analysis reads it: recipe, checkpoints in order, and the model at any of them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from karat_scale.analysis.validation_images import ValidationImages
from karat_scale.errors import RunDirectoryError, UserError
from karat_scale.files import file_sha256
from karat_scale.recipe import AttentionConfig, Recipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.train.checkpoint.store import MANIFEST, CheckpointStore
from karat_scale.train.checkpoint.weights import load_weights, wants_ema
from karat_scale.train.checkpoint.weights_file import load_exported
from karat_scale.train.run_directory import RunDirectory
from karat_scale.train.teacher import build_model

SNAPSHOT = ".safetensors"


@dataclass(frozen=True)
class TrainedRun:
    """One run, softmax or KArAt. Nothing in its directory is changed.

    Args:
        path: the run's directory.
        recipe: its recipe, with `data.path` replaced where the data has moved.
        weights: "raw", "ema", or "auto": what `karat eval` would take.
        checkpoint: "best", "latest" or a name; the model that is looked at. "best" falls back on "latest".
    """

    path: Path
    recipe: Recipe
    weights: str = "auto"
    checkpoint: str = "best"

    @cached_property
    def store(self) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(self.path / "checkpoints")

    @property
    def label(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @cached_property
    def chosen(self) -> str:
        """The name of the checkpoint that is looked at. Raises RunDirectoryError when there is none."""
        wanted = self.checkpoint
        name = self.store.pointed(wanted) if wanted in ("best", "latest") else wanted
        if wanted == "best" and name is None:
            name = self.store.pointed("latest")
        if name is None or not (self.store.root / name).is_dir():
            there = ", ".join(self.store.names()) or "none"
            raise RunDirectoryError(f"{self.store.root}: no checkpoint {wanted!r}; there are: {there}")
        return name

    @cached_property
    def in_order(self) -> list[str]:
        """The names of all checkpoints and snapshots, oldest first, one a step: where there are both, the checkpoint.

        Raises RunDirectoryError when there is none.
        """
        snapshots = {path.stem: path.name for path in self.snapshots.glob(f"step-*{SNAPSHOT}")}
        by_step = {**snapshots, **{name: name for name in self.store.names()}}
        if not by_step:
            raise RunDirectoryError(f"{self.store.root}: no checkpoint; train the run first")
        return [by_step[step] for step in sorted(by_step)]

    @cached_property
    def fingerprint(self) -> str:
        """Changes when an analysis of this run would look at other weights."""
        try:
            chosen = file_sha256(self.store.root / self.chosen / MANIFEST)
            newest = self.in_order[-1]
        except (UserError, OSError):
            chosen = newest = ""
        return f"{self.path.resolve()} {newest} {chosen} {self.weights}"

    @property
    def snapshots(self) -> Path:
        """Where the weights alone are kept through training (`checkpoint.snapshots`), if at all."""
        return self.path / "snapshots"

    def step(self, name: str) -> int:
        """Finished steps at a checkpoint or snapshot."""
        return int(name.removesuffix(SNAPSHOT).removeprefix("step-"))

    def model(self, name: str | None = None, weights: str | None = None, implementation: str = "auto") -> nn.Module:
        """The model at a checkpoint (the chosen one when None), float32, on `device`, in evaluation mode.

        Args:
            weights: in place of the run's choice.
            implementation: of KArAt's operator, whichever it was trained with.

        Raises:
            RunDirectoryError: no such checkpoint, or it is damaged, of another model, without averages or not finite.
        """
        model = self.new_model(implementation)
        self.load(model, name or self.chosen, weights)
        return model

    def new_model(self, implementation: str = "auto") -> nn.Module:
        """A model as `model` gives it, but for its weights, which `load` gives it."""
        recipe = self.recipe.model_copy(update={"attention": self._attention(implementation)})
        return build_model(recipe, self.path).to(self.device).eval()

    def load(self, model: nn.Module, name: str, weights: str | None = None) -> None:
        """Give a model of this run the weights of a checkpoint, or the raw ones of a snapshot; raises as `model`."""
        if name.endswith(SNAPSHOT):
            directory = self.snapshots / name
            load_exported(model, directory)
        else:
            directory = self.store.root / name
            damage = self.store.damage(name)
            if damage:
                raise RunDirectoryError(f"checkpoint {directory} is damaged: {damage}; choose another")
            saved = self.store.state(name)
            load_weights(model, directory, saved, wants_ema(weights or self.weights, self.recipe, saved))
        bad = next((n for n, parameter in model.named_parameters() if not parameter.isfinite().all()), None)
        if bad is not None:
            raise RunDirectoryError(f"checkpoint {directory}: {bad} is not finite, the run diverged; choose another")

    @property
    def device(self) -> torch.device:
        """A GPU where the recipe allows one and there is one."""
        use_cuda = self.recipe.run.device != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if use_cuda else "cpu")

    @property
    def is_karat(self) -> bool:
        """Whether any head is learned."""
        return self.recipe.attention.kind == "karat"

    def images(self, count: int, ids: tuple[int, ...] | None = None) -> ValidationImages:
        """`count` validation images spread over the split, or those of `ids`; raises DataError when there are none."""
        return ValidationImages(self.recipe, count, ids)

    def _attention(self, implementation: str) -> AttentionConfig:
        return self.recipe.attention.model_copy(update={"implementation": implementation})


def open_run(path: str | Path, data: str | None = None, weights: str = "auto", checkpoint: str = "best") -> TrainedRun:
    """A run by its directory.

    Args:
        data: where the recipe's data is now, if not at `data.path`.

    Raises:
        RunDirectoryError: this is not a run directory, or a detector's.
        RecipeError: its recipe cannot be read.
    """
    path = Path(path)
    directory = RunDirectory(path)
    directory.recipe()  # refuses another kind of run
    recipe = load_recipe(directory.recipe_file, [] if data is None else [f"data.path={data}"])
    return TrainedRun(path, recipe, weights, checkpoint)
