"""One run from a recipe to an exit code, whatever its task.

`train` claims the directory, opens the data, builds the trainer and lets it train. If the images grow, by
`schedule.image_sizes`, each size has its own trainer, which resumes from the previous one's checkpoint.
"""

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from karat_scale.checkpoint.restore import bring_near
from karat_scale.checkpoint.store import NearStore, checkpoint_name
from karat_scale.checkpoint.tensor_storage import start_writer
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World, device_name
from karat_scale.engine.engine import slow_precision
from karat_scale.engine.memory import keep_freed_memory, memory_snapshot, one_line_out_of_memory, record_memory
from karat_scale.engine.optimizers import CosineSchedule
from karat_scale.engine.peers import explaining
from karat_scale.engine.reporting.progress import MetricsLog, Reporter, choose_display
from karat_scale.engine.tracking.follow import check_trackers
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import EXIT_STOPPED, RunDirectoryError, UserError
from karat_scale.foundation.machine import gpu_faults, may_have_gpu, this_node
from karat_scale.recipe import RunRecipe
from karat_scale.training.agreement import StoppedError, StopSignals
from karat_scale.training.outcome import Outcome, concluded
from karat_scale.training.run_copy import RunCopy, open_copy
from karat_scale.training.run_directory import RunDirectory, leave_for
from karat_scale.training.task import Task
from karat_scale.training.trainer import Trainer, has_checkpoints

# What the system says of a disk that is broken or full; of a path that is wrong it says something else.
_DISK_FAULTS = {errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


def train(task_type: type[Task], recipe: RunRecipe) -> int:
    """Train the recipe, or resume its run; return this rank's exit code.

    Raises:
        UserError: the recipe does not fit the data, the run directory or the machine.
    """
    falls_back = recipe.run.device == "auto" and not torch.cuda.is_available()
    if falls_back and os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0":
        raise UserError(
            f"run.device = auto: the job has GPUs, but torch on {this_node()} sees none; run karat doctor there, or "
            "set run.device=cpu"
        )
    signals = StopSignals().install()
    with (
        suppress(StoppedError),
        distributed.joined(recipe.run.device, recipe.run.peer_timeout_minutes, signals.check) as world,
    ):
        if world.any(signals.received is not None):
            raise StoppedError
        # Kept memory would take back what recomputation saves.
        if world.device.type == "cpu" and recipe.train.recompute.policy == "none":
            keep_freed_memory()
        try:
            directory, copy, changes = claim_directory(recipe, world, signals)
        except StoppedError:
            if world.is_main:
                print("stopped before training began; run the same command to resume", flush=True)
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
            explaining(),
        ):
            if recipe.checkpoint.local:
                open_near(recipe, directory, world, reporter)
            else:  # what nodes have of earlier starts is not to come back at a later one
                world.on_main(lambda: directory.local_start_file.unlink(missing_ok=True))
            if recipe.checkpoint.asynchronous:
                with suppress(OSError):  # the first save tries again
                    start_writer()
            task = outcome.task = task_type(recipe, world, reporter)
            if changes:
                left = "" if has_checkpoints(directory, world) else ", which left no checkpoint"
                reporter.info(f"the recipe differs from that of the earlier start{left}: {changes}")
            step = world.on_main(directory.store.newest_step)
            trainer = begin_or_go_on(task.at(step), step, directory, signals, outcome)
            trainer.checkpoints.check_room()
            was_finished = outcome.state.step >= trainer.total_steps and not trainer.owes_evaluation
            outcome.was_finished = was_finished
            is_anew = world.on_main(lambda: directory.begins_anew(recipe)) and world.is_main
            if not (was_finished and world.broadcast(directory.recipe_file.is_file())):  # it keeps its own recipe
                world.on_main(lambda: directory.begin(recipe, task.classes))
            reporter.start_trackers(directory.path, recipe.log.trackers, is_anew)
            last_sign, device = directory.last_sign, device_name(world.device)
            reporter.begin(outcome.state.step, is_anew, last_sign, world.size, device)
            if outcome.state.restarts:  # only now, as the end of a refused start is not logged
                state, name = outcome.state, checkpoint_name(outcome.state.step)
                said = f"resumed from {name}: step {state.step}, {state.samples:,} samples seen"
                figures = {"samples": state.samples, "name": name, "restarts": state.restarts}
                reporter.event("resume", state.step, said, {**figures, **({"changed": changes} if changes else {})})
            if copy is not None:
                copy.begin()
            outcome.begun = True
            report_start(trainer, reporter, was_finished, falls_back)
            while trainer.run(trainer.task.stop_step):
                reporter.beat("starting")
                step = outcome.state.step
                trainer.release()
                task = outcome.task = trainer.task.at(step)
                del trainer  # and all that it holds, such as a teacher, before the next one is built
                trainer = begin_or_go_on(task, step, directory, signals, outcome, is_start=False)
            if not was_finished:
                state, name = outcome.state, outcome.state.scores[0]
                best = getattr(state, f"best_{name}")
                unit, what = " %" if name.startswith("top") else "", name.replace("top", "top-")
                scored = "" if best is None else f", best {what} {best:.2f}{unit} at step {state.best_step}"
                reporter.info(f"finished{scored}; next: {task.reader} {shlex.quote(str(directory.path))}")
        return outcome.code
    print("stopped before training began; run the same command to resume", flush=True)
    return EXIT_STOPPED


def begin_or_go_on(
    task: Task, step: int, directory: RunDirectory, signals: StopSignals, outcome: Outcome, is_start: bool = True
) -> Trainer:
    """Build the trainer that resumes from the newest intact checkpoint, probably of `step`, which `task` is for."""
    while True:
        outcome.task = task
        trainer = Trainer(task, directory, signals, step)
        outcome.parameters = trainer.engine.parameters
        outcome.state = trainer.resume(is_start)
        step = outcome.state.step
        task = task.at(step - trainer.owes_evaluation)  # a stop during an evaluation may have been at the last size
        if task is trainer.task:
            return trainer
        trainer.release()  # the newest checkpoint was damaged, or of another run, or of the size before


def claim_directory(recipe: RunRecipe, world: World, signals: StopSignals) -> tuple[RunDirectory, RunCopy | None, str]:
    """Claim the run directory, and `checkpoint.url` if there is one, on rank 0; a refusal is raised on all ranks.

    Returns the directory, on rank 0 the `RunCopy` to the URL, and what the recipe changes on purpose.
    """
    directory = RunDirectory(recipe.run.dir)

    def stop_if_asked() -> None:
        if signals.received is not None:
            raise StoppedError

    def opened() -> str | None:
        try:
            return directory.open(recipe, stop_if_asked)
        except StoppedError:
            return None

    # Before the URL: a start that is refused here takes it from nobody.
    if (changes := world.on_main(opened)) is None:
        raise StoppedError
    copy = open_copy(recipe, world, directory, signals)
    if recipe.checkpoint.url:
        changes = world.on_main(lambda: directory.admit(recipe))  # to what came from there
    return directory, copy, changes


def open_reporter(recipe: RunRecipe, world: World, directory: RunDirectory) -> Reporter:
    """Return the reporter of a run, with metrics on rank 0 and a heartbeat on each rank.

    Raises:
        UserError: a tracker is not installed, or the disk does not take the metrics; on all ranks.
    """
    log: MetricsLog | None = None
    with world.together():
        if world.is_main:
            check_trackers(recipe.log.trackers)
            log = MetricsLog(directory.metrics_file)
    heartbeat = directory.start_heartbeat(world)
    if recipe.log.memory_history:
        record_memory(world.device)
    reporter = Reporter(choose_display(world.is_main, recipe.run.name), log, world.rank, heartbeat)
    for problem in directory.clear(world.size) if world.is_main else ():
        reporter.warn(problem)
    return reporter


def open_near(recipe: RunRecipe, directory: RunDirectory, world: World, reporter: Reporter) -> None:
    """Let each node also keep the newest checkpoints, and fetch the newest one that the nodes have. Collective.

    If the disk of a node is broken or full, this start does without them on all nodes.

    Raises:
        RunDirectoryError: a node cannot write there, or the recipe cannot resume from what it has.
    """
    last = world.on_main(directory.local_start)
    nodes = sum(world.gather(world.local_rank == 0))
    near = NearStore(Path(recipe.checkpoint.local).expanduser(), directory.path, last, nodes)
    fault = ""
    with world.together():
        if world.local_rank == 0:
            try:
                near.open()
                if recipe.resume.mode == "never":
                    near.empty()
            except OSError as error:
                problem = (
                    f"checkpoint.local = {recipe.checkpoint.local}: {near.root} on {this_node()}: {error.strerror}"
                )
                if error.errno not in _DISK_FAULTS:
                    raise RunDirectoryError(f"{problem}; choose another directory") from None
                fault = f"{problem}; this start saves no local checkpoints"
    if faults := [one for one in world.gather(fault) if one]:
        world.on_main(lambda: directory.local_start_file.unlink(missing_ok=True))
        for one in faults:
            reporter.warn(one)
        return
    name, problems = bring_near(directory.store, near, world, reporter)
    near.start = world.on_main(directory.renew_local_start)
    with world.together():
        if world.local_rank == 0:
            near.empty()  # the run's directory has all of it that is whole
    directory.near = near
    for problem in problems:
        reporter.warn(problem)
    if name is not None:
        reporter.info(f"{name} was copied to run.dir from checkpoint.local, which had a newer state")
        world.on_main(lambda: directory.admit(recipe))


def report_start(trainer: Trainer, reporter: Reporter, was_finished: bool, falls_back: bool) -> None:
    """Report the model, its data, its steps and its device, and what is doubtful about them. Collective."""
    world, plan, task, train = trainer.world, trainer.plan, trainer.task, trainer.recipe.train
    pieces = f"{plural(world.size, 'rank')} x {plan.accumulation} x {plan.micro_batch}"
    reporter.info(
        f"{trainer.recipe.run.name}: {trainer.engine.parameters:,} parameters, {task.num_train:,} training images of "
        f"{plural(len(task.classes), 'class')}, {plural(trainer.total_steps, 'step')} of {plan.global_batch} "
        f"({pieces}), learning rate up to {trainer.schedule.peak_lr:.3g}, on {device_name(world.device)}"
    )
    if world.device.type == "cuda":
        for fault in chain(*world.gather((gpu_faults() if world.local_rank == 0 else None) or [])):
            if world.is_main:
                reporter.warn(fault)
    if was_finished:
        reporter.info(f"nothing is left to do: {how_to_extend(trainer)}")
        return
    if slow := slow_precision(train.precision, world.device):
        reporter.warn(slow)
    elif falls_back and may_have_gpu():
        reporter.warn("torch sees no GPU, though there is a driver, so this trains on the CPU; see karat doctor")
    if world.is_main:
        for doubt in doubts(trainer):
            reporter.warn(doubt)


def how_to_extend(trainer: Trainer) -> str:
    """Return one line on a finished run: which keys set its length, and how to train it longer."""
    train, step = trainer.recipe.train, trainer.state.step
    of_epochs = train.epochs * trainer.plan.steps_per_epoch
    is_by_steps = train.max_steps is not None and train.max_steps < of_epochs
    if step > trainer.total_steps:  # the run was longer than this start asks for
        of_recipe = f"the {trainer.total_steps:,} of train.epochs = {train.epochs}"
        if is_by_steps:
            of_recipe = f"train.max_steps = {train.max_steps:,}"
        return f"the run has taken {step:,} steps, more than {of_recipe}; raise it to go on"
    if is_by_steps:
        return f"the run has taken its train.max_steps = {train.max_steps:,} steps; raise it to go on"
    more = f" and {leave_for(trainer.recipe, 'train.epochs')}" if train.max_steps is not None else ""
    return f"the run has trained its train.epochs = {train.epochs}; for more, raise it{more}"


def doubts(trainer: Trainer) -> Iterator[str]:
    """Yield a line for each setting that is allowed, but that hardly anybody means."""
    schedule, train = trainer.schedule, trainer.recipe.train
    if (sizes := getattr(trainer.recipe.schedule, "image_sizes", ())) and train.max_steps is not None:
        begin = sizes[-1][0] * trainer.plan.steps_per_epoch
        if train.max_steps <= begin:
            yield (
                f"train.max_steps = {train.max_steps} ends training before the images have {sizes[-1][1]} px, from "
                f"step {begin} on (schedule.image_sizes)"
            )
    if isinstance(schedule, CosineSchedule) and schedule.min_lr > schedule.peak_lr:
        yield (
            f"schedule.min_lr = {schedule.min_lr:g} is above the peak learning rate, {schedule.peak_lr:.3g}, so the "
            "rate rises to the end; set schedule.min_lr=0, or optim.lr_batch=null, which uses optim.lr as it is"
        )
    if trainer.engine.statistics and train.ema_decay and train.eval_weights != "raw":
        yield (
            f"train.ema_decay = {train.ema_decay:g}: the averaged weights are evaluated with the BatchNorm statistics "
            "of the raw ones; set train.eval_weights=raw or train.ema_decay=0"
        )
