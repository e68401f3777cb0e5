"""The training loop: global batches in order, evaluation, saving, and stopping when asked.

Training is a function of the state: `run` may stop after any step and resume from its checkpoint, and the
weights come out the same.

The host launches a step's work and does not wait for it. Loss and gradient norms stay on the device until a log line,
an evaluation, a save, or an agreement of the ranks, about once a second.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import psutil
import torch
from timm.loss import SoftTargetCrossEntropy

from karat_scale.checkpoint.snapshots import snapshot_steps
from karat_scale.data.batch import BadSample, Batch
from karat_scale.data.device_feed import DeviceFeed
from karat_scale.data.digest import BITS, batch_digest, with_digest
from karat_scale.data.plan import total_steps
from karat_scale.engine.run_state import TrainState
from karat_scale.errors import DivergedError
from karat_scale.reporting.interval import Interval, peak_memory_mb, resident_memory_mb
from karat_scale.reporting.own_time import OwnTime
from karat_scale.run.agreement import Agreement, SavePoints
from karat_scale.run.parts import Parts
from karat_scale.run.signals import StoppedError
from karat_scale.tasks.classification.evaluate import EvalResult, evaluate


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
        self._save_points = SavePoints(
            parts.world, parts.signals, recipe.checkpoint.every_steps, recipe.checkpoint.every_minutes
        )
        self._evaluating = Agreement(parts.world)
        self._grad_norm: float | None = None

    def run(self) -> None:
        """Train to the end, evaluate and save.

        Raises:
            DivergedError: the loss or the gradients are not finite, and the recipe says to end there.
            StoppedError: a signal asked to stop; the state is saved, or `saved` of the error says it is not.
            RunDirectoryError: the last checkpoint could not be saved, or the disk does not take the metrics.
        """
        state = self.state
        try:
            self._snapshot_if_due()
            self._evaluate_if_due()
            batches = self.feed(self.total_steps)
            while state.step < self.total_steps:
                with self.parts.profiler.step(state.step + 1):
                    self.step(self.micro_batches(batches))
                self._snapshot_if_due()
                self._evaluate_if_due()
                self.save_or_stop()
        except StoppedError as stopped:
            stopped.saved = self._save(wait=True)
            raise
        if not self._save(wait=True):
            raise self.parts.checkpoints.store.last_not_saved(self.parts.checkpoints.saver.problem)

    def feed(self, stop_step: int, waiting: Callable[[], AbstractContextManager[None]] | None = None) -> DeviceFeed:
        """This rank's micro batches from the next step to `stop_step`, on its device; `waiting` as for DeviceFeed."""
        batches = self.parts.backend.train_batches(self.parts.plan.slices(self.state.step, stop_step))
        return DeviceFeed(map(with_digest, batches), self.parts.world.device, waiting or self._waiting_for_data)

    @contextmanager
    def _waiting_for_data(self) -> Iterator[None]:
        self.parts.reporter.beat("waiting for data", self.state.step + 1)
        with self._own_time.data():
            yield

    def micro_batches(self, batches: DeviceFeed) -> Iterator[Batch]:
        """Those of one step. The next batch is fetched when a step's work is launched, while the device does it."""
        for _ in range(self.parts.plan.accumulation):
            yield next(batches)
            batches.fetch_ahead()

    def step(self, micro_batches: Iterable[Batch]) -> None:
        """Train on this rank's part of one global batch; its micro batches are on the device."""
        parts, state = self.parts, self.state
        lr = parts.schedule.lr(state.step)
        parts.engine.set_lr(lr)
        *_, last = [self._pass_through(batch) for batch in micro_batches]
        norm = torch.as_tensor(last)
        state.step += 1
        state.samples += parts.recipe.train.global_batch
        self._interval.add_norm(norm)
        if parts.ema is not None:
            parts.ema.update(state.step, was_taken=norm < math.inf)
        self._interval.finish_step()
        if state.seconds_to_first_step is None:
            state.seconds_to_first_step = round(time.time() - psutil.Process().create_time(), 2)
        parts.reporter.display.advance(state.step, self.total_steps)
        if state.step % parts.recipe.log.every_steps == 0 or state.step == self.total_steps:
            self._report(lr)
        if parts.histograms.due(state.step):
            with self._interval.paused():
                parts.histograms.write(state.step)

    def _pass_through(self, batch: Batch) -> torch.Tensor | float | None:
        """Forward and backward; after the last micro batch of a step the step, whose gradient norm is returned."""
        parts, accumulation = self.parts, self.parts.plan.accumulation
        self._note_bad(batch.bad)
        self._interval.add_digest(batch_digest(batch))
        images = parts.normalize(parts.augment(batch.images, batch.draws))
        images, targets = parts.mixer.mix(images, batch.labels, batch.epoch, batch.batch)
        parts.reporter.beat("forward")
        with self._own_time.forward():
            loss = self._objective(parts.engine.forward(images), targets)
        parts.reporter.beat("backward")
        parts.engine.backward(loss)
        parts.reporter.beat("optimizer")
        norm = parts.engine.step()
        self._interval.add_loss(loss / accumulation)
        return norm

    def _note_bad(self, bad: tuple[BadSample, ...]) -> None:
        self._interval.add_bad(len(bad))
        for sample in bad:
            self.parts.reporter.bad_sample(sample)

    def _read_norms(self) -> None:
        """Look which steps were skipped since the last look; the same on all ranks.

        Raises:
            DivergedError: the recipe says to stop at such a step, or as many in a row were skipped as it allows.
        """
        norms = self._interval.take_norms()
        for step, norm in enumerate(norms, start=self.state.step - len(norms) + 1):
            self._grad_norm = norm
            self.state.skipped_in_row = 0 if math.isfinite(norm) else self.state.skipped_in_row + 1
            if self.state.skipped_in_row:
                self._note_skipped(step)

    def _note_skipped(self, step: int) -> None:
        state, train = self.state, self.parts.recipe.train
        stop = train.on_nonfinite == "stop"
        what = f"step {step} has a loss or gradients that are not finite"
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
        self._read_norms()
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
            "grad_norm": self._grad_norm,
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
        digest, bad = world.sum(torch.tensor([self._interval.take_digest(), bad], dtype=torch.float64)).tolist()
        state.data_digest = (state.data_digest + int(digest)) % 2**BITS
        state.bad_samples += int(bad)
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
        self._read_norms()
        self._evaluating = Agreement(parts.world)
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
        agreed = self._evaluating.maxima(done, self.parts.signals.received is not None)
        if agreed is not None and agreed[0]:
            raise StoppedError

    def _snapshot_if_due(self) -> None:
        if self.state.step in self._snapshot_steps:
            self.parts.reporter.beat("snapshot")
            with self._interval.paused():
                self.parts.snapshots.take(self.state.step)

    def save_or_stop(self) -> None:
        """What the ranks agree to do after a step."""
        step, saver = self.state.step, self.parts.checkpoints.saver
        if self._save_points.is_agreement_due(step):
            self._read_norms()
        decision = self._save_points.decide(step, saver.is_busy)
        if decision.is_idle and saver.is_under_way:
            saver.advance()
        if decision.stop and step < self.total_steps:
            raise StoppedError
        if decision.save:
            self._save()

    def _save(self, is_best: bool = False, wait: bool = False) -> bool:
        """Save this state unless that is done; whether it is, or without `wait` will be unless a rank fails."""
        self.parts.reporter.beat("saving")
        self._read_norms()
        with self._interval.paused():
            if not self.parts.checkpoints.saver.holds(self.state):
                self._fold_interval()
            self._save_points.note_save()
            return self.parts.checkpoints.save(self.state, is_best, wait)
