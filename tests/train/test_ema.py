import pytest
import torch
from timm.utils import ModelEmaV3

from karat_scale.train.ds_internals import master_weights
from karat_scale.train.ema import Ema, ema_decay
from tests.train.conftest import train_once, weights


@pytest.mark.parametrize("warmup", [True, False])
def test_the_decay_is_timms(warmup: bool) -> None:
    theirs = ModelEmaV3(torch.nn.Linear(1, 1), decay=0.999, use_warmup=warmup)
    for step in (1, 2, 3, 10, 1000, 100_000):
        assert ema_decay(step, 0.999, warmup) == pytest.approx(theirs.get_decay(step), abs=1e-12)


@pytest.mark.parametrize("config", ["zero0", "zero1"])
def test_equals_the_plain_formula_bit_for_bit_and_is_what_evaluation_sees(small_recipe, make_engine, config) -> None:
    recipe = small_recipe(f"deepspeed.config={config}", "train.ema_decay=0.9", "train.ema_warmup=false")
    engine = make_engine(recipe)
    ema = Ema(engine.deepspeed, recipe.train)
    plain = [master.detach().clone() for master in master_weights(engine.deepspeed)]
    for step in range(1, 5):
        train_once(engine, step)
        ema.update(step)
        decay = 0.0 if step == 1 else 0.9
        plain = [
            torch.lerp(average, master.detach(), 1 - decay)
            for average, master in zip(plain, master_weights(engine.deepspeed), strict=True)
        ]
    assert all(map(torch.equal, ema.shards, plain))

    raw = weights(engine)
    with ema.in_place_of_weights():
        inside = weights(engine)
    assert all(map(torch.equal, raw, weights(engine)))
    assert all(map(torch.equal, ema.shards, plain))
    flat = torch.cat([tensor.flatten() for tensor in inside]).sort().values
    expected = torch.cat([tensor.flatten() for tensor in plain]).sort().values
    assert torch.equal(flat, expected[expected.numel() - flat.numel() :]) or torch.equal(flat, expected)
    assert not all(map(torch.equal, inside, raw))
