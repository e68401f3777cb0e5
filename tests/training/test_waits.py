"""The host does not wait for the device within a step: nothing is read, copied or synchronised there."""

from typing import Any

import pytest
import torch
from torch import nn

from karat_scale.data.augmentation.mixing import Mixer
from karat_scale.data.batch import Batch
from karat_scale.engine.distributed import World
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from karat_scale.training.tasks.classification.task import TrainState, evaluate
from karat_scale.training.trainer import Trainer
from tests.engine.counting import Counting, as_on_a_gpu
from tests.small_engines import make_trainer

__all__ = ["as_on_a_gpu"]

EMULATED = torch.device("meta")
QUIET = ("data.workers=0", "log.every_steps=1000", "train.epochs=100", "checkpoint.every_minutes=null")
KERNELS = 40


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_reads_nothing(small_recipe, world, as_on_a_gpu, precision) -> None:
    trainer = make_trainer(small_recipe(*QUIET, f"train.precision={precision}", "deepspeed.config=zero0"), world)
    batches = trainer.feed(100)
    for _ in range(20):  # until the next agreement is more than a step away
        trainer.step(trainer.micro_batches(batches))
        trainer.save_or_stop()
    trainer._save_points.agreement._next = 1000
    for _ in range(5):
        with Counting() as counts:
            trainer.step(trainer.micro_batches(batches))
            trainer.save_or_stop()
        assert counts.reads == 0
    assert trainer.state.step == 25


class EmulatedEngine:
    """An engine on a device that computes nothing, so its values cannot be read; its own kernels are not counted."""

    loss_scale = None

    def __init__(self, model: nn.Module) -> None:
        self.module = model.to(EMULATED)
        self.counts: Any = None

    def set_lr(self, lr: float) -> None:
        pass

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with self.counts.without_kernels():
            logits: torch.Tensor = self.module(images)
        return logits

    def backward(self, loss: torch.Tensor) -> None:
        with self.counts.without_kernels():
            loss.backward()

    def step(self) -> torch.Tensor:
        with self.counts.without_kernels():
            norm = nn.utils.get_total_norm([one.grad for one in self.module.parameters() if one.grad is not None])
        return norm


def _emulated(recipe: Recipe, world: World) -> Trainer:
    trainer = make_trainer(recipe, world)
    model = create_model(recipe.model, recipe.attention)
    engine: Any = EmulatedEngine(model)
    trainer.world, trainer.engine, trainer.ema = World(0, 1, 0, EMULATED), engine, None
    return trainer


def _batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    made = Batch(images, torch.arange(8) % 4, torch.arange(8), torch.ones(8, dtype=torch.bool), batch=number, digest=1)
    return made.to(EMULATED)


def test_what_the_loop_does_with_a_batch_stays_on_the_device(small_recipe, world) -> None:
    recipe = small_recipe(*QUIET, "attention.kind=softmax", "augment.mixup=0.8", "augment.cutmix=1.0")
    trainer = _emulated(recipe, world)
    trainer.begin(TrainState(step=1))  # the first step is logged
    kinds = set()
    for number in range(8):
        batch = _batch(number)
        kinds.add(Mixer(recipe.augment, 4, recipe.run.seed).params(0, number, 16, 16).kind)
        with Counting() as counts:
            trainer.engine.counts = counts  # type: ignore[attr-defined]
            trainer.step([batch])
        assert counts.copies == 0
        assert counts.kernels.total() < KERNELS, counts.kernels
    assert kinds == {"mixup", "cutmix"}
    assert len(trainer._interval._norms) == 8
    with pytest.raises((NotImplementedError, RuntimeError)):  # so nothing has been read before
        trainer.look()


def test_an_evaluation_stays_on_the_device_until_its_end(small_recipe, world, monkeypatch) -> None:
    recipe = small_recipe(*QUIET, "attention.kind=softmax")
    trainer = _emulated(recipe, world)
    batches = [_batch(number) for number in range(4)]
    monkeypatch.setattr(trainer.task.backend, "eval_batches", lambda slices: batches)
    monkeypatch.setattr("karat_scale.training.tasks.classification.task.DeviceFeed", Plain)
    done: list[int] = []
    task: Any = trainer.task
    forward, counts = trainer.engine.forward, Counting()
    trainer.engine.counts = counts  # type: ignore[attr-defined]
    with counts, pytest.raises(NotImplementedError, match="meta"):  # the sums are read at the end
        evaluate(forward, task.backend, task.normalize, 8, trainer.world, lambda *told: done.append(told[0]))
    assert done == [1, 2, 3, 4]
    assert counts.reads == 0
    assert counts.copies == 0


class Plain:
    """A feed of batches that are ready."""

    def __init__(self, batches: list[Batch], device: torch.device) -> None:
        self._batches = iter(batches)

    def __next__(self) -> Batch:
        return next(self._batches)

    def fetch_ahead(self) -> None:
        pass
