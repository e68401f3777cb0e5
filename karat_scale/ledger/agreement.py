"""Whether a run's own files say the same: one that someone has edited since does not go into the ledger."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from karat_scale.data.plan import total_steps
from karat_scale.errors import RunDirectoryError
from karat_scale.files import file_sha256, sealed
from karat_scale.ledger.figures import EvalEvent, SummaryFigures, TrainEvent
from karat_scale.recipe import Recipe
from karat_scale.train.run_directory import RunDirectory
from karat_scale.train.state import TrainState

# Fields of summary.json that a checkpoint's state.json has too, there as `step` for `steps`.
_OF_STATE = (
    *("samples", "best_top1", "best_top5", "best_step", "last_top1", "last_top5"),
    *("peak_memory_mb", "data_digest", "bad_samples", "skipped_steps", "world_size"),
)
_MEND = "put back the files that the run wrote"


class Events(NamedTuple):
    """Of metrics.jsonl."""

    training: tuple[TrainEvent, ...]
    evaluations: tuple[EvalEvent, ...]


def read_summary(directory: RunDirectory) -> dict[str, Any]:
    """The summary of a finished run. Raises RunDirectoryError where there is none."""
    if directory.is_summary_damaged:
        raise RunDirectoryError(f"{directory.summary_file}: damaged, it is no JSON object; {_MEND}")
    summary = directory.summary()
    if summary is None:
        raise RunDirectoryError(f"{directory.path}: has no summary.json, so it has not finished; finish it first")
    if summary.get("exit") != 0:
        reason = summary.get("reason", "no reason given")
        raise RunDirectoryError(f"{directory.path}: has not finished ({reason}); finish it first")
    return summary


def read_events(directory: RunDirectory) -> Events:
    """What a run's metrics say. Raises RunDirectoryError where they are damaged, or it was never evaluated."""
    training, evaluations = [], []
    for where, event in _lines(directory):
        if event["event"] == "train":
            training.append(TrainEvent.of(event, where))
        elif event["event"] == "eval":
            evaluations.append(EvalEvent.of(event, where))
    if not evaluations:
        raise RunDirectoryError(f"{directory.path}: was never evaluated, so there is no figure for the ledger")
    return Events(tuple(training), tuple(evaluations))


def check_agreement(
    directory: RunDirectory, recipe: Recipe, summary: Mapping[str, Any], figures: SummaryFigures, events: Events
) -> None:
    """Raises RunDirectoryError with the first thing that two of a run's files say otherwise, as far as both say it."""
    last, where = events.evaluations[-1], "the last evaluation in metrics.jsonl"
    _same(directory, where, summary, {"last_top1": last.top1, "last_top5": last.top5, "samples": last.samples})
    if events.training:
        trained = events.training[-1]
        there = {"steps": trained.step, "samples": trained.samples, "data_digest": trained.data_digest}
        _same(directory, "the last step in metrics.jsonl", summary, there)
    state = _state(directory)
    if state:
        rate = TrainState.from_json(state).images_per_second
        of_state = {key: state[key] for key in _OF_STATE if key in state}
        of_state |= {"steps": state.get("step"), "images_per_second": round(rate, 2) if rate else None}
        _same(directory, "the last checkpoint", summary, of_state)
    steps = {"steps": _steps(recipe, figures)} if figures.train_images is not None else {}
    of_recipe = {"name": recipe.run.name, "seed": recipe.run.seed, **steps}
    _same(directory, "recipe.yaml", summary, {key: value for key, value in of_recipe.items() if key in summary})
    written = figures.recipe_sha256 or state.get("recipe_sha256")
    if written not in (None, file_sha256(directory.recipe_file)):
        raise RunDirectoryError(f"{directory.recipe_file}: is not the one that the run was trained by; {_MEND}")
    if figures.sha256 is not None and summary != sealed(summary):
        raise RunDirectoryError(f"{directory.summary_file}: was changed since the run wrote it; {_MEND}")


def _same(directory: RunDirectory, where: str, summary: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    for key, value in there.items():
        if summary.get(key) != value:
            raise RunDirectoryError(
                f"{directory.path}: summary.json has {key} = {summary.get(key)}, and {where} {value}; {_MEND}"
            )


def _steps(recipe: Recipe, figures: SummaryFigures) -> int:
    """How many a run by this recipe takes."""
    steps_per_epoch = (figures.train_images or 0) // recipe.train.global_batch
    return total_steps(steps_per_epoch, recipe.train.epochs, recipe.train.max_steps)


def _state(directory: RunDirectory) -> dict[str, Any]:
    """`state.json` of the last checkpoint; empty where the checkpoints are not there."""
    name = directory.store.pointed("latest")
    try:
        state = directory.store.state(name) if name else {}
    except (OSError, ValueError):
        state = None
    if not isinstance(state, dict):
        raise RunDirectoryError(f"checkpoint {directory.store.root / str(name)}: its state.json is damaged; {_MEND}")
    return state


def _lines(directory: RunDirectory) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each event, and where it stands."""
    path = directory.metrics_file
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} is missing; the ledger compares the summary with it") from None
    except UnicodeDecodeError:
        raise RunDirectoryError(f"{path}: damaged, it is not UTF-8; {_MEND}") from None
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            event = json.loads(line)
            event["event"]
        except (ValueError, TypeError, KeyError):
            raise RunDirectoryError(f"{where}: damaged, it is no event") from None
        yield where, event
