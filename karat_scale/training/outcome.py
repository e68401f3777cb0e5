"""Records of a run's end and failures: exit code, last event, `summary.json`, and the steps that went wrong.

RUN/incidents/step-00001234.json is such a step, so that `karat replay` can repeat it. It says which samples the step
had, on which ranks, and from which checkpoint training reaches it. That checkpoint is kept.
"""

import json
import math
import shlex
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.data.batch import classes_digest
from karat_scale.data.plan import TrainPlan
from karat_scale.engine.distributed import ALONE, World, device_name
from karat_scale.engine.reporting.goodput import WallTime, wall_time
from karat_scale.engine.reporting.progress import Reporter, read_events
from karat_scale.engine.run_state import RunState
from karat_scale.engine.tracking.follow import END_SECONDS, STOP_SECONDS
from karat_scale.foundation.errors import (
    EXIT_LOST_PEER,
    EXIT_STOPPED,
    PeerError,
    RunDirectoryError,
    UserError,
    of_the_machine,
)
from karat_scale.foundation.files import replace_file, sealed
from karat_scale.foundation.machine import library_versions, processor_name
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.loading import dump_recipe, text_digest
from karat_scale.training.agreement import StoppedError, StopSignals
from karat_scale.training.run_copy import RunCopy, finish_copy
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.task import Task


@dataclass
class Outcome:
    """The end of a run, for `summary.json`; an unforeseen exception until something better is known."""

    recipe: RunRecipe
    world: World
    state: RunState
    task: Task | None = None
    begun: bool = False
    was_finished: bool = False
    parameters: int = 0
    code: int = 1
    reason: str = "error"

    def summary(self, previous: dict[str, Any] | None, spent: WallTime) -> dict[str, Any]:
        """The figures of the whole run, over all its restarts."""
        if previous is not None and not self.begun:  # this start failed before it knew the run's state
            return {**previous, "exit": self.code, "reason": self.reason}
        rate, task = self.state.images_per_second, self.task
        data: dict[str, Any] = {}
        scores = [f"{which}_{name}" for which in ("best", "last") for name in self.state.scores]
        if task is not None and self.parameters:  # else its data may be why this start failed
            classes = {"classes": len(task.classes), "classes_sha256": classes_digest(task.classes)}
            data = {"train_images": task.num_train, **classes, **task.facts(self.state)}
        return {
            "name": self.recipe.run.name,
            "exit": self.code,
            "reason": self.reason,
            "steps": self.state.step,
            "samples": self.state.samples,
            **{name: getattr(self.state, name) for name in [*scores, "best_step"]},
            "wall_time": spent.to_json(),
            "images_per_second": round(rate, 2) if rate else None,
            "seconds_to_first_step": self.state.seconds_to_first_step,
            "peak_memory_mb": self.state.peak_memory_mb,
            "parameters": self.parameters,
            **data,
            "recipe_sha256": text_digest(dump_recipe(self.recipe)),
            "seed": self.recipe.run.seed,
            "skipped_steps": self.state.skipped_steps,
            "restarts": self.state.restarts,
            "world_size": self.world.size,
            "device": device_name(self.world.device),
            "processor": processor_name(),
            "versions": library_versions(),
        }


@contextmanager
def concluded(
    outcome: Outcome, directory: RunDirectory, signals: StopSignals, reporter: Reporter, copy: RunCopy | None
) -> Iterator[None]:
    """Record the end of the run inside the block: in `outcome`, the log, `summary.json` and the run's copy.

    The records of a finished run stay as they are if a start in its directory fails before it has begun.
    """
    if outcome.world.is_main and directory.is_summary_damaged:
        reporter.warn(f"{directory.summary_file} is damaged; it will be written again")
    try:
        yield
        outcome.code, outcome.reason = 0, "finished"
    except StoppedError as stopped:
        name = signals.received.name if signals.received else "a signal on another rank"
        outcome.code = EXIT_STOPPED if stopped.saved else 1
        outcome.reason = f"stopped by {name}"
        reporter.info(f"{outcome.reason} at step {outcome.state.step}; run the same command to resume")
    except BaseException as error:
        is_foreseen = isinstance(error, UserError | PeerError)
        if is_foreseen:
            outcome.code = 2 if isinstance(error, UserError) else EXIT_LOST_PEER
        elif (lack := of_the_machine(error)) is not None:
            outcome.code = lack[1]
        outcome.reason = str(error) if is_foreseen else f"{type(error).__name__}: {error}"
        raise
    finally:
        is_shared = outcome.code in (0, EXIT_STOPPED)  # else a rank may be here alone
        with outcome.world.together() if is_shared else nullcontext():
            end = partial(finish_copy, copy, outcome.world if is_shared else ALONE, reporter, signals)
            _record(outcome, directory, reporter, end)


def _record(outcome: Outcome, directory: RunDirectory, reporter: Reporter, finish_copy: Callable[[int], None]) -> None:
    previous = directory.summary() if outcome.world.is_main else None
    is_told = outcome.begun or previous is None or previous.get("exit") != 0
    with ExitStack() as last:  # calls all, the last first, even if the disk fails one of them
        # After the data workers, which have their pipes, and the summary, which they send.
        last.callback(reporter.finish_trackers, END_SECONDS if outcome.code == 0 else STOP_SECONDS)
        last.callback(reporter.close)
        if outcome.begun and outcome.recipe.checkpoint.url:
            last.callback(finish_copy, outcome.code)
        if outcome.task is not None:
            last.callback(outcome.task.close)
        # Report what has ended the run, not that the same disk does not take the record of it.
        told = nullcontext() if outcome.code in (0, EXIT_STOPPED) else suppress(RunDirectoryError, OSError)
        # A start that trained nothing has another machine, and may have another recipe.
        is_kept = outcome.was_finished and previous is not None and previous.get("exit") == 0
        if outcome.world.is_main and is_told and not is_kept:
            last.enter_context(told)
            last.callback(_write_summary, outcome, directory, previous)
        if is_told:
            last.callback(reporter.end, outcome.state, outcome.code, outcome.reason)


def _write_summary(outcome: Outcome, directory: RunDirectory, previous: dict[str, Any] | None) -> None:
    if previous is None and directory.store.names():  # what a failed start knows is not the run's
        previous = {"name": outcome.recipe.run.name}
    spent = wall_time(read_events(directory.metrics_file))  # to the last event, which is there by now
    directory.write_summary(sealed(outcome.summary(previous, spent)))


# Each incident keeps a checkpoint, so a run that goes wrong often must not fill the disk.
KEPT_CHECKPOINTS, MOST = 3, 50
WINDOW, LEAST = 100, 20


class Incidents:
    """The directory `incidents` of a run. Only rank 0 writes to it."""

    def __init__(self, directory: Path, store: CheckpointStore, plan: TrainPlan, replays: bool) -> None:
        self._directory, self._store, self._plan, self._replays = directory, store, plan, replays
        self._noted = 0

    def note(self, step: int, kind: str, **figures: float) -> str:
        """Write down what happened in a step, counted from 1; returns how to look into it, or what prevented that."""
        if self._noted >= MOST:
            return f"nothing is kept for karat replay, as this start has noted {MOST} such steps already"
        self._noted += 1
        try:
            checkpoint = next(iter(checkpoints_before(self._store, step)), None)
        except OSError as error:
            return f"{self._store.root} cannot be read: {error.strerror}"
        plan = self._plan
        epoch, batch = divmod(step - 1, plan.steps_per_epoch)
        samples = None  # only the ranks that have read them know the samples of a stream
        if not plan.lanes:  # in the order of the ranks and of their micro batches
            samples = plan.epoch_order(epoch)[batch * plan.global_batch : (batch + 1) * plan.global_batch].tolist()
        record = {
            "step": step,
            "kind": kind,
            **{name: value if math.isfinite(value) else str(value) for name, value in figures.items()},
            "checkpoint": checkpoint,
            **{"epoch": epoch, "batch": batch, "world_size": plan.world_size, "micro_batch": plan.micro_batch},
            "samples": samples,
        }
        path = self._directory / f"{checkpoint_name(step)}.json"
        try:
            self._directory.mkdir(exist_ok=True)
            replace_file(path, json.dumps(record, indent=1) + "\n")
            if checkpoint is not None and len(self._store.pinned()) < KEPT_CHECKPOINTS:
                self._store.pin(checkpoint)
        except OSError as error:
            return f"{self._directory} cannot be written: {error.strerror}"
        if not self._replays:
            return f"{path} has its samples"
        return f"find the cause with karat replay {shlex.quote(str(self._directory.parent))} {step}"


def checkpoints_before(store: CheckpointStore, step: int) -> list[str]:
    """Return the checkpoints from which training reaches a step, newest first."""
    return [name for name in store.names() if name < checkpoint_name(step)]


class Spikes:
    """Finds losses far above those of the steps before.

    A loss is a spike if it is `deviations` standard deviations above the mean of the last WINDOW finite losses.
    """

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self._last: deque[float] = deque(maxlen=WINDOW)

    def find(self, losses: Sequence[float]) -> list[tuple[int, float, float]]:
        """Return (position, loss, limit) of each spike among further losses."""
        found = []
        for position, loss in enumerate(losses):
            if not math.isfinite(loss):
                continue
            limit = math.inf
            if len(self._last) >= LEAST:
                limit = float(np.mean(self._last) + self._deviations * np.std(self._last))
            if loss > limit:
                found.append((position, loss, limit))
            self._last.append(loss)
        return found
