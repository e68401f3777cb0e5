import pytest
import torch
from timm.utils import ModelEmaV3

from karat_scale.engine.optimizers import Ema, ema_decay
from tests.small_engines import CONFIGS, train_once, weights


@pytest.mark.parametrize("warmup", [True, False])
def test_the_decay_is_timms(warmup) -> None:
    theirs = ModelEmaV3(torch.nn.Linear(1, 1), decay=0.999, use_warmup=warmup)
    for step in (1, 2, 3, 10, 1000, 100_000):
        assert ema_decay(step, 0.999, warmup) == pytest.approx(theirs.get_decay(step), abs=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_equals_the_plain_formula_bit_for_bit_and_is_what_evaluation_sees(
    small_recipe, make_engine, config, precision
) -> None:
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
    """fp32 weights by parameter, through DeepSpeed's own public call."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.stage == 0:
        return weights(engine)
    return [safe_get_full_fp32_param(parameter).detach().clone() for parameter in engine.module.parameters()]
