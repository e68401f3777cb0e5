"""Where figures go: `metrics.jsonl`, one event a line, and the trackers of `log.trackers`."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from karat_scale.errors import not_written
from karat_scale.recipe import RunRecipe
from karat_scale.tables import TRACKERS, load


class Tracker(Protocol):
    """Shows a run's figures elsewhere. Its class takes (name of the run, its directory, its recipe)."""

    def write(self, event: str, step: int, figures: Mapping[str, Any]) -> None:
        """Take the figures of an event: "train", "eval", "checkpoint", "resume" or "end"."""

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """Take a distribution."""

    def close(self) -> None:
        """Flush what is left."""


def open_trackers(directory: Path, recipe: RunRecipe, names: Sequence[str]) -> list[Tracker]:
    """Open the trackers of these names in the table."""
    return [load(TRACKERS[name])(recipe.run.name, directory, recipe) for name in names]


class MetricsLog:
    """Appends events; every line is on disk before the next step can be lost."""

    def __init__(self, file: Path, trackers: Sequence[Tracker] = ()) -> None:
        self._file = file.open("a", encoding="utf-8")
        self._trackers = trackers

    def write(self, event: str, step: int, **figures: Any) -> None:
        """One event. A figure that is not finite is written as null: JSON has no NaN.

        Raises RunDirectoryError when the disk does not take it.
        """
        record = {"event": event, "step": step, "time": round(time.time(), 3), **figures}
        record = {key: _finite_or_none(value) for key, value in record.items()}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise not_written(self._file.name, error) from error
        for tracker in self._trackers:
            tracker.write(event, step, figures)

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """A distribution, for the trackers alone."""
        for tracker in self._trackers:
            tracker.histogram(name, values, step)

    def close(self) -> None:
        """Flush and close the file and the trackers."""
        with suppress(OSError):  # a write that failed was reported when it happened
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
