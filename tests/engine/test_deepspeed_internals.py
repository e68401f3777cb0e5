"""DeepSpeed's private corners are where we look for them: a new release that moves one fails here first."""

import inspect

import pytest
import torch

from karat_scale.checkpoint.tensor_storage import DurableStorage
from karat_scale.engine import deepspeed_internals, distributed
from karat_scale.engine.deepspeed_internals import (
    checkpoint_globals,
    load_optimizer_states,
    master_weights,
    refresh_module,
    shard_layout,
    use_storage,
)
from karat_scale.engine.shards import Fragment, Pieces
from tests.conftest import ROOT
from tests.small_engines import CONFIGS, train_once, weights


def test_each_private_corner_has_a_test() -> None:
    """Called here, or by what the named test runs at each stage."""
    elsewhere = {
        "forget_groups": "test_a_second_run_may_start_in_one_process",
        "share_world_group": "test_deepspeed_waits_as_long_as_the_recipe_says",
        "gathers_wait_for_the_weights": "test_weights_are_gathered_after_they_are_written",
        "quieten_and_skip_builds": "test_the_shared_memory_build_is_switched_off",
        "average_gradients_in_few_copies": "test_a_step_runs_few_kernels_beside_the_model",
        "reduce_in_few_operations": "test_streams_are_in_order",
        "check_by_the_norm": "test_a_step_neither_stops_the_host_nor_reads_a_scalar",
        "step_judged_by": "test_a_step_neither_stops_the_host_nor_reads_a_scalar",
        "device_waits_for_itself": "test_a_step_neither_stops_the_host_nor_reads_a_scalar",
        "patch_modules": "test_an_engine_is_built_without_a_word",
        "use_torchs_own_linear": "test_an_engine_does_not_depend_on_those_built_before",
        "forget_gradients": "test_a_step_with_nan_gradients_is_skipped_and_counted",
        "deepspeed_checkpoint": "test_training_is_bit_equal",
        "set_frozen": "test_frozen_weights_stay_and_come_back",
        "whole_parameters": "test_each_head_at_each_stage",
        "loss_scale": "test_overflows_are_skipped_lower_the_scale_and_resume_with_it",
        "load_loss_scaler": "test_overflows_are_skipped_lower_the_scale_and_resume_with_it",
        "keep_least_loss_scale": "test_overflows_at_the_least_scale_are_skipped_too",
    }
    functions = {
        name
        for name, value in vars(deepspeed_internals).items()
        if inspect.isfunction(inspect.unwrap(value))
        and value.__module__ == deepspeed_internals.__name__
        and not name.startswith("_")
    }
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    called = {name for name in functions - elsewhere.keys() if f"{name}(" in tests}
    assert functions == called | elsewhere.keys()
    assert all(f"def {test}" in tests for test in elsewhere.values())


def test_the_shared_memory_build_is_switched_off(small_recipe, make_engine) -> None:
    from deepspeed.ops import __compatible_ops__

    make_engine(small_recipe())
    assert __compatible_ops__["deepspeed_shm_comm"] is False


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_masters_hold_every_weight_and_the_module_follows_them(
    small_recipe, make_engine, config: str, precision: str
) -> None:
    engine = make_engine(small_recipe(f"deepspeed.config={config}", f"train.precision={precision}"))
    train_once(engine, 0)
    masters = master_weights(engine.deepspeed)
    assert all(master.dtype == torch.float32 for master in masters)
    assert sum(map(torch.numel, masters)) >= sum(map(torch.numel, weights(engine)))
    with torch.no_grad():
        for master in masters:
            master.data.fill_(0.5)
    refresh_module(engine.deepspeed)
    assert all(bool((tensor == 0.5).all()) for tensor in weights(engine))


def test_an_engine_is_built_without_a_word(small_recipe, make_engine, capfd: pytest.CaptureFixture[str]) -> None:
    make_engine(small_recipe("deepspeed.config=zero1", "train.precision=bf16"))
    make_engine(small_recipe("deepspeed.config=zero3", "train.precision=bf16"))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("config", CONFIGS)
def test_a_layout_covers_each_weight_once(small_recipe, make_engine, config: str) -> None:
    engine = make_engine(small_recipe(f"deepspeed.config={config}"))
    layout = shard_layout(engine.deepspeed)
    pieces = Pieces()
    for fragments, master in zip(layout, master_weights(engine.deepspeed), strict=True):
        pieces.add(fragments, master)
    assert sorted(f.name for fragments in layout for f in fragments) == sorted(engine.shapes)
    for (name, shape), weight in zip(engine.shapes.items(), weights(engine), strict=True):
        whole = torch.empty(shape)
        pieces.fill([Fragment(name, 0, 0, whole.numel())], whole)
        assert torch.equal(whole, weight)


@pytest.mark.parametrize("config", CONFIGS)
def test_optimizer_states_go_in_as_they_came_out(small_recipe, make_engine, config: str) -> None:
    engine = make_engine(small_recipe(f"deepspeed.config={config}"))
    train_once(engine, 0)
    states = [{"step": 7.0, "exp_avg": m.detach() + 1, "exp_avg_sq": m.detach() ** 2} for m in _masters(engine)]
    load_optimizer_states(engine.deepspeed, states)
    base = engine.deepspeed.basic_optimizer
    for master, state in zip(_masters(engine), states, strict=True):
        assert torch.equal(base.state[master]["exp_avg_sq"], state["exp_avg_sq"])
    train_once(engine, 1)
    assert [float(base.state[master]["step"]) for master in _masters(engine)] == [8.0] * len(states)


def _masters(engine) -> list[torch.Tensor]:
    return master_weights(engine.deepspeed)


def test_an_engine_does_not_depend_on_those_built_before(small_recipe, make_engine) -> None:
    """A stage 3 engine replaces torch.nn.functional.linear for the rest of the process."""
    make_engine(small_recipe())
    own = torch.nn.functional.linear
    make_engine(small_recipe("deepspeed.config=zero3"))
    assert torch.nn.functional.linear is not own
    make_engine(small_recipe("deepspeed.config=zero1"))
    assert torch.nn.functional.linear is own


def test_a_process_that_leaves_its_group_gets_torchs_own_linear_back(small_recipe, make_engine) -> None:
    """What is counted or traced after a stage 3 run would otherwise see DeepSpeed's product and sum."""
    make_engine(small_recipe())
    own = torch.nn.functional.linear
    make_engine(small_recipe("deepspeed.config=zero3"))
    distributed.stop()
    assert torch.nn.functional.linear is own


def test_storage_takes_the_place_of_deepspeeds_own(small_recipe, make_engine) -> None:
    engine = make_engine(small_recipe())
    assert hasattr(engine.deepspeed, "checkpoint_engine")
    storage = DurableStorage()
    use_storage(engine.deepspeed, storage)
    assert engine.deepspeed.checkpoint_engine is storage


def test_the_classes_in_checkpoints_exist() -> None:
    assert [cls.__name__ for cls in checkpoint_globals()] == [
        "DynamicLossScaler",
        "LossScaler",
        "ZeroStageEnum",
        "fragment_address",
    ]


@pytest.mark.parametrize("config", ["zero0", "zero1", "zero3"])
def test_a_second_run_may_start_in_one_process(small_recipe, make_engine, config: str) -> None:
    for _ in range(2):
        train_once(make_engine(small_recipe(f"deepspeed.config={config}")), seed=1)
        distributed.stop()
        distributed.start("cpu")
