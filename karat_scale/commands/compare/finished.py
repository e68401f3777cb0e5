"""A finished run as `karat compare` sees it: its recipe, its budget, its scores and their curves."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from karat_scale.engine.reporting.progress import read_events
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.files import file_sha256, sealed
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.base import wanted_by
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.detection.recipe import DetectionRecipe

# A checkpoint's event may come after those of later steps.
_KINDS = ("start", "train", "eval", "resume")
CLASSIFICATION, DETECTION = ("top1", "top5", "loss"), ("box_ap", "mask_ap")


Percent = Annotated[float, Field(ge=0.0, le=100.0)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
M = TypeVar("M", bound="Figures")


class Figures(BaseModel):
    """Some fields of a JSON object. Types are strict: a number in quotes is not a number."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    @classmethod
    def of(cls: type[M], content: Any, where: str) -> M:
        """Validate `content`. Raises RunDirectoryError, which begins with `where` and names the first wrong field."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "its content"
            value = "" if first["type"] == "missing" else f" = {str(first['input'])[:40]!r}"
            raise RunDirectoryError(
                f"{where}: damaged: {field}{value}: {wanted_by(first)}; put back what the run wrote"
            ) from None


def read_summary(directory: RunDirectory) -> dict[str, Any]:
    """Return the summary of a finished run. Raises RunDirectoryError if there is none."""
    if directory.is_summary_damaged:
        raise RunDirectoryError(
            f"{directory.summary_file}: damaged, it is not a JSON object; put back the files that the run wrote"
        )
    summary = directory.summary()
    if summary is None:
        raise RunDirectoryError(f"{directory.path}: has no summary.json, so it has not finished; finish it first")
    if summary.get("exit") != 0:
        reason = summary.get("reason", "no reason given")
        raise RunDirectoryError(f"{directory.path}: has not finished ({reason}); finish it first")
    return summary


class Measure(NamedTuple):
    """The name of a figure in tables, and its decimal places."""

    title: str
    digits: int


SCORES = {
    "top1": Measure("top-1, %", 2),
    "top5": Measure("top-5, %", 2),
    "loss": Measure("loss", 4),
    "box_ap": Measure("box AP, %", 2),
    "mask_ap": Measure("mask AP, %", 2),
}
CHOOSING = ("top1", "mask_ap")  # the best evaluation has the highest of these
MEASURES = {
    **{
        f"{which}_{name}": Measure(title.format(row.title), row.digits)
        for name, row in SCORES.items()
        for which, title in (("last", "last {}"), ("best", "best {}" if name in CHOOSING else "{} at the best"))
    },
    "images_per_second": Measure("images a second", 1),
    "step_seconds": Measure("seconds a step", 4),
    "hours": Measure("hours", 3),
    "parameters": Measure("parameters", 0),
}


class Budget(NamedTuple):
    """The length of a run's training, its data, and the number of test images."""

    steps: int
    epochs: float | None
    train_images: int | None
    test_images: int | None
    classes: int
    classes_sha256: str


class Point(NamedTuple):
    """An evaluation: when it was, and its scores."""

    step: int
    samples: int
    hours: float
    scores: dict[str, float]


@dataclass(frozen=True)
class FinishedRun:
    """A run that has finished.

    Attributes:
        values: a figure for each of `MEASURES` that the run has.
        curve: the evaluations, by step.
        machine: the machine that it trained on last.
        damage: a line on what was skipped in the run's files; empty if nothing was.
    """

    path: Path
    recipe: RunRecipe
    budget: Budget
    values: dict[str, float]
    curve: tuple[Point, ...]
    machine: str
    damage: str = ""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.recipe.run.seed

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that runs of this kind have; the first one is compared unless another is asked for."""
        return DETECTION if isinstance(self.recipe, DetectionRecipe) else CLASSIFICATION


class _Summary(Figures):
    steps: Count
    samples: Count
    parameters: Count
    best_step: Number | None
    images_per_second: float | None = None
    world_size: Count = 1
    device: str = "CPU"
    processor: str = "CPU"
    train_images: Count | None = None
    classes: Number = 0
    classes_sha256: str = ""
    recipe_sha256: str | None = None
    sha256: str | None = None


class _Event(Figures):
    event: str
    step: Number
    time: float
    anew: bool = False
    samples: Number | None = None
    images_per_second: float | None = None
    images: Count | None = None
    top1: Percent | None = None
    top5: Percent | None = None
    loss: float | None = None
    box_ap: float | None = None
    mask_ap: float | None = None


def read_run(path: str) -> FinishedRun:
    """Read a run from its own files.

    Raises:
        UserError: it is not a run, or it is unfinished, damaged or changed.
    """
    directory = RunDirectory(path)
    is_detector = directory.command == "detect"
    schema: type[RunRecipe] = DetectionRecipe if is_detector else Recipe
    recipe = directory.recipe(schema)
    content = read_summary(directory)
    summary = _Summary.of(content, str(directory.summary_file))
    if summary.sha256 is not None and content != sealed(content):
        raise RunDirectoryError(f"{directory.summary_file}: was changed after the run; put it back")
    if summary.recipe_sha256 not in (None, file_sha256(directory.recipe_file)):
        raise RunDirectoryError(
            f"{path}: recipe.yaml is not that of summary.json: the run has begun again, or the file was changed; "
            "finish the run, or put the file back"
        )
    events: list[_Event] = []
    damaged: list[str] = []
    try:
        for event in read_events(directory.metrics_file, damaged.append):
            if event.get("event") in _KINDS:
                try:
                    events.append(_Event.of(event, str(directory.metrics_file)))
                except RunDirectoryError:
                    damaged.append("")
    except OSError as error:
        raise RunDirectoryError(f"{directory.metrics_file}: {error.strerror}; make it readable") from error
    curve, hours = _curve(events, DETECTION if is_detector else CLASSIFICATION)
    if summary.best_step is None:
        raise RunDirectoryError(f"{path}: was never evaluated, so there is nothing to compare")
    values = {"parameters": float(summary.parameters), "hours": hours}
    if summary.images_per_second:
        values["images_per_second"] = summary.images_per_second
        values["step_seconds"] = recipe.train.global_batch / summary.images_per_second
    values |= _last_and_best(path, curve, summary.best_step, content)
    tested = [event.images for event in events if event.event == "eval"]
    epochs = round(summary.samples / summary.train_images, 2) if summary.train_images else None
    budget = Budget(summary.steps, epochs, summary.train_images, tested[-1], summary.classes, summary.classes_sha256)
    machine = f"{summary.world_size} x {summary.device} ({summary.processor})"
    damage = f"{path}: {plural(len(damaged), 'damaged line')} of metrics.jsonl skipped" if damaged else ""
    return FinishedRun(Path(path), recipe, budget, values, curve, machine, damage)


def _last_and_best(path: str, curve: tuple[Point, ...], best_step: int, summary: dict[str, Any]) -> dict[str, float]:
    """Return the scores of the last and of the best evaluation, after checking that the summary agrees.

    If a run branched from another, the best evaluation may be the other run's: then it has no loss here.
    """
    if not curve:
        raise RunDirectoryError(f"{path}: metrics.jsonl has no evaluation of this run; put back the file")
    best = next((point.scores for point in curve if point.step == best_step), {})
    values = {f"last_{name}": value for name, value in curve[-1].scores.items()}
    values |= {f"best_{name}": value for name, value in best.items()}
    for name, value in values.items():
        if summary.get(name, value) != value:
            raise RunDirectoryError(
                f"{path}: {name} is {summary[name]} in summary.json and {value} in metrics.jsonl: the run goes on, or "
                "a file was changed; wait for the end of the run, or put the file back"
            )
    kept = {name: summary.get(name) for name in MEASURES if name.startswith("best_")}
    return values | {name: float(value) for name, value in kept.items() if isinstance(value, int | float)}


def _curve(events: list[_Event], scores: tuple[str, ...]) -> tuple[tuple[Point, ...], float]:
    """Return the evaluations and the hours of work.

    A start that went back to an earlier step drops the evaluations after that step, one that began anew drops all.
    The time between two starts does not count as work; repeated steps do.
    """
    points: dict[int, Point] = {}
    seconds = 0.0
    before: _Event | None = None
    began = math.inf
    for event in events:
        if event.event == "start":
            before, began = None, event.time
            if event.anew:
                points.clear()
                seconds = 0.0
            continue
        # An evaluation may follow its training step.
        is_start = before is None or (
            event.step < before.step or (event.event == before.event == "train" and event.step == before.step)
        )
        if before is None or (is_start and event.event != "resume"):
            if event.images_per_second:
                seconds += (event.samples or 0) / event.images_per_second
            elif event.event == "eval":
                seconds += max(event.time - began, 0.0)
        elif event.event != "resume":
            seconds += max(event.time - before.time, 0.0)
        while points and next(reversed(points)) > event.step:
            points.popitem()
        if event.event == "eval":
            found = {name: value for name in scores if (value := getattr(event, name)) is not None}
            points[event.step] = Point(event.step, event.samples or 0, seconds / 3600, found)
        before = event
    return tuple(points.values()), seconds / 3600
