"""DeepSpeed's private corners are where we look for them: a new release that moves one fails here first."""

import pytest
import torch

from karat_scale.train.ds_internals import checkpoint_globals, master_weights, refresh_module, use_storage
from karat_scale.train.tensor_storage import DurableStorage
from tests.train.conftest import train_once, weights


def test_the_shared_memory_build_is_switched_off(small_recipe, make_engine) -> None:
    from deepspeed.ops import __compatible_ops__

    make_engine(small_recipe())
    assert __compatible_ops__["deepspeed_shm_comm"] is False


@pytest.mark.parametrize("config", ["zero0", "zero1"])
def test_masters_hold_every_weight_and_the_module_follows_them(small_recipe, make_engine, config: str) -> None:
    engine = make_engine(small_recipe(f"deepspeed.config={config}"))
    train_once(engine, 0)
    masters = master_weights(engine.deepspeed)
    assert all(master.dtype == torch.float32 for master in masters)
    assert sum(map(torch.numel, masters)) >= sum(map(torch.numel, weights(engine)))
    with torch.no_grad():
        for master in masters:
            master.data.fill_(0.5)
    refresh_module(engine.deepspeed)
    assert all(bool((tensor == 0.5).all()) for tensor in weights(engine))


def test_storage_takes_the_place_of_deepspeeds_own(small_recipe, make_engine) -> None:
    engine = make_engine(small_recipe())
    assert hasattr(engine.deepspeed, "checkpoint_engine")
    storage = DurableStorage()
    use_storage(engine.deepspeed, storage)
    assert engine.deepspeed.checkpoint_engine is storage


def test_the_classes_in_checkpoints_exist() -> None:
    assert [cls.__name__ for cls in checkpoint_globals()] == ["LossScaler", "ZeroStageEnum", "fragment_address"]
