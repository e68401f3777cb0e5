"""fp16 is for GPUs; here a CPU does its arithmetic."""

import json
import math

import pytest
import torch

from karat_scale.engine.deepspeed_config import load_ds_config
from karat_scale.engine.deepspeed_internals import master_weights
from karat_scale.foundation.errors import RecipeError
from karat_scale.training.tasks.classification.task import TrainState
from tests.engine.fp16_on_cpu import allow_fp16
from tests.small_engines import CONFIGS, equal, train_once, train_steps, weights

FP16 = ("train.precision=fp16", "deepspeed.cpu_adam=torch")
# The last ones by turns.
STAGES = [*CONFIGS[1:3], *(pytest.param(config, marks=pytest.mark.slow) for config in CONFIGS[3:])]


@pytest.fixture
def allowed(monkeypatch) -> None:
    allow_fp16(monkeypatch.setattr)


def test_a_cpu_is_refused_in_one_line(small_recipe, make_engine) -> None:
    with pytest.raises(RecipeError, match="fp16 needs a GPU; on a CPU use fp32 or bf16"):
        make_engine(small_recipe(*FP16, "deepspeed.config=zero1"))


def test_stage_0_is_refused_in_one_line(small_recipe) -> None:
    with pytest.raises(RecipeError, match=r"fp16 needs ZeRO stage 1 or higher; use deepspeed\.config=zero1"):
        load_ds_config(small_recipe(*FP16), 1, 8)


def test_stopping_at_the_first_overflow_is_refused(small_recipe) -> None:
    with pytest.raises(RecipeError, match=r"train\.on_nonfinite = stop .* use skip"):
        small_recipe(*FP16, "train.on_nonfinite=stop")


@pytest.mark.parametrize("name", STAGES)
def test_the_shipped_files_take_it_from_the_recipe(small_recipe, name: str) -> None:
    config = load_ds_config(small_recipe(*FP16, f"deepspeed.config={name}"), 1, 8)
    assert (config["fp16"]["enabled"], config["bf16"]["enabled"]) == (True, False)
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


def test_a_users_loss_scale_is_kept_and_a_wrong_one_is_one_line(small_recipe, tmp_path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"initial_scale_power": 12}}))
    config = load_ds_config(small_recipe(*FP16, f"deepspeed.config={own}"), 1, 8)
    assert config["fp16"] == {"initial_scale_power": 12, "enabled": True}
    for key in ("auto_cast", "fp16_master_weights_and_grads"):
        own.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {key: True}}))
        with pytest.raises(RecipeError, match=rf"fp16\.{key} = True"):
            load_ds_config(small_recipe(*FP16, f"deepspeed.config={own}"), 1, 8)


@pytest.mark.parametrize("config", STAGES)
def test_steps_are_close_to_fp32s_from_the_same_masters(small_recipe, make_engine, allowed, config: str) -> None:
    half = make_engine(small_recipe(*FP16, f"deepspeed.config={config}"))
    full = make_engine(small_recipe(f"deepspeed.config={config}", "deepspeed.cpu_adam=torch"))
    assert next(half.module.parameters()).dtype == torch.float16
    assert half.loss_scale == 2**16
    assert full.loss_scale is None
    norms = [[train_once(engine, seed) for seed in range(3)] for engine in (half, full)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


@pytest.mark.parametrize("config", STAGES)
def test_overflows_are_skipped_lower_the_scale_and_resume_with_it(
    small_recipe, make_checkpoints, allowed, tmp_path, config: str
) -> None:
    recipe = small_recipe(*FP16, f"deepspeed.config={config}")
    run = make_checkpoints(recipe, tmp_path / "checkpoints")
    train_steps(run, 1)
    before = [master.detach().clone() for master in master_weights(run.engine.deepspeed)]
    for _ in range(2):  # the second lowers it: DeepSpeed's hysteresis
        run.engine.backward(run.engine.forward(torch.randn(8, 3, 16, 16)).sum() * 3e4)
        assert not math.isfinite(run.engine.step())
    assert run.engine.loss_scale == 2**15
    assert run.engine.take_skipped_steps() == 2
    assert all(map(torch.equal, before, master_weights(run.engine.deepspeed)))
    assert run.save(TrainState(step=3, samples=24), wait=True)
    again = make_checkpoints(recipe, tmp_path / "checkpoints")
    assert again.load() is not None
    assert again.engine.loss_scale == 2**15
    for one in (run, again):
        train_steps(one, 4, 5)
    assert equal(weights(run.engine), weights(again.engine))


def test_overflows_at_the_least_scale_are_skipped_too(small_recipe, make_engine, allowed, tmp_path) -> None:
    own = tmp_path / "own.json"
    scale = {"initial_scale_power": 0, "hysteresis": 1}
    own.write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "fp16": scale, "zero_allow_untested_optimizer": True})
    )
    engine = make_engine(small_recipe(*FP16, f"deepspeed.config={own}"))
    for _ in range(3):
        engine.backward(engine.forward(torch.randn(8, 3, 16, 16)).sum() * math.inf)
        assert not math.isfinite(engine.step())
    assert engine.loss_scale == 1
    assert train_once(engine, 1) > 0
