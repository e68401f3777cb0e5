"""One training run from a recipe to an exit code: build the parts, run the loop, say how it ended."""

from dataclasses import dataclass, field
from typing import Any

import torch

from karat_scale.cluster.heartbeat import Heartbeat
from karat_scale.errors import EXIT_STOPPED, UserError
from karat_scale.recipe import Recipe
from karat_scale.train import distributed
from karat_scale.train.distributed import World
from karat_scale.train.loop import Loop
from karat_scale.train.metrics import MetricsLog
from karat_scale.train.out_of_memory import explain_out_of_memory
from karat_scale.train.parts import Parts, build_parts
from karat_scale.train.progress import Reporter, choose_display
from karat_scale.train.run_directory import RunDirectory
from karat_scale.train.signals import StoppedError, StopSignals
from karat_scale.train.state import TrainState


def train(recipe: Recipe) -> int:
    """Train, or go on training, what the recipe says; returns this rank's exit code.

    Raises:
        UserError: the recipe does not fit the data, the run directory or the machine.
    """
    signals = StopSignals().install()
    world = distributed.start(recipe.run.device)
    try:
        directory, changes = _open_directory(recipe, world)
        return _train(recipe, world, directory, changes, signals)
    finally:
        distributed.stop()


def _open_directory(recipe: Recipe, world: World) -> tuple[RunDirectory, str]:
    """Rank 0 claims the run directory; all ranks hear of its refusal, or of what the recipe changes on purpose."""
    directory = RunDirectory(recipe.run.dir)
    answer: UserError | str = ""
    if world.is_main:
        try:
            answer = directory.open(recipe)
        except UserError as error:
            answer = error
    answer = world.broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    return directory, answer


def _train(recipe: Recipe, world: World, directory: RunDirectory, changes: str, signals: StopSignals) -> int:
    reporter = _open_reporter(recipe, world, directory)
    outcome = _Outcome(recipe, world)
    parts: Parts | None = None
    try:
        with explain_out_of_memory(recipe, world.size):
            parts = build_parts(recipe, world, directory, signals, reporter)
            outcome.parameters = parts.engine.parameters
            if changes:
                reporter.info(f"the recipe has changed on purpose: {changes}")
            state = parts.checkpoints.load(_branch_point(recipe, directory)) or outcome.state
            outcome.state, outcome.begun = state, True
            if world.is_main:
                directory.begin(recipe, parts.backend.classes)
            loop = Loop(parts, state)
            reporter.info(_headline(parts, outcome.parameters, loop.total_steps))
            loop.run()
        outcome.code, outcome.reason = 0, "finished"
    except StoppedError as stopped:
        name = signals.received.name if signals.received else "a signal on another rank"
        outcome.code = EXIT_STOPPED if stopped.saved else 1
        outcome.reason = f"stopped by {name}"
        reporter.info(f"{outcome.reason} at step {outcome.state.step}; run the same command to go on")
    except UserError as error:
        outcome.code, outcome.reason = 2, str(error)
        raise
    except BaseException as error:
        outcome.reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        reporter.end(outcome.state, outcome.code, outcome.reason)
        reporter.close()
        if parts is not None:
            parts.backend.close()
        if world.is_main:
            directory.write_summary(outcome.summary(directory.summary()))
    return outcome.code


@dataclass
class _Outcome:
    """How a run ended, for `summary.json`; an unforeseen exception until something better is known."""

    recipe: Recipe
    world: World
    state: TrainState = field(default_factory=TrainState)
    begun: bool = False
    parameters: int = 0
    code: int = 1
    reason: str = "error"

    def summary(self, previous: dict[str, Any] | None) -> dict[str, Any]:
        """The figures of the whole run, over all its restarts."""
        if previous is not None and not self.begun:  # this start failed before it knew the run's state
            return {**previous, "exit": self.code, "reason": self.reason}
        rate = self.state.images_per_second
        return {
            "name": self.recipe.run.name,
            "exit": self.code,
            "reason": self.reason,
            "steps": self.state.step,
            "samples": self.state.samples,
            "best_top1": self.state.best_top1,
            "best_top5": self.state.best_top5,
            "best_step": self.state.best_step,
            "last_top1": self.state.last_top1,
            "last_top5": self.state.last_top5,
            "images_per_second": round(rate, 2) if rate else None,
            "seconds_to_first_step": self.state.seconds_to_first_step,
            "peak_memory_mb": self.state.peak_memory_mb,
            "parameters": self.parameters,
            "data_digest": self.state.data_digest,
            "bad_samples": self.state.bad_samples,
            "skipped_steps": self.state.skipped_steps,
            "restarts": self.state.restarts,
            "world_size": self.world.size,
            "device": _device_name(self.world),
        }


def _open_reporter(recipe: Recipe, world: World, directory: RunDirectory) -> Reporter:
    log = None
    if world.is_main:
        log = MetricsLog(directory.metrics_file, directory.tensorboard if recipe.log.tensorboard else None)
    heartbeat = Heartbeat(directory.path, world.rank, _device_name(world)).start()
    return Reporter(choose_display(world.is_main, recipe.run.name), log, world.rank, heartbeat)


def _branch_point(recipe: Recipe, directory: RunDirectory) -> str:
    """`resume.from` counts at a run's first start only: after that the run has checkpoints of its own."""
    return "" if directory.store.names() else recipe.resume.from_


def _headline(parts: Parts, parameters: int, total_steps: int) -> str:
    world, plan = parts.world, parts.plan
    pieces = f"{world.size} x {plan.accumulation} x {plan.micro_batch}"
    return (
        f"{parts.recipe.run.name}: {parameters:,} parameters, {parts.backend.num_train:,} training images, "
        f"{total_steps:,} steps of {plan.global_batch} ({pieces}) on {_device_name(world)}"
    )


def _device_name(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"CPU, {torch.get_num_threads()} threads"
