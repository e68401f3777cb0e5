"""Optimizers, their groups of parameters, the learning rate of each step, and the average of the weights."""

import math
import os
import sys
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.utils.cpp_extension import is_ninja_available

from karat_scale.engine import optimizers
from karat_scale.engine.optimizers import (
    QUIET_SECONDS,
    CosineSchedule,
    Ema,
    build_cpu_adam,
    build_optimizer,
    build_schedule,
    cpu_adam_can_be_built,
    ema_decay,
    hidden_matrices,
    layer_scales,
    parameter_groups,
    wait_for_mark,
)
from karat_scale.foundation.errors import RecipeError, RunDirectoryError
from karat_scale.models import create_model, no_weight_decay_names
from karat_scale.recipe import ModelConfig, OptimConfig
from karat_scale.training.tasks.classification.task import TrainState
from tests.models.test_init_from import model
from tests.small_engines import FEW_CELLS, equal, train_once, train_steps, weights

MUON = "optim.name=muon"
CPU = torch.device("cpu")


def test_hidden_matrices_are_the_blocks_linear_weights(small_recipe) -> None:
    recipe = small_recipe()
    hidden = hidden_matrices(create_model(recipe.model, recipe.attention))
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert hidden == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}
    with torch.device("meta"):
        parallel = create_model(ModelConfig(name="vit_small_patch16_18x2_224", depth=1), recipe.attention)
    layers = ("attns.{}.attn.qkv", "attns.{}.attn.proj", "ffns.{}.mlp.fc1", "ffns.{}.mlp.fc2")
    of_block = {f"blocks.0.{layer.format(branch)}.weight" for branch in (0, 1) for layer in layers}
    assert hidden_matrices(parallel) == of_block


def test_muon_alone_trains_where_all_else_is_frozen(small_recipe) -> None:
    recipe = small_recipe(MUON, "optim.lr=0.01")
    model = create_model(recipe.model, recipe.attention)
    hidden = hidden_matrices(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in hidden)
    optimizer = build_optimizer(model, recipe.optim, CPU)
    model(torch.randn(2, 3, 16, 16)).square().mean().backward()
    optimizer.step()
    assert {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])} == hidden


def test_each_parameter_moves_as_under_the_optimizer_that_has_it(small_recipe) -> None:
    recipe = small_recipe(MUON, "optim.lr=0.01")
    torch.manual_seed(0)
    model = create_model(recipe.model, recipe.attention)
    torch.manual_seed(0)
    twin = create_model(recipe.model, recipe.attention)
    ours = build_optimizer(model, recipe.optim, CPU)
    hidden = hidden_matrices(twin)
    matrices = [p for name, p in twin.named_parameters() if name in hidden]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = build_optimizer(twin, small_recipe("optim.lr=0.01").optim, CPU)
    for matrix in matrices:
        matrix.requires_grad_(True)
    for seed in range(3):
        for network in (model, twin):
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
            network(images).square().mean().backward()
        ours.step()
        ours.zero_grad()
        muon.step()
        for matrix in matrices:
            matrix.grad = None  # AdamW passes over it
        adamw.step()
        adamw.zero_grad()
    pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(p, q) for (_, p), q in pairs)


def test_muon_resumes_to_the_same_bits(small_recipe, make_checkpoints, tmp_path) -> None:
    first, second = (make_checkpoints(small_recipe(MUON), tmp_path) for _ in range(2))
    train_steps(first, 1, 2)
    assert first.save(TrainState(step=2, samples=16))
    assert second.load() is not None
    norms = [[train_once(run.engine, step) for step in (3, 4)] for run in (first, second)]
    assert norms[0] == norms[1]
    assert equal(weights(first.engine), weights(second.engine))


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizers_checkpoint_is_refused(small_recipe, make_checkpoints, tmp_path, before, after) -> None:
    first, second = (make_checkpoints(small_recipe(f"optim.name={name}"), tmp_path) for name in (before, after))
    train_steps(first, 1)
    assert first.save(TrainState(step=1, samples=8))
    with pytest.raises(RunDirectoryError, match=f"optim.name={before}"):
        second.load()


def test_muon_is_refused_where_matrices_are_cut_up(small_recipe, make_engine) -> None:
    for config in ("zero1", "zero2", "zero3", "zero2_offload"):
        with pytest.raises(RecipeError, match=r"optim\.name = muon .* use deepspeed\.config=zero0"):
            make_engine(small_recipe(MUON, f"deepspeed.config={config}"))


def settings(vit: VisionTransformer, groups: list[dict]) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in vit.named_parameters()}
    return {names[p]: (g["weight_decay"], pytest.approx(g["lr_scale"])) for g in groups for p in g["params"]}


def test_layers_and_scales_are_timms() -> None:
    vit = model(0)
    plain = parameter_groups(vit, OptimConfig())
    assert [(group["weight_decay"], group["lr_scale"]) for group in plain] == [(0.05, 1.0), (0.0, 1.0)]
    ours = parameter_groups(vit, OptimConfig(layer_decay=0.5))
    exempt = no_weight_decay_names(vit, False)
    timms = param_groups_layer_decay(vit, 0.05, exempt, layer_decay=0.5)
    assert settings(vit, ours) == settings(vit, timms)


def test_an_operator_learns_with_its_block_and_a_shared_one_with_the_last_and_what_is_frozen_with_none() -> None:
    scales = layer_scales(model(0), 0.5)
    assert scales["blocks.0.attn.operator.proj"] == scales["blocks.0.mlp.fc1.weight"]
    assert scales["blocks.0.mlp.fc1.weight"] == scales["blocks.1.mlp.fc1.weight"] / 2
    shared = layer_scales(model(0, mode="universal"), 0.5)
    assert shared["blocks.0.attn.operator.proj"] == shared["blocks.1.mlp.fc1.weight"]
    assert shared["blocks.0.mlp.fc1.weight"] == scales["blocks.0.mlp.fc1.weight"]
    vit = model(0)
    vit.cls_token.requires_grad_(False)
    groups = parameter_groups(vit, OptimConfig(), apart={"head.weight"})
    assert {"cls_token", "head.weight"}.isdisjoint(settings(vit, groups))


@given(warmup=st.integers(0, 30), total=st.integers(31, 200), step=st.integers(0, 199))
def test_equals_timms_scheduler_at_every_step(warmup, total, step) -> None:
    ours = CosineSchedule(peak_lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=warmup, total_steps=total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = CosineLRScheduler(optimizer, total, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6, t_in_epochs=False)
    theirs.step_update(step)
    assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_the_papers_rates_and_a_warm_up_counted_in_steps(small_recipe):
    recipe = small_recipe("train.global_batch=128", "train.epochs=100", "schedule.warmup_epochs=5")
    schedule = build_schedule(recipe, steps_per_epoch=10_009)
    assert schedule.peak_lr == pytest.approx(1.25e-4)
    assert schedule.warmup_steps == 50_045
    assert schedule.total_steps == 1_000_900
    assert schedule.lr(0) == 1e-6
    assert schedule.lr(1_000_900) == 1e-5
    recipe = small_recipe("schedule.warmup_steps=30", "schedule.warmup_epochs=99", "schedule.cosine_after_warmup=true")
    schedule = build_schedule(recipe, steps_per_epoch=20)
    assert (schedule.warmup_steps, schedule.cosine_from, schedule.total_steps) == (30, 30, 40)
    with pytest.raises(RecipeError, match=r"schedule.warmup_steps = 30 are more than the 20 steps of train.epochs = 2"):
        build_schedule(recipe, steps_per_epoch=10)
    # Without `optim.lr_batch` the rate is not scaled.
    assert build_schedule(small_recipe("optim.lr_batch=null", "optim.lr=0.5"), 10).peak_lr == 0.5


@given(warmup=st.integers(0, 50), total=st.integers(51, 300), step=st.integers(0, 299))
def test_a_cosine_after_the_warm_up_is_big_visions(warmup, total, step) -> None:
    ours = CosineSchedule(1e-3, 0.0, 0.0, warmup_steps=warmup, total_steps=total, cosine_from=warmup)
    progress = min(max((step - warmup) / (total - warmup), 0.0), 1.0)
    rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * progress)) * (min(1.0, step / warmup) if warmup else 1.0)
    assert ours.lr(step) == pytest.approx(rate, rel=1e-12, abs=1e-18)


def test_without_a_compiler_it_cannot_be_built(monkeypatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} g++")  # as with ccache
    assert cpu_adam_can_be_built() == is_ninja_available()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not cpu_adam_can_be_built()


def test_a_wait_ends_with_another_build(tmp_path) -> None:
    (tmp_path / "lock").touch()
    ends = threading.Timer(0.5, (tmp_path / "lock").unlink)
    ends.start()
    wait_for_mark(tmp_path)
    assert not ends.is_alive() or not (tmp_path / "lock").exists()
    ends.join()


@pytest.mark.parametrize("age", [QUIET_SECONDS + 30, 0, -1000], ids=["old", "young", "by another clock"])
def test_the_mark_of_a_killed_build_goes_when_nothing_has_changed_for_a_while(tmp_path, monkeypatch, age) -> None:
    """Before the fix, a start within a minute of the kill waited for ever."""
    then = time.time() - age
    for name, time_of_change in {"lock": then - 1000, "cpu_adam.o": then}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time_of_change, time_of_change))
    (tmp_path / "karat.lock").touch()
    if age < QUIET_SECONDS:
        monkeypatch.setattr(optimizers, "QUIET_SECONDS", 1.0)
    wait_for_mark(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu_adam.o", "karat.lock"]


@pytest.mark.slow
def test_a_build_goes_on_after_one_that_was_killed(tmp_path, monkeypatch) -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder, builder

    if not cpu_adam_can_be_built():
        pytest.skip("no compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(builder.OpBuilder, "_loaded_ops", {})
    mark = tmp_path / CPUAdamBuilder().name / "lock"
    mark.parent.mkdir()
    mark.touch()
    os.utime(mark, (0, 0))
    build_cpu_adam()
    assert not mark.exists()
    assert list(mark.parent.glob("*.so"))


@pytest.mark.parametrize("warmup", [True, False])
def test_the_decay_is_timms(warmup) -> None:
    theirs = ModelEmaV3(torch.nn.Linear(1, 1), decay=0.999, use_warmup=warmup)
    for step in (1, 2, 3, 10, 1000, 100_000):
        assert ema_decay(step, 0.999, warmup) == pytest.approx(theirs.get_decay(step), abs=1e-12)


@pytest.mark.parametrize(("config", "precision"), FEW_CELLS)
def test_the_average_is_the_plain_formulas_and_what_evaluation_sees(small_recipe, make_engine, config, precision):
    recipe = small_recipe(
        f"deepspeed.config={config}", f"train.precision={precision}", "train.ema_decay=0.9", "train.ema_warmup=false"
    )
    engine = make_engine(recipe)
    ema = Ema(engine.deepspeed, recipe.train)
    plain = _whole_masters(engine)
    for step in range(1, 5):
        train_once(engine, step)
        ema.update(step)
        decay = 0.0 if step == 1 else 0.9
        plain = [torch.lerp(*pair, 1 - decay) for pair in zip(plain, _whole_masters(engine), strict=True)]

    raw, masters = weights(engine), _whole_masters(engine)
    with ema.in_place_of_weights():
        assert all(map(torch.equal, _whole_masters(engine), plain))
        inside = weights(engine)
        images = torch.randn(2, 3, 16, 16)
        averaged = engine.forward(images)
    assert all(torch.equal(ours, theirs.to(ours.dtype)) for ours, theirs in zip(inside, plain, strict=True))
    assert all(map(torch.equal, raw, weights(engine)))
    assert all(map(torch.equal, masters, _whole_masters(engine)))
    assert not torch.equal(averaged, engine.forward(images))
    assert train_once(engine, 5) > 0


def _whole_masters(engine) -> list[torch.Tensor]:
    """Return the fp32 weights by parameter; at stages 1 to 3 DeepSpeed's public function reads them."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.stage == 0:
        return weights(engine)
    return [safe_get_full_fp32_param(parameter).detach().clone() for parameter in engine.module.parameters()]
