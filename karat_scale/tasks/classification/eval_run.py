"""`karat eval`: a checkpoint of a run on its validation split, on any number of processes."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from karat_scale.checkpoint.weights import load_weights, wants_ema
from karat_scale.data.augmentation.normalize import Normalize
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.batch import BadSample
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World
from karat_scale.engine.precision import PRECISIONS, allow_tf32
from karat_scale.files import write_atomically
from karat_scale.models.init_from import take_weights
from karat_scale.models.operators import check_implementation, describe_implementation
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.reporting.progress import Reporter, choose_display
from karat_scale.run.run_directory import RunDirectory
from karat_scale.tasks.classification.evaluate import EvalResult, evaluate
from karat_scale.tasks.classification.teacher import build_model


def evaluate_run(run_dir: str, overrides: Sequence[str], checkpoint: str, weights: str, json_file: str | None) -> int:
    """Evaluate and print; returns the exit code.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or data that does not fit.
    """
    directory = RunDirectory(run_dir)
    trained = directory.recipe()
    recipe = load_recipe(directory.recipe_file, overrides)
    world = distributed.start(recipe.run.device)
    try:
        name = directory.store.find_intact(checkpoint)
        saved = directory.store.state(name)
        use_ema = wants_ema(weights, recipe, saved)
        model = _model(recipe, trained.model.image_size, directory, name, use_ema)
        check_implementation(model, world.device)
        if world.is_main and (chosen := describe_implementation(model, world.device)):
            print(chosen)
        result = _evaluate(recipe, world, model)
        if world.is_main:
            _report(directory.path, name, "ema" if use_ema else "raw", result, json_file)
    finally:
        distributed.stop()
    return 0


def _model(recipe: Recipe, image_size: int, directory: RunDirectory, name: str, use_ema: bool) -> nn.Module:
    """A checkpoint's model; interpolated where the recipe has another image size than it was trained at."""
    model = build_model(recipe.changed(model__image_size=image_size), directory.path)
    load_weights(model, directory.store.root / name, directory.store.state(name), use_ema)
    if recipe.model.image_size == image_size:
        return model
    resized = build_model(recipe, directory.path)
    take_weights(resized, model.state_dict(), new_head=False)
    return resized


def _evaluate(recipe: Recipe, world: World, model: nn.Module) -> EvalResult:
    slow = recipe.train.precision == "fp16" and world.device.type == "cpu"
    precision = PRECISIONS["fp32" if slow else recipe.train.precision]
    allow_tf32(recipe.train.tf32)
    model.to(world.device, precision.weights).eval()
    backend = open_backend(ImageSpec.of(recipe))
    reporter = Reporter(choose_display(world.is_main, "evaluate"), None, world.rank)

    def on_batch(done: int, total: int, bad: tuple[BadSample, ...]) -> None:
        for sample in bad:
            reporter.bad_sample(sample)
        reporter.display.evaluate(done, total)

    def forward(images: torch.Tensor) -> torch.Tensor:
        with precision.autocast(world.device.type):
            logits: torch.Tensor = model(images.to(precision.weights))
        return logits

    try:
        return evaluate(
            forward,
            backend,
            Normalize(recipe.augment.mean, recipe.augment.std),
            recipe.train.eval_batch,
            world,
            on_batch,
        )
    finally:
        reporter.close()
        backend.close()


def _report(run: Path, name: str, weights: str, result: EvalResult, json_file: str | None) -> None:
    print(
        f"{run} {name} ({weights} weights): top-1 {result.top1:.2f} % top-5 {result.top5:.2f} % "
        f"loss {result.loss:.4f} on {result.images:,} images, {result.bad} unreadable"
    )
    if json_file:
        figures = {"run": str(run), "checkpoint": name, "weights": weights, **result.to_json()}
        write_atomically(Path(json_file), json.dumps(figures, indent=2) + "\n")
