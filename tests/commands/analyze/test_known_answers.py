"""Whole analyses of a real run whose operators are replaced by ones with a known answer."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from karat_scale.commands.analyze.functions import analyze_functions
from karat_scale.commands.analyze.maps import analyze_maps
from karat_scale.commands.analyze.matrices import analyze_spectrum
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun

SEEN = {0: 7, 1: 3}
"""The token that each head looks at, whoever looks."""


class PlantedRun(TrainedRun):
    """Every score is 0, cos(0) = 1, and so S[k, :] is 1 at SEEN[head] (in head 1 one half), in every block."""

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
    """Every function of head 1 is 3 cos(2 x), every other 0."""

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
    # Two of 17 tokens share what two blocks move: a half of what was left, twice, two thirds of it to the first.
    np.testing.assert_allclose(result.arrays["rollout"][:, 6], 0.75 * 2 / 3, atol=1e-6)
    np.testing.assert_allclose(result.arrays["rollout"].sum(-1), 0.75, atol=1e-6)


def test_one_hot_attention_has_rank_one(karat_run: TrainedRun) -> None:
    result = analyze_spectrum(changed(karat_run, PlantedRun), Settings(images=3))
    for block in result.numbers["blocks"]:
        assert block["after"] == pytest.approx(dict.fromkeys(block["after"], 1.0), abs=1e-3)
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
