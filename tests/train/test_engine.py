import copy

import pytest
import torch

from karat_scale.models import create_model, no_weight_decay_names
from karat_scale.train.engine import build_optimizer
from tests.train.conftest import train_once, weights


@pytest.mark.parametrize("config", ["zero0", "zero1"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_steps_equal_plain_pytorch(small_recipe, make_engine, config: str, clip: float) -> None:
    recipe = small_recipe(f"deepspeed.config={config}", f"optim.clip_grad={clip}")
    engine = make_engine(recipe)
    torch.manual_seed(0)
    plain = create_model(recipe.model, recipe.attention)
    optimizer = build_optimizer(plain, recipe.optim, torch.device("cpu"))
    for seed in range(3):
        norm = train_once(engine, seed)
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(8, 3, 16, 16, generator=generator)
        labels = torch.randint(0, 4, (8,), generator=generator)
        torch.nn.functional.cross_entropy(plain(images), labels).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
        optimizer.zero_grad()
        assert norm == pytest.approx(float(expected), rel=1e-5)
    for ours, theirs in zip(weights(engine), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", ["zero0", "zero1"])
def test_a_step_with_nan_gradients_is_skipped_and_counted(small_recipe, make_engine, config: str) -> None:
    engine = make_engine(small_recipe(f"deepspeed.config={config}"))
    train_once(engine, 0)
    before = weights(engine)
    images = torch.full((8, 3, 16, 16), float("nan"))
    engine.backward(engine.forward(images).sum())
    norm = engine.step()
    assert norm is not None
    assert norm != norm  # NaN
    assert all(map(torch.equal, before, weights(engine)))
    assert engine.take_skipped_steps() == 1
    assert engine.take_skipped_steps() == 0
    train_once(engine, 1)
    assert not all(map(torch.equal, before, weights(engine)))


def test_the_initial_weights_are_the_models_own(small_recipe, make_engine) -> None:
    recipe = small_recipe("deepspeed.config=zero1")
    torch.manual_seed(0)
    plain = create_model(recipe.model, recipe.attention)
    assert all(map(torch.equal, weights(make_engine(recipe)), plain.parameters()))


def test_biases_norms_and_karat_parameters_get_no_decay_unless_asked(small_recipe) -> None:
    recipe = small_recipe()
    model = create_model(recipe.model, recipe.attention)
    exempt = no_weight_decay_names(model, decay_karat=False)
    assert {"pos_embed", "cls_token", "blocks.0.norm1.weight", "blocks.0.attn.operator.cos_coef"} <= exempt
    assert "blocks.0.attn.qkv.weight" not in exempt
    assert "blocks.0.attn.operator.cos_coef" not in no_weight_decay_names(model, decay_karat=True)
    optimizer = build_optimizer(model, recipe.optim, torch.device("cpu"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    counted = sum(len(group["params"]) for group in optimizer.param_groups)
    assert counted == len(list(copy.copy(model).parameters()))
