"""Train a detector: global batches in order, evaluation, saving, and stopping on request.

Like `run/loop.py`, it depends only on the state: a run may stop after any step and resume from its checkpoint. On a
CPU the weights are then the same, bit for bit.
"""

import math
import time
from contextlib import nullcontext
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from karat_scale.data.plan import total_steps
from karat_scale.engine.precision import PRECISIONS
from karat_scale.errors import DivergedError
from karat_scale.reporting.interval import Interval, peak_memory_mb
from karat_scale.run.agreement import Agreement, SavePoints
from karat_scale.run.signals import StoppedError
from karat_scale.tasks.detection.batches import DetectionBatch, TrainMaker, load_batches
from karat_scale.tasks.detection.evaluate import evaluate
from karat_scale.tasks.detection.parts import DetectionParts
from karat_scale.tasks.detection.state import DetectionState


class DetectionLoop:
    """Trains `parts` from `state` to the recipe's end."""

    def __init__(self, parts: DetectionParts, state: DetectionState) -> None:
        self.parts = parts
        self.state = state
        train, checkpoint = parts.recipe.train, parts.recipe.checkpoint
        self.total_steps = total_steps(parts.plan.steps_per_epoch, train.epochs, train.max_steps)
        self._interval = Interval(parts.world.device)
        self._losses: dict[str, torch.Tensor] = {}
        self._grad_norm: float | None = None
        self._save_points = SavePoints(parts.world, parts.signals, checkpoint.every_steps, checkpoint.every_minutes)
        self._evaluating = Agreement(parts.world)

    def run(self) -> None:
        """Train to the end, evaluate and save.

        Raises:
            DivergedError: the number of skipped steps in a row reached its limit.
            StoppedError: a signal asked to stop. The state is saved, unless `saved` of the error is False.
            RunDirectoryError: the last checkpoint or the metrics could not be written.
        """
        parts, state = self.parts, self.state
        parts.model.train()
        slices = parts.plan.slices(state.step, self.total_steps)
        batches = load_batches(TrainMaker(parts.train, parts.recipe), slices, parts.recipe.data)
        try:
            self._evaluate_if_due()
            while state.step < self.total_steps:
                parts.reporter.beat("waiting for data", state.step + 1)
                self.step([next(batches) for _ in range(parts.plan.accumulation)])
                self._evaluate_if_due()
                self._save_or_stop()
        except StoppedError as stopped:
            stopped.saved = self._save()
            raise
        finally:
            batches.close()
        if not self._save():
            raise parts.checkpoints.store.last_not_saved(parts.checkpoints.problem)

    def step(self, micro_batches: list[DetectionBatch]) -> None:
        """Train on this rank's part of one global batch."""
        parts, state = self.parts, self.state
        lr = parts.schedule.lr(state.step)
        for group in parts.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for number, batch in enumerate(micro_batches, start=1):
            self._add_gradients(batch, len(micro_batches), is_last=number == len(micro_batches))
        parts.reporter.beat("optimizer")
        norm = float(nn.utils.clip_grad_norm_(parts.model.parameters(), parts.recipe.optim.clip_grad or math.inf))
        if math.isfinite(norm):
            parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.samples += parts.recipe.train.global_batch
        self._grad_norm = norm
        self._count_skipped(norm)
        self._interval.finish_step()
        if state.seconds_to_first_step is None:
            state.seconds_to_first_step = round(time.time() - psutil.Process().create_time(), 2)
        parts.reporter.display.advance(state.step, self.total_steps)
        if state.step % parts.recipe.log.every_steps == 0 or state.step == self.total_steps:
            self._report(lr)

    def _add_gradients(self, batch: DetectionBatch, count: int, is_last: bool) -> None:
        parts = self.parts
        images, targets = batch.to(parts.world.device)
        waits = isinstance(parts.replica, DistributedDataParallel) and not is_last
        with parts.replica.no_sync() if waits else nullcontext():  # type: ignore[operator]
            parts.reporter.beat("forward")
            with PRECISIONS[parts.recipe.train.precision].autocast(parts.world.device.type):
                losses: dict[str, torch.Tensor] = parts.replica(images, targets)
            loss = torch.stack([loss.float() for loss in losses.values()]).sum() / count
            parts.reporter.beat("backward")
            # A loss that is not finite makes the gradients NaN on all ranks, also if they would be finite.
            (loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)).backward()
        self._interval.add_loss(loss)
        for name, value in losses.items():
            share = value.detach().float() / count
            self._losses[name] = self._losses[name] + share if name in self._losses else share

    def _count_skipped(self, norm: float) -> None:
        """Raise DivergedError at the last step that may be skipped in a row."""
        state = self.state
        if math.isfinite(norm):
            state.skipped_in_row = 0
            return
        state.skipped_steps += 1
        state.skipped_in_row += 1
        what = f"step {state.step} has a loss or gradients that are not finite"
        if state.skipped_in_row >= self.parts.recipe.train.max_skipped_steps:
            last = self.parts.checkpoints.store.pointed("latest") or "none"
            raise DivergedError(
                f"{what}, the last of train.max_skipped_steps = {state.skipped_in_row}; the last checkpoint is {last}; "
                "lower optim.lr or check the data"
            )
        if self.parts.world.is_main:
            self.parts.reporter.warn(f"{what}; skipped")

    def _report(self, lr: float) -> None:
        parts, state = self.parts, self.state
        loss, steps = self._interval.take_loss()
        sums = {"loss": loss, **self._losses}
        means = parts.world.sum(torch.stack(list(sums.values()))) / (steps * parts.world.size)
        self._losses.clear()
        rate = self._fold_interval()
        figures: dict[str, Any] = {
            "epoch": (state.step - 1) // parts.plan.steps_per_epoch,
            "samples": state.samples,
            "total_steps": self.total_steps,
            **dict(zip(sums, means.tolist(), strict=True)),
            "lr": lr,
            "grad_norm": self._grad_norm,
            "images_per_second": rate,
            "skipped_steps": state.skipped_steps,
            "peak_memory_mb": state.peak_memory_mb,
        }
        parts.reporter.train(state.step, self.total_steps, figures)

    def _fold_interval(self) -> float | None:
        """Add the timed interval to the state, on all ranks; returns its images per second."""
        state, world = self.state, self.parts.world
        _, steps, seconds = self._interval.take_counts()
        samples = steps * self.parts.recipe.train.global_batch
        state.timed_samples += samples
        state.timed_seconds += seconds
        state.peak_memory_mb = max(state.peak_memory_mb, world.max(int(peak_memory_mb(world.device))))
        return samples / seconds if samples else None

    def _evaluate_if_due(self) -> None:
        parts, state = self.parts, self.state
        every = parts.recipe.train.eval_every_epochs * parts.plan.steps_per_epoch
        due = state.step > 0 and (state.step % every == 0 or state.step == self.total_steps)
        if not due or state.evaluated_step == state.step:
            return
        self._evaluating = Agreement(parts.world)
        with self._interval.paused():
            parts.model.eval()
            try:
                scores = evaluate(parts.model, parts.val, parts.recipe, parts.world, self._during_evaluation)
            finally:
                parts.model.train()
            is_best = state.record(scores)
            parts.reporter.scored(state.step, str(scores), {"samples": state.samples, **scores.to_json()})
        if is_best and parts.recipe.checkpoint.keep_best:
            self._save(is_best=True)

    def _during_evaluation(self, done: int, total: int) -> None:
        self.parts.reporter.beat("evaluating")
        self.parts.reporter.display.evaluate(done, total)
        agreed = self._evaluating.maxima(done, self.parts.signals.received is not None)
        if agreed is not None and agreed[0]:
            raise StoppedError

    def _save_or_stop(self) -> None:
        """Do what the ranks agree on after a step."""
        decision = self._save_points.decide(self.state.step)
        if decision.stop and self.state.step < self.total_steps:
            raise StoppedError
        if decision.save:
            self._save()

    def _save(self, is_best: bool = False) -> bool:
        self.parts.reporter.beat("saving")
        with self._interval.paused():
            self._fold_interval()
            self._save_points.note_save()
            return self.parts.checkpoints.save(self.state, is_best)
