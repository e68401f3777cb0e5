"""Tests of the Triton kernels of augmentation, run by Triton's interpreter on the CPU.

The interpreter must be chosen before Triton is imported, so `test_device_fused.py` runs this file in a process of its
own.
"""

import random
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from karat_scale.data.augmentation import device_fused
from karat_scale.data.augmentation.augment import TrainTransform
from karat_scale.data.augmentation.device_augment import DeviceAugment, Normalize, resize_views
from karat_scale.data.augmentation.device_program import KINDS, MATRICES
from karat_scale.data.augmentation.mixing import MixParams
from karat_scale.data.batch import Draw
from karat_scale.data.decoders.decode import centre_view, crop_view
from karat_scale.data.decoders.libraries import RESAMPLE, resized
from karat_scale.recipe import AugmentConfig
from tests.attention.kernels.interpreter import install_bfloat16
from tests.data.conftest import photo

install_bfloat16()

WIDTH, HEIGHT = 43, 37  # several programs, and the last one is not full
STRENGTHS = {
    "Rotate": (-30, 30),
    "ShearX": (-0.3, 0.3),
    "ShearY": (-0.3, 0.3),
    "TranslateX": (-20, 20),
    "TranslateY": (-20, 20),
    "TranslateXRel": (-0.4, 0.4),
    "TranslateYRel": (-0.4, 0.4),
    "Posterize": (0, 8),
    "Solarize": (0, 256),
    "SolarizeAdd": (0, 128),
}
OTHERS = (0.0, 2.5)


def by_torch(augment: DeviceAugment, images: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    with patch.object(device_fused, "can_run", lambda _: False):
        return augment(images, draws)


def some_images() -> torch.Tensor:
    """Return photos, and images of noise, of one colour, of few levels and of one bright pixel on black."""
    rng = np.random.default_rng(0)
    images = [photo(i, WIDTH, HEIGHT) for i in range(4)]
    images += [rng.integers(0, 256, (HEIGHT, WIDTH, 3)), np.full((HEIGHT, WIDTH, 3), (7, 200, 255))]
    images += [photo(9, WIDTH, HEIGHT) // 3 + 40, np.zeros((HEIGHT, WIDTH, 3))]
    images[-1][3, 5] = 255
    return torch.from_numpy(np.stack(images).astype(np.uint8).transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize(
    ("name", "interpolation"),
    [(name, "bicubic") for name in sorted(KINDS.keys() - {"Erase"})]
    + [(name, "bilinear") for name in sorted(MATRICES)],
)
def test_each_operation_is_that_of_torch(name, interpolation):
    images, rng = some_images(), random.Random(name)
    kind = next((known for known in STRENGTHS if name.startswith(known)), "")
    strengths = [rng.uniform(*STRENGTHS.get(name, STRENGTHS.get(kind, OTHERS))) for _ in images]
    if kind in ("Posterize", "Solarize", "SolarizeAdd"):
        strengths = [float(round(strength)) for strength in strengths]
    draws = [Draw((0, 0, 1, 1), ops=((name, (strength,)),)) for strength in strengths]
    augment = DeviceAugment(AugmentConfig(run_on="device", interpolation=interpolation), WIDTH)
    assert torch.equal(augment(images, draws), by_torch(augment, images, draws))


def test_the_papers_augmentation_is_that_of_workers_and_of_torch():
    recipe = AugmentConfig(color_jitter=0.4)
    transform = TrainTransform(recipe, WIDTH)
    augment = DeviceAugment(recipe.model_copy(update={"run_on": "device"}), WIDTH)
    images = some_images()
    draws = [replace(transform.draw(i, WIDTH, HEIGHT), flip=False) for i in range(len(images))]
    before = images.clone()
    ours = augment(images, draws)
    assert torch.equal(ours, by_torch(augment, images, draws))
    assert torch.equal(images, before)
    pixels = images.permute(0, 2, 3, 1).numpy()
    workers = np.stack([transform.finish(crop, draw) for crop, draw in zip(pixels, draws, strict=True)])
    assert np.abs(ours.numpy().astype(int) - workers).mean() < 0.05
    assert torch.equal(augment(images[2:5], draws[2:5]), ours[2:5])


@pytest.mark.parametrize(("height", "width"), [(2, 5), (1, 1), (3, 3), (HEIGHT, WIDTH)])
def test_images_too_small_for_a_neighbourhood_and_of_other_strides(height, width):
    images = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)
    draws = [Draw((0, 0, 1, 1), ops=(("Sharpness", (1.7,)), ("Rotate", (9.0,)), ("Equalize", ()))) for _ in images]
    augment = DeviceAugment(AugmentConfig(run_on="device"), width)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(augment(strided, draws), by_torch(augment, images, draws))


@pytest.mark.parametrize("by_kernels", [True, False])
def test_boxes_are_filled_with_noise_of_the_recipes_mean_from_their_seed(by_kernels, monkeypatch):
    monkeypatch.setattr(device_fused, "can_run", lambda _: by_kernels)
    recipe = AugmentConfig(run_on="device")
    images = torch.full((3, 3, HEIGHT, WIDTH), 9, dtype=torch.uint8)
    draws = [Draw((0, 0, 1, 1), erase=(4, 8, 30, 25, seed)) for seed in (1, 1, 2**32 - 1)]
    same, again, other = erased = DeviceAugment(recipe, WIDTH)(images, draws)
    box = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    box[8:33, 4:34] = True
    assert erased[:, :, ~box].eq(9).all()
    noise = erased[..., box].float() / 255
    torch.testing.assert_close(noise.mean((0, 2)), torch.tensor(recipe.mean), atol=0.02, rtol=0)
    assert noise.std(2).min() > 0.2
    assert torch.equal(same, again)
    channels = torch.stack([*same[:, box], *other[:, box]]).float()
    assert (torch.corrcoef(channels) - torch.eye(6)).abs().max() < 0.2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_are_those_of_torch_and_of_pillow(interpolation):
    size = 8
    sizes = [(21, 17), (13, 16), (14, 9), (8, 8), (1, 1), (19, 9)]
    views = [
        crop_view((1, 3, 19, 13), size),
        centre_view(13, 16, 9, size),
        crop_view((2, 1, 7, 5), size),
        crop_view((0, 0, 8, 8), size),
        crop_view((0, 0, 1, 1), size),
        centre_view(19, 9, 8, size),
    ]
    images = [torch.from_numpy(photo(i, *shape).copy()).permute(2, 0, 1) for i, shape in enumerate(sizes)]
    images[1], images[2] = images[1].contiguous(), images[2].transpose(1, 2).contiguous().transpose(1, 2)
    flips = [i % 2 == 1 for i in range(len(views))]
    ours = resize_views(images, views, flips, size, interpolation)
    with patch.object(device_fused, "can_run", lambda _: False):
        theirs = resize_views(images, views, flips, size, interpolation)
    for number, (view, flip) in enumerate(zip(views, flips, strict=True)):
        image = Image.fromarray(np.ascontiguousarray(images[number].permute(1, 2, 0)))
        expected = np.array(resized(image, view, RESAMPLE[interpolation])).transpose(2, 0, 1)
        expected = expected[..., ::-1] if flip else expected
        for other in (theirs[number].numpy(), expected):
            apart = np.abs(ours[number].numpy().astype(int) - other)
            assert apart.max() <= 1, number
            assert apart.mean() < 0.05, number


def test_views_wider_than_a_program(monkeypatch):
    monkeypatch.setattr(device_fused, "VIEW_WIDTH", 16)
    image = torch.from_numpy(photo(1, 12, 10).copy()).permute(2, 0, 1)
    views = [crop_view((1, 2, 9, 5), 20)]
    in_parts = resize_views([image], views, [True], 20, "bicubic")
    monkeypatch.setattr(device_fused, "VIEW_WIDTH", 32)
    assert torch.equal(resize_views([image], views, [True], 20, "bicubic"), in_parts)


MIXES = [MixParams("none"), MixParams("mixup", 0.3), MixParams("cutmix", 0.8, (3, 20, 0, 11)), MixParams("mixup", 1.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: f"{mix.kind} {mix.lam}")
def test_the_models_input_has_the_bits_of_torchs_passes(mix, dtype):
    recipe, images = AugmentConfig(), some_images()
    normalize = Normalize(recipe.mean, recipe.std, dtype)
    ours = normalize(images, mix)
    with patch.object(device_fused, "can_run", lambda _: False):
        assert torch.equal(ours, normalize(images, mix))
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (recipe.mean, recipe.std))
    exact = (images.double() / 255 - mean) / std
    partners = exact.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    if mix.kind == "mixup":
        exact = mix.lam * exact + (1 - mix.lam) * partners
    else:
        top, bottom, left, right = mix.box
        exact[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
    assert ours.dtype == dtype
    # One rounding to the result's type, and a few to float32 of numbers below 3.
    assert (ours.double() - exact).abs().le(exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


def test_an_odd_batch_that_does_not_mix():
    normalize = Normalize((0.5,) * 3, (0.5,) * 3)
    images = some_images()
    assert torch.equal(normalize(images[:3]), normalize(images)[:3])
