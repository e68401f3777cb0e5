"""Parameters that do not learn, and positions that are computed."""

import numpy as np
import pytest

from karat_scale.foundation.errors import RecipeError
from karat_scale.models.layers import freeze, sincos_2d
from tests.models.test_init_from import model


def formula(height: int, width: int, dim: int) -> np.ndarray:
    """Return the positions by the formula of arXiv 2205.01580, in float64, one at a time."""
    frequencies = [10_000.0 ** (-k / (dim // 4 - 1)) for k in range(dim // 4)]
    rows = []
    for y in range(height):
        for x in range(width):
            angles = [[at * w for w in frequencies] for at in (x, y)]
            rows.append(np.concatenate([np.sin(angles[0]), np.cos(angles[0]), np.sin(angles[1]), np.cos(angles[1])]))
    return np.array(rows)


@pytest.mark.parametrize(("height", "width", "dim"), [(14, 14, 384), (2, 5, 8), (1, 1, 12)])
def test_equals_the_formula(height: int, width: int, dim: int) -> None:
    ours = sincos_2d(height, width, dim)
    assert ours.shape == (height * width, dim)
    np.testing.assert_allclose(ours.numpy(), formula(height, width, dim), atol=1e-7)
    for wrong in (4, 10):
        with pytest.raises(ValueError, match=f"8, 12, 16, ..., not {wrong}"):
            sincos_2d(2, 2, wrong)


def test_patterns_freeze_what_they_match() -> None:
    vit = model(0)
    line = freeze(vit, ["patch_embed.*", "blocks.0.*", "*.operator.proj"])
    frozen = {name for name, parameter in vit.named_parameters() if not parameter.requires_grad}
    assert "blocks.0.norm1.weight" in frozen
    assert "blocks.1.attn.operator.proj" in frozen
    assert {"blocks.1.attn.operator.cos_coef", "head.bias", "cls_token"}.isdisjoint(frozen)
    assert line.endswith("parameters are frozen")


def test_a_pattern_that_matches_nothing_and_one_that_leaves_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"train.freeze = blocs.\*: matches no parameter; .* cls_token"):
        freeze(model(0), ["blocs.*"])
    with pytest.raises(RecipeError, match=r"train.freeze = \[\*\] leaves no parameter to train"):
        freeze(model(0), ["*"])
