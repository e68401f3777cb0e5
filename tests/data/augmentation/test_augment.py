import random
import sys
from dataclasses import replace
from functools import partial
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torchvision.transforms import CenterCrop, Compose, Resize
from torchvision.transforms.functional import InterpolationMode

from karat_scale.data.augmentation.augment import (
    ENHANCEMENTS,
    EvalTransform,
    RandAugment,
    TrainTransform,
    _find_compiled,
    planes_of,
    rotation,
)
from karat_scale.data.decoders.libraries import RESAMPLE, resized
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.native_build import _available_instruction_sets
from karat_scale.recipe import AugmentConfig
from tests.compilers import needs_compiler


def image(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels_of(transform, source, draw):
    """Return the result of the transform on a whole image."""
    view = resized(source, transform.view(draw), Image.Resampling.BICUBIC)
    return transform.finish(np.asarray(view), draw)


def augmented(transform, source, seed):
    return pixels_of(transform, source, transform.draw(seed, *source.size))


OFF = AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0, color_jitter=0, randaugment="")


@given(st.integers(0, 2**64 - 1), st.integers(1, 500), st.integers(1, 500))
def test_a_drawn_box_lies_in_the_image(seed, width, height):
    left, top, w, h = TrainTransform(AugmentConfig(color_jitter=0.4), 32).draw(seed, width, height).box
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    assert w > 0
    assert h > 0


def test_draws_have_the_asked_distribution():
    transform = TrainTransform(AugmentConfig(scale=(0.3, 0.6), ratio=(0.67, 1.5), hflip=0.25, color_jitter=0.4), 32)
    draws = [transform.draw(seed, 200, 200) for seed in range(4000)]
    areas = np.array([draw.box[2] * draw.box[3] / 40000 for draw in draws])
    ratios = np.array([draw.box[2] / draw.box[3] for draw in draws])
    assert 0.29 < areas.min() < 0.31
    assert 0.59 < areas.max() < 0.61
    assert abs(areas.mean() - 0.45) < 0.01
    assert abs(np.log(ratios).mean()) < 0.02
    assert ratios.min() > 0.65
    assert ratios.max() < 1.53
    assert abs(np.mean([draw.flip for draw in draws]) - 0.25) < 0.03
    factors = np.array([[factor for _, factor in draw.jitter] for draw in draws])
    assert factors.min() > 0.6
    assert factors.max() < 1.4
    assert len({tuple(name for name, _ in draw.jitter) for draw in draws}) == 6
    assert len({name for draw in draws for name, _ in draw.ops}) == 15


def test_draws_are_pinned():
    draw = TrainTransform(AugmentConfig(color_jitter=0.4), 224).draw(1234, 500, 375)
    assert (draw.box, draw.flip) == ((328, 156, 151, 108), False)
    assert [name for name, _ in draw.ops] == ["Rotate"]  # "ShearX" was drawn too, and left out by its probability


def test_what_is_drawn_is_done():
    transform = TrainTransform(AugmentConfig(color_jitter=0, randaugment="", hflip=1), 16)
    draw = transform.draw(3, 40, 30)
    left, top, w, h = draw.box
    expected = image().crop((left, top, left + w, top + h)).resize((16, 16), Image.Resampling.BICUBIC)
    expected = np.asarray(expected)[:, ::-1].transpose(2, 0, 1)
    assert np.array_equal(pixels_of(transform, image(), draw), expected)


def test_the_same_seed_gives_the_same_pixels_and_global_generators_stay():
    transform = TrainTransform(AugmentConfig(color_jitter=0.4), 24)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    results = [augmented(transform, image(), seed) for seed in range(30)]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after
    random.seed(99)
    again = [augmented(transform, image(), seed) for seed in range(30)]
    assert all(np.array_equal(one, two) for one, two in zip(results, again, strict=True))
    # A posterised image may come out black, more than once.
    assert len({result.tobytes() for result in results}) >= 28
    assert {(result.shape, result.dtype.name) for result in results} == {((3, 24, 24), "uint8")}


def test_threads_draw_what_one_thread_draws_and_leave_the_global_generator_alone():
    transform = TrainTransform(AugmentConfig(), 32)

    def draws(_):
        return [transform.draw(seed, 90, 80) for seed in range(3000)]

    alone, state, interval = draws(0), random.getstate(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPool(4) as pool:
            assert all(drawn == alone for drawn in pool.map(draws, range(4), chunksize=1))
    finally:
        sys.setswitchinterval(interval)
    assert random.getstate() == state


def test_what_is_off_is_a_plain_resize_and_an_unreadable_randaugment_string_is_refused():
    transform = TrainTransform(OFF, 20)
    assert transform.draw(5, 28, 28).box == (0, 0, 28, 28)
    expected = np.asarray(image(28, 28).resize((20, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(augmented(transform, image(28, 28), 5), expected)
    assert np.array_equal(
        augmented(TrainTransform(OFF, 28), image(28, 28), 5), np.asarray(image(28, 28)).transpose(2, 0, 1)
    )
    with pytest.raises(RecipeError, match=r"augment.randaugment = 'rand-x9'"):
        TrainTransform(AugmentConfig(randaugment="rand-x9"), 32)


@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
def test_evaluation_is_resize_and_centre_crop(crop):
    for size in ((40, 30), (30, 40), (28, 28), (7, 90)):
        # A smooth image: Pillow clips between its two passes, and the sizes decide which axis it resizes first.
        source = image(5, 5).point(lambda value: 64 + value // 2).resize(size, Image.Resampling.BICUBIC)
        expected = Compose([Resize(int(28 / crop), InterpolationMode.BICUBIC), CenterCrop(28)])(source)
        view = EvalTransform(AugmentConfig(eval_crop=crop), 28).view(*size)
        difference = np.asarray(resized(source, view, Image.Resampling.BICUBIC)).astype(int) - np.asarray(expected)
        assert abs(difference).max() <= 2
        assert abs(difference).mean() < 0.2


def test_erasing_fills_a_box_of_the_drawn_size_with_noise_around_the_mean_and_leaves_other_draws_as_they_were():
    transform = TrainTransform(AugmentConfig(scale=(1, 1), color_jitter=0, randaugment="", erasing=1.0), 64)
    blank = np.zeros((64, 64, 3), dtype=np.uint8)
    shares = []
    for seed in range(200):
        draw = transform.draw(seed, 80, 80)
        left, top, width, height, _ = draw.erase
        result = transform.finish(blank, draw)
        inside = result[:, top : top + height, left : left + width]
        assert inside.mean() > 60
        assert result.sum() == inside.sum()
        assert np.array_equal(result, transform.finish(blank, draw))
        shares.append(width * height / 64**2)
    assert 0.01 < min(shares) < max(shares) < 0.36
    assert abs(np.mean(shares) - (0.02 + 1 / 3) / 2) < 0.03
    assert not blank.any()
    plain, erasing = (TrainTransform(AugmentConfig(erasing=p), 32).draw(7, 90, 80) for p in (0, 1))
    assert erasing.erase is not None
    assert replace(erasing, erase=None) == plain


# The C++ is compared with Pillow bit for bit, on each instruction set of this machine.
FILL = (124, 116, 104)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(1)
    sizes = [(1, 1), (2, 5), (31, 7), (64, 64), (57, 90)]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    # Between these values, single precision is often too coarse to tell the byte.
    few = [Image.fromarray((rng.integers(0, 3, (33, 17, 3)) * 127).astype(np.uint8)), images[1].resize((40, 50))]
    return [*images, *few, Image.new("RGB", (40, 30), (255, 0, 255))]


@pytest.fixture(params=[pytest.param(name, marks=needs_compiler) for name in (*_available_instruction_sets(), "plain")])
def compiled(request, monkeypatch):
    """Yield a function that returns the compiled operations of an interpolation, for each instruction set."""
    monkeypatch.setenv("KARAT_CPU_ISA", request.param)
    _find_compiled.cache_clear()
    yield partial(_find_compiled, fill=FILL)
    _find_compiled.cache_clear()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_any_matrix_gives_pillows_bits(compiled, interpolation):
    operations = compiled(interpolation)
    assert operations is not None
    rng = random.Random(2)
    for source in pictures():
        for _ in range(12):
            shift = rng.choice([0.0, rng.uniform(-40, 40), float(rng.randint(-20, 20)), 1e-13, -1e10])
            slope = rng.choice([0.0, rng.uniform(-2, 2), 1.0, -0.5])
            for matrix in (
                (1, slope, shift, 0, 1, 0),
                (1, 0, 0, slope, 1, shift),
                (1, slope, shift, slope, 1, shift),
                tuple(rng.uniform(-2, 2) for _ in range(6)),
                rotation(rng.uniform(-720, 720), *source.size),
            ):
                filtered = RESAMPLE[interpolation]
                theirs = source.transform(source.size, Image.Transform.AFFINE, matrix, filtered, fillcolor=FILL)
                found = operations.warp(planes_of(source), matrix)
                assert np.array_equal(found, planes_of(theirs)), (source.size, matrix)


@pytest.mark.parametrize("name", ENHANCEMENTS)
def test_any_strength_of_an_enhancement_gives_pillows_bits(compiled, name):
    rng, operations = random.Random(4), compiled("bicubic")
    for source in pictures():
        for factor in (0.0, 1.0, *(rng.uniform(-1, 4) for _ in range(10))):
            theirs = getattr(ImageEnhance, name)(source).enhance(factor)
            found = operations.enhance(planes_of(source), name, factor)
            assert np.array_equal(found, planes_of(theirs)), (source.size, factor)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m15-n2-mstd1.0-inc1", "rand-m10-tweights-n2"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_operation_of_a_policy_is_timms(policy, interpolation):
    augment = AugmentConfig(randaugment=policy, interpolation=interpolation)
    ours, timms = RandAugment(augment, 48), RandAugment(augment, 48)
    timms._compiled = None
    rng = random.Random(3)
    seen = set()
    for _ in range(400):
        for operation in ours.draw(rng):
            seen.add(operation[0])
            for source in pictures()[-4:]:
                found, expected = (one.apply(planes_of(source), operation) for one in (ours, timms))
                assert np.array_equal(found, expected), operation
    assert seen == set(ours.names)


@needs_compiler
def test_flips_and_jitter_are_the_same_without_a_compiler():
    augment = AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0.5, color_jitter=0.4, randaugment="rand-m9")
    compiled, plain = TrainTransform(augment, 40), TrainTransform(augment, 40)
    assert compiled._compiled is not None
    plain._compiled = plain._randaugment._compiled = None
    for seed in range(30):
        draw = compiled.draw(seed, 40, 30)
        assert np.array_equal(compiled.finish(np.asarray(image()), draw), plain.finish(np.asarray(image()), draw))


@pytest.mark.parametrize("degrees", [0.0, 90.0, -180.0])
def test_turns_that_pillow_does_without_a_filter_stay_with_pillow(degrees):
    source = image(64, 64)
    turned = RandAugment(AugmentConfig(randaugment="rand-m9"), 48).apply(planes_of(source), ("Rotate", (degrees,)))
    assert np.array_equal(turned, planes_of(source.rotate(degrees)))
