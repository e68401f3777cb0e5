"""`karat show RECIPE`: one global batch as training sees it, augmented and mixed, as a picture and as text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karat_scale.commands.figures import new_figure, rendered, show_map
from karat_scale.data.batch import Batch
from karat_scale.data.plan import micro_batch_of
from karat_scale.engine import distributed
from karat_scale.engine.reporting.progress import Reporter, SilentDisplay
from karat_scale.foundation.console import print_table, printable
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.files import write_atomically
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.tasks.classification.task import ClassificationTask

_LEAST_WEIGHT = 0.005  # of a class in a mixed target that is worth naming
_COLUMNS = 8


@dataclass(frozen=True)
class ShownBatch:
    """A global batch, or some of its images.

    Attributes:
        images: uint8 [b, H, W, 3], as the model sees them, without normalisation.
        targets: float [b, classes].
        places: where each image is stored.
        bad: images that could not be read, and were replaced.
        least: what label smoothing gives to every class.
    """

    images: npt.NDArray[np.uint8]
    targets: npt.NDArray[np.float32]
    places: list[str]
    classes: tuple[str, ...]
    bad: list[str]
    least: float

    @classmethod
    def of(cls, task: ClassificationTask, micro_batches: Iterable[tuple[Batch, Tensor, Tensor]]) -> "ShownBatch":
        """Return micro batches, each with its normalised images [b, 3, H, W] and its targets."""
        augment = task.recipe.augment
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (augment.mean, augment.std))
        locate = getattr(task.backend, "locate", None)
        images, targets, places, bad = [], [], [], []
        for batch, seen, soft in micro_batches:
            scaled = (seen.float() * std + mean).mul(255).round().clamp(0, 255)
            images.append(scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy())
            targets.append(soft.numpy())
            if batch.streamed is not None:
                places += [" in ".join(source) for source in batch.streamed.sources]
            else:
                ids = batch.sample_ids.tolist()
                places += [" in ".join(locate(number)) if locate else f"sample {number}" for number in ids]
            bad += [str(one) for one in batch.bad]
        least = augment.label_smoothing / task.recipe.model.num_classes
        return cls(np.concatenate(images), np.concatenate(targets), places, task.classes, bad, least)

    def chosen(self, numbers: Sequence[int]) -> "ShownBatch":
        """Return these images of the batch."""
        places = [self.places[number] for number in numbers]
        return replace(self, images=self.images[numbers], targets=self.targets[numbers], places=places)

    def label(self, number: int) -> str:
        """Return the classes of an image, with their weights where it is mixed."""
        row = self.targets[number]
        shares = (row - self.least) / max(float((row - self.least).sum()), 1e-9)
        order = [int(index) for index in np.argsort(-shares)[:2] if shares[index] > _LEAST_WEIGHT]
        names = [printable(self.classes[i]) if i < len(self.classes) else f"class {i}" for i in order]
        if len(order) == 1:
            return names[0]
        return " + ".join(f"{shares[index]:.2f} {name}" for index, name in zip(order, names, strict=True))


def show_batch(recipe: str, overrides: Sequence[str], step: int, images: int, out: str | None) -> int:
    """Draw the images of a training step into a PNG, and list them; returns the exit code.

    Args:
        step: counted from 1; what `karat train` logs as this step.
        images: at most this many.
        out: the PNG; beside the run's directory if None.

    Raises:
        UserError: the recipe, its data or the step is not right, or the file cannot be written.
    """
    loaded = load_recipe(recipe, overrides)
    shown = read_batch(loaded, step, images)
    path = Path(out or f"{Path(loaded.run.dir).expanduser()}-step-{step}.png")
    try:
        if not out:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, draw(shown))
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from error
    rows = [[str(number), shown.label(number), place] for number, place in enumerate(shown.places)]
    print_table(f"{loaded.run.name}, step {step}: {len(rows)} images", ["", "target", "from"], rows, (1, 2))
    for bad in shown.bad:
        print(printable(f"replaced: {bad}"))
    print(f"\n{path}")
    return 0


def read_batch(recipe: Recipe, step: int, count: int) -> ShownBatch:
    """Return the first images of a training step. Raises UserError if there is no such step."""
    if recipe.data.is_stream and step > 1:
        raise UserError(f"--step {step}: a stream (data.order = stream) is read from its start; use --step 1")
    recipe = recipe.changed(data=recipe.data.on_a_cpu().changed(workers=recipe.data.fewest_workers))
    world = distributed.start("cpu")
    task: ClassificationTask | None = None
    try:
        task = ClassificationTask(recipe, world, Reporter(SilentDisplay(), None)).at(step - 1)
        plan = task.plan()
        last = plan.steps_per_epoch * recipe.train.epochs
        if not 1 <= step <= last:
            raise UserError(f"--step {step}: the recipe has steps 1 to {last:,}")
        wanted = -(-min(count, recipe.train.global_batch) // micro_batch_of(recipe, world.size))
        slices = [one for one, _ in zip(plan.slices(step - 1, step), range(wanted), strict=False)]
        taken = ((batch, *task.as_trained(batch)) for batch in task.backend.train_batches(slices))
        shown = ShownBatch.of(task, taken)
        return shown.chosen(range(min(count, len(shown.images))))
    finally:
        if task is not None:
            task.close()
        distributed.stop()


def draw(shown: ShownBatch) -> bytes:
    """Return the grid of images with their targets, as a PNG."""
    columns = min(_COLUMNS, len(shown.images))
    rows = -(-len(shown.images) // columns)
    figure = new_figure(1.7 * columns, 1.95 * rows)
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if number < len(shown.images):
            title = shown.label(number).replace(" + ", "\n").replace("$", r"\$")
            show_map(axes, shown.images[number], title)
        else:
            axes.axis("off")
    return rendered(figure)
