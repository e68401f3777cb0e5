"""What every analysis takes and returns: settings, a visit of images by the model, and figures, numbers and tables."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import nn

from karat_scale.commands.analyze.trained_run import TrainedRun, ValidationImages
from karat_scale.engine.distributed import ALONE, World
from karat_scale.foundation.console import duration
from karat_scale.foundation.errors import UserError
from karat_scale.models.attention_matrices import Visit, watched


class NothingToShowError(UserError):
    """An analysis does not apply to this run: nothing is wrong, and the message says why."""


WORTH_TELLING = 5.0
"""Seconds of work from which its cost is told."""


@dataclass(frozen=True)
class Settings:
    """The size of each analysis. Counts are of validation images."""

    images: int = 64
    """Images for spectrum and functions."""
    image_ids: tuple[int, ...] | None = None
    """The images of the attention maps; None spreads four over the split."""
    block: int = -1
    """The block of the attention maps; negative counts from the last."""
    batch: int = 8
    """Images per batch, which limits memory."""
    grid: int = 15
    """Points per side of the loss landscape."""
    range: float = 1.0
    """Extent of the landscape: the random grid is +- this, in filter norms; it scales the path's margin."""
    samples: int = 128
    """Images for each loss of the landscape."""
    hessian_samples: int = 32
    """Images of the sharpness."""
    eigenvalues: int = 3
    seed: int = 0
    world: World = ALONE
    """The ranks that share the points of the landscape."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    """Called with the current work, the steps done and the total number of steps."""
    tell: Callable[[str], None] = lambda text: None
    """Called with what work will cost, before it starts."""


@dataclass(frozen=True)
class Table:
    """Rows of numbers and texts for the report."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Tile:
    """A small picture of a gallery: a PNG and the lines below it."""

    name: str
    lines: list[str]
    png: bytes


@dataclass
class Result:
    """One analysis of one run, or of all runs together.

    numbers: values of JSON's types. arrays: the data of the figures, for npz. figures: by file name, each with a
    caption; a figure that is a function is drawn when it is written, since very many would not fit in memory.
    galleries: pictures by title. notes: what the reader must know about this run, such as images that could not be
    read.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    figures: dict[str, tuple[Figure | Callable[[], Figure], str]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    galleries: dict[str, list[Tile]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def say_cost(settings: Settings, what: str, count: int, seconds: float, shorter: str) -> None:
    """Tell what work of `count` equal units costs, from the measured time of one, if it is long enough to wonder.

    shorter: the options that make it shorter.
    """
    if count * seconds > WORTH_TELLING:
        each = f"{count} x {duration(seconds)}"
        settings.tell(f"{what} takes at most about {duration(count * seconds)} ({each}); {shorter}")


def note_bad_images(result: Result, bad: int) -> None:
    """Note how many of the chosen images are missing in the figures."""
    if bad:
        result.notes.append(f"{bad} of the chosen images cannot be read and are left out")


@torch.no_grad()
def visit_images(
    model: nn.Module, run: TrainedRun, images: ValidationImages, settings: Settings, what: str, visit: Visit
) -> int:
    """Call `visit` for each block on each batch of images, and show the progress as `what`; return their number."""
    done = 0
    with watched(model, visit):
        for batch, _ in images.batches(settings.batch, run.device):
            model(batch)
            done += len(batch)
            settings.progress(what, done, len(images))
    return done
