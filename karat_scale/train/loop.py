"""The training loop: global batches in order, evaluation, saving, and stopping when asked.

Training is a function of the state: `run` may stop after any step and go on from its checkpoint, and the
weights come out the same.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import psutil
import torch
from timm.loss import SoftTargetCrossEntropy

from karat_scale.data.batch import BadSample, Batch
from karat_scale.data.digest import BITS, batch_digest
from karat_scale.data.plan import total_steps
from karat_scale.errors import DivergedError
from karat_scale.train.checkpoint.snapshots import snapshot_steps
from karat_scale.train.evaluate import EvalResult, evaluate
from karat_scale.train.parts import Parts
from karat_scale.train.reporting.interval import Interval, peak_memory_mb, resident_memory_mb
from karat_scale.train.reporting.own_time import OwnTime
from karat_scale.train.signals import StoppedError
from karat_scale.train.state import TrainState

_SAVE, _STOP = 1, 2


def evaluate_in_training(
    parts: Parts, on_batch: Callable[[int, int, tuple[BadSample, ...]], None]
) -> tuple[str, EvalResult]:
    """Evaluate the weights that the recipe names; returns ("ema" or "raw", result)."""
    use_ema = parts.ema is not None and parts.recipe.train.eval_weights != "raw"
    weights = parts.ema.in_place_of_weights() if use_ema and parts.ema else nullcontext()
    parts.engine.module.eval()
    try:
        with weights:
            result = evaluate(
                parts.engine.forward,
                parts.backend,
                parts.normalize,
                parts.recipe.train.eval_batch,
                parts.world,
                on_batch,
            )
    finally:
        parts.engine.module.train()
    return ("ema" if use_ema else "raw"), result


class Loop:
    """Trains `parts` from `state` to the recipe's end."""

    def __init__(self, parts: Parts, state: TrainState) -> None:
        self.parts = parts
        self.state = state
        recipe, plan = parts.recipe, parts.plan
        self.total_steps = total_steps(plan.steps_per_epoch, recipe.train.epochs, recipe.train.max_steps)
        self._snapshot_steps = snapshot_steps(self.total_steps, recipe.checkpoint.snapshots)
        self._objective = SoftTargetCrossEntropy()
        self._interval = Interval(parts.world.device)
        self._own_time = OwnTime(parts.world.device)
        self._saved_at = time.monotonic()

    def run(self) -> None:
        """Train to the end, evaluate and save.

        Raises:
            DivergedError: the loss or the gradients are not finite, and the recipe says to end there.
            StoppedError: a signal asked to stop; the state is saved, or `saved` of the error says it is not.
            RunDirectoryError: the last checkpoint could not be saved, or the disk does not take the metrics.
        """
        plan, state = self.parts.plan, self.state
        try:
            self._snapshot_if_due()
            self._evaluate_if_due()
            batches = self.parts.backend.train_batches(plan.slices(state.step, self.total_steps))
            while state.step < self.total_steps:
                with self.parts.profiler.step(state.step + 1):
                    self.parts.reporter.beat("waiting for data", state.step + 1)
                    with self._own_time.data():
                        micro_batches = [next(batches) for _ in range(plan.accumulation)]
                    self.step(micro_batches)
                self._snapshot_if_due()
                self._evaluate_if_due()
                self.save_or_stop()
        except StoppedError as stopped:
            stopped.saved = self._save(wait=True)
            raise
        if not self._save(wait=True):
            raise self.parts.checkpoints.store.last_not_saved(self.parts.checkpoints.saver.problem)

    def step(self, micro_batches: list[Batch]) -> None:
        """Train on this rank's part of one global batch."""
        parts, state = self.parts, self.state
        lr = parts.schedule.lr(state.step)
        parts.engine.set_lr(lr)
        norm: float | None = None
        for cpu_batch in micro_batches:
            self._note_bad(cpu_batch.bad)
            self._interval.add_digest(batch_digest(cpu_batch))
            batch = cpu_batch.to(parts.world.device)
            images = parts.normalize(parts.augment(batch.images, batch.draws))
            images, targets = parts.mixer.mix(images, batch.labels, batch.epoch, batch.batch)
            parts.reporter.beat("forward")
            with self._own_time.forward():
                loss = self._objective(parts.engine.forward(images), targets)
            parts.reporter.beat("backward")
            parts.engine.backward(loss)
            parts.reporter.beat("optimizer")
            on_device = parts.engine.step()
            norm = None if on_device is None else float(on_device)
            self._interval.add_loss(loss / len(micro_batches))
        state.step += 1
        state.samples += parts.recipe.train.global_batch
        if norm is None or not math.isfinite(norm):
            self._note_skipped()
        else:
            state.skipped_in_row = 0
            if parts.ema is not None:
                parts.ema.update(state.step)
        self._interval.finish_step(norm)
        if state.seconds_to_first_step is None:
            state.seconds_to_first_step = round(time.time() - psutil.Process().create_time(), 2)
        parts.reporter.display.advance(state.step, self.total_steps)
        if state.step % parts.recipe.log.every_steps == 0 or state.step == self.total_steps:
            self._report(lr)
        if parts.histograms.due(state.step):
            with self._interval.paused():
                parts.histograms.write(state.step)

    def _note_bad(self, bad: tuple[BadSample, ...]) -> None:
        self._interval.add_bad(len(bad))
        for sample in bad:
            self.parts.reporter.bad_sample(sample)

    def _note_skipped(self) -> None:
        """The engine skipped this step, on all ranks: go on, or end as the recipe says.

        Raises:
            DivergedError: the recipe says to stop at the first, or this is the last one in a row that it allows.
        """
        state, train = self.state, self.parts.recipe.train
        state.skipped_in_row += 1
        stop = train.on_nonfinite == "stop"
        what = f"step {state.step} has a loss or gradients that are not finite"
        if not stop and state.skipped_in_row < train.max_skipped_steps:
            if self.parts.world.is_main:
                self.parts.reporter.warn(f"{what}; skipped")
            return
        self.parts.checkpoints.saver.finish()
        rule = "train.on_nonfinite = stop" if stop else f"the last of train.max_skipped_steps = {state.skipped_in_row}"
        last = self.parts.checkpoints.store.pointed("latest") or "none"
        raise DivergedError(f"{what}, {rule}; the last checkpoint is {last}; lower optim.lr or look into the data")

    def _report(self, lr: float) -> None:
        parts, state = self.parts, self.state
        loss, steps = self._interval.take_loss()
        mean_loss = float(parts.world.sum(loss)) / (steps * parts.world.size)
        parts.reporter.pace(self._own_time.take() / steps)
        rate = self._fold_interval()
        with self._interval.paused():  # the first report counts FLOPs
            efficiency = parts.efficiency.figures(rate)
        figures = {
            "epoch": (state.step - 1) // parts.plan.steps_per_epoch,
            "samples": state.samples,
            "total_steps": self.total_steps,
            "loss": mean_loss,
            "lr": lr,
            "grad_norm": self._interval.grad_norm,
            **({"loss_scale": scale} if (scale := parts.engine.loss_scale) is not None else {}),
            "images_per_second": rate,
            **efficiency,
            "bad_samples": state.bad_samples,
            "skipped_steps": state.skipped_steps,
            "data_digest": state.data_digest,
            "peak_memory_mb": state.peak_memory_mb,
            "resident_memory_mb": round(resident_memory_mb(), 1),
        }
        parts.reporter.train(state.step, self.total_steps, figures)

    def _fold_interval(self) -> float | None:
        """Add what the interval counted to the state, on all ranks; returns images a second in it."""
        world, state = self.parts.world, self.state
        bad, steps, seconds = self._interval.take_counts()
        samples = steps * self.parts.recipe.train.global_batch
        digest = torch.tensor(self._interval.take_digest(), dtype=torch.float64)
        state.data_digest = (state.data_digest + int(world.sum(digest))) % 2**BITS
        state.bad_samples += int(world.sum(torch.tensor(bad)))
        state.timed_samples += samples
        state.timed_seconds += seconds
        state.skipped_steps += self.parts.engine.take_skipped_steps()
        state.peak_memory_mb = max(state.peak_memory_mb, world.max(int(peak_memory_mb(world.device))))
        return samples / seconds if samples else None

    def _evaluate_if_due(self) -> None:
        parts, state = self.parts, self.state
        every = parts.recipe.train.eval_every_epochs * parts.plan.steps_per_epoch
        due = state.step > 0 and (state.step % every == 0 or state.step == self.total_steps)
        if not due or state.evaluated_step == state.step:
            return
        with self._interval.paused():
            weights, result = evaluate_in_training(parts, self._during_evaluation)
            is_best = state.record(result.top1, result.top5)
            figures = {"samples": state.samples, **result.to_json(), "weights": weights}
            parts.reporter.evaluated(state.step, figures)
            if is_best and parts.recipe.checkpoint.keep_best:
                self._save(is_best=True)

    def _during_evaluation(self, done: int, total: int, bad: tuple[BadSample, ...]) -> None:
        self.parts.reporter.beat("evaluating")
        for sample in bad:
            self.parts.reporter.bad_sample(sample)
        self.parts.reporter.display.evaluate(done, total)
        if self.parts.world.any(self.parts.signals.received is not None):
            raise StoppedError

    def _snapshot_if_due(self) -> None:
        if self.state.step in self._snapshot_steps:
            self.parts.reporter.beat("snapshot")
            with self._interval.paused():
                self.parts.snapshots.take(self.state.step)

    def save_or_stop(self) -> None:
        """Rank 0's clock says when to save, any rank's signal says stop, and all must have written what is being saved.

        One small collective agrees on all of it.
        """
        parts, checkpoint = self.parts, self.parts.recipe.checkpoint
        wish = _STOP if parts.signals.received else 0
        if checkpoint.every_steps and self.state.step % checkpoint.every_steps == 0:
            wish = max(wish, _SAVE)
        minutes = (time.monotonic() - self._saved_at) / 60
        if parts.world.is_main and checkpoint.every_minutes and minutes >= checkpoint.every_minutes:
            wish = max(wish, _SAVE)
        saver = parts.checkpoints.saver
        agreed, busy = parts.world.maxima(wish, saver.is_busy)
        if saver.is_under_way and not busy:
            saver.advance()
        if agreed == _STOP and self.state.step < self.total_steps:
            raise StoppedError
        if agreed == _SAVE:
            self._save()

    def _save(self, is_best: bool = False, wait: bool = False) -> bool:
        """Save this state unless that is done; whether it is, or without `wait` will be unless a rank fails."""
        self.parts.reporter.beat("saving")
        with self._interval.paused():
            if not self.parts.checkpoints.saver.holds(self.state):
                self._fold_interval()
            self._saved_at = time.monotonic()  # a failed save is tried again an interval later, not each step
            return self.parts.checkpoints.save(self.state, is_best, wait)
