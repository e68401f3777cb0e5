"""`karat detect`: one run from a recipe to an exit code, and the evaluation of a run's checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from karat_scale.engine import distributed
from karat_scale.engine.out_of_memory import one_line_out_of_memory
from karat_scale.files import write_atomically
from karat_scale.models import parameter_count
from karat_scale.recipe.loading import load_recipe
from karat_scale.reporting.progress import choose_display
from karat_scale.run.outcome import Outcome, concluded
from karat_scale.run.run_directory import RunDirectory
from karat_scale.run.same_data import keep_data
from karat_scale.run.signals import StopSignals
from karat_scale.run.start import branch_point, device_name, open_directory, open_reporter
from karat_scale.tasks.detection.backbone import build_vit
from karat_scale.tasks.detection.checkpoint import load_weights, read_training
from karat_scale.tasks.detection.coco import require_pycocotools
from karat_scale.tasks.detection.evaluate import DetectionScores, evaluate
from karat_scale.tasks.detection.loop import DetectionLoop
from karat_scale.tasks.detection.mask_rcnn import build_detector
from karat_scale.tasks.detection.parts import DetectionParts, build_parts, open_split
from karat_scale.tasks.detection.recipe import DetectionRecipe
from karat_scale.tasks.detection.state import DetectionState

_LESS_MEMORY = "lower train.micro_batch, detector.rois or detector.proposals"


def train_detector(recipe: DetectionRecipe) -> int:
    """Train, or resume training, from the recipe; returns this rank's exit code.

    Raises:
        UserError: the recipe does not fit the data, the run directory or the machine.
    """
    require_pycocotools()
    signals = StopSignals().install()
    world = distributed.start(recipe.run.device)
    try:
        directory, changes = open_directory(recipe, world)
        reporter = open_reporter(recipe, world, directory, recipe.log.trackers)
        outcome = _Outcome(recipe.run.name, world, DetectionState())
        with concluded(outcome, directory, signals, reporter), one_line_out_of_memory(lambda: _LESS_MEMORY):
            parts = build_parts(recipe, world, directory, signals, reporter)
            outcome.parameters = parameter_count(parts.model)
            if changes:
                reporter.info(f"the recipe differs from that of the earlier start: {changes}")
            branch = branch_point(recipe, directory)
            state = parts.checkpoints.load(branch) or outcome.state
            other = keep_data(state, len(parts.train), parts.train.classes, recipe, is_branch=bool(branch))
            if other:
                reporter.info(f"continuing with other data: {other}")
            outcome.state, outcome.begun = state, True
            if world.is_main:
                directory.begin(recipe, parts.train.classes)
            loop = DetectionLoop(parts, state)
            reporter.info(_headline(parts, outcome.parameters, loop.total_steps))
            loop.run()
        return outcome.code
    finally:
        distributed.stop()


def evaluate_detector(run_dir: str, overrides: Sequence[str], checkpoint: str, json_file: str | None) -> int:
    """Evaluate a checkpoint (best, latest, or a name) of a run and print COCO's averages; returns the exit code.

    Raises:
        UserError: the run or checkpoint is missing or damaged, or the data does not fit.
    """
    require_pycocotools()
    directory = RunDirectory(run_dir)
    directory.recipe(DetectionRecipe)
    recipe = load_recipe(directory.recipe_file, overrides, DetectionRecipe)
    world = distributed.start(recipe.run.device)
    try:
        name = directory.store.find_intact(checkpoint)
        path = directory.store.root / name
        model = build_detector(build_vit(recipe), recipe)
        load_weights(model, read_training(path, directory.store.state(name)), path)
        display = choose_display(world.is_main, "evaluate")
        try:
            split = open_split(recipe, "val")
            scores = evaluate(model.to(world.device).eval(), split, recipe, world, display.evaluate)
        finally:
            display.close()
        if world.is_main:
            _report(directory.path, name, scores, json_file)
    finally:
        distributed.stop()
    return 0


class _Outcome(Outcome[DetectionState]):
    def scores(self) -> dict[str, Any]:
        """COCO's averages, in percent."""
        state = self.state
        return {
            "best_box_ap": state.best_box_ap,
            "best_mask_ap": state.best_mask_ap,
            "best_step": state.best_step,
            "last_box_ap": state.last_box_ap,
            "last_mask_ap": state.last_mask_ap,
        }


def _headline(parts: DetectionParts, parameters: int, total_steps: int) -> str:
    world, plan = parts.world, parts.plan
    pieces = f"{world.size} x {plan.accumulation} x {plan.micro_batch}"
    return (
        f"{parts.recipe.run.name}: {parameters:,} parameters, {len(parts.train):,} training images with objects of "
        f"{len(parts.train.classes)} categories, {total_steps:,} steps of {plan.global_batch} ({pieces}) on "
        f"{device_name(world)}"
    )


def _report(run: Path, name: str, scores: DetectionScores, json_file: str | None) -> None:
    print(f"{run} {name}: {scores}")
    if json_file:
        figures = {"run": str(run), "checkpoint": name, **scores.to_json()}
        write_atomically(Path(json_file), json.dumps(figures, indent=2) + "\n")
