"""A trained run as the analyses read it: recipe, checkpoints in order, the model at any of them, and its images.

Images are a selection of the run's validation split, read through the run's own backend.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from karat_scale.checkpoint.store import MANIFEST, POINTERS, step_of
from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.batch import Batch
from karat_scale.data.plan import PADDING, EvalPlan
from karat_scale.data.shards.shard_format import absolute_path, beton_path, dataset_directory, read_dataset_record
from karat_scale.data.shards.shards import images_under
from karat_scale.engine.distributed import ALONE
from karat_scale.foundation.errors import DataError, RunDirectoryError, UserError
from karat_scale.foundation.files import file_sha256, json_sha256
from karat_scale.foundation.tables import Files
from karat_scale.models.layers import freeze
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_run_recipe
from karat_scale.training.run_directory import OpenRun, RunDirectory
from karat_scale.training.tasks.classification.conversion import SURVEYED
from karat_scale.training.tasks.classification.distillation_teacher import build_model
from karat_scale.training.weights_file import load_exported


class ValidationImages:
    """The same images in the same order in each pass, in batches, so that memory does not grow with their number.

    `bad` is the number of images that could not be read in the last pass; `total` is the number of images of the split.
    """

    def __init__(self, recipe: Recipe, count: int, ids: Sequence[int] | None = None) -> None:
        # Few images need no workers, and analyses of several runs should not need more processes.
        self._spec = ImageSpec.of(recipe.changed(data__workers=0), trains=False)
        self._normalize = Normalize(recipe.augment.mean, recipe.augment.std)
        self.bad = 0
        with closing(open_backend(self._spec)) as backend:
            self.classes, self.total = backend.classes, backend.num_val
        total = self.total
        if ids is None:
            ids = np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
        outside = [i for i in ids if not 0 <= i < total]
        if outside or not ids:
            raise DataError(
                f"--image {outside[0] if outside else '(none)'}: the validation split has images 0 to {total - 1}"
            )
        self.ids = tuple(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def raw(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches of bytes on the host, without the images that could not be read."""
        self.bad, read = 0, 0
        ids = np.array([*self.ids, PADDING], dtype=np.int64)  # PADDING is the index of its own place
        parts = EvalPlan(len(self.ids), batch_size, rank=0, world_size=1).slices()
        slices = [replace(part, sample_ids=ids[part.sample_ids]) for part in parts]
        with closing(open_backend(self._spec)) as backend:
            for batch in backend.eval_batches(slices):
                # DALI and nvJPEG leave images on the GPU, and pictures are drawn on the host.
                batch = batch.to("cpu", non_blocking=False)
                self.bad += len(batch.bad)
                keep = batch.valid
                read += int(keep.sum())
                if keep.any():
                    yield Batch(batch.images[keep], batch.labels[keep], batch.sample_ids[keep], batch.valid[keep])
            if not read:
                raise DataError(f"none of the {len(self.ids)} chosen validation images can be read")

    def batches(self, raw: Iterable[Batch], device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield normalised float32 images [b, 3, H, W] and labels [b] of batches of bytes."""
        for batch in raw:
            yield self.normalized(batch, device), batch.labels.to(device)

    def normalized(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return a batch's bytes as normalised float32 images [b, 3, H, W]."""
        return self._normalize(batch.images.to(device))


SNAPSHOT = ".safetensors"


@dataclass
class TrainedRun(OpenRun[Recipe]):
    """One run, softmax or KArAt. Its directory is never changed, except that its predictions are kept there."""

    @cached_property
    def shared(self) -> dict[str, Any]:
        """Results that one analysis has computed and others use."""
        return {}

    @property
    def label(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @cached_property
    def in_order(self) -> list[str]:
        """The names of all checkpoints and snapshots, oldest first, one per step; a checkpoint is preferred.

        Raises RunDirectoryError if there is none.
        """
        snapshots = {path.stem: path.name for path in self.directory.snapshots.glob(f"step-*{SNAPSHOT}")}
        by_step = {**snapshots, **{name: name for name in self.store.names()}}
        if not by_step:
            raise self.store.nothing_saved()
        return [by_step[step] for step in sorted(by_step)]

    @cached_property
    def fingerprint(self) -> str:
        """A text that changes if an analysis of this run would use other weights."""
        try:
            chosen = file_sha256(self.store.root / self.chosen / MANIFEST)
            newest, weights = self.in_order[-1], self.weights_kind
        except (UserError, OSError):
            chosen, newest, weights = "", "", self.weights
        return f"{self.path.resolve()} {newest} {chosen} {weights}"

    @property
    def data_identity(self) -> dict[str, Any]:
        """The settings that decide which validation images there are, and what their pixels are."""
        data = self.recipe.data
        facts = {key: getattr(data, key) for key in ("backend", "val_split", "decoder")}
        return {**facts, "path": absolute_path(data.path)}

    @cached_property
    def data_digest(self) -> str:
        """A digest that changes if the files of the validation images do; empty where there are none.

        For images that are not in shards, it covers the files' names, sizes and times.
        """
        data = self.recipe.data
        directory = dataset_directory(data.path)
        try:
            if data.row.files is Files.SHARDS:
                return json_sha256(read_dataset_record(directory, data.timeout).model_dump(mode="json"))
            if data.row.files is None or isinstance(directory, str):
                return ""
            if data.row.files is Files.BETONS:
                paths = [beton_path(directory, data.val_split)]
            else:
                paths = [directory / name for name in images_under(directory, data.val_split)[0]]
            return json_sha256({str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths})
        except (OSError, DataError):
            return ""

    def step(self, name: str) -> int:
        """Return the number of finished steps at a checkpoint or snapshot."""
        return step_of(name.removesuffix(SNAPSHOT))

    def model(self, name: str | None = None, weights: str | None = None, implementation: str = "auto") -> nn.Module:
        """Return the model at a checkpoint (default: the chosen one), float32, on `device`, in evaluation mode.

        Args:
            weights: the weights to load instead of the run's choice.
            implementation: the implementation of KArAt's operator, instead of the one it was trained with.

        Raises:
            RunDirectoryError: the checkpoint is missing, damaged, of another model, without averages or not finite.
        """
        model = self.new_model(implementation)
        self.load(model, name, weights)
        return model

    def new_model(self, implementation: str = "auto") -> nn.Module:
        """Return a model like `model`, with the same frozen parameters, but without the weights, which `load` adds."""
        recipe = self.recipe.changed(attention__implementation=implementation)
        model = build_model(recipe, self.path).to(self.device).eval()
        freeze(model, recipe.train.freeze)
        return model

    def refuse_other_classes(self, classes: Sequence[str]) -> None:
        """Raise DataError if the data's classes differ from those that the run recorded."""
        own = self.directory.classes()
        if own and own != tuple(classes):
            raise DataError(
                f"data.path = {self.recipe.data.path} has other classes than the run; name its own by --data"
            )

    def load(self, model: nn.Module, name: str | None = None, weights: str | None = None) -> None:
        """Load the weights of a checkpoint (default: the chosen one), or the raw weights of a snapshot.

        Raises the same errors as `model`.
        """
        name = name or self.chosen
        if name.endswith(SNAPSHOT):
            path = self.directory.snapshots / name
            load_exported(model, path)
        else:
            path = self.store.root / name
            if damage := self.store.damage(name):
                raise RunDirectoryError(f"checkpoint {path} cannot be used: {damage}; choose another")
            super().load(model, name, weights)
        bad = next((n for n, parameter in model.named_parameters() if not parameter.isfinite().all()), None)
        if bad is not None:
            raise RunDirectoryError(f"checkpoint {path}: {bad} is not finite: the run diverged; choose another")

    def load_newest(self, model: nn.Module) -> str:
        """Load the raw weights of the newest checkpoint or snapshot that can be loaded, and return its name.

        Raises:
            RunDirectoryError: there is none, or none can be loaded; the message is that of the newest.
        """
        damage: list[RunDirectoryError] = []
        for name in reversed(self.in_order):
            try:
                self.load(model, name, "raw")
                return name
            except RunDirectoryError as error:
                damage.append(error)
        raise damage[0]

    @property
    def device(self) -> torch.device:
        """See `device_of`."""
        return device_of(self.recipe)

    @property
    def matrix_name(self) -> str:
        """Name of the attention matrices in figures: "softmax", or "S" if they are learned, perhaps by a teacher."""
        attention = self.recipe.attention
        return "S" if attention.learns or attention.transfer_from else "softmax"

    def images(self, count: int, ids: Sequence[int] | None = None) -> ValidationImages:
        """Return `count` validation images spread over the split, or `ids`. Raises DataError if there are none."""
        found = ValidationImages(self.recipe, count, ids)
        self.refuse_other_classes(found.classes)
        return found


def device_of(recipe: Recipe) -> torch.device:
    """Return a GPU if the recipe allows it and there is one."""
    return torch.device("cuda" if recipe.run.device != "cpu" and torch.cuda.is_available() else "cpu")


def open_run(path: str | Path, data: str | None = None, weights: str = "auto", checkpoint: str = "best") -> TrainedRun:
    """Open a run, or what `karat convert --survey` left, by its directory.

    Args:
        data: the directory of the data, if it is no longer at `data.path`.

    Raises:
        RunDirectoryError: this is not a run directory, or it is a detector's, or it lacks the checkpoint.
        RecipeError: its recipe cannot be read.
        UntrustedError: its recipe names a class.
    """
    overrides, directory = [] if data is None else [f"data.path={data}"], RunDirectory(path)
    if (surveyed := directory.path / SURVEYED).is_file() and not directory.recipe_file.exists():
        run = TrainedRun(directory.path, load_run_recipe(surveyed, overrides, Recipe), weights, checkpoint)
    else:
        run = TrainedRun.at(path, Recipe, overrides, weights, checkpoint)
    if run.device.type == "cpu":
        run = replace(run, recipe=run.recipe.changed(data=run.recipe.data.on_a_cpu()))
    elif run.recipe.data.row.without_gpu:
        torch.cuda.init()  # nvJPEG decodes on the GPU that the process uses
    if checkpoint not in POINTERS:
        run.choose(ALONE)
    return run
