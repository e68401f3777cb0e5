"""One run from a recipe to an exit code, whatever its task.

`train` claims the directory, builds the parts, resumes and trains. `build_parts` seeds, builds the model, gives it its
first weights, compiles it and makes its engine and checkpoints.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.checkpoint.store import checkpoint_name
from karat_scale.data.plan import total_steps
from karat_scale.engine import distributed
from karat_scale.engine.devices import device_name
from karat_scale.engine.distributed import World
from karat_scale.engine.ema import Ema
from karat_scale.engine.engine import Engine, slow_precision
from karat_scale.engine.memory import (
    apply_recompute,
    keep_freed_memory,
    memory_snapshot,
    one_line_out_of_memory,
    record_memory,
)
from karat_scale.engine.reporting.interval import HeadHistograms, StepProfiler
from karat_scale.engine.reporting.progress import MetricsLog, Reporter, choose_display
from karat_scale.engine.run_state import RunState
from karat_scale.engine.tracking.follow import check_trackers
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import EXIT_STOPPED
from karat_scale.models.layers import freeze
from karat_scale.models.operators import check_implementation, describe_implementation
from karat_scale.recipe import RunRecipe
from karat_scale.training.from_url import open_copy
from karat_scale.training.heartbeats import start_heartbeat
from karat_scale.training.initial_weights import initialise
from karat_scale.training.loop import Loop, Parts
from karat_scale.training.outcome import Incidents, Outcome, concluded
from karat_scale.training.run_copy import RunCopy
from karat_scale.training.run_directory import RunDirectory, refuse_another_model
from karat_scale.training.signals import StoppedError, StopSignals
from karat_scale.training.task import Task


def train(task_type: type[Task], recipe: RunRecipe) -> int:
    """Train the recipe, or resume its run; return this rank's exit code.

    Raises:
        UserError: the recipe does not fit the data, the run directory or the machine.
    """
    signals = StopSignals().install()
    with distributed.joined(recipe.run.device, recipe.run.peer_timeout_minutes) as world:
        if world.device.type == "cpu":
            keep_freed_memory()
        try:
            directory, copy, changes = claim_directory(recipe, world, signals)
        except StoppedError:
            if world.is_main:
                print("stopped before the checkpoint was fetched; run the same command to resume", flush=True)
            return EXIT_STOPPED
        reporter = open_reporter(recipe, world, directory)
        if copy is not None:
            reporter.hear(copy.messages)
        outcome = Outcome(recipe, world, task_type.state_type())
        fix = partial(task_type.less_memory, recipe, world.size)
        snapshot = partial(memory_snapshot, directory.path / "diagnostics", world)
        # The innermost block is the first to know why a collective broke.
        with (
            concluded(outcome, directory, signals, reporter, copy),
            one_line_out_of_memory(fix, snapshot),
            world.explaining(),
        ):
            task = outcome.task = task_type(recipe, world, reporter)
            if changes:
                left = "" if directory.store.names() else ", which left no checkpoint"
                reporter.info(f"the recipe differs from that of the earlier start{left}: {changes}")
            first = world.broadcast(directory.store.newest_step())
            phase = begin_phase(task, directory, signals, outcome, first)
            parts = phase.parts
            parts.checkpoints.check_room()
            outcome.begun = True
            is_anew = world.is_main and directory.begins_anew(recipe)
            world.on_main(lambda: directory.begin(recipe, task.classes))
            reporter.start_trackers(directory.path, recipe.log.trackers, is_anew)
            if outcome.state.restarts:  # only now, as the end of a start that was refused is not told
                reporter.resumed(outcome.state, checkpoint_name(outcome.state.step))
            if copy is not None:
                copy.begin()
            reporter.info(headline(parts))
            if outcome.state.step >= parts.total_steps:
                reporter.info(f"nothing is left to do: {how_to_extend(parts)}")
            elif slow := slow_precision(recipe.train.precision, world.device):
                reporter.warn(slow)
            while Loop(parts, outcome.state).run(phase.stop_step):
                del parts
                phase = next_phase(phase, directory, signals, outcome)
                parts = phase.parts
        return outcome.code


@dataclass
class Phase:
    """What trains up to `stop_step`, where another model follows; None for the end of training."""

    parts: Parts
    stop_step: int | None


def begin_phase(
    task: Task, directory: RunDirectory, signals: StopSignals, outcome: Outcome, step: int, is_start: bool = True
) -> Phase:
    """Build the phase that trains from the newest intact checkpoint on; `step` is where that probably stands."""
    while True:
        chosen, stop = task.phase(step)
        outcome.task = chosen
        parts = build_parts(chosen, directory, signals)
        outcome.parameters = parts.engine.parameters
        outcome.state = resume(parts, directory, is_start)
        task, stop = chosen.phase(outcome.state.step)
        if task is chosen:
            return Phase(parts, stop)
        outcome.task, step = task, outcome.state.step  # the newest checkpoint was damaged, or it is of another run
        parts.engine.release()


def next_phase(phase: Phase, directory: RunDirectory, signals: StopSignals, outcome: Outcome) -> Phase:
    """Let go of a phase's engine, and build the next one from the checkpoint at its end."""
    task = phase.parts.task
    phase.parts.engine.release()
    del phase.parts
    return begin_phase(task, directory, signals, outcome, outcome.state.step, is_start=False)


def build_parts(task: Task, directory: RunDirectory, signals: StopSignals) -> Parts:
    """Build everything a loop needs, in the order in which mistakes show soonest: plan, model, engine.

    Raises:
        UserError: the recipe does not fit the data or the world.
    """
    recipe, world, reporter = task.recipe, task.world, task.reporter
    plan = task.plan()
    steps = total_steps(plan.steps_per_epoch, recipe.train.epochs, recipe.train.max_steps)
    schedule = task.schedule(plan.steps_per_epoch)
    task.prepare(directory)
    torch.manual_seed(recipe.run.seed)  # the same initial weights on every rank and at every world size
    backbone = task.build_backbone(directory)
    check_implementation(backbone, world.device)
    if chosen := describe_implementation(backbone, world.device):
        reporter.info(chosen)
    if recipe.init_from and not directory.store.names():
        reporter.info(initialise(backbone, recipe, world, task.take_weights))
    model = task.build_model(backbone)
    if recipe.train.freeze:
        reporter.info(freeze(model, recipe.train.freeze))
    torch.manual_seed(recipe.run.seed + 1 + world.rank)  # but random numbers of its own on each rank in training
    if recomputed := apply_recompute(backbone, recipe):
        reporter.info(recomputed)
    engine = Engine(model, recipe, world, plan.micro_batch, task.groups(model))
    if recipe.train.compile:
        engine.compile(recipe.train.compile)
        reporter.info(f"the first step compiles the model (train.compile = {recipe.train.compile})")
    ema = Ema(engine.deepspeed, recipe.train) if recipe.train.ema_decay else None
    histograms = HeadHistograms(engine, recipe.log, reporter)
    return Parts(
        recipe=recipe,
        world=world,
        task=task,
        plan=plan,
        total_steps=steps,
        engine=engine,
        ema=ema,
        schedule=schedule,
        checkpoints=Checkpoints(directory.store, engine, ema, world, recipe, reporter, task.kind, task.state_type),
        after_step=[histograms, *task.after_step(engine, directory, steps)],
        profiler=StepProfiler(recipe.log.profile_steps, directory.profile, world, reporter),
        reporter=reporter,
        signals=signals,
        incidents=Incidents(directory.path / "incidents", directory.store, plan),
    )


def resume(parts: Parts, directory: RunDirectory, is_start: bool = True) -> RunState:
    """The state of the newest intact checkpoint, loaded into the engine; that of a new run if there is none.

    `resume.from` counts at a run's first start only: after that the run has checkpoints of its own.

    Raises:
        RunDirectoryError: no checkpoint is intact, or it is of another model, or of other data.
    """
    recipe, task = parts.recipe, parts.task
    branch = "" if directory.store.names() else recipe.resume.from_
    if branch:
        refuse_another_model(Path(branch).expanduser(), recipe)
    fresh = partial(task.build_fresh, directory)
    state: RunState = parts.checkpoints.load(branch, fresh, is_start) or task.begin()
    task.check_resumed(state)
    other = directory.keep_data(state, task.num_train, task.classes, recipe, is_branch=bool(branch))
    if other:
        parts.reporter.info(f"it continues with other data: {other}")
    return state


def claim_directory(recipe: RunRecipe, world: World, signals: StopSignals) -> tuple[RunDirectory, RunCopy | None, str]:
    """Rank 0 claims the run directory, and `checkpoint.url` if there is one; all ranks hear of a refusal.

    Returns the directory, on rank 0 what copies it to the URL, and what the recipe changes on purpose.
    """
    directory, changes = RunDirectory(recipe.run.dir), ""
    with world.together():  # before the URL: a start that is refused here takes it from nobody
        if world.is_main:
            changes = directory.open(recipe)
    copy = open_copy(recipe, world, directory, signals)
    with world.together():
        if copy is not None:
            changes = directory.admit(recipe)  # to what came from there
    return directory, copy, world.broadcast(changes)


def open_reporter(recipe: RunRecipe, world: World, directory: RunDirectory) -> Reporter:
    """The reporter of a run, with metrics on rank 0 and a heartbeat on each.

    Raises:
        UserError: on all ranks, where a tracker is not installed or the disk does not take the metrics.
    """
    log: MetricsLog | None = None
    with world.together():
        if world.is_main:
            check_trackers(recipe.log.trackers)
            log = MetricsLog(directory.metrics_file)
    heartbeat = start_heartbeat(directory.path, world)
    if recipe.log.memory_history:
        record_memory(world.device)
    reporter = Reporter(choose_display(world.is_main, recipe.run.name), log, world.rank, heartbeat)
    for problem in directory.clear(world.size) if world.is_main else ():
        reporter.warn(problem)
    return reporter


def how_to_extend(parts: Parts) -> str:
    """One line on a finished run: which keys say its length, and what trains it longer."""
    train = parts.recipe.train
    if train.max_steps is not None and parts.total_steps == train.max_steps:
        return f"the run has taken its train.max_steps = {train.max_steps:,} steps; raise it to go on"
    more = " and add 'resume.allow=[train.epochs]'" if train.max_steps is not None else ""
    return f"the run has trained its train.epochs = {train.epochs}; for more, raise it{more}"


def headline(parts: Parts) -> str:
    """One line on what is trained, on how much data and on what."""
    world, plan, task = parts.world, parts.plan, parts.task
    pieces = f"{world.size} x {plan.accumulation} x {plan.micro_batch}"
    return (
        f"{parts.recipe.run.name}: {parts.engine.parameters:,} parameters, {task.num_train:,} training images of "
        f"{len(task.classes):,} classes, {plural(parts.total_steps, 'step')} of {plan.global_batch} ({pieces}) on "
        f"{device_name(world.device)}"
    )
