"""A training step by our loop, as `karat train` takes it, by a bare PyTorch loop, and each of its stages by itself.

The stages are transfer, model, optimizer and communication. All ranks measure together.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from karat_scale.commands.measure.interleaved import cuda_peak, wall_seconds
from karat_scale.data.augmentation.augment import TrainTransform
from karat_scale.data.backends import ImageSpec
from karat_scale.data.backends.images import SyntheticBackend
from karat_scale.data.batch import Batch, with_digest
from karat_scale.data.exact import Finish
from karat_scale.data.plan import BatchSlice
from karat_scale.engine.distributed import World, wait_for
from karat_scale.engine.engine import PRECISIONS, cast_images, pixel_dtype
from karat_scale.engine.optimizers import build_optimizer
from karat_scale.models import create_model, parameter_count
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import validate_recipe
from karat_scale.training.tasks.classification.task import ClassificationTask
from karat_scale.training.trainer import Trainer, silent_trainer

MANY = 10**6
FEWEST = 2  # steps, or measurements of a stage
WARM_UP = 3  # steps, on a card
STEP = "karat step"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


def synthetic_recipe(directory: str | Path, source: str, **sections: dict[str, Any]) -> Recipe:
    """Return a recipe of these sections on synthetic images, which saves and reports nothing unless they ask for it."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "bench", "dir": str(directory)},
        "data": {"backend": "synthetic"},
        "checkpoint": {"every_minutes": None},
        "log": {"every_steps": 1000, "trackers": []},
    }
    tree |= {name: {**tree.get(name, {}), **section} for name, section in sections.items()}
    return validate_recipe(tree, source)


def held_batch(spec: ImageSpec, size: int) -> Batch:
    """Return a batch of noise, the same for the same size, in page-locked memory if this process uses a GPU."""
    generator, side = torch.Generator().manual_seed(0), spec.image_size
    transform = TrainTransform(spec.augment, side)
    batch = Batch(
        images=torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, spec.num_classes, (size,), generator=generator),
        sample_ids=torch.arange(size),
        valid=torch.ones(size, dtype=torch.bool),
        draws=tuple(transform.draw(seed, side, side) for seed in range(size)),
    )
    return with_digest(batch.pin_memory() if torch.cuda.is_initialized() else batch)


class HeldBatches(SyntheticBackend):
    """Yields one batch again and again: making a batch may take longer than a step."""

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Yield a batch as large as the first slice."""
        held: Batch | None = None
        for part in slices:
            held = held or held_batch(self.spec, len(part.sample_ids))
            yield held


class OurLoop:
    """A run's trainer, fed with one batch again and again. On a card it also measures a step's memory and launches."""

    def __init__(self, recipe: Recipe, world: World, on_card: bool = False) -> None:
        self._device, self._on_card = world.device, on_card
        if on_card:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_card else 0
        self.trainer = silent_trainer(recipe, world, ClassificationTask)
        self.trainer.resume()
        task = self.trainer.task
        assert isinstance(task, ClassificationTask)
        self.task = task
        self.task.backend = HeldBatches(ImageSpec.of(recipe))
        self._batches = self.trainer.feed(MANY)
        self.run(WARM_UP if on_card else 1)
        self._memory, self._built = 0, 0
        if on_card:
            self._memory = torch.cuda.memory_allocated() - before
            self._built = torch.cuda.max_memory_allocated() - before

    def launch(self, steps: int) -> None:
        """Take steps as `Trainer.run` does, without waiting for the device."""
        for _ in range(steps):
            self.trainer.step(self.trainer.micro_batches(self._batches))
            self.trainer.save_or_stop()

    def run(self, steps: int) -> None:
        """Take steps, and wait for the device."""
        self.launch(steps)
        wait_for(self._device)

    def work(self) -> dict[str, float | None]:
        """Return the peak memory of training on a card, without what other loops keep there.

        With it, torch's profiler gives one step's kernels and launches, and how often the host waits for the device.
        """
        if not self._on_card:
            return {"peak_mb": None}
        peak = round(cuda_peak(lambda: self.run(1)) + self._memory / 1e6, 1)
        if self.trainer.recipe.train.records_graphs:  # a replay allocates nothing that torch counts; recording did
            peak = max(peak, round(self._built / 1e6, 1))
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, record_function(STEP):
            self.launch(1)
        self.run(0)
        events = list(profiler.events() or ())
        on_host = [event for event in events if event.device_type == DeviceType.CPU]
        end = next(event.time_range.end for event in on_host if event.name == STEP)  # then the profiler itself waits
        return {
            "peak_mb": peak,
            "kernels": sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events),
            "launches": sum(event.name.startswith(LAUNCHES) for event in events),
            "waits": sum(event.name.startswith(WAITS) and event.time_range.start < end for event in on_host),
        }


def bare_step(recipe: Recipe, world: World, shared: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a plain PyTorch step that takes images and targets and returns the loss. shared: whether ranks use DDP."""
    torch.manual_seed(recipe.run.seed)
    model: Any = create_model(recipe.model, recipe.attention).to(world.device)
    optimizer, precision = build_optimizer(model, recipe.optim, world.device), PRECISIONS[recipe.train.precision]
    called = DistributedDataParallel(model) if shared else model

    def step(images: Tensor, targets: Tensor) -> Tensor:
        with precision.autocast(world.device.type):
            logits = called(images)
        loss = nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def bare_loop(recipe: Recipe, steps: int, world: World) -> Callable[[], None]:
    """Return a function that takes `steps` steps in plain PyTorch, on the batch of `OurLoop`, held on the device."""
    step, prepare = bare_step(recipe, world), preparation(recipe, world.device)
    held = held_batch(ImageSpec.of(recipe), recipe.train.global_batch).to(world.device)

    def run() -> None:
        for _ in range(steps):
            step(*prepare(held))
        wait_for(world.device)

    return run


@dataclass(frozen=True)
class LoopSpeed:
    """The speed of a training loop.

    images_per_second: the rate of all ranks. waiting_share: the share of time spent waiting for data, on the slowest
    rank. steps: the number of timed steps. unreadable: the samples of rank 0 that could not be decoded.
    """

    images_per_second: float
    waiting_share: float
    steps: int
    unreadable: int

    @classmethod
    def of(cls, trainer: Trainer, seconds: float) -> "LoopSpeed":
        """Train for about `seconds`, after a first step that does not count. Nothing is evaluated or saved."""
        world, waited, unreadable = trainer.world, 0.0, 0

        @contextmanager
        def waiting() -> Iterator[None]:
            nonlocal waited
            before = time.perf_counter()
            yield
            waited += time.perf_counter() - before

        batches = trainer.feed(MANY, waiting)

        def counted() -> Iterator[Batch]:
            nonlocal unreadable
            for batch in trainer.micro_batches(batches):
                unreadable += len(batch.bad)
                yield batch

        trainer.step(counted())
        wait_for(world.device)
        begun, waited = time.perf_counter(), 0.0
        steps = unreadable = 0
        while steps < FEWEST or not world.any(time.perf_counter() - begun > seconds):
            trainer.step(counted())
            steps += 1
        wait_for(world.device)
        elapsed = max(world.gather(time.perf_counter() - begun))
        waiting_share = max(world.gather(waited / elapsed))
        return cls(steps * trainer.plan.global_batch / elapsed, waiting_share, steps, unreadable)


def repeated(measure: Callable[[], float], seconds: float, world: World) -> float:
    """Return the median of `measure` over about `seconds`, that of the slowest rank; all ranks measure equally often.

    The first call is the warm-up and does not count.
    """
    measure()
    begun = time.perf_counter()
    measured: list[float] = []
    while len(measured) < FEWEST or not world.any(time.perf_counter() - begun > seconds):
        measured.append(measure())
    return max(world.gather(statistics.median(measured)))


def preparation(recipe: Recipe, device: torch.device) -> Finish:
    """Return a function that makes the model's images and soft targets of a batch on the device."""
    finish = Finish(ImageSpec.of(recipe), pixel_dtype(recipe.train, device), recipe.model.num_classes)
    finish.soft = True
    return finish


class Stages:
    """The stages of a recipe's step on a model that is not DeepSpeed's: each measures for about `seconds`."""

    def __init__(self, model: nn.Module, recipe: Recipe, world: World) -> None:
        self._precision = PRECISIONS[recipe.train.precision]
        self._model = model.to(world.device, self._precision.weights).train()
        self._recipe, self._world = recipe, world
        self._prepare = preparation(recipe, world.device)

    def transfer_seconds(self, micro_batch: int, seconds: float) -> float:
        """Return the seconds to transfer one micro batch and to augment (if asked), normalise and mix it there."""
        batch = held_batch(ImageSpec.of(self._recipe), micro_batch)
        return self._repeated(lambda: self._prepare(batch.to(self._world.device)), seconds)

    def model_seconds(self, micro_batch: int, seconds: float) -> float:
        """Return the seconds of one forward and backward over a micro batch."""
        images, targets = self._prepare(held_batch(ImageSpec.of(self._recipe), micro_batch).to(self._world.device))
        images, objective = cast_images(images, self._precision), SoftTargetCrossEntropy()

        def pass_through() -> None:
            with self._precision.autocast(self._world.device.type):
                logits = self._model(images)
            objective(logits.float(), targets).backward()
            self._model.zero_grad(set_to_none=True)

        return self._repeated(pass_through, seconds)

    def communication(self, seconds: float) -> dict[str, float] | None:
        """Return the "seconds" and "bytes" of an all-reduce of all gradients at once; None for a single rank."""
        if self._world.size == 1:
            return None
        gradients = torch.zeros(parameter_count(self._model), dtype=self._precision.weights, device=self._world.device)
        one = self._repeated(lambda: dist.all_reduce(gradients), seconds)
        return {"seconds": one, "bytes": gradients.numel() * gradients.element_size()}

    def _repeated(self, run: Callable[[], object], seconds: float) -> float:
        return repeated(partial(wall_seconds, run, 1, self._world.device), seconds, self._world)


def optimizer_seconds(trainer: Trainer, recipe: Recipe, micro_batch: int, seconds: float) -> float:
    """Return the seconds of the engine's step on existing gradients, with clipping and the EMA."""
    device = trainer.world.device
    images, targets = preparation(recipe, device)(held_batch(ImageSpec.of(recipe), micro_batch).to(device))
    objective, steps = SoftTargetCrossEntropy(), 0

    def finish() -> None:
        nonlocal steps
        steps += 1
        trainer.engine.step()
        if trainer.ema is not None:
            trainer.ema.update(steps)

    def step() -> float:
        for micro in range(trainer.plan.accumulation):
            if micro:
                trainer.engine.step()
            trainer.engine.backward(objective(trainer.engine.forward(images), targets))
        return wall_seconds(finish, 1, device)

    return repeated(step, seconds, trainer.world)
