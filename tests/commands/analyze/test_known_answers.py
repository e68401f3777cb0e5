"""Whole analyses of a real run whose operators are replaced by ones with a known answer."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from karat_scale.attention.variants import SmoothOperator
from karat_scale.commands.analyze.functions import analyze_functions, energy_parts
from karat_scale.commands.analyze.maps import analyze_maps
from karat_scale.commands.analyze.matrices import analyze_content, analyze_spectrum
from karat_scale.commands.analyze.result import NothingToShowError, Result, Settings
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.recipe import ModelConfig

SEEN = {0: 7, 1: 3}
"""The token that each head looks at, whoever looks."""


class PlantedRun(TrainedRun):
    """A run in which every score is 0, so that S[k, :] is 1 (in head 1, one half) at SEEN[head], in every block."""

    def model(self, *arguments: Any, **named: Any) -> Any:
        model: Any = super().model(*arguments, **named)
        with torch.no_grad():
            for block in model.blocks:
                operator, width = block.attn.operator, block.attn.attn_dim
                block.attn.qkv.weight[:width] = 0
                block.attn.qkv.bias[:width] = 0
                for parameter in operator.parameters():
                    parameter.zero_()
                operator.cos_coef[:, 0, :, 0] = 1 / operator.num_tokens
                for head, token in SEEN.items():
                    operator.proj[head, token, 0] = 1 / (1 + head)
        return model


class CosineRun(TrainedRun):
    """A run in which every function of head 1 is 3 cos(2 x) and every other function is 0."""

    def model(self, *arguments: Any, **named: Any) -> Any:
        model: Any = super().model(*arguments, **named)
        with torch.no_grad():
            for block in model.blocks:
                block.attn.operator.cos_coef.zero_()
                block.attn.operator.sin_coef.zero_()
                block.attn.operator.cos_coef[1, :, :, 1] = 3
        return model


def changed(run: TrainedRun, kind: type[TrainedRun]) -> TrainedRun:
    return kind(**{field.name: getattr(run, field.name) for field in dataclasses.fields(run)})


def test_one_hot_attention_is_drawn_where_it_looks(karat_run: TrainedRun) -> None:
    result = analyze_maps(changed(karat_run, PlantedRun), Settings(image_ids=(0, 5), block=0))
    learned = result.arrays["learned"]
    for head, token in SEEN.items():
        expected = np.eye(16)[token - 1] / (1 + head)
        np.testing.assert_allclose(learned[:, head], np.broadcast_to(expected, (2, 16)), atol=1e-6)
    assert not result.arrays["raw"].any()
    assert [image["dominant_head"] for image in result.numbers["images"]] == [0, 0]
    # Each of two blocks moves half of what is left, so 0.75 in all. The first head's token gets two thirds of it.
    np.testing.assert_allclose(result.arrays["rollout"][:, 6], 0.75 * 2 / 3, atol=1e-6)
    np.testing.assert_allclose(result.arrays["rollout"].sum(-1), 0.75, atol=1e-6)


def test_one_hot_attention_has_rank_one(karat_run: TrainedRun) -> None:
    result = analyze_spectrum(changed(karat_run, PlantedRun), Settings(images=3))
    for block in result.numbers["blocks"]:
        assert block["after"] == pytest.approx(dict.fromkeys(block["after"], 1.0), abs=1e-3)
    assert result.findings == [
        "In the last block, the scores A have an effective rank of 1.0, and S, made of them, of 1.0."
    ]
    # All 17 rows are the same unit vector, so its singular value is the root of 17, or half of it.
    extremes = result.arrays["ln_min"][:, 1, 0], result.arrays["ln_max"][:, 1, 0]
    np.testing.assert_allclose(extremes, [[np.log(17**0.5 / 2)] * 2, [np.log(17**0.5)] * 2], atol=1e-5)


def test_a_planted_cosine_is_the_curve_and_all_of_the_energy(karat_run: TrainedRun) -> None:
    result = analyze_functions(changed(karat_run, CosineRun), Settings(images=3))
    x = result.arrays["block1_head1_x"]
    for quantile in result.arrays["block1_head1_quantiles"]:
        np.testing.assert_allclose(quantile, 3 * np.cos(2 * x), atol=1e-6)
    assert not result.arrays["block1_head0_quantiles"].any()
    np.testing.assert_array_equal(result.arrays["energy_share"][:, 1], [[0, 1], [0, 1]])
    assert "of the functions' energy is a constant" in result.findings[0]


def test_the_parts_of_a_parabola_are_those_of_the_best_line() -> None:
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    weights = torch.full_like(x, 1 / len(x))
    parts = energy_parts(x, torch.stack((x**2, 3 * x, torch.full_like(x, 2.0)), 1), weights)
    # The means of x^2 and x^4 are 1/3 and 1/5.
    np.testing.assert_allclose(parts, [1 / 9 + 4, 9 / 3, 1 / 5 - 1 / 9], rtol=5e-3)


IMAGES = 4
BY_SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "static": {"kind": "static"},
    "static_softmax": {"kind": "static_softmax"},
    "gated": {"kind": "gated", "softmax_heads": 1},
    "differential": {"kind": "differential"},
    "without scores": {"kind": "karat", "scores": False},
    "content": {"kind": "karat", "form": "content", "softmax_heads": 1},
    "smooth": {"kind": "karat", "form": "smooth", "modes": 4},
    "project first": {"kind": "karat", "form": "project_first"},
    "another grid": {"kind": "karat", "blocks": {"0": {"grid": 4}}},
    "another basis": {"kind": "karat", "blocks": {"0": {"basis": "mexican_hat"}}},
    "another form": {"kind": "karat", "blocks": {"0": {"form": "content"}}},
    "scores in one block": {"kind": "karat", "blocks": {"0": {"scores": False}}},
}


class RandomRun(TrainedRun):
    """A run on the same images with another kind of attention, and with weights far from their start."""

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


@pytest.mark.parametrize("name", ["static_softmax", "gated", "differential", "without scores", "content", "smooth"])
def test_every_kind_has_a_spectrum_and_maps_of_s(name: str, softmax_run: TrainedRun) -> None:
    run = random_run(softmax_run, name)
    spectrum = analyze_spectrum(run, Settings(images=IMAGES))
    assert "effective rank, S" in spectrum.tables[0].columns
    assert np.isfinite(spectrum.arrays["ln_max"][..., 0]).all()  # the values after the rank are 0 and have no logarithm
    assert np.isfinite(analyze_maps(run, Settings(images=1)).arrays["learned"]).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("softmax", "softmax has no learned functions"),
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
    assert any("distance from softmax: only for S = H W^T" in note for note in result.notes)
    assert any("heads are numbered here without those of attention.softmax_heads" in note for note in result.notes)


def test_the_axis_of_the_functions_says_what_they_read(softmax_run: TrainedRun) -> None:
    for name, read in (("project first", "entry of A W"), ("smooth", "score")):
        figure, _ = functions_of(softmax_run, name).figures["functions_block_0"]
        assert {axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()} == {read}


@pytest.mark.parametrize(
    ("name", "energy", "distance", "notes"),
    [
        ("another grid", [0, 0, 1, 1], [0, 0, 1, 1], []),
        ("another basis", [1, 1], [1, 1], ["energy per frequency: only the Fourier", "distance from softmax: only"]),
        ("another form", [0, 0, 1, 1], [1, 1], ["distance from softmax: only for S = H W^T with base zero"]),
        ("scores in one block", [1, 1], [1, 1], ["attention.scores = false has constants phi_pq(0) alone"]),
    ],
)
def test_blocks_of_other_attention_are_shown_as_far_as_they_can(name, energy, distance, notes, softmax_run) -> None:
    result = functions_of(softmax_run, name)
    (table,) = [table for table in result.tables if table.title == "Energy per frequency"]
    assert [row[0] for row in table.rows] == energy
    assert [row["block"] for row in result.numbers["softmax"]] == distance
    assert [note.partition(", so not for ")[2] for note in result.notes] == ["block 0"] * len(notes)
    assert all(note.startswith(start) for note, start in zip(result.notes, notes, strict=True))
    if name == "another grid":
        assert [len(block[0]) for block in result.numbers["energy_share"]] == [4, 2]
        assert np.isnan(table.rows[2][4:]).tolist() == [True, True]
        assert np.isnan(result.arrays["energy_share"][1, :, 2:]).all()


def test_smooth_has_the_distance_from_softmax(softmax_run: TrainedRun) -> None:
    result = functions_of(softmax_run, "smooth")
    assert "distance" in result.figures
    nearest = min(result.numbers["softmax"], key=lambda head: head["to_fit"])
    assert result.findings[1:] == [
        f"{'No head is near softmax. ' * (nearest['to_fit'] > 0.5)}The head nearest to softmax is head "
        f"{nearest['head']} of block {nearest['block']}: {nearest['to_fit']:.2f} from its best fit, where 0 is the "
        "same and 1 has nothing in common."
    ]


def test_a_constant_matrix_loses_nothing_by_its_mean_over_images(softmax_run: TrainedRun) -> None:
    result = analyze_content(random_run(softmax_run, "static"), Settings(images=8))
    top1 = result.numbers["top1"]
    assert set(top1) == {"S", "mean over queries", "mean over images"}
    assert top1["mean over images"] == top1["S"]
    depends, constant = result.findings
    assert depends.endswith("and little on the image (0 % of its energy).")
    assert constant == "Each S is a constant matrix already: no image changes it."
    assert result.tables[0].rows[2][2:3] == [0.0]


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
