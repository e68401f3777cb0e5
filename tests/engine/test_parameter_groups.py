import pytest
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay

from karat_scale.engine.optimizers import layer_scales, parameter_groups
from karat_scale.models import no_weight_decay_names
from karat_scale.recipe import OptimConfig
from tests.models.test_init_from import model


def settings(vit: VisionTransformer, groups: list[dict]) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in vit.named_parameters()}
    return {names[p]: (g["weight_decay"], pytest.approx(g["lr_scale"])) for g in groups for p in g["params"]}


def test_without_layer_decay_there_are_two_groups_of_one_rate() -> None:
    groups = parameter_groups(model(0), OptimConfig())
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.05, 1.0), (0.0, 1.0)]


def test_layers_and_scales_are_timms() -> None:
    vit = model(0)
    ours = parameter_groups(vit, OptimConfig(layer_decay=0.5))
    exempt = no_weight_decay_names(vit, False)
    timms = param_groups_layer_decay(vit, 0.05, exempt, layer_decay=0.5)
    assert settings(vit, ours) == settings(vit, timms)


def test_an_operator_learns_with_its_block_and_a_shared_one_with_the_last() -> None:
    scales = layer_scales(model(0), 0.5)
    assert scales["blocks.0.attn.operator.proj"] == scales["blocks.0.mlp.fc1.weight"]
    assert scales["blocks.0.mlp.fc1.weight"] == scales["blocks.1.mlp.fc1.weight"] / 2
    shared = layer_scales(model(0, mode="universal"), 0.5)
    assert shared["blocks.0.attn.operator.proj"] == shared["blocks.1.mlp.fc1.weight"]
    assert shared["blocks.0.mlp.fc1.weight"] == scales["blocks.0.mlp.fc1.weight"]


def test_what_is_frozen_or_apart_is_in_no_group() -> None:
    vit = model(0)
    vit.cls_token.requires_grad_(False)
    groups = parameter_groups(vit, OptimConfig(), apart={"head.weight"})
    assert {"cls_token", "head.weight"}.isdisjoint(settings(vit, groups))
