import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target

from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.augmentation.mixing import Mixer, cut_box, mixed
from karat_scale.recipe import AugmentConfig

CLASSES = 5
torch.manual_seed(0)
IMAGES = torch.randn(16, 3, 12, 10)
LABELS = torch.randint(0, CLASSES, (16,))
BOTH = AugmentConfig()


def mix(mixer: Mixer, images: torch.Tensor, labels: torch.Tensor, epoch: int, batch: int):
    params = mixer.params(epoch, batch, *images.shape[-2:])
    return mixed(images, params), mixer.targets(labels, params)


def pairs_exchanged(rows: torch.Tensor) -> torch.Tensor:
    return rows[[i ^ 1 for i in range(len(rows))]]


@given(st.integers(0, 2**32 - 1), st.integers(0, 50), st.integers(0, 500), st.integers(0, 8), st.integers(0, 8))
def test_an_even_slice_mixes_as_inside_the_whole(seed, epoch, batch, first, last):
    rows = slice(2 * min(first, last), 2 * max(first, last))
    mixer = Mixer(BOTH, CLASSES, seed)
    images, targets = mix(mixer, IMAGES, LABELS, epoch, batch)
    part_images, part_targets = mix(mixer, IMAGES[rows], LABELS[rows], epoch, batch)
    assert torch.equal(images[rows], part_images)
    assert torch.equal(targets[rows], part_targets)


@given(st.integers(0, 2**31 - 1), st.floats(0, 1), st.integers(1, 300), st.integers(1, 300))
def test_the_box_of_cutmix_is_timms(seed, lam, height, width):
    np.random.seed(seed)
    box, share = cutmix_bbox_and_lam((height, width), lam)
    ours = cut_box(lam, height, width, np.random.RandomState(seed))
    assert (ours.box, ours.lam) == (box, share)


def test_mixup_is_the_formula():
    mixer = Mixer(AugmentConfig(mixup=0.8, cutmix=0), CLASSES, 1)
    before = IMAGES.clone()
    images, targets = mix(mixer, IMAGES, LABELS, 2, 3)
    params = mixer.params(2, 3, 12, 10)
    assert params.kind == "mixup"
    torch.testing.assert_close(images, params.lam * IMAGES + (1 - params.lam) * pairs_exchanged(IMAGES))
    # timm pairs the first row with the last, which is our pairing if there are two rows.
    for i in range(0, 16, 2):
        expected = mixup_target(LABELS[i : i + 2], CLASSES, params.lam, 0.1)
        torch.testing.assert_close(targets[i : i + 2], expected)
    assert torch.equal(before, IMAGES)


def test_cutmix_pastes_the_box_and_weighs_by_its_area():
    mixer = Mixer(AugmentConfig(mixup=0, cutmix=1.0), CLASSES, 1)
    boxes = 0
    for batch in range(50):
        params = mixer.params(0, batch, 12, 10)
        images, targets = mix(mixer, IMAGES, LABELS, 0, batch)
        top, bottom, left, right = params.box
        inside = torch.zeros(12, 10, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(images, torch.where(inside, pairs_exchanged(IMAGES), IMAGES))
        assert params.lam == pytest.approx(1 - inside.sum().item() / 120)
        torch.testing.assert_close(targets.sum(1), torch.ones(16))
        boxes += bool(inside.any())
    assert boxes > 30


def test_kinds_come_with_the_asked_probabilities():
    kinds = [
        Mixer(AugmentConfig(mix_prob=0.8, mix_switch_prob=0.25), CLASSES, 0).params(0, batch, 8, 8).kind
        for batch in range(3000)
    ]
    for kind, share in (("none", 0.2), ("cutmix", 0.2), ("mixup", 0.6)):
        assert abs(kinds.count(kind) / 3000 - share) < 0.04


def test_without_mixing_targets_are_smoothed_one_hot():
    mixer = Mixer(AugmentConfig(mixup=0, cutmix=0, label_smoothing=0.1), CLASSES, 0)
    images, targets = mix(mixer, IMAGES[:3], LABELS[:3], 0, 0)
    assert torch.equal(images, IMAGES[:3])
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets, torch.nn.functional.one_hot(LABELS[:3], CLASSES) * 0.9 + 0.02)


def test_params_depend_on_epoch_and_batch_and_leave_the_global_generator_and_an_odd_batch_cannot_mix():
    mixer = Mixer(AugmentConfig(mixup=0), CLASSES, 0)
    before = np.random.get_state()[1].tolist()
    params = {mixer.params(epoch, batch, 32, 32) for epoch in range(5) for batch in range(5)}
    assert len(params) == 25
    assert np.random.get_state()[1].tolist() == before
    params = Mixer(BOTH, CLASSES, 0).params(0, 0, 12, 10)
    with pytest.raises(ValueError, match="odd batch of 3"):
        Normalize(BOTH.mean, BOTH.std)(torch.zeros(3, 3, 12, 10, dtype=torch.uint8), params)


def test_normalize_is_torchvisions():
    from torchvision.transforms.v2.functional import normalize, to_dtype

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    result = Normalize(mean, std)(images)
    assert result.dtype == torch.float32
    expected = normalize(to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)
