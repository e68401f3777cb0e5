"""What every analysis returns: figures, their numbers, and tables for the report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
from matplotlib.figure import Figure

from karat_scale.analysis.trained_run import TrainedRun
from karat_scale.train.distributed import ALONE, World


@dataclass(frozen=True)
class Settings:
    """How much each analysis looks at. Counts are of validation images."""

    images: int = 64
    """For spectrum, functions."""
    image_ids: tuple[int, ...] | None = None
    """The images of the attention maps; None spreads four over the split."""
    block: int = -1
    """The block of the attention maps; negative counts from the last."""
    batch: int = 8
    """Images at a time, which bounds memory."""
    grid: int = 15
    """Points a side of the loss landscape."""
    range: float = 1.0
    """The landscape's extent: the random grid is +- this, in norms of the model's filters; scales the path's margin."""
    samples: int = 256
    """For each loss of the landscape."""
    hessian_samples: int = 64
    eigenvalues: int = 3
    seed: int = 0
    world: World = ALONE
    """The ranks that share the points of the landscape."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    """Called with what goes on, steps done and steps in all."""


@dataclass(frozen=True)
class Table:
    """Rows of numbers and texts, for the report."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass
class Result:
    """One analysis of one run.

    numbers: JSON's kinds of values. arrays: what the figures are drawn from, for npz. figures: by file name, each with
    a caption; one that is a function is drawn when it is written, as very many at once would not fit in memory. notes:
    what a reader must know of this run, such as images that could not be read.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    figures: dict[str, tuple[Figure | Callable[[], Figure], str]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def note_bad_images(result: Result, run: TrainedRun, bad: int) -> None:
    """Say how many of the chosen images are not in the figures."""
    if bad:
        result.notes.append(f"{run.label}: {bad} of the chosen images cannot be read and are left out")
