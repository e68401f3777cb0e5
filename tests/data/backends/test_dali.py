import numpy as np
import pytest
import torch

from karat_scale.data.backends import ImageSpec
from karat_scale.data.backends.dali_pipeline import DaliDecoder
from karat_scale.data.backends.images import BatchDecodingBackend, open_shards
from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan
from karat_scale.data.shards.tars import EncodedSample
from karat_scale.recipe import AugmentConfig
from tests.data.backends.helpers import SIZE, contents, odd_samples
from tests.data.conftest import encode, photo


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("order", ["full", "block"])
def test_batches_are_those_of_webdataset_and_torchvision_to_the_bit(make_shards, dali, webdataset, workers, order):
    directory = make_shards()
    policy = {"order": order, "block_samples": 4, "window_blocks": 2}
    seen = []
    for backend in (dali(directory, workers=workers, **policy), webdataset(directory, **policy)):
        # The paper's whole augmentation, over an epoch's end.
        plan = TrainPlan(5, backend.num_train, 12, 6, 0, 1, order, 4, 2)
        train = contents(backend.train_batches(plan.slices(1, 7)))
        seen.append((train, contents(backend.eval_batches(EvalPlan(backend.num_val, 4, 0, 1).slices()))))
    assert [len(part) for part in seen[0]] == [12, 3]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_pillows_within_half_a_grey_level_on_average(make_shards, dali, webdataset, interpolation):
    samples = [EncodedSample(f"{i}", "jpg", encode(photo(i, 90 + i, 80), quality=95), 0) for i in range(12)]
    augment = AugmentConfig(color_jitter=0, randaugment="", interpolation=interpolation)
    directory = make_shards(train=samples, val=samples)
    ours, pillow = dali(directory, augment, size=48), webdataset(directory, augment, size=48, decoder="pillow")
    slices = [BatchSlice(0, 0, np.arange(12))]
    (one,), (two,) = ours.train_batches(slices), pillow.train_batches(slices)
    assert one.draws == two.draws
    assert (one.images.int() - two.images).abs().float().mean(dim=(1, 2, 3)).max() < 0.5
    (one,), (two,) = ours.eval_batches(slices), pillow.eval_batches(slices)
    assert torch.equal(one.images, two.images)


def test_a_batch_of_padding_alone_is_zeros(make_shards, dali):
    (batch,) = dali(make_shards()).eval_batches([BatchSlice(0, 0, np.array([-1, -1]))])
    assert not batch.images.any()
    assert not batch.valid.any()


def test_batches_that_dali_finishes_hold_the_same_samples(make_shards, data_config, webdataset, cheap_augment):
    # As on a GPU, but on the CPU: DALI resizes and flips, and rows that it was not given are put in.
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    samples = list(odd_samples())
    directory = make_shards(train=samples, val=samples)
    spec = ImageSpec(data_config(directory, backend="dali", workers=1), cheap_augment, SIZE, 3, 5)
    finishing = DaliDecoder(1, cheap_augment.interpolation, size=SIZE)
    backend = BatchDecodingBackend(open_shards(spec), spec, lambda _: finishing)
    other = webdataset(directory, cheap_augment)
    whole = [BatchSlice(2, 0, np.arange(len(samples)))]
    padded = [BatchSlice(2, 0, np.array([*range(len(samples)), -1]))]
    for found, expected in (
        (backend.train_batches(whole), other.train_batches(whole)),
        (backend.eval_batches(padded), other.eval_batches(padded)),
    ):
        (one,), (two,) = found, expected
        assert one.draws == two.draws
        assert torch.equal(one.valid, two.valid)
        assert not one.images[~one.valid].any()
        difference = (one.images.int() - two.images).abs().float().mean(dim=(1, 2, 3))
        assert difference.max() < 0.5
        by_pillow = [i for i, sample in enumerate(samples) if sample.key in ("png", "cmyk", "palette", "alpha")]
        assert not difference[by_pillow].any()
    backend.close()
