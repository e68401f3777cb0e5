"""What a tracker is, what it is told of a run, and the figures in an event.

This package imports no torch: it works in processes of its own beside the training.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Event = Mapping[str, Any]

KINDS = ("train", "eval", "histograms")
"""The kinds of events that have figures; of each kind, a step has one."""
_NOT_FIGURES = ("step", "time")


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker sees it.

    Attributes:
        id: made at the run's first start and kept in its directory. The tracker continues what it began under this id.
        name: for people.
        project: the project or experiment that the recipe names; empty if it names none.
        directory: the run's directory.
        settings: the keys of the recipe, dotted, and the versions of the libraries.
    """

    id: str
    name: str
    project: str
    directory: Path
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """Shows a run's figures elsewhere. Its class takes a `TrackedRun`.

    Any error means: try again later, with a new tracker. A tracker that knows what has arrived may have an attribute
    `steps`, the last step of each of `KINDS`. Then everything after these steps is sent again. None: it does not know.
    """

    url: str
    """Where a person finds the run; empty if there is no such place."""

    def write(self, events: Sequence[Event]) -> None:
        """Take events of `metrics.jsonl` and `histograms.jsonl`. They are sent, or safe on disk, when this returns."""

    def upload(self, file: Path, name: str) -> None:
        """Take a file of the run; `name` is its path in the run's directory. A newer one replaces it."""

    def close(self, summary: Event) -> None:
        """Take `summary.json`, which is empty while the run has none, and send what is left."""


def figures(event: Event) -> dict[str, float]:
    """Return the numbers of a "train" or "eval" event by the names that trackers show, such as `train/loss`."""
    return dict(_figures(event)) if event.get("event") in ("train", "eval") else {}


def _figures(event: Event) -> Iterator[tuple[str, float]]:
    for name, value in numbers(event):
        if name not in _NOT_FIGURES:
            yield f"{event['event']}/{name}", value
    for name, blocks in (event.get("content") or {}).items():
        for block, value in enumerate(blocks):
            if value is not None:
                yield f"content, {name}/block {block}", value


def numbers(event: Event) -> Iterator[tuple[str, float]]:
    """Yield the values of an event or a summary that are numbers."""
    for name, value in event.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
