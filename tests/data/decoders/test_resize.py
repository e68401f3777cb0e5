import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from karat_scale.data.decoders.decode import centre_view, crop_view
from karat_scale.data.decoders.pillow import RESAMPLE, resize_region, resized


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from(sorted(RESAMPLE)), st.integers(0, 99)
)
def test_a_crop_is_resized_as_pillow_does_but_for_rounding(width, height, size, interpolation, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    view = crop_view((0, 0, width, height), size)
    result = resize_region(pixels, view, interpolation)
    expected = np.asarray(resized(Image.fromarray(pixels), view, RESAMPLE[interpolation]))
    difference = np.abs(result.astype(int) - expected)
    assert result.shape == (size, size, 3)
    assert difference.mean() < 1


@pytest.mark.parametrize("interpolation", sorted(RESAMPLE))
@pytest.mark.parametrize("dimensions", [(40, 30), (33, 71)])
def test_a_centre_is_resized_as_pillow_does_to_the_bit(dimensions, interpolation):
    width, height = dimensions
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    view = centre_view(width, height, 20, 16)
    left, top, right, bottom = view.region
    expected = np.asarray(resized(Image.fromarray(pixels), view, RESAMPLE[interpolation]))
    assert np.array_equal(resize_region(pixels[top:bottom, left:right], view, interpolation), expected)
