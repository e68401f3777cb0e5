"""Each operation against timm's on Pillow, for strengths that hypothesis draws."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from timm.data.auto_augment import NAME_TO_OP

from karat_scale.data.augmentation.augment import _posterize
from karat_scale.data.augmentation.device_augment import BATCHED, transformed
from karat_scale.data.augmentation.device_program import KINDS, MATRICES, Kind
from tests.data.conftest import photo

SIDE = 40
FILL = (124, 116, 104)
RESAMPLES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
FEW = settings(max_examples=15, deadline=None)

IMAGES = [
    photo(1, SIDE, SIDE),
    np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
    np.full((SIDE, SIDE, 3), (7, 200, 255), dtype=np.uint8),
    photo(3, SIDE, SIDE) // 3 + 40,
]
BATCH = torch.from_numpy(np.stack(IMAGES).transpose(0, 3, 1, 2).copy())


def by_pillow(name: str, *arguments: float, **keywords: object) -> torch.Tensor:
    operation = _posterize if name.startswith("Posterize") else NAME_TO_OP[name]
    results = [np.asarray(operation(Image.fromarray(image), *arguments, **keywords)) for image in IMAGES]
    return torch.from_numpy(np.stack(results).transpose(0, 3, 1, 2).copy())


def batched(name: str, argument: float) -> torch.Tensor:
    return BATCHED[KINDS[name]](BATCH, torch.full((len(BATCH),), argument, dtype=torch.float32))


def difference(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    assert (ours.dtype, ours.shape) == (torch.uint8, reference.shape)
    return (ours.int() - reference.int()).abs()


@pytest.mark.parametrize("name", ["Invert", "AutoContrast", "Equalize"])
def test_operations_without_a_strength_are_pillows(name):
    assert torch.equal(batched(name, 0.0), by_pillow(name))


def test_contrast_is_stretched_by_pillows_quotient():
    """255 * (1 / 234) is another number than 255 / 234, and level 255 came out as 255 where Pillow has 254."""
    image = np.tile(np.arange(21, 256, dtype=np.uint8)[:, None, None], (1, 2, 3))
    pillow = np.asarray(NAME_TO_OP["AutoContrast"](Image.fromarray(image)))
    ours = BATCHED[Kind.AUTO_CONTRAST](torch.from_numpy(image.transpose(2, 0, 1).copy())[None], torch.zeros(1))
    assert np.array_equal(ours[0].permute(1, 2, 0).numpy(), pillow)


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"])
@pytest.mark.parametrize("bits", range(9))
def test_posterizing_is_pillows(name, bits):
    assert torch.equal(batched(name, bits), by_pillow(name, bits))


@pytest.mark.parametrize("name", ["Solarize", "SolarizeIncreasing", "SolarizeAdd"])
@given(level=st.integers(0, 256))
@FEW
def test_solarizing_is_pillows(name, level):
    level = min(level, 128) if name == "SolarizeAdd" else level
    assert torch.equal(batched(name, level), by_pillow(name, level))


@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Color", "Sharpness", "Desaturate"])
@given(factor=st.floats(0.0, 2.5))
@example(0.0)
@example(1.0)
@FEW
def test_blends_are_within_one_level_of_pillows(name, factor):
    found = difference(batched(name, factor), by_pillow(name, factor))
    assert found.max() <= 1
    assert found.float().mean() < 0.01


def test_sharpness_of_an_image_too_small_for_it():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    pillow = ImageEnhance.Sharpness(Image.fromarray(image[0].permute(1, 2, 0).numpy())).enhance(1.7)
    ours = BATCHED[Kind.SHARPNESS](image, torch.tensor([1.7]))
    assert torch.equal(ours[0].permute(1, 2, 0), torch.from_numpy(np.array(pillow)))


STRENGTHS = {
    "Rotate": st.floats(-45, 45),
    "ShearX": st.floats(-0.5, 0.5),
    "ShearY": st.floats(-0.5, 0.5),
    "TranslateX": st.floats(-SIDE, SIDE),
    "TranslateY": st.floats(-SIDE, SIDE),
    "TranslateXRel": st.floats(-1, 1),
    "TranslateYRel": st.floats(-1, 1),
}


def test_every_matrix_is_tested():
    assert STRENGTHS.keys() == MATRICES.keys()


@pytest.mark.parametrize("interpolation", RESAMPLES)
@pytest.mark.parametrize("name", STRENGTHS)
@given(data=st.data())
@FEW
def test_moves_are_within_one_level_of_pillows(name, interpolation, data):
    # A shift of next to nothing takes a level from every second pixel of Pillow's, for it cuts off.
    strength = round(data.draw(STRENGTHS[name]), 3)
    reference = by_pillow(name, strength, resample=RESAMPLES[interpolation], fillcolor=FILL)
    matrix = torch.tensor([MATRICES[name](strength, SIDE, SIDE)] * len(BATCH), dtype=torch.float64)
    found = difference(transformed(BATCH, matrix, FILL, interpolation == "bicubic"), reference)
    assert found.max() <= 1
    assert found.float().mean() < 0.05


def test_images_are_moved_by_parts_as_at_once():
    matrices = torch.tensor([MATRICES["Rotate"](angle, SIDE, SIDE) for angle in (3, -9, 20, 31)], dtype=torch.float64)
    at_once = transformed(BATCH, matrices, FILL, cubic=True)
    assert torch.equal(transformed(BATCH, matrices, FILL, cubic=True, cut=3), at_once)
