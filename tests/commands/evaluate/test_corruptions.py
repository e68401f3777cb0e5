"""Corrupted copies are the same in each process, and harder with severity."""

import sys

import numpy as np
import pytest

from karat_scale.commands.evaluate.test_set import Corruption, chosen_corruptions
from karat_scale.foundation.tables import CORRUPTIONS
from tests.conftest import output_of

pytest.importorskip("imagecorruptions", reason="needs the extra corruptions")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    y, x = np.mgrid[0:64, 0:64]
    return np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)


def test_the_names_are_the_librarys() -> None:
    from imagecorruptions import get_corruption_names

    assert tuple(get_corruption_names()) == CORRUPTIONS
    assert chosen_corruptions([]) == chosen_corruptions(["all"]) == CORRUPTIONS
    assert chosen_corruptions(["fog", "snow"]) == ("snow", "fog")


COMPILES = pytest.param("glass_blur", marks=pytest.mark.slow)  # by numba, at its first call


@pytest.mark.parametrize("name", [COMPILES if name == "glass_blur" else name for name in CORRUPTIONS])
def test_each_keeps_the_size_and_repeats_itself(name: str, picture: np.ndarray) -> None:
    state = np.random.get_state()[1].copy()
    first, again, other = (Corruption(name, 3)(picture, number) for number in (7, 7, 8))
    assert first.shape == picture.shape
    assert first.dtype == np.uint8
    assert not np.array_equal(first, picture)
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(np.random.get_state()[1], state), "the generator of others is left as it was"
    if name in ("gaussian_noise", "shot_noise", "impulse_noise", "fog", "glass_blur", "elastic_transform"):
        assert not np.array_equal(first, other)
    if name in ("gaussian_noise", "defocus_blur", "contrast"):
        mild, strong = (np.abs(Corruption(name, s)(picture, 0).astype(int) - picture).mean() for s in (1, 5))
        assert mild < strong


@pytest.mark.slow
def test_another_process_makes_the_same(picture: np.ndarray) -> None:
    code = (
        "import numpy as np\nfrom karat_scale.commands.evaluate.test_set import Corruption\n"
        "y, x = np.mgrid[0:64, 0:64]\np = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)\n"
        "print(sum(int(Corruption(n, 2)(p, 5).astype(int).sum()) for n in ('snow', 'glass_blur', 'shot_noise')))"
    )
    here = sum(int(Corruption(n, 2)(picture, 5).astype(int).sum()) for n in ("snow", "glass_blur", "shot_noise"))
    assert int(output_of(sys.executable, "-c", code)) == here
