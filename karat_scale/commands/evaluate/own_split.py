"""A checkpoint of a run on its validation split, whatever its task, on any number of processes."""

import json
from collections.abc import Sequence
from pathlib import Path

from karat_scale.checkpoint.weights import wants_ema
from karat_scale.engine import distributed
from karat_scale.engine.precision import forward_for_evaluation
from karat_scale.engine.reporting.progress import Reporter, choose_display
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import write_atomically
from karat_scale.foundation.trust import require_trust
from karat_scale.models.operators import check_implementation, describe_implementation
from karat_scale.recipe.loading import flatten
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.task import Scores, Task


def evaluate_run(
    task_type: type[Task], run_dir: str, overrides: Sequence[str], checkpoint: str, weights: str, json_file: str | None
) -> int:
    """Evaluate a checkpoint (best, latest, or a name) and print its scores; returns the exit code.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or data that does not fit.
    """
    directory = RunDirectory(run_dir)
    trained = directory.recipe(task_type.recipe_type)
    recipe = directory.recipe(task_type.recipe_type, overrides)
    require_trust(recipe.attention.basis, directory.recipe_file)
    with distributed.joined(recipe.run.device, recipe.run.peer_timeout_minutes) as world:
        reporter = Reporter(choose_display(world.is_main, "evaluate"), None, world.rank)
        task: Task | None = None
        try:
            with world.together():
                name = directory.store.find_intact(checkpoint) if world.is_main else ""
            name = world.broadcast(name)
            use_ema = wants_ema(weights, recipe, directory.store.state(name))
            task = task_type(recipe, world, reporter)
            _check_classes(directory, task)
            model = task.trained_model(trained, directory, name, use_ema)
            check_implementation(model, world.device)
            if chosen := describe_implementation(model, world.device):
                reporter.info(chosen)
            forward = forward_for_evaluation(model, recipe.train, world.device)
            scores = task.evaluate(forward, reporter.display.evaluate)
        finally:
            if task is not None:
                task.close()
            reporter.close()
    if world.is_main:
        _report(directory, name, "ema" if use_ema else "raw", scores, json_file)
    return 0


def _check_classes(run: RunDirectory, task: Task) -> None:
    """Refuse data whose labels number other classes than the run's, if it recorded those. Raises DataError."""
    classes = run.classes()
    if classes and classes != task.classes:
        by_name = f"use `karat eval {run.path} --on DIR`, which matches classes by name"
        raise DataError(
            f"data.path = {flatten(task.recipe)['data.path']} has other classes than the run; "
            + (by_name if task.kind == "classification" else "put data.path right")
        )


def _report(run: RunDirectory, name: str, weights: str, scores: Scores, json_file: str | None) -> None:
    print(f"{run.path} {name}{run.store.beside(name)} ({weights} weights): {scores}")
    if json_file:
        figures = {"run": str(run.path), "checkpoint": name, "weights": weights, **scores.to_json()}
        write_atomically(Path(json_file), json.dumps(figures, indent=2) + "\n")
