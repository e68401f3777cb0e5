"""The training loop of one rank: global batches in order, evaluation, saving, and stopping when asked.

Training is a function of the state: `run` may stop after any step and resume from its checkpoint, and the
weights come out the same.

The host launches a step's work and does not wait for it. Loss and gradient norms stay on the device until a log line,
an evaluation, a save, or an agreement of the ranks, about once a second. Steps that were skipped, as their gradients
are not finite, and losses that jump are then found and noted; the recipe says when the run ends at them.

On a CPU a step is given up between two micro batches, so that a stop need not wait for minutes. Weights change only at
a step's end. What changes before is put back, and the resumed run takes the step again, with the same bits. Gradients
are not kept in a checkpoint.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.plan import TrainPlan
from karat_scale.engine.distributed import World
from karat_scale.engine.ema import Ema
from karat_scale.engine.engine import Engine
from karat_scale.engine.reporting.interval import Interval, OwnTime, StepProfiler, peak_memory_mb, resident_memory_mb
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import DivergedError
from karat_scale.recipe import RunRecipe
from karat_scale.training.agreement import Agreement, SavePoints
from karat_scale.training.outcome import Incidents, Spikes
from karat_scale.training.signals import StoppedError, StopSignals
from karat_scale.training.task import AfterStep, OnBatch, Schedule, Scores, Task, Waiting


@dataclass
class Parts:
    """What one rank's loop is made of. `build_parts` in `run.py` builds it."""

    recipe: RunRecipe
    world: World
    task: Task
    plan: TrainPlan
    total_steps: int
    engine: Engine
    ema: Ema | None
    schedule: Schedule
    checkpoints: Checkpoints[Any]
    after_step: list[AfterStep]
    profiler: StepProfiler
    reporter: Reporter
    signals: StopSignals
    incidents: Incidents


class UnfinishedStep:
    """What a step changes before its last micro batch, as it was at the step's beginning."""

    def __init__(self, task: Task, interval: Interval) -> None:
        self._task, self._interval = task, interval
        self._rng, self._counts, self._seconds = torch.get_rng_state(), task.counts, interval.seconds

    def undo(self) -> None:
        """Put it back: torch's random generator, what the task counted, and the stopwatch."""
        torch.set_rng_state(self._rng)
        self._task.counts, self._interval.seconds = self._counts, self._seconds


def can_give_up(model: nn.Module, world: World, accumulation: int) -> bool:
    """Whether steps of this rank can be given up: it is alone, on a CPU, and a forward pass changes no statistics."""
    norms = (nn.modules.batchnorm._BatchNorm,)
    return (
        accumulation > 1
        and world.size == 1
        and world.device.type == "cpu"
        and not any(isinstance(module, norms) for module in model.modules())
    )


class StepHealth:
    """Looks at the norms and losses that an interval has kept on the device.

    grad_norm: of the last step that was looked at.
    """

    def __init__(self, parts: Parts, state: RunState, interval: Interval) -> None:
        self._parts, self._state, self._interval = parts, state, interval
        self.grad_norm: float | None = None
        deviations = parts.recipe.train.detect_spikes
        self._spikes = Spikes(deviations) if deviations is not None else None

    @property
    def watches_losses(self) -> bool:
        """True if the interval must keep the loss of each step."""
        return self._spikes is not None

    def look(self) -> None:
        """Look which steps were skipped since the last look; the same on all ranks.

        Raises:
            DivergedError: the recipe says to stop at such a step, or as many in a row were skipped as it allows.
        """
        norms = self._interval.take_norms()
        for step, norm in enumerate(norms, start=self._state.step - len(norms) + 1):
            self.grad_norm = norm
            self._state.skipped_in_row = 0 if math.isfinite(norm) else self._state.skipped_in_row + 1
            if self._state.skipped_in_row:
                self._note_skipped(step, norm)
        if self._spikes is not None:
            self._note_spikes(self._spikes)

    def _note_spikes(self, spikes: Spikes) -> None:
        """Collective: a step's loss is the mean over the ranks."""
        parts, losses = self._parts, self._interval.take_step_losses()
        if not len(losses):
            return
        first = self._state.step - len(losses) + 1
        for place, loss, limit in spikes.find((parts.world.sum(losses) / parts.world.size).tolist()):
            if parts.world.is_main:
                advice = parts.incidents.note(first + place, "spike", loss=loss, limit=limit)
                parts.reporter.spike(first + place, loss, limit, advice)

    def _note_skipped(self, step: int, norm: float) -> None:
        state, train = self._state, self._parts.recipe.train
        stop = train.on_nonfinite == "stop"
        what, advice = f"step {step} has a loss or gradients that are not finite", ""
        if self._parts.world.is_main and train.precision != "fp16":  # where the loss scale overflows now and then
            advice = f"; {self._parts.incidents.note(step, 'not finite', grad_norm=norm)}"
        if not stop and state.skipped_in_row < train.max_skipped_steps:
            if self._parts.world.is_main:
                self._parts.reporter.warn(f"{what}; skipped{advice}")
            return
        self._parts.checkpoints.finish()
        rule = "train.on_nonfinite = stop" if stop else f"the last of train.max_skipped_steps = {state.skipped_in_row}"
        last = self._parts.checkpoints.store.pointed("latest") or "none"
        raise DivergedError(
            f"{what}, {rule}; the last checkpoint is {last}; lower optim.lr or look into the data{advice}"
        )


def evaluate_in_training(parts: Parts, on_batch: OnBatch) -> tuple[Scores, dict[str, Any]]:
    """Evaluate the weights that the recipe names; returns the scores, and what else the event says of the model."""
    use_ema = parts.ema is not None and parts.recipe.train.eval_weights != "raw"
    weights = parts.ema.in_place_of_weights() if use_ema and parts.ema else nullcontext()
    parts.engine.module.eval()
    try:
        with weights:
            scores = parts.task.evaluate(parts.engine.forward, on_batch)
            more = parts.task.look_inside(parts.engine)
    finally:
        parts.engine.module.train()
    return scores, {"weights": "ema" if use_ema else "raw", **more}


class Loop:
    """Trains `parts` from `state` to the recipe's end."""

    def __init__(self, parts: Parts, state: RunState) -> None:
        self.parts = parts
        self.state = state
        self.total_steps = parts.total_steps
        checkpoint = parts.recipe.checkpoint
        self._interval = Interval(parts.world.device)
        self._own_time = OwnTime(parts.world.device)
        self._save_points = SavePoints(parts.world, parts.signals, checkpoint.every_steps, checkpoint.every_minutes)
        self._evaluating = Agreement(parts.world)
        self._compiles = self._compiles_evaluation = bool(parts.recipe.train.compile)
        if state.step > 0:  # so that a checkpoint of this very step has the rate that an undisturbed run has there
            parts.engine.set_lr(parts.schedule.lr(state.step - 1))
        self._health = StepHealth(parts, state, self._interval)
        self._can_give_up = can_give_up(parts.engine.module, parts.world, parts.plan.accumulation)

    def run(self, stop_step: int | None = None) -> bool:
        """Train to the end, or to `stop_step`; evaluate if that is due, and save. Returns whether training goes on.

        Raises:
            DivergedError: the loss or the gradients are not finite, and the recipe says to end there.
            StoppedError: a signal asked to stop; the state is saved, or `saved` of the error says it is not.
            RunDirectoryError: the last checkpoint could not be saved, or the first, or the disk does not take the
                metrics.
        """
        state, checkpoints = self.state, self.parts.checkpoints
        stop_step = self.total_steps if stop_step is None else min(stop_step, self.total_steps)
        try:
            self._write_if_due()
            self._evaluate_if_due()
            batches = self.feed(stop_step)
            while state.step < stop_step:
                with self.parts.profiler.step(state.step + 1):
                    self.step(self.micro_batches(batches))
                self._write_if_due()
                self._evaluate_if_due()
                self.save_or_stop()
                if checkpoints.has_only_failed:
                    raise checkpoints.store.not_saved(checkpoints.problem)
        except StoppedError as stopped:
            stopped.saved = self._save(wait=True)
            raise
        if not self._save(wait=True):
            raise checkpoints.store.not_saved(checkpoints.problem)
        return stop_step < self.total_steps

    def feed(self, stop_step: int, waiting: Waiting | None = None) -> DeviceFeed[Any]:
        """This rank's micro batches from the next step to `stop_step`, on its device; `waiting` as for DeviceFeed."""
        slices = self.parts.plan.slices(self.state.step, stop_step)
        return self.parts.task.train_batches(slices, waiting or self._waiting_for_data)

    @contextmanager
    def _waiting_for_data(self) -> Iterator[None]:
        self.parts.reporter.beat("waiting for data", self.state.step + 1)
        with self._own_time.data():
            yield

    def micro_batches(self, batches: DeviceFeed[Any]) -> Iterator[Any]:
        """Those of one step. The next batch is fetched when a step's work is launched, while the device does it.

        Raises StoppedError between them if a signal asks to stop and the step can be given up.
        """
        parts = self.parts
        unfinished = UnfinishedStep(parts.task, self._interval) if self._can_give_up else None
        for number in range(parts.plan.accumulation):
            if number and unfinished is not None and parts.signals.received is not None:
                unfinished.undo()
                raise StoppedError
            yield next(batches)
            batches.fetch_ahead()

    def step(self, micro_batches: Iterable[Any]) -> torch.Tensor:
        """Train on this rank's part of one global batch, on the device; returns the gradient norm, 0-dim."""
        parts, state = self.parts, self.state
        lr = parts.schedule.lr(state.step)
        parts.engine.set_lr(lr)
        *_, norm = [self._pass_through(batch) for batch in micro_batches]
        assert norm is not None  # the last micro batch ends the step
        self._compiles = False
        state.step += 1
        state.samples += parts.recipe.train.global_batch
        self._interval.add_norm(norm)
        if parts.ema is not None:
            parts.ema.update(state.step, was_taken=norm < math.inf)
        self._interval.finish_step()
        if state.seconds_to_first_step is None:
            state.seconds_to_first_step = round(time.time() - psutil.Process().create_time(), 2)
        parts.reporter.display.advance(state.step, self.total_steps)
        # The first step, too: people look whether a loss is there.
        if state.step % parts.recipe.log.every_steps == 0 or state.step in (1, self.total_steps):
            self._report(lr)
        return norm

    def _pass_through(self, batch: Any) -> torch.Tensor | None:
        """Forward and backward; after the last micro batch of a step the step, whose gradient norm is returned."""
        parts, accumulation = self.parts, self.parts.plan.accumulation
        parts.reporter.beat("compiling" if self._compiles else "forward")
        with self._own_time.forward():
            losses = parts.task.losses(parts.engine.forward, batch)
        parts.reporter.beat("compiling" if self._compiles else "backward")
        parts.engine.backward(losses["loss"])
        parts.reporter.beat("compiling" if self._compiles else "optimizer")
        norm = parts.engine.step()
        self._interval.add_losses({name: loss.detach() / accumulation for name, loss in losses.items()})
        if self._health.watches_losses:
            self._interval.add_to_step(losses["loss"].detach() / accumulation)
        return norm

    def _report(self, lr: float) -> None:
        parts, state, world = self.parts, self.state, self.parts.world
        self._health.look()
        losses, steps = self._interval.take_losses()
        sums = world.sum(torch.stack(list(losses.values()))) / (steps * world.size)
        parts.reporter.pace(self._own_time.take() / steps)
        rate = self._fold_interval()
        with self._interval.paused():  # the first report may count FLOPs
            more = parts.task.figures(state, rate)
        figures = {
            "epoch": (state.step - 1) // parts.plan.steps_per_epoch,
            "samples": state.samples,
            "total_steps": self.total_steps,
            **dict(zip(losses, sums.tolist(), strict=True)),
            "lr": lr,
            "grad_norm": self._health.grad_norm,
            **({"loss_scale": scale} if (scale := parts.engine.loss_scale) is not None else {}),
            "images_per_second": rate,
            **more,
            "skipped_steps": state.skipped_steps,
            "peak_memory_mb": state.peak_memory_mb,
            "resident_memory_mb": round(resident_memory_mb(), 1),
        }
        parts.reporter.train(state.step, self.total_steps, figures)

    def _fold_interval(self) -> float | None:
        """Add what the interval counted to the state, on all ranks; returns images a second in it."""
        world, state = self.parts.world, self.state
        steps, seconds = self._interval.take_time()
        samples = steps * self.parts.recipe.train.global_batch
        state.timed_samples += samples
        state.timed_seconds += seconds
        state.skipped_steps += self.parts.engine.take_skipped_steps()
        state.peak_memory_mb = max(state.peak_memory_mb, world.max(int(peak_memory_mb(world.device))))
        self.parts.task.fold(state)
        return samples / seconds if samples else None

    def _evaluate_if_due(self) -> None:
        parts, state = self.parts, self.state
        every = parts.recipe.train.eval_every_epochs * parts.plan.steps_per_epoch
        due = state.step > 0 and (state.step % every == 0 or state.step == self.total_steps)
        if not due or state.evaluated_step == state.step:
            return
        self._health.look()
        self._evaluating = Agreement(parts.world)
        parts.reporter.beat("compiling" if self._compiles_evaluation else "evaluating")
        with self._interval.paused():
            scores, more = evaluate_in_training(parts, self._during_evaluation)
            self._compiles_evaluation = False
            figures = {"samples": state.samples, **scores.to_json(), **more}
            is_best = state.record(figures)
            parts.reporter.evaluated(state.step, f"{scores} ({figures['weights']} weights)", figures)
            if is_best and parts.recipe.checkpoint.keep_best:
                self._save()

    def _during_evaluation(self, done: int, total: int) -> None:
        self.parts.reporter.beat("evaluating")
        self.parts.reporter.display.evaluate(done, total)
        agreed = self._evaluating.maxima(done, self.parts.signals.received is not None)
        if agreed is not None and agreed[0]:
            raise StoppedError

    def _write_if_due(self) -> None:
        for one in self.parts.after_step:
            if one.due(self.state.step):
                with self._interval.paused():
                    one.write(self.state.step)

    def save_or_stop(self) -> None:
        """What the ranks agree to do after a step."""
        step, checkpoints = self.state.step, self.parts.checkpoints
        if self._save_points.is_agreement_due(step):
            self._health.look()
        decision = self._save_points.decide(step, checkpoints.is_busy)
        if decision.is_idle and checkpoints.is_under_way:
            checkpoints.advance()
        if decision.stop and step < self.total_steps:
            raise StoppedError
        if decision.save:
            self._save()

    def _save(self, wait: bool = False) -> bool:
        """Save this state unless that is done; whether it is, or without `wait` will be unless a rank fails."""
        self.parts.reporter.beat("saving")
        self._health.look()
        with self._interval.paused():
            if not self.parts.checkpoints.holds(self.state):
                self._fold_interval()
            self._save_points.note_save()
            # Asked of the state, as the save at the evaluation may have failed.
            is_best = self.state.best_step == self.state.step and self.parts.recipe.checkpoint.keep_best
            return self.parts.checkpoints.save(self.state, is_best, wait)
