"""Workers hand over images in memory that is used again, and each batch has a digest."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from karat_scale.data import ExactLoader
from karat_scale.data.batch import Batch, Draw, batch_digest, with_digest
from karat_scale.data.loading.assemble import ImageSlots, OrderedLoader
from karat_scale.data.loading.device_feed import RunAhead
from karat_scale.data.plan import BatchSlice
from karat_scale.foundation.errors import DataError
from tests.data.backends.helpers import contents

SIZE, IMAGES, PREFETCH = 32, 4, 3


class Numbered:
    """Makes batches with pixels that are their number."""

    def shape(self, part: BatchSlice) -> tuple[int, ...]:
        return len(part.sample_ids), 3, SIZE, SIZE

    def __getitem__(self, part: BatchSlice) -> Batch:
        return self.fill(part, torch.empty(self.shape(part), dtype=torch.uint8))

    def fill(self, part: BatchSlice, images: torch.Tensor) -> Batch:
        images.fill_(part.batch % 251)
        ids = torch.from_numpy(part.sample_ids)
        draws = tuple(Draw((0, 0, 1, 1), ops=(("Rotate", (float(i),)),)) for i in part.sample_ids)
        return Batch(images, ids + 1, ids, torch.ones(len(ids), dtype=torch.bool), (), draws, 3, part.batch)

    def whereabouts(self, workers: int) -> str:
        return "nowhere"


def slices(count: int, images: int = IMAGES):
    return [BatchSlice(3, number, np.arange(number, number + images)) for number in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_stay_as_they_are(workers):
    loader = OrderedLoader(Numbered(), slices(40), workers, PREFETCH, 60.0)
    batches = list(loader)
    assert len(batches) == 40 > 2 * workers * PREFETCH  # each slot was filled more than twice
    for number, batch in enumerate(batches):
        assert batch.images.shape == (IMAGES, 3, SIZE, SIZE)
        assert batch.images.eq(number % 251).all()
        assert contents([batch]) == contents([Numbered()[slices(40)[number]]])


def test_a_batch_without_its_slot_is_small():
    slots = ImageSlots(1, 1, (IMAGES, 3, SIZE, SIZE))
    batch = Numbered().fill(slices(1)[0], slots._at(0, (IMAGES, 3, SIZE, SIZE)))
    sent = pickle.dumps(slots.pack(batch))
    assert len(sent) < IMAGES * 3 * SIZE * SIZE
    batch.images.fill_(77)  # the images are copied when the batch is received
    received = slots.unpack(pickle.loads(sent))
    assert received.images.eq(77).all()
    assert received.images.data_ptr() != batch.images.data_ptr()


def test_images_stay_on_the_host_whatever_torchs_default_device_is():
    slots = ImageSlots(1, 1, (IMAGES, 3, SIZE, SIZE))
    batch = Numbered().fill(slices(1)[0], slots._at(0, (IMAGES, 3, SIZE, SIZE)))
    synthetic = ExactLoader("any", backend="synthetic", num_classes=2, global_batch=2, workers=0, dtype=torch.uint8)
    torch.set_default_device("meta")
    try:
        sent = slots.pack(batch)[2].images
        images, _ = next(iter(synthetic))
    finally:
        torch.set_default_device(None)
    assert sent.device.type == images.device.type == "cpu"


def test_a_smaller_batch_fits_and_a_larger_one_and_what_memory_does_not_hold_are_refused():
    sizes = [slices(1)[0], slices(1, 2)[0]]
    assert [len(batch.images) for batch in OrderedLoader(Numbered(), sizes, 1, PREFETCH, 60.0)] == [4, 2]
    with pytest.raises(ValueError, match="first batch must be its largest"):
        list(OrderedLoader(Numbered(), sizes[::-1], 1, PREFETCH, 60.0))
    assert list(OrderedLoader(Numbered(), [], 1, PREFETCH, 60.0)) == []
    with pytest.raises(DataError, match=r"^no .* GiB of memory for prefetched batches; lower data.prefetch"):
        ImageSlots(64, 10**12, (IMAGES, 3, SIZE, SIZE))


def drawn(ids, epoch=0, number=0, flips=None):
    draws = tuple(Draw((0, 0, i + 1, 5), flip) for i, flip in zip(ids, flips or [False] * len(ids), strict=True))
    labels = torch.tensor(ids) % 3
    images = torch.zeros(len(ids), 3, 2, 2, dtype=torch.uint8)
    return Batch(images, labels, torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), (), draws, epoch, number)


def test_a_digest_is_a_sum_over_samples_and_everything_that_training_sees_changes_it():
    whole = batch_digest(drawn([4, 1, 7, 2]))
    assert 0 < whole < 2**40
    assert (batch_digest(drawn([7, 2])) + batch_digest(drawn([1, 4]))) % 2**40 == whole
    plain = drawn([4, 1])
    others = [drawn([4, 2]), drawn([4, 4]), drawn([4, 1], epoch=1), drawn([4, 1], number=1)]
    others += [drawn([4, 1], flips=[False, True]), replace(plain, labels=plain.labels + 1), replace(plain, draws=())]
    assert len({batch_digest(each) for each in [plain, *others]}) == 8


def test_digests_are_those_of_runs_that_began_with_an_older_version():
    ops = (("ShearX", (-0.3,)), ("PosterizeIncreasing", (0,)))
    jitter = (("contrast", 1.0667056315640249), ("brightness", 0.9812775633218846))
    draws = (Draw((23, 3, 445, 361), False, ops, jitter), Draw((0, 0, 20, 20), True, erase=(1, 2, 3, 4, 5)))
    ids, labels = torch.tensor([7, 1281166]), torch.tensor([3, 999])
    drawn = Batch(torch.zeros(2, 1), labels, ids, torch.ones(2, dtype=torch.bool), (), draws, 12, 4003)
    assert batch_digest(drawn) == 709283761290
    assert batch_digest(replace(drawn, draws=(), epoch=0, batch=1)) == 830834181604


@pytest.mark.parametrize("workers", [0, 1])
def test_whoever_makes_a_batch_takes_its_digest(workers):
    (made,) = OrderedLoader(Numbered(), [BatchSlice(3, 4, np.arange(2, 6))], workers, 1, 60)
    assert made.digest == batch_digest(replace(made, digest=None)) > 0
    (ahead,) = RunAhead((one for one in [replace(made, digest=None)]), 1, 60.0, str)
    assert ahead.digest == made.digest
    assert with_digest(ahead) is ahead
    # The digest of a batch on the device is known without its labels.
    assert batch_digest(made.to("meta")) == made.digest
