"""The C++ warps against Pillow, bit for bit, on each instruction set of this machine."""

import random

import numpy as np
import pytest
from PIL import Image

from karat_scale.data.augmentation.augment import RandAugment, find_warp, rotation
from karat_scale.data.decoders.pillow import RESAMPLE
from karat_scale.foundation.native_build import _available_instruction_sets
from karat_scale.recipe.loading import load_recipe

FILL = (124, 116, 104)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(1)
    sizes = [(1, 1), (2, 5), (31, 7), (64, 64), (57, 90)]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    return [*images, Image.new("RGB", (40, 30), (255, 0, 255))]


@pytest.mark.parametrize("isa", [*_available_instruction_sets(), "plain"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_any_matrix_gives_pillows_bits(isa: str, interpolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KARAT_CPU_ISA", isa)
    find_warp.cache_clear()
    warp = find_warp(interpolation, FILL)
    find_warp.cache_clear()
    assert warp is not None
    rng = random.Random(2)
    for image in pictures():
        for _ in range(25):
            shift = rng.choice([0.0, rng.uniform(-40, 40), float(rng.randint(-20, 20))])
            slope = rng.choice([0.0, rng.uniform(-2, 2), 1.0, -0.5])
            for matrix in (
                (1, slope, shift, 0, 1, 0),
                (1, 0, 0, slope, 1, shift),
                (1, slope, shift, slope, 1, shift),
                tuple(rng.uniform(-2, 2) for _ in range(6)),
                rotation(rng.uniform(-720, 720), *image.size),
            ):
                theirs = image.transform(
                    image.size, Image.Transform.AFFINE, matrix, RESAMPLE[interpolation], fillcolor=FILL
                )
                assert np.array_equal(np.asarray(warp(image, matrix)), np.asarray(theirs)), (image.size, matrix)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m15-n2-mstd1.0-inc1", "rand-m10"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_operation_of_a_policy_is_timms(policy: str, interpolation: str) -> None:
    recipe = load_recipe(
        "cifar10_vit_tiny",
        ["data.path=x", f"augment.randaugment={policy}", f"augment.interpolation={interpolation}"],
    )
    ours, timms = RandAugment(recipe.augment, 48), RandAugment(recipe.augment, 48)
    timms._warp = None
    rng = random.Random(3)
    noise = np.random.default_rng(4).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    image, seen = Image.fromarray(noise), set()
    for _ in range(400):
        for operation in ours.draw(rng):
            seen.add(operation[0])
            assert np.array_equal(
                np.asarray(ours.apply(image, operation)), np.asarray(timms.apply(image, operation))
            ), operation
    assert {"Rotate", "ShearX", "ShearY"} <= seen


@pytest.mark.parametrize("degrees", [0.0, 90.0, -180.0])
def test_turns_that_pillow_does_without_a_filter_stay_with_pillow(degrees: float) -> None:
    recipe = load_recipe("cifar10_vit_tiny", ["data.path=x", "augment.randaugment=rand-m9"])
    (image,) = pictures()[3:4]
    turned = RandAugment(recipe.augment, 48).apply(image, ("Rotate", (degrees,)))
    assert np.array_equal(np.asarray(turned), np.asarray(image.rotate(degrees)))
