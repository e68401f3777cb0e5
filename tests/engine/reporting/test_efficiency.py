import pytest
import torch

from karat_scale.engine.reporting.interval import Efficiency, device_peak
from karat_scale.models.flops import flops_per_image
from karat_scale.recipe import TrainConfig


def test_mfu_is_the_models_own_flops_over_the_peak_of_all_devices(small_recipe) -> None:
    recipe = small_recipe()
    flops = flops_per_image(recipe.model, recipe.attention).training
    figures = Efficiency(recipe, devices=4, peak=8.0 * flops).figures(images_per_second=16.0)
    assert figures == {"tflops": pytest.approx(4 * flops / 1e12), "mfu": pytest.approx(0.5)}


def test_a_cpus_peak_is_unknown_so_there_is_no_mfu(small_recipe) -> None:
    assert device_peak(torch.device("cpu"), small_recipe().train) is None
    figures = Efficiency(small_recipe(), devices=1, peak=None).figures(images_per_second=16.0)
    assert figures.keys() == {"tflops"}


def test_no_rate_is_no_figure(small_recipe) -> None:
    assert Efficiency(small_recipe(), devices=1, peak=1.0).figures(None) == {"tflops": None, "mfu": None}


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989.4),
        ("NVIDIA H100 80GB HBM3", "bf16_weights", True, 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", False, 66.9),
        ("NVIDIA H100 80GB HBM3", "fp32", True, 494.7),
        ("Tesla T4", "bf16", True, None),
        ("Tesla T4", "fp32", True, 8.1),
        ("Tesla T4", "fp16", True, 65.0),
        ("Some Accelerator", "bf16", True, None),
    ],
)
def test_the_peak_is_that_of_the_precision_at_work(monkeypatch, name, precision, tf32, teraflops) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = device_peak(torch.device("cuda"), TrainConfig(precision=precision, tf32=tf32))
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))
