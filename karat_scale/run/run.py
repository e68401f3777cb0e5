"""One training run from a recipe to an exit code: build the parts, run the loop, say how it ended."""

from dataclasses import dataclass, field
from typing import Any

from karat_scale.data.digest import classes_digest
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World
from karat_scale.engine.out_of_memory import explain_out_of_memory
from karat_scale.engine.run_state import TrainState
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import dump_recipe
from karat_scale.recipe.portable import text_digest
from karat_scale.run.lineage import Lineage, lineage, run_behind
from karat_scale.run.loop import Loop
from karat_scale.run.outcome import Outcome, concluded
from karat_scale.run.parts import Parts, build_parts
from karat_scale.run.run_directory import RunDirectory
from karat_scale.run.same_data import keep_data
from karat_scale.run.signals import StopSignals
from karat_scale.run.start import branch_point, device_name, open_directory, open_reporter


def train(recipe: Recipe) -> int:
    """Train the recipe, or resume its run; return this rank's exit code.

    Raises:
        UserError: the recipe does not fit the data, the run directory or the machine.
    """
    signals = StopSignals().install()
    world = distributed.start(recipe.run.device)
    try:
        directory, changes = open_directory(recipe, world)
        return _train(recipe, world, directory, changes, signals)
    finally:
        distributed.stop()


def _train(recipe: Recipe, world: World, directory: RunDirectory, changes: str, signals: StopSignals) -> int:
    reporter = open_reporter(recipe, world, directory, recipe.log.trackers)
    outcome = _Outcome(recipe.run.name, world, TrainState(), recipe=recipe)
    parts: Parts | None = None
    try:
        with concluded(outcome, directory, signals, reporter), explain_out_of_memory(recipe, world.size):
            parts = build_parts(recipe, world, directory, signals, reporter)
            outcome.parameters, outcome.train_images = parts.engine.parameters, parts.backend.num_train
            if changes:
                reporter.info(f"the recipe differs from that of the earlier start: {changes}")
            branch = branch_point(recipe, directory)
            state = parts.checkpoints.load(branch)
            if state is None:
                state = TrainState(begun_with=run_behind(recipe.init_from))
            other = keep_data(state, parts.backend.num_train, parts.backend.classes, recipe, is_branch=bool(branch))
            if other:
                reporter.info(f"it continues with other data: {other}")
            outcome.classes = parts.backend.classes
            outcome.lineage = lineage(recipe, directory.path, state)
            outcome.state, outcome.begun = state, True
            if world.is_main:
                directory.begin(recipe, parts.backend.classes)
            loop = Loop(parts, state)
            reporter.info(_headline(parts, outcome.parameters, loop.total_steps))
            loop.run()
    finally:
        if parts is not None:
            parts.backend.close()
    return outcome.code


@dataclass
class _Outcome(Outcome[TrainState]):
    recipe: Recipe = field(kw_only=True)
    train_images: int = 0
    classes: tuple[str, ...] = ()
    lineage: Lineage = field(default_factory=dict)

    def scores(self) -> dict[str, Any]:
        """Accuracies, in percent."""
        return {
            "best_top1": self.state.best_top1,
            "best_top5": self.state.best_top5,
            "best_step": self.state.best_step,
            "last_top1": self.state.last_top1,
            "last_top5": self.state.last_top5,
        }

    def counts(self) -> dict[str, Any]:
        """Of samples, and what the run is of."""
        return {
            "train_images": self.train_images,
            "classes": len(self.classes),
            "classes_sha256": classes_digest(self.classes),
            "lineage": self.lineage,
            "recipe_sha256": text_digest(dump_recipe(self.recipe)),
            "seed": self.recipe.run.seed,
            "data_digest": self.state.data_digest,
            "bad_samples": self.state.bad_samples,
        }


def _headline(parts: Parts, parameters: int, total_steps: int) -> str:
    world, plan = parts.world, parts.plan
    pieces = f"{world.size} x {plan.accumulation} x {plan.micro_batch}"
    return (
        f"{parts.recipe.run.name}: {parameters:,} parameters, {parts.backend.num_train:,} training images, "
        f"{total_steps:,} steps of {plan.global_batch} ({pieces}) on {device_name(world)}"
    )
