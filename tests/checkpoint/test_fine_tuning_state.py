"""Frozen parameters and scaled rates at every stage, in checkpoints too."""

from pathlib import Path

import pytest
import torch

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.checkpoint.weights import load_weights
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.models import create_model
from karat_scale.models.layers import freeze
from karat_scale.recipe import Recipe
from karat_scale.training.tasks.classification.task import TrainState
from tests.small_engines import CONFIGS, checkpoints_of, train_once, weights

TUNED = ("optim.layer_decay=0.5", "train.freeze=[patch_embed.*, blocks.0.attn.operator.*]", "optim.weight_decay=0")


def build(recipe: Recipe, world: World, seed: int) -> tuple[Engine, Checkpoints]:
    torch.manual_seed(seed)
    model = create_model(recipe.model, recipe.attention)
    if recipe.train.freeze:
        freeze(model, recipe.train.freeze)
    engine = Engine(model, recipe, world, recipe.train.global_batch)
    return engine, checkpoints_of(engine, recipe, world, Path(recipe.run.dir) / "checkpoints")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_stay_and_come_back(small_recipe, world, config, precision) -> None:
    recipe = small_recipe(*TUNED, f"deepspeed.config={config}", f"train.precision={precision}")
    engine, checkpoints = build(recipe, world, seed=0)
    start = weights(engine)
    train_once(engine, seed=1)
    moved = {
        name: float((after - before).abs().max())
        for (name, _), before, after in zip(engine.module.named_parameters(), start, weights(engine), strict=True)
    }
    assert {name for name, by in moved.items() if by == 0} >= set(engine.frozen)
    assert set(engine.frozen) == {
        name for name in moved if name.startswith(("patch_embed.", "blocks.0.attn.operator."))
    }
    if precision == "fp32":  # AdamW's first step is the rate, whatever the gradient
        assert moved["head.weight"] == pytest.approx(1e-2, rel=1e-2)
        assert moved["blocks.1.mlp.fc1.weight"] == pytest.approx(0.5e-2, rel=1e-2)
        assert moved["blocks.0.mlp.fc1.weight"] == pytest.approx(0.25e-2, rel=1e-2)
        assert moved["pos_embed"] == pytest.approx(0.125e-2, rel=1e-2)
    assert checkpoints.save(TrainState(step=1, samples=8))
    saved, kept = weights(engine), dict(engine.frozen)
    train_once(engine, seed=2)
    expected = weights(engine)

    other, others = build(recipe, world, seed=5)
    assert others.load() is not None
    assert all(torch.equal(a, b) for a, b in zip(weights(other), saved, strict=True))
    train_once(other, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), expected, strict=True))

    plain = create_model(recipe.model, recipe.attention)
    name = checkpoints.store.pointed("latest")
    load_weights(plain, checkpoints.store.root / name, checkpoints.store.state(name), ema=True)
    assert all(torch.equal(plain.get_parameter(key), value) for key, value in kept.items())


def test_another_stage_takes_over_and_another_list_is_refused(small_recipe, world) -> None:
    engine, checkpoints = build(small_recipe(*TUNED, "deepspeed.config=zero3"), world, seed=0)
    train_once(engine, seed=1)
    checkpoints.save(TrainState(step=1, samples=8))
    other, others = build(small_recipe(*TUNED, "deepspeed.config=zero1"), world, seed=5)
    others.load()
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(engine), strict=True))
    _, unfrozen = build(small_recipe(), world, seed=0)
    with pytest.raises(RunDirectoryError, match=r"operator.* is frozen there and not here \(train.freeze\)"):
        unfrozen.load()
