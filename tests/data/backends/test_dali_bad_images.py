"""Images that DALI cannot read, or reads otherwise than the others would."""

import tarfile

import numpy as np
import pytest

from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards.tars import EncodedSample
from karat_scale.foundation.errors import DataError
from tests.data.backends.helpers import contents, hollow, noise, odd_samples
from tests.data.conftest import encode


def test_odd_images_are_read_as_elsewhere(make_shards, dali, webdataset):
    samples = list(odd_samples())
    directory = make_shards(train=samples, val=samples)
    slices = [BatchSlice(epoch, 0, np.arange(len(samples))) for epoch in range(3)]
    one, two = dali(directory), webdataset(directory)
    assert contents(one.train_batches(slices)) == contents(two.train_batches(slices))
    assert contents(one.eval_batches(slices)) == contents(two.eval_batches(slices))


def test_the_odd_set_is_read_as_elsewhere(sample_data, make_shards, dali, webdataset):
    with tarfile.open(sample_data / "odd_jpegs.tar") as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        samples = [
            EncodedSample(f"{i:02d}", "jpg", tar.extractfile(member).read(), i % 3) for i, member in enumerate(members)
        ]
    directory = make_shards(train=samples, val=samples)
    slices = [BatchSlice(0, start, np.arange(start, start + 3)) for start in range(0, len(samples), 3)]
    one, two = dali(directory, on_bad_sample="skip"), webdataset(directory, on_bad_sample="skip")
    train = contents(one.train_batches(slices))
    assert train == contents(two.train_batches(slices))
    assert contents(one.eval_batches(slices)) == contents(two.eval_batches(slices))
    bad = {sample.key for batch in train for sample in batch[-1]}
    assert bad == {
        f"{i:02d}" for i, member in enumerate(members) if "truncated_jpeg" in member.name or "hdr" in member.name
    }


def damaged(number: int) -> EncodedSample:
    """A JPEG with bytes changed, cut out or zeroed, anywhere."""
    rng = np.random.default_rng(number)
    data = bytearray(encode(noise(number), quality=90))
    at = int(rng.integers(2, len(data) - 300))
    if number % 3 == 0:
        del data[at : at + 200]
    elif number % 3 == 1:
        data[at : at + 200] = bytes(200)
    else:
        for place in rng.integers(2, len(data) - 2, 4).tolist():
            data[place] = int(rng.integers(200, 256))
    return EncodedSample(f"damaged-{number}", "jpg", bytes(data), 0)


def test_damage_is_judged_as_elsewhere_and_looks_the_same(make_shards, dali, webdataset):
    samples = [damaged(number) for number in range(60)]
    directory = make_shards(train=samples, val=samples)
    slices = [BatchSlice(0, number, np.array([number])) for number in range(60)]
    one, two = dali(directory, on_bad_sample="skip"), webdataset(directory, on_bad_sample="skip")
    train = contents(one.train_batches(slices))
    assert train == contents(two.train_batches(slices))
    assert 0 < sum(len(batch[-1]) > 0 for batch in train) < 60
    assert contents(one.eval_batches(slices)) == contents(two.eval_batches(slices))


def test_what_only_decoding_shows_to_be_bad_is_replaced_as_elsewhere(make_shards, make_sample, dali, webdataset):
    samples = [make_sample(i) for i in range(10)]
    samples[4], samples[8], samples[9] = hollow(4), hollow(8), hollow(9)
    directory = make_shards(train=samples, val=samples)
    slices = [BatchSlice(0, t, np.arange(2 * t, 2 * t + 2)) for t in range(5)]
    slices += [BatchSlice(0, 5, np.arange(10))]
    one, two = dali(directory, on_bad_sample="skip"), webdataset(directory, on_bad_sample="skip")
    train, evaluated = contents(one.train_batches(slices)), contents(one.eval_batches(slices))
    assert train == contents(two.train_batches(slices))
    assert evaluated == contents(two.eval_batches(slices))
    assert train[5][4] == [0, 1, 2, 3, 5, 5, 6, 7, 0, 0]  # the samples' ids
    assert [i for i in range(10) if not evaluated[5][5][i]] == [4, 8, 9]


def test_a_bomb_is_refused_by_its_header(make_shards, make_sample, dali, cheap_augment):
    samples = [make_sample(i) for i in range(3)]
    samples[1] = EncodedSample("bomb", "jpg", encode(np.zeros((300, 300, 3), dtype=np.uint8)), 0)
    backend = dali(make_shards(train=samples), cheap_augment, max_pixels=89_999)
    with pytest.raises(DataError, match=r"bomb in train-000000.tar .* 300 x 300 pixels, more than data.max_pixels"):
        next(backend.train_batches([BatchSlice(0, 0, np.arange(3))]))
