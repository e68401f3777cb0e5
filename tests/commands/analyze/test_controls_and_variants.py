"""Analyses of controls and variants, on real images; their weights are random."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from karat_scale.attention.variants import SmoothOperator
from karat_scale.commands.analyze.functions import analyze_functions
from karat_scale.commands.analyze.maps import analyze_maps
from karat_scale.commands.analyze.matrices import analyze_content, analyze_spectrum
from karat_scale.commands.analyze.result import NothingToShowError, Result, Settings
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.recipe import ModelConfig

IMAGES = 4
BY_SETTINGS: dict[str, dict[str, Any]] = {
    "static": {"kind": "static"},
    "static_softmax": {"kind": "static_softmax"},
    "scaled_softmax": {"kind": "scaled_softmax"},
    "without scores": {"kind": "karat", "scores": False},
    "content": {"kind": "karat", "form": "content", "softmax_heads": 1},
    "smooth": {"kind": "karat", "form": "smooth", "modes": 4},
}


class RandomRun(TrainedRun):
    """A run's recipe and images, with the weights of another kind of attention far from their start."""

    def model(self, name: str | None = None, weights: str | None = None, implementation: str = "auto") -> nn.Module:
        torch.manual_seed(3)
        model = self.new_model(implementation)
        for key, parameter in model.named_parameters():
            if ".operator." in key or ".qkv." in key:
                nn.init.normal_(parameter, std=0.5)
        return model


def random_run(run: TrainedRun, name: str) -> RandomRun:
    attention = run.recipe.attention.model_copy(update=BY_SETTINGS[name])
    return RandomRun(run.path, run.recipe.model_copy(update={"attention": attention}))


def functions_of(run: TrainedRun, name: str) -> Result:
    return analyze_functions(random_run(run, name), Settings(images=IMAGES))


@pytest.mark.parametrize("name", BY_SETTINGS)
def test_every_kind_has_a_spectrum_and_maps_of_s(name: str, softmax_run: TrainedRun) -> None:
    run = random_run(softmax_run, name)
    spectrum = analyze_spectrum(run, Settings(images=IMAGES))
    assert "effective rank, S" in spectrum.tables[0].columns
    assert np.isfinite(spectrum.arrays["ln_max"][..., 0]).all()  # those after the rank have no logarithm
    assert np.isfinite(analyze_maps(run, Settings(images=1)).arrays["learned"]).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("static", "static has no learned functions"),
        ("static_softmax", "static_softmax has no learned functions"),
        ("without scores", "all functions are the constants"),
    ],
)
def test_controls_have_no_functions(name: str, reason: str, softmax_run: TrainedRun) -> None:
    with pytest.raises(NothingToShowError, match=reason):
        functions_of(softmax_run, name)


def test_content_shows_both_kinds_of_functions(softmax_run: TrainedRun) -> None:
    result = functions_of(softmax_run, "content")
    assert {"of_score_block_0", "functions_block_0", "energy"} <= set(result.figures)
    layer = random_run(softmax_run, "content").model().blocks[0].attn.operator.operator  # type: ignore[union-attr,index]
    x = result.arrays["block0_head0_of_score_x"].astype(float)
    cos, sin = (series.detach().double().numpy()[0] for series in (layer.psi_cos, layer.psi_sin))
    psi = sum(cos[m] * np.cos((m + 1) * x) + sin[m] * np.sin((m + 1) * x) for m in range(len(cos)))
    assert result.arrays["block0_head0_of_score"] == pytest.approx(psi + layer.psi_constant[0].item(), abs=1e-4)
    assert any("not for attention.form = content" in note for note in result.notes)


def test_smooth_has_the_distance_from_softmax(softmax_run: TrainedRun) -> None:
    assert "distance" in functions_of(softmax_run, "smooth").figures


def test_a_constant_matrix_loses_nothing_by_its_mean_over_images(softmax_run: TrainedRun) -> None:
    top1 = analyze_content(random_run(softmax_run, "static"), Settings(images=8)).numbers["top1"]
    assert set(top1) == {"S", "mean over queries", "mean over images"}
    assert top1["mean over images"] == top1["S"]


def test_the_plain_operator_has_the_same_functions() -> None:
    operator = SmoothOperator(10, 2, 3, 2, 5)
    query, key = torch.randn(2, 1, 2, 10, 4)
    assert torch.allclose(operator.plain().scores(query, key), operator.scores(query, key), atol=1e-5)


def test_a_constant_s_depends_on_no_image_in_any_window(softmax_run: TrainedRun) -> None:
    run = random_run(softmax_run, "static")
    swin = ModelConfig(name="swin_mini_patch2_window4_32", image_size=32, num_classes=4)
    run = dataclasses.replace(run, recipe=run.recipe.model_copy(update={"model": swin}))
    found = analyze_content(run, Settings(images=IMAGES, batch=3)).numbers["blocks"]
    assert [block["by_image"] for block in found] == pytest.approx([0, 0, 0, 0], abs=1e-6)
