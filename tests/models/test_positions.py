import numpy as np
import pytest

from karat_scale.models.layers import sincos_2d


def formula(height: int, width: int, dim: int) -> np.ndarray:
    """arXiv 2205.01580's, in float64, one position at a time."""
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


@pytest.mark.parametrize("dim", [4, 10])
def test_a_width_it_cannot_have(dim: int) -> None:
    with pytest.raises(ValueError, match=f"8, 12, 16, ..., not {dim}"):
        sincos_2d(2, 2, dim)
