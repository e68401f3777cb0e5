"""Check that a run's files agree with each other: a run that was edited later does not go into the ledger."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from karat_scale.data.plan import total_steps
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.files import file_sha256, parse_json, sealed
from karat_scale.recipe import RunRecipe
from karat_scale.training.run_directory import RunDirectory
from paper.figures import EvalEvent, SummaryFigures, TrainEvent

# Fields of summary.json that are also in a checkpoint's state.json, where `steps` is called `step`.
_OF_STATE = (
    *("samples", "best_top1", "best_top5", "best_step", "last_top1", "last_top5"),
    *("best_box_ap", "best_mask_ap", "last_box_ap", "last_mask_ap"),
    *("peak_memory_mb", "data_digest", "bad_samples", "skipped_steps", "world_size"),
)
_FIX = "put back the files that the run wrote"


class Events(NamedTuple):
    """The events in metrics.jsonl that the ledger uses."""

    training: tuple[TrainEvent, ...]
    evaluations: tuple[EvalEvent, ...]


def read_events(directory: RunDirectory, evaluation: type[EvalEvent]) -> Events:
    """Return the events of a run. Raises RunDirectoryError if they are damaged, or if it was never evaluated."""
    training, evaluations = [], []
    for where, event in _lines(directory):
        if event["event"] == "train":
            training.append(TrainEvent.of(event, where))
        elif event["event"] == "eval":
            evaluations.append(evaluation.of(event, where))
    if not evaluations:
        raise RunDirectoryError(f"{directory.path}: was never evaluated, so there is no figure for the ledger")
    return Events(tuple(training), tuple(evaluations))


def check_agreement(
    directory: RunDirectory, recipe: RunRecipe, summary: Mapping[str, Any], figures: SummaryFigures, events: Events
) -> None:
    """Raise RunDirectoryError for the first value on which two of a run's files disagree."""
    last, where = events.evaluations[-1], "the last evaluation in metrics.jsonl"
    scores = {f"last_{name}": getattr(last, name) for name in last.scores}
    _same(directory, where, summary, {**scores, "samples": last.samples})
    if events.training:
        trained = events.training[-1]
        there = {"steps": trained.step, "samples": trained.samples, "data_digest": trained.data_digest}
        _same(directory, "the last step in metrics.jsonl", summary, there)
    state = _state(directory)
    if state:
        rate = RunState.from_json(state).images_per_second
        of_state = {key: state[key] for key in _OF_STATE if key in state}
        of_state |= {"steps": state.get("step"), "images_per_second": round(rate, 2) if rate else None}
        _same(directory, "the last checkpoint", summary, of_state)
    of_recipe = {"name": recipe.run.name, "seed": recipe.run.seed, "steps": _steps(recipe, figures)}
    _same(directory, "recipe.yaml", summary, {key: value for key, value in of_recipe.items() if key in summary})
    written = figures.recipe_sha256 or state.get("recipe_sha256")
    if written not in (None, file_sha256(directory.recipe_file)):
        raise RunDirectoryError(f"{directory.recipe_file}: is not the recipe that the run was trained with; {_FIX}")
    if figures.sha256 is not None and summary != sealed(summary):
        raise RunDirectoryError(f"{directory.summary_file}: was changed since the run wrote it; {_FIX}")


def _same(directory: RunDirectory, where: str, summary: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    for key, value in there.items():
        if summary.get(key) != value:
            raise RunDirectoryError(
                f"{directory.path}: summary.json has {key} = {summary.get(key)}, but {where} has {value}; {_FIX}"
            )


def _steps(recipe: RunRecipe, figures: SummaryFigures) -> int:
    """Return the number of steps of a run with this recipe."""
    steps_per_epoch = (figures.train_images or 0) // recipe.train.global_batch
    return total_steps(steps_per_epoch, recipe.train.epochs, recipe.train.max_steps)


def _state(directory: RunDirectory) -> dict[str, Any]:
    """Return `state.json` of the last checkpoint; empty if there are no checkpoints."""
    name = directory.store.pointed("latest")
    try:
        state = directory.store.state(name) if name else {}
        RunState.from_json(state)
    except (OSError, ValueError, TypeError, AttributeError):
        state = None
    if not isinstance(state, dict):
        raise RunDirectoryError(f"checkpoint {directory.store.root / str(name)}: its state.json is damaged; {_FIX}")
    return state


def _lines(directory: RunDirectory) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each event together with its place."""
    path = directory.metrics_file
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} is missing; the ledger compares the summary with it") from None
    except UnicodeDecodeError:
        raise RunDirectoryError(f"{path}: damaged, it is not UTF-8; {_FIX}") from None
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            event = parse_json(line)
        except ValueError:  # a disk that was full left half a line, and the run went on below it
            continue
        if not isinstance(event, dict) or "event" not in event:
            raise RunDirectoryError(f"{where}: damaged, it is not an event; {_FIX}")
        yield where, event
