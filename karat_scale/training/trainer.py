"""The trainer of one rank: model, engine and data of a recipe, and the loop over its steps.

A trainer is built in the order in which mistakes show soonest: plan, model, engine. It resumes from a checkpoint, takes
global batches in order, evaluates, saves, and stops when asked. Training is a function of the state: `run` may stop
after any step and resume from its checkpoint, and the weights come out the same.

The host launches a step's work and does not wait for it. Loss and gradient norms stay on the device until a log line,
an evaluation, a save, or an agreement of the ranks, about once a second. Only then are skipped steps
(gradients that are not finite) and loss spikes found and noted; the recipe says when they end the run.

On a CPU a stop may abandon a step between two micro batches, so that it need not wait for minutes. Weights change only
at a step's end. What changes earlier is restored, and the resumed run repeats the step with the same bits. Gradients
are not kept in a checkpoint.
"""

import math
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from typing_extensions import Self

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.plan import total_steps
from karat_scale.engine.distributed import World, device_name
from karat_scale.engine.engine import Engine
from karat_scale.engine.memory import apply_recompute
from karat_scale.engine.optimizers import Ema
from karat_scale.engine.reporting import interval
from karat_scale.engine.reporting.goodput import wall_time
from karat_scale.engine.reporting.progress import Reporter, SilentDisplay, read_events
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import DivergedError, OtherModelError, RunDirectoryError
from karat_scale.models.layers import freeze
from karat_scale.models.operators import check_implementation, describe_implementation
from karat_scale.recipe import RunRecipe
from karat_scale.training.agreement import FIRST_MINUTES, Agreement, BestInterval, SavePoints, StoppedError, StopSignals
from karat_scale.training.outcome import Incidents, Spikes
from karat_scale.training.run_directory import RunDirectory, leave_for, refuse_another_model
from karat_scale.training.task import AfterStep, OnBatch, Scores, Task, Waiting
from karat_scale.training.weights_file import initialise

# Warn of a block with a larger share of scores beyond the reach of its functions.
MOST_BEYOND_REACH = 0.05


class Trainer:
    """Trains a task's recipe in a run's directory. As a context manager, it closes the task and releases the engine.

    Args:
        step: the step from which it will probably train. Data workers make its batches while the model is built.

    Raises:
        UserError: the recipe does not fit the data or the world.
    """

    def __init__(
        self, task: Task, directory: RunDirectory, signals: StopSignals | None = None, step: int | None = None
    ) -> None:
        recipe, world, reporter = task.recipe, task.world, task.reporter
        self.task, self.recipe, self.world, self.reporter = task, recipe, world, reporter
        self.directory = directory
        self.signals = signals or StopSignals()
        self.plan = plan = task.plan()
        self.total_steps = total_steps(plan.steps_per_epoch, recipe.train.epochs, recipe.train.max_steps)
        self.schedule = task.schedule(plan.steps_per_epoch)
        self._early: tuple[int, int, DeviceFeed[Any]] | None = None
        if step is not None and not plan.lanes:  # a stream resumes where its checkpoint says
            end = self._last_step(task.stop_step)
            waiting = partial(Trainer._waiting_for_data, weakref.proxy(self))  # with self it would keep a failed run
            self._early = step, end, task.train_batches(plan.slices(step, end), waiting)
        backbone = starting_model(task, directory, self.signals)
        model = task.build_model(backbone)
        if chosen := describe_implementation(model, world.device):  # a detector has softmax in some blocks instead
            reporter.info(chosen)
        if recipe.train.freeze:
            reporter.info(freeze(model, recipe.train.freeze))
        torch.manual_seed(recipe.run.seed + 1 + world.rank)  # but other random numbers on each rank in training
        if recomputed := apply_recompute(backbone, recipe):
            reporter.info(recomputed)
        self.engine = engine = Engine(model, recipe, world, plan.micro_batch, task.groups(model))
        if recipe.train.compile:
            engine.compile(recipe.train.compile)
            reporter.info(f"the first step compiles the model (train.compile = {recipe.train.compile})")
        self.ema = Ema(engine.deepspeed, recipe.train) if recipe.train.ema_decay else None
        self.checkpoints: Checkpoints[Any] = Checkpoints(
            directory.store, engine, self.ema, world, recipe, reporter, task.kind, task.state_type, directory.near
        )
        histograms = interval.HeadHistograms(engine, recipe.log, reporter)
        self.after_step: list[AfterStep] = [histograms, *task.after_step(engine, directory, self.total_steps)]
        window = recipe.log.profile_steps
        if window is not None and window[1] > self.total_steps:
            if world.is_main:
                reporter.warn(
                    f"log.profile_steps = {[*window]}: training has {self.total_steps} steps, so none is traced"
                )
            window = None
        self._profiler = interval.StepProfiler(window, directory.profile, world, reporter)
        self._incidents = Incidents(directory.path / "incidents", directory.store, plan, task.replays)
        self.begin(task.state_type())

    def begin(self, state: RunState) -> None:
        """Train from `state` on; the weights must be of this state."""
        recipe, world = self.recipe, self.world
        self.state = state
        self.grad_norm: float | None = None
        """The gradient norm of the last step that was looked at."""
        deviations = recipe.train.detect_spikes
        self._spikes = Spikes(deviations) if deviations is not None else None
        self._beyond_reach: set[int] = set()
        """The blocks that were warned of."""
        self._interval, self._own_time = interval.Interval(world.device), interval.OwnTime(world.device)
        self._interval.resume_losses(state.unreported_steps, state.unreported_losses, world)
        minutes = FIRST_MINUTES if recipe.checkpoint.every == "auto" else recipe.checkpoint.every_minutes
        self._save_points = SavePoints(world, self.signals, recipe.checkpoint.every_steps, minutes)
        self._best_interval: BestInterval | None = None
        self._cost: tuple[float, float] | None = None
        self._evaluating = Agreement(world)
        self._compiles = self._compiles_evaluation = bool(recipe.train.compile)
        # A step can be given up where this rank is alone, on a CPU, and a forward pass changes no statistics.
        is_alone = world.size == 1 and world.device.type == "cpu"
        self._can_give_up = self.plan.accumulation > 1 and is_alone and not self.engine.statistics
        if state.step > 0:  # so that a checkpoint of this very step has the rate that an undisturbed run has there
            self.engine.set_lr(self.schedule.lr(state.step - 1))

    def resume(self, is_start: bool = True) -> RunState:
        """Resume from the newest intact checkpoint; begin a new run if there is none. Returns the state.

        `resume.from` counts only at a run's first start: after that the run has its own checkpoints.

        Args:
            is_start: false if the run only continues with another model.

        Raises:
            RunDirectoryError: no checkpoint is intact, or it is of another model, or of other data.
        """
        recipe, task, directory = self.recipe, self.task, self.directory
        branch = "" if has_checkpoints(directory, self.world) else recipe.resume.from_
        if branch:
            refuse_another_model(Path(branch).expanduser(), recipe)
        fresh = partial(task.build_fresh, directory)
        try:
            state: RunState = self.checkpoints.load(branch, fresh, is_start) or task.begin()
        except RunDirectoryError as error:
            if branch and isinstance(error.__cause__, OtherModelError):
                refuse_another_model(Path(branch).expanduser(), recipe, by_shapes=True)
            raise
        task.check_resumed(state)
        data = task.num_train, task.train_identity, task.classes, task.num_val
        if other := directory.keep_data(state, *data, recipe, is_branch=bool(branch)):
            self.reporter.info(f"the run continues with other data: {other}")
        self.begin(state)
        return state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.task.close()
        self.release()

    def run(self, stop_step: int | None = None) -> bool:
        """Train to the end, or to `stop_step`; evaluate if that is due, and save. Returns whether training goes on.

        Raises:
            DivergedError: the loss or the gradients are not finite, and the recipe says to end there.
            StoppedError: a signal asked to stop; the state is saved, or `saved` of the error says it is not.
            RunDirectoryError: the last checkpoint could not be saved, or the first, or the disk does not take the
                metrics.
        """
        state, checkpoints = self.state, self.checkpoints
        stop_step = self._last_step(stop_step)
        try:
            self._write_if_due()
            self._evaluate_if_due()
            batches = self.feed(stop_step)
            while state.step < stop_step:
                with self._profiler.step(state.step + 1):
                    self.step(self.micro_batches(batches))
                self._write_if_due()
                self._evaluate_if_due()
                self.save_or_stop()
                if checkpoints.has_only_failed:
                    raise checkpoints.store.not_saved(checkpoints.problem)
        except StoppedError as stopped:
            stopped.saved = self._save(wait=True)
            if stopped.saved:
                checkpoints.remove_near()
            raise
        if not self._save(wait=True):
            raise checkpoints.store.not_saved(checkpoints.problem)
        if stop_step == self.total_steps:
            checkpoints.remove_near()
        self._profiler.close(state.step)  # before another image size
        return stop_step < self.total_steps

    def release(self) -> None:
        """Let go of weights, averages and optimizer states; the trainer cannot be used afterwards."""
        self.ema = self.checkpoints.ema = None
        self.engine.release()

    def _last_step(self, stop_step: int | None) -> int:
        return self.total_steps if stop_step is None else min(stop_step, self.total_steps)

    def feed(self, stop_step: int, waiting: Waiting | None = None) -> DeviceFeed[Any]:
        """Return this rank's micro batches from the next step to `stop_step`; `waiting` is as for DeviceFeed."""
        early, self._early = self._early, None
        if early is not None and early[:2] == (self.state.step, stop_step) and waiting is None:
            return early[2]
        del early  # and its workers
        slices = self.plan.slices(self.state.step, stop_step)
        return self.task.train_batches(slices, waiting or self._waiting_for_data)

    @contextmanager
    def _waiting_for_data(self) -> Iterator[None]:
        self.reporter.beat("waiting for data", self.state.step + 1)
        try:
            with self._own_time.data():
                yield
        finally:
            self.reporter.beat("training")  # what comes next may be a wait for the device

    def micro_batches(self, batches: DeviceFeed[Any]) -> Iterator[Any]:
        """Yield one step's micro batches. The next is fetched when a step's work is launched, while the device does it.

        Raises StoppedError between them if a signal asks to stop and the step can be given up.
        """
        if self._can_give_up:  # what a step changes before its last micro batch
            rng, counts, stand = torch.get_rng_state(), self.task.counts, self._interval.stand()
        for number in range(self.plan.accumulation):
            if number and self._can_give_up and self.signals.received is not None:
                torch.set_rng_state(rng)
                self.task.counts = counts
                self._interval.go_back(stand)
                raise StoppedError
            yield next(batches)
            batches.fetch_ahead()

    def step(self, micro_batches: Iterable[Any]) -> torch.Tensor:
        """Train on this rank's part of one global batch, on the device; returns the gradient norm, 0-dim."""
        state = self.state
        lr = self.schedule.lr(state.step)
        self.engine.set_lr(lr)
        *_, norm = [self._pass_through(batch) for batch in micro_batches]
        assert norm is not None  # the last micro batch ends the step
        self._compiles = False
        state.step += 1
        state.samples += self.recipe.train.global_batch
        self._interval.add_norm(norm)
        if self.ema is not None:
            self.ema.update(state.step, was_taken=norm < math.inf)
        self._interval.finish_step()
        if state.seconds_to_first_step is None:
            state.seconds_to_first_step = round(time.time() - psutil.Process().create_time(), 2)
        # The first step, too: people look whether a loss is there.
        if state.step % self.recipe.log.every_steps == 0 or state.step in (1, self.total_steps):
            self._report(lr)
        else:
            self.reporter.display.advance(state.step, self.total_steps)
        return norm

    def _pass_through(self, batch: Any) -> torch.Tensor | None:
        """Run forward and backward; after the last micro batch of a step, step and return the gradient norm."""
        accumulation = self.plan.accumulation
        self.reporter.beat("compiling" if self._compiles else "forward")
        with self._own_time.forward():
            losses = self.task.losses(self.engine.forward, batch)
        self.reporter.beat("compiling" if self._compiles else "backward")
        self.engine.backward(losses["loss"])
        self.reporter.beat("compiling" if self._compiles else "optimizer")
        norm = self.engine.step()
        self._interval.add_losses(losses, accumulation)
        if self._spikes is not None:
            self._interval.add_to_step(losses["loss"].detach() / accumulation)
        return norm

    def _report(self, lr: float) -> None:
        state, world = self.state, self.world
        self.look()
        losses, steps = self._interval.take_losses()
        sums = world.sum(torch.stack([losses.pop(interval.COUNTED), *losses.values()]))
        means = dict(zip(losses, (sums[1:] / sums[0]).tolist(), strict=True))
        self.reporter.pace(self._own_time.take() / steps)
        rate = self._fold_interval()
        with self._interval.paused():  # the first report may count FLOPs
            more = {**self.task.figures(state, rate), **self._look_at_scores()}
        figures = {
            "epoch": (state.step - 1) // self.plan.steps_per_epoch,
            "samples": state.samples,
            "total_steps": self.total_steps,
            **means,
            "lr": lr,
            "grad_norm": self.grad_norm,
            **({"loss_scale": scale} if (scale := self.engine.loss_scale) is not None else {}),
            "images_per_second": rate,
            **more,
            "skipped_steps": state.skipped_steps,
            "peak_memory_mb": state.peak_memory_mb,
            "resident_memory_mb": round(interval.resident_memory_mb(), 1),
        }
        self.reporter.train(state.step, self.total_steps, figures)

    def _look_at_scores(self) -> dict[str, Any]:
        """Return the shares of scores beyond the reach of the functions; warn of a block once."""
        found = self.task.look_at_scores(self.engine)
        for block, beyond in found.items():
            if beyond.share > MOST_BEYOND_REACH and block not in self._beyond_reach:
                self._beyond_reach.add(block)
                self.reporter.beyond_reach(self.state.step, block, beyond.share, beyond.reach)
        shares = {block: round(beyond.share, 6) for block, beyond in found.items()}
        return {"beyond_reach": max(shares.values()), "beyond_reach_by_block": shares} if shares else {}

    def _fold_interval(self) -> float | None:
        """Add what the interval counted to the state, on all ranks; returns the interval's images per second."""
        world, state = self.world, self.state
        steps, seconds = self._interval.take_time()
        samples = steps * self.recipe.train.global_batch
        machine = f"{world.size} x {device_name(world.device)}"
        if state.timed_on != machine:
            state.timed_on, state.timed_samples, state.timed_seconds = machine, 0, 0.0
        state.timed_samples += samples
        state.timed_seconds += seconds
        state.skipped_steps += self.engine.take_skipped_steps()
        state.peak_memory_mb = max(state.peak_memory_mb, world.max(int(interval.peak_memory_mb(world.device))))
        self.task.fold(state)
        return samples / seconds if samples else None

    @property
    def owes_evaluation(self) -> bool:
        """Whether the model of the current step is due to be evaluated, and was not yet."""
        state = self.state
        every = self.recipe.train.eval_every_epochs * self.plan.steps_per_epoch
        due = state.step > 0 and (state.step % every == 0 or state.step == self.total_steps)
        return due and state.evaluated_step != state.step

    def _evaluate_if_due(self) -> None:
        state = self.state
        if not self.owes_evaluation:
            return
        self.look()
        self._evaluating = Agreement(self.world)
        self.reporter.beat("compiling" if self._compiles_evaluation else "evaluating")
        with self._interval.paused():
            scores, more = self.evaluate(self._during_evaluation)
            self._compiles_evaluation = False
            figures = {"samples": state.samples, **scores.to_json(), **more}
            self.checkpoints.forget_lost_best(state)
            is_best = state.record(figures)
            of = f" ({figures['weights']} weights)" if self.recipe.train.ema_decay else ""
            said = f"eval at step {state.step}: {scores}{of}"
            self.reporter.event("eval", state.step, said, figures)
            if is_best and self.recipe.checkpoint.keep_best:
                self._save()

    def _during_evaluation(self, done: int, total: int) -> None:
        self.reporter.beat("evaluating")
        self.reporter.display.evaluate(done, total)
        checkpoints = self.checkpoints
        agreed = self._evaluating.maxima(done, self.signals.received is not None, checkpoints.is_busy)
        if agreed is None:
            return
        stop, busy = agreed
        if stop:
            raise StoppedError
        if checkpoints.is_under_way and not busy:
            checkpoints.advance()

    def _write_if_due(self) -> None:
        for one in self.after_step:
            if one.due(self.state.step):
                with self._interval.paused():
                    one.write(self.state.step)

    def save_or_stop(self) -> None:
        """Do what the ranks agree to do after a step."""
        step, checkpoints = self.state.step, self.checkpoints
        if self._save_points.agreement.is_due(step):
            self.look()
        decision = self._save_points.decide(step, checkpoints.is_busy)
        if decision.is_idle and checkpoints.is_under_way:
            checkpoints.advance()
        if self.recipe.checkpoint.every == "auto" and self.world.is_main:
            self._choose_interval()
        if decision.stop and step < self.total_steps:
            raise StoppedError
        if decision.save:
            self._save()
        elif decision.save_near and checkpoints.saves_near(self.state):
            self._save(near=True)

    def _choose_interval(self) -> None:
        """With `checkpoint.every=auto`, choose the time until the next save by the cost of the last one."""
        cost = self.checkpoints.cost
        if cost is None or cost is self._cost:
            return
        self._cost = cost
        if self._best_interval is None:
            self._best_interval = BestInterval(wall_time(read_events(self.directory.metrics_file)))
        self._save_points.every_minutes, said = self._best_interval.choose(*cost)
        if said:
            self.reporter.info(said)

    def _save(self, wait: bool = False, near: bool = False) -> bool:
        """Save this state unless it is saved; return whether it is or, without `wait`, will be unless a rank fails."""
        self.look()
        self.reporter.beat("saving")
        with self._interval.paused():
            if not self.checkpoints.holds(self.state):
                self._fold_interval()
                state = self.state
                state.unreported_steps, state.unreported_losses = self._interval.losses_of_ranks(self.world)
            self._save_points.note_save(near)
            if near:
                return self.checkpoints.save_near(self.state)
            # Asked of the state, as the save at the evaluation may have failed.
            is_best = self.state.best_step == self.state.step and self.recipe.checkpoint.keep_best
            return self.checkpoints.save(self.state, is_best, wait)

    def evaluate(self, on_batch: OnBatch) -> tuple[Scores, dict[str, Any]]:
        """Evaluate the weights that the recipe names; returns the scores, and what else the event says of the model."""
        use_ema = self.ema is not None and self.recipe.train.eval_weights != "raw"
        weights = self.ema.in_place_of_weights(StoppedError) if use_ema and self.ema else nullcontext()
        self.engine.share_statistics()
        self.engine.module.eval()
        try:
            with weights:
                scores = self.task.evaluate(self.engine.forward, on_batch)
                more = self.task.look_inside(self.engine)
        finally:
            self.engine.module.train()
        return scores, {"weights": "ema" if use_ema else "raw", **more}

    def look(self) -> None:
        """Look which steps were skipped since the last look, and which losses jumped; the same on all ranks.

        Raises:
            DivergedError: the recipe says to stop at such a step, or as many in a row were skipped as it allows.
        """
        state = self.state
        norms = self._interval.take_norms()
        for step, norm in enumerate(norms, start=state.step - len(norms) + 1):
            self.grad_norm = norm
            state.skipped_in_row = 0 if math.isfinite(norm) else state.skipped_in_row + 1
            if state.skipped_in_row:
                self._note_skipped(step, norm)
        if self._spikes is None:
            return
        losses = self._interval.take_step_losses()
        if not len(losses):
            return
        means = (self.world.sum(losses) / self.world.size).tolist()
        for place, loss, limit in self._spikes.find(means):
            if self.world.is_main:
                step = state.step - len(losses) + 1 + place
                advice = self._incidents.note(step, "spike", loss=loss, limit=limit)
                self.reporter.spike(step, loss, limit, advice)

    def _note_skipped(self, step: int, norm: float) -> None:
        state, train = self.state, self.recipe.train
        stop = train.on_nonfinite == "stop"
        what, advice = f"step {step} has a loss or gradients that are not finite", ""
        if self.world.is_main and train.precision != "fp16":  # where the loss scale overflows now and then
            advice = f"; {self._incidents.note(step, 'not finite', grad_norm=norm)}"
        if not stop and state.skipped_in_row < train.max_skipped_steps:
            if self.world.is_main:
                self.reporter.warn(f"{what}; skipped{advice}")
            return
        self.checkpoints.finish()
        allowed = f", the last of {state.skipped_in_row} in a row (train.max_skipped_steps = {train.max_skipped_steps})"
        rule = " and train.on_nonfinite = stop" if stop else allowed
        last = self.checkpoints.store.pointed("latest")
        kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        leave = f" ({leave_for(self.recipe, 'optim.lr')})" if last else ""
        raise DivergedError(f"{what}{rule}; {kept}; lower optim.lr{leave} or look into the data{advice}")


def starting_model(task: Task, directory: RunDirectory, signals: StopSignals) -> nn.Module:
    """Return the transformer that a task's run starts with, before what is built around it. Collective.

    Raises:
        UserError: it cannot be built, cannot run on this device, or does not fit the weights of `init_from`.
        StoppedError: a signal asked to stop.
    """
    recipe, world, reporter = task.recipe, task.world, task.reporter
    task.prepare(directory)
    torch.manual_seed(recipe.run.seed)  # the same initial weights on every rank and at every world size
    backbone = task.build_backbone(directory)
    check_implementation(backbone, world.device)
    if recipe.init_from and not has_checkpoints(directory, world):
        reporter.info(initialise(backbone, recipe, world, task.take_weights))
        task.convert(backbone, directory, signals)
    return backbone


def has_checkpoints(directory: RunDirectory, world: World) -> bool:
    """Return whether rank 0 sees checkpoints of the run: a network file system may show other ranks older listings."""
    return world.on_main(lambda: bool(directory.store.names()))


def silent_trainer(recipe: RunRecipe, world: World, task_type: type[Task]) -> Trainer:
    """Return the trainer of `karat train`, which prints nothing here; `resume` lets it resume what is there."""
    directory = RunDirectory(recipe.run.dir)
    world.on_main(lambda: directory.store.root.mkdir(parents=True, exist_ok=True))
    task = task_type(recipe, world, Reporter(SilentDisplay(), None))
    try:
        return Trainer(task, directory)
    except BaseException:
        task.close()
        raise
