"""Where figures go: `metrics.jsonl`, one event a line, and the trackers of `log.trackers`."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from karat_scale.errors import not_written, one_line
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


def open_trackers(directory: Path, recipe: RunRecipe, names: Sequence[str]) -> tuple[list[Tracker], list[str]]:
    """Open the trackers of these names in the table; returns them, and a line for each one that the disk refuses."""
    opened, failures = [], []
    for name in names:
        try:
            opened.append(load(TRACKERS[name])(recipe.run.name, directory, recipe))
        except OSError as error:
            failures.append(f"log.trackers = {name} has failed, so it gets no figures: {one_line(error)}")
    return opened, failures


class MetricsLog:
    """Appends events; every line is on disk before the next step can be lost.

    A tracker that fails is closed and named in `failures`; training goes on without it.

    Raises:
        RunDirectoryError: the disk does not take the file.
    """

    def __init__(self, file: Path, trackers: Sequence[Tracker] = ()) -> None:
        try:
            self._file = file.open("a", encoding="utf-8")
        except OSError as error:
            raise not_written(file, error) from error
        self._trackers = list(trackers)
        self._failures: list[str] = []
        # A disk that was full has left half a line: the next event must not join it.
        self._begins_line = not _ends_with_newline(file)

    def write(self, event: str, step: int, **figures: Any) -> None:
        """One event. A figure that is not finite is written as null: JSON has no NaN.

        Raises RunDirectoryError when the disk does not take it.
        """
        record = {"event": event, "step": step, "time": round(time.time(), 3), **figures}
        record = {key: _finite_or_none(value) for key, value in record.items()}
        try:
            self._file.write(("\n" if self._begins_line else "") + json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise not_written(self._file.name, error) from error
        self._begins_line = False
        self._tell(lambda tracker: tracker.write(event, step, figures))

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """A distribution, for the trackers alone."""
        self._tell(lambda tracker: tracker.histogram(name, values, step))

    def failures(self) -> list[str]:
        """Return what went wrong with trackers since the last call, one line each."""
        failures, self._failures = self._failures, []
        return failures

    def close(self) -> None:
        """Flush and close the file and the trackers."""
        with suppress(OSError):  # a write that failed was reported when it happened
            self._file.close()
        self._tell(lambda tracker: tracker.close())

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for tracker in [*self._trackers]:
            try:
                what(tracker)
            except Exception as error:  # of any kind: a tracker is another's library, often behind a network
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                self._failures.append(f"{name} has failed, so it gets no more figures: {one_line(error)}")
                with suppress(Exception):
                    tracker.close()


def _ends_with_newline(file: Path) -> bool:
    with file.open("rb") as content:
        content.seek(0, 2)
        if content.tell() == 0:
            return True
        content.seek(-1, 2)
        return content.read(1) == b"\n"


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
