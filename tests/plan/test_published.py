"""The predictions of docs/scaling.md against the published figures that it cites."""

import pytest

from karat_scale.hardware import find_gpu
from karat_scale.plan.communication import seconds, step_seconds, traffic
from karat_scale.plan.links import links_of
from karat_scale.plan.subject import Subject
from karat_scale.plan.time import estimate
from karat_scale.recipe.loading import load_recipe

NODES = (1, 2, 4, 8, 16)
# NeMo's ViT-g/14: images a second on so many nodes of 8, with 64 images a GPU.
NEMO = {"a100-80": (693, 1347, 2642, 5454, 10644), "h100-80": (1428, 2846, 5737, 11222, 21561)}
VIT_G = 1_012_600_000


@pytest.mark.parametrize("gpu", NEMO)
def test_scaling_is_within_an_eighth_of_nemos(gpu: str) -> None:
    config = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5_000_000}}
    load, links = traffic(VIT_G, config, 1, "bf16"), links_of(gpu)
    compute = 8 * 64 / NEMO[gpu][0] - seconds(load, 8, 8, links)
    for nodes, published in zip(NODES, NEMO[gpu], strict=True):
        predicted = nodes * 8 * 64 / step_seconds(compute, load, seconds(load, 8 * nodes, 8, links))
        assert predicted == pytest.approx(published, rel=0.125)


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("tiny", 2293.54),
        pytest.param("small", 1052.92, marks=pytest.mark.slow),
        pytest.param("base", 390.86, marks=pytest.mark.slow),
    ],
)
def test_an_estimate_is_within_a_fifth_of_timms(size: str, published: float) -> None:
    keys = ("data.path=.", f"model.name=vit_{size}_patch16_224", "train.precision=bf16")
    recipe, gpu = load_recipe("imagenet_vit_tiny", keys), find_gpu("rtx3090-24")
    assert gpu is not None
    estimated = estimate(recipe, gpu, Subject(recipe, on_gpu=True).footprint(0, 2))
    assert estimated is not None
    assert 1 / estimated.seconds == pytest.approx(published, rel=0.2)
