"""How fast the device runs the stages of a step: transfer, model, optimizer and communication.

All ranks measure together.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from karat_scale.data.augmentation.augment import TrainTransform
from karat_scale.data.augmentation.device_augment import DeviceAugment, Normalize
from karat_scale.data.augmentation.mixing import Mixer
from karat_scale.data.batch import Batch
from karat_scale.engine.devices import wait_for
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import PRECISIONS, cast_images, pixel_dtype
from karat_scale.models import parameter_count
from karat_scale.recipe import Recipe
from karat_scale.training.loop import Parts

FEWEST = 2


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, including the device's work."""
    wait_for(device)
    begun = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - begun


def repeated(action: Callable[[], float], seconds: float, world: World) -> float:
    """Return the median of `action` over about `seconds`; of the slowest rank, with the same count on each.

    The first call is the warm-up and does not count.
    """
    action()
    begun = time.perf_counter()
    measured: list[float] = []
    while len(measured) < FEWEST or not world.any(time.perf_counter() - begun > seconds):
        measured.append(action())
    return slowest(statistics.median(measured), world)


def slowest(value: float, world: World) -> float:
    """Return the largest of all ranks' values."""
    return max(world.gather(value))


def random_batch(recipe: Recipe, size: int) -> Batch:
    """Return a batch of noise, in page-locked memory if there is a GPU, as from the loader."""
    side = recipe.model.image_size
    transform = TrainTransform(recipe.augment, side)
    batch = Batch(
        images=torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8),
        labels=torch.randint(0, recipe.model.num_classes, (size,)),
        sample_ids=torch.arange(size),
        valid=torch.ones(size, dtype=torch.bool),
        draws=tuple(transform.draw(seed, side, side) for seed in range(size)),
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


class Preparation:
    """Convert a batch in RAM to the model's input: transfer, augment, normalise, mix."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self._augment = DeviceAugment(recipe.augment, recipe.model.image_size)
        self._normalize = Normalize(recipe.augment.mean, recipe.augment.std, pixel_dtype(recipe.train, world.device))
        self._mixer = Mixer(recipe.augment, recipe.model.num_classes, recipe.run.seed)
        self._device = world.device

    def __call__(self, cpu_batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        batch = cpu_batch.to(self._device)
        mix = self._mixer.params(batch.epoch, batch.batch, *batch.images.shape[-2:])
        images = self._normalize(self._augment(batch.images, batch.draws), mix)
        return images, self._mixer.targets(batch.labels, mix)


def transfer_seconds(recipe: Recipe, micro_batch: int, seconds: float, world: World) -> float:
    """Return the seconds to transfer one micro batch and to augment (if asked), normalise and mix it there."""
    prepare, batch = Preparation(recipe, world), random_batch(recipe, micro_batch)
    return repeated(lambda: timed(lambda: prepare(batch), world.device), seconds, world)


class BareModel:
    """Forward and backward without DeepSpeed: the time of the model by itself."""

    def __init__(self, model: nn.Module, recipe: Recipe, world: World) -> None:
        self._precision = PRECISIONS[recipe.train.precision]
        self._model = model.to(world.device, self._precision.weights).train()
        self._recipe, self._world = recipe, world
        self._prepare = Preparation(recipe, world)
        self._objective = SoftTargetCrossEntropy()

    def leave_device(self) -> None:
        """Free the device's memory."""
        self._model.to("cpu")

    def seconds(self, micro_batch: int, seconds: float) -> float:
        """Return the seconds of one forward and backward over a micro batch, measured for about `seconds`."""
        images, targets = self._prepare(random_batch(self._recipe, micro_batch))
        images = cast_images(images, self._precision)

        def pass_through() -> None:
            with self._precision.autocast(self._world.device.type):
                logits = self._model(images)
            self._objective(logits.float(), targets).backward()
            self._model.zero_grad(set_to_none=True)

        return repeated(lambda: timed(pass_through, self._world.device), seconds, self._world)


def optimizer_seconds(parts: Parts, recipe: Recipe, micro_batch: int, seconds: float) -> float:
    """Return the seconds of the engine's step on existing gradients, with clipping and the EMA."""
    images, targets = Preparation(recipe, parts.world)(random_batch(recipe, micro_batch))
    objective, steps = SoftTargetCrossEntropy(), 0

    def finish() -> None:
        nonlocal steps
        steps += 1
        parts.engine.step()
        if parts.ema is not None:
            parts.ema.update(steps)

    def step() -> float:
        for _ in range(parts.plan.accumulation - 1):
            parts.engine.backward(objective(parts.engine.forward(images), targets))
            parts.engine.step()
        parts.engine.backward(objective(parts.engine.forward(images), targets))
        return timed(finish, parts.world.device)

    return repeated(step, seconds, parts.world)


@dataclass(frozen=True)
class Communication:
    """The all-reduce of all gradients at once: seconds, and bytes that each rank sends."""

    seconds: float
    bytes: int


def communication(model: Any, recipe: Recipe, seconds: float, world: World) -> Communication | None:
    """Time an all-reduce of the size of the gradients, or return None for a single rank."""
    if world.size == 1:
        return None
    dtype = PRECISIONS[recipe.train.precision].weights
    gradients = torch.zeros(parameter_count(model), dtype=dtype, device=world.device)
    one = repeated(lambda: timed(lambda: dist.all_reduce(gradients), world.device), seconds, world)
    return Communication(one, gradients.numel() * gradients.element_size())
