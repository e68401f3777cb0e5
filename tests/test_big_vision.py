"""The shipped recipe of arXiv 2205.01580 against the formulas of its configuration, big_vision's vit_s16_i1k.py."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from karat_scale.data.augmentation.augment import RandAugment, TrainTransform
from karat_scale.engine.optimizers import build_optimizer, build_schedule
from karat_scale.models import create_model
from karat_scale.recipe import AugmentConfig
from karat_scale.recipe.loading import differing_keys, load_recipe
from tests.conftest import SMALL, events, karat_done

NAME = "imagenet_vit_small_bv"
IMAGES, BATCH = 1_281_167, 1024


def test_the_schedule_and_the_decay() -> None:
    recipe = load_recipe(NAME)
    schedule = build_schedule(recipe, IMAGES // BATCH)
    assert (schedule.warmup_steps, schedule.total_steps) == (10_000, 112_590)
    assert [schedule.lr(step) for step in (0, 5_000, 10_000, 112_590)] == [0.0, 5e-4, 1e-3, 0.0]
    assert schedule.lr((10_000 + 112_590) // 2) == pytest.approx(5e-4)
    # One step of AdamW takes the rate times the decay off a matrix: 1e-4 at the peak; nothing off vectors.
    weight, bias = torch.nn.Linear(4, 4, bias=False), torch.nn.LayerNorm(4)
    before = weight.weight.detach().clone()
    model = torch.nn.Sequential(weight, bias)
    model.no_weight_decay = set  # type: ignore[assignment]
    optimizer = build_optimizer(model, recipe.optim, torch.device("cpu"))  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(weight.weight.detach(), before * (1 - 1e-4), rtol=1e-6, atol=0)
    assert torch.equal(bias.weight.detach(), torch.ones(4))


def test_randaugment_does_both_its_operations_at_magnitude_10() -> None:
    recipe = load_recipe(NAME)
    policy = RandAugment(recipe.augment, 224)
    drawn = [operation for seed in range(400) for operation in policy.draw(random.Random(seed))]
    assert len(drawn) == 2 * 400  # timm's default would leave out every second one
    strengths: dict[str, set[float]] = {}
    for name, arguments in drawn:
        strengths.setdefault(name, set()).update(round(abs(value), 6) for value in arguments)
    assert strengths == {
        **{name: set() for name in ("AutoContrast", "Equalize", "Invert")},
        **{name: {1.9} for name in ("Color", "Contrast", "Brightness", "Sharpness")},
        **{name: {0.3} for name in ("ShearX", "ShearY")},
        **{name: {0.45} for name in ("TranslateXRel", "TranslateYRel")},  # of 224 pixels; 100 pixels there
        **{"Rotate": {30.0}, "Posterize": {4}, "Solarize": {256}, "SolarizeAdd": {110}},
    }
    assert policy.fill == (128, 128, 128)


BIG = AugmentConfig(crop="big_vision", scale=(0.05, 0.5), ratio=(0.75, 1.33), hflip=0, randaugment="")


def drawn_boxes(augment: AugmentConfig, width: int, height: int, count: int) -> np.ndarray:
    transform = TrainTransform(augment, 224)
    return np.array([transform.draw(seed, width, height).box for seed in range(count)])


def test_big_visions_crop_has_uniform_heights_and_aspect_ratios() -> None:
    """Unless a side limits it, a crop's height is uniform at each aspect, and so is the root of its share of area."""
    side, count = 100_000, 4_000
    left, top, w, h = drawn_boxes(BIG, side, side, count).T
    low, high = np.sqrt(BIG.scale)
    for values, start, end in (
        (np.sqrt(w * h) / side, low, high),
        (w / h, *BIG.ratio),
        (left / (side - w), 0, 1),
        (top / (side - h), 0, 1),
    ):
        assert stats.kstest(values, stats.uniform(start, end - start).cdf).pvalue > 1e-3
    assert abs(stats.spearmanr(w / h, w * h).statistic) < 0.05
    # torchvision's crop differs: its areas are uniform.
    _, _, w, h = drawn_boxes(BIG.changed(crop="pytorch"), side, side, count).T
    assert stats.kstest(np.sqrt(w * h) / side, stats.uniform(low, high - low).cdf).pvalue < 1e-12
    assert stats.kstest(w * h / side**2, stats.uniform(0.05, 0.45).cdf).pvalue > 1e-3


def test_big_visions_crop_of_a_small_image_has_tensorflows_frequencies() -> None:
    """An enumeration gives the frequencies: for each of many aspect ratios, all heights in range are equally likely."""
    width, height, count = 9, 6, 40_000
    least, most = 0.2 * width * height, 0.9 * width * height
    expected: Counter[tuple[int, int]] = Counter()
    for aspect in np.linspace(0.5, 2, 20_001):
        heights = [h for h in range(1, height + 1) if round(h * aspect) <= width and h <= round((most / aspect) ** 0.5)]
        heights = [h for h in heights if h >= min(round((least / aspect) ** 0.5), heights[-1])]
        for h in heights:
            # A height whose rounding leaves the range of areas moves by one, or is drawn again.
            area = h * round(h * aspect)
            h += 1 if area < least else 0
            h -= 1 if h * round(h * aspect) > most else 0
            w = round(h * aspect)
            if least <= w * h <= most and w <= width and 0 < h <= height:
                expected[w, h] += 1 / len(heights)
    augment = BIG.changed(scale=(0.2, 0.9), ratio=(0.5, 2.0))
    found = Counter((int(w), int(h)) for _, _, w, h in drawn_boxes(augment, width, height, count))
    assert set(found) <= set(expected)
    sizes = sorted(expected)
    share = count / sum(expected.values())
    test = stats.chisquare([found[size] for size in sizes], [share * expected[size] for size in sizes])
    assert test.pvalue > 1e-3


def test_big_visions_crop_never_touches_the_last_row_of_a_larger_image_and_gives_up_to_the_whole() -> None:
    left, top, w, h = drawn_boxes(BIG.changed(scale=(0.05, 1.0)), 512, 256, 4_000).T
    assert (w <= 341).all()  # never the whole image: a ratio up to 1.33 of 256 rows
    assert (left + w <= 511).all()
    assert ((top + h <= 255) | (h == 256)).all()
    assert (h == 256).any()
    # A wide image has no box of these ratios with 90 % of its area.
    assert (drawn_boxes(BIG.changed(scale=(0.9, 1.0)), 100, 10, 20) == (0, 0, 100, 10)).all()


def test_the_rest_is_the_configurations() -> None:
    recipe = load_recipe(NAME)
    augment = recipe.augment
    assert (augment.scale, augment.ratio, augment.hflip, augment.color_jitter) == ((0.05, 1), (0.75, 1.33), 0.5, 0)
    assert augment.crop == "pytorch"  # EIFY/mup-vit: 77.27 %, and 76.94 % with big_vision's
    assert (augment.mixup, augment.cutmix, augment.mix_prob, augment.label_smoothing) == (0.2, 0, 1, 0)
    assert (augment.mean, augment.std, 224 / augment.eval_crop) == ((0.5,) * 3, (0.5,) * 3, 256)
    assert (recipe.train.epochs, recipe.train.global_batch, recipe.train.ema_decay) == (90, BATCH, 0)
    assert (recipe.optim.clip_grad, recipe.optim.betas, recipe.optim.eps) == (1, (0.9, 0.999), 1e-8)
    twin = load_recipe(f"{NAME}_g3b")
    assert differing_keys(recipe, twin) == ["attention.kind"]


def test_the_model_is_timms_vit_small_without_a_class_token() -> None:
    recipe = load_recipe(NAME)
    with torch.device("meta"):
        model = create_model(recipe.model, recipe.attention)
        twin = create_model(recipe.model, load_recipe(f"{NAME}_g3b").attention)
    assert sum(p.numel() for p in model.parameters()) == 22_050_664 - 2 * 384
    assert twin.blocks[0].attn.operator.num_tokens == 196


@pytest.mark.slow
def test_it_trains_resumes_and_evaluates(shards: Path, tmp_path: Path) -> None:
    small = [*SMALL, "schedule.warmup_steps=3", "train.precision=fp32", "train.ema_decay=0"]
    paths = [f"data.path={shards}", f"run.dir={tmp_path / 'run'}"]
    for steps in (4, 8):
        karat_done("train", f"{NAME}_g3b", *small, *paths, f"train.max_steps={steps}")
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [4]
    assert "on 28 images" in karat_done("eval", str(tmp_path / "run")).stdout
