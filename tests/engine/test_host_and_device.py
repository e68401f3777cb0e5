"""On a GPU the host must run ahead of the device. These tests count, without a GPU, how often a step makes it wait."""

import copy
import math
from typing import Any

import pytest
import torch

from karat_scale.commands.plan.time import StepLaunches
from karat_scale.commands.plan.tracing import Launches
from karat_scale.engine.deepspeed_config import load_ds_config
from karat_scale.engine.deepspeed_internals import master_weights, refresh_module
from karat_scale.engine.engine import Engine
from karat_scale.engine.optimizers import Ema
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from tests.engine.counting import Counting, as_on_a_gpu, waits
from tests.small_engines import equal

__all__ = ["as_on_a_gpu", "waits"]
STAGES, PRECISIONS = ("zero0", "zero1", "zero2", "zero3"), ("fp32", "bf16", "bf16_weights")
FEW = {("zero0", "fp32"), ("zero0", "bf16"), ("zero1", "fp32"), ("zero2", "bf16_weights"), ("zero3", "bf16")}
FEW |= {("zero3", "bf16_weights")}
CASES = [
    pytest.param(stage, precision, marks=() if (stage, precision) in FEW else pytest.mark.slow)
    for stage in STAGES
    for precision in PRECISIONS
    if (stage, precision) != ("zero0", "bf16_weights")
]


class Trainer:
    """An engine and its average of the weights, which decide on the device whether to skip a step."""

    def __init__(self, recipe: Recipe, world: Any) -> None:
        torch.manual_seed(0)
        self.engine = Engine(create_model(recipe.model, recipe.attention), recipe, world, 4)
        self.ema = Ema(self.engine.deepspeed, recipe.train)
        self._micro_batches = recipe.train.global_batch // 4

    def step(self, number: int, factor: float = 1.0) -> torch.Tensor:
        """Take a step as the training loop does, reading no scalar. `factor` scales the first micro batch's loss."""
        for micro in range(self._micro_batches):
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(10 * number + micro))
            loss = torch.nn.functional.cross_entropy(self.engine.forward(images), torch.arange(4))
            self.engine.set_lr(1e-2)
            self.engine.backward(loss * (1.0 if micro else factor))
            norm = self.engine.step()
        assert norm is not None
        self.ema.update(number, norm < math.inf)
        return norm

    def learned(self) -> Any:
        """Return copies of the master weights, optimizer states and averages."""
        states = [dict(state) for state in self.engine.deepspeed.basic_optimizer.state.values()]
        return copy.deepcopy([master_weights(self.engine.deepspeed), states, self.ema.shards])


@pytest.mark.parametrize(("config", "precision"), CASES)
def test_a_step_neither_stops_the_host_nor_reads_a_scalar(small_recipe, world, as_on_a_gpu, waits, config, precision):
    recipe = small_recipe(f"deepspeed.config={config}", f"train.precision={precision}", "train.micro_batch=4")
    trainer = Trainer(recipe, world)
    for number in range(1, 4):  # stage 3 learns the order of layers in the first two, and compares it between ranks
        waits.clear()
        with Counting() as counting:
            norm = trainer.step(number)
    # At stage 3 a single rank has nothing to gather. It makes a copy instead, and waits for it.
    assert (waits["host"], counting.reads) == (config == "zero3", 0)
    assert norm.ndim == 0
    assert norm.isfinite()


def test_weights_are_gathered_after_they_are_written(small_recipe, world, as_on_a_gpu, waits) -> None:
    """With DeepSpeed's own waits alone, the next forward pass could gather the weights before the step writes them."""
    trainer = Trainer(small_recipe("deepspeed.config=zero3", "train.micro_batch=4"), world)
    gathers = trainer.engine.deepspeed.optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
    for change in (lambda: trainer.step(1), lambda: refresh_module(trainer.engine.deepspeed)):
        gathers.waited_for.clear()
        change()
        assert len(gathers.waited_for) == 1


def test_muon_cannot_skip_on_the_device_and_the_norm_is_read_once(small_recipe, world, as_on_a_gpu) -> None:
    trainer = Trainer(small_recipe("optim.name=muon", "train.precision=bf16", "train.micro_batch=4"), world)
    for number in range(1, 3):
        with Counting() as counting:
            trainer.step(number)
        assert counting.reads == 1
    before = trainer.learned()
    assert trainer.step(3, factor=float("nan")).isnan()
    assert equal(trainer.learned(), before)
    assert trainer.engine.take_skipped_steps() == 1


@pytest.mark.parametrize(("config", "precision"), CASES)
def test_a_step_skipped_on_the_device_changes_nothing(small_recipe, world, as_on_a_gpu, config, precision) -> None:
    recipe = small_recipe(f"deepspeed.config={config}", f"train.precision={precision}", "train.micro_batch=4")
    trainer = Trainer(recipe, world)
    trainer.step(1)
    before = trainer.learned()
    assert trainer.step(2, factor=float("nan")).isnan()
    assert equal(trainer.learned(), before)
    assert trainer.engine.take_skipped_steps() == 1
    assert trainer.engine.take_skipped_steps() == 0
    assert trainer.step(3).isfinite()
    assert not any(map(torch.equal, master_weights(trainer.engine.deepspeed), before[0]))


@pytest.mark.parametrize("config", ["zero0", "zero1"])
def test_a_skipped_step_leaves_the_statistics_of_batch_norm(small_recipe, world, as_on_a_gpu, config) -> None:
    """Before the fix, they were not finite from that step on."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0, "lr_scale": 1.0}]
    engine = Engine(model, small_recipe(f"deepspeed.config={config}"), world, 4, groups)

    def step(images: torch.Tensor) -> torch.Tensor | None:
        for micro in images.split(4):
            engine.backward(torch.nn.functional.cross_entropy(engine.forward(micro), torch.arange(4)))
            norm = engine.step()
        return norm

    def statistics() -> list[torch.Tensor]:
        return [buffer.clone() for buffer in engine.module.buffers()]

    images, started = torch.randn(8, 3, 16, 16), statistics()
    assert step(images).isfinite()
    before = statistics()
    assert not any(map(torch.equal, before, started))
    with Counting() as counting:
        assert step(images.index_fill(0, torch.tensor(1), math.nan)) is not None
    assert counting.reads == 0
    assert engine.take_skipped_steps() == 1
    assert equal(statistics(), before)
    assert step(images).isfinite()
    assert not any(map(torch.equal, statistics(), before))


@pytest.mark.parametrize("clip", [pytest.param(0.0, marks=pytest.mark.slow), 0.05])
@pytest.mark.parametrize("config", STAGES)
def test_steps_on_the_device_are_those_of_the_loop_over_parameters(small_recipe, world, request, config, clip) -> None:
    recipe = small_recipe(f"deepspeed.config={config}", f"optim.clip_grad={clip}", "train.micro_batch=4")
    plain = Trainer(recipe, world)
    request.getfixturevalue("as_on_a_gpu")
    fused = Trainer(recipe, world)
    norms = [[float(trainer.step(number)) for number in range(1, 4)] for trainer in (plain, fused)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    for ours, theirs in ((fused.ema.shards, plain.ema.shards), (fused.learned()[0], plain.learned()[0])):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("config", "most"), [("zero0", 40), *((stage, 60) for stage in STAGES[1:])])
def test_a_step_runs_few_kernels_beside_the_model(small_recipe, world, as_on_a_gpu, config, most) -> None:
    """With 188 parameters in bf16, a step runs few kernels besides the model's, and the plan predicts their number."""
    own = ("model.depth=12", "attention.mode=blockwise", "train.precision=bf16", "train.global_batch=4")
    recipe = small_recipe(*own, f"deepspeed.config={config}")
    model = create_model(recipe.model, recipe.attention)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert len(sizes) == 188
    trainer = Trainer(recipe, world)
    trainer.step(1)
    images = torch.randn(4, 3, 16, 16)
    with Counting() as whole:
        trainer.step(2)
    with Counting() as of_the_model, torch.autocast("cpu", torch.bfloat16):
        torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    beside = whole.kernels - of_the_model.kernels
    assert sum(beside.values()) < most, beside
    none = Launches(products=0, others=0)
    planned = StepLaunches.of(none, recipe.train, load_ds_config(recipe, 1, 4), sizes, blocks=12)
    assert planned.micro_batch + planned.step == pytest.approx(sum(beside.values()), abs=8)
