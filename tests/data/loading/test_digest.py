from dataclasses import replace

import numpy as np
import pytest
import torch

from karat_scale.data.batch import Batch, Draw
from karat_scale.data.loading.device_feed import RunAhead
from karat_scale.data.loading.loader import OrderedLoader, batch_digest, with_digest
from karat_scale.data.plan import BatchSlice
from tests.data.loading.test_slots import Numbered


def batch(ids, epoch=0, number=0, flips=None):
    draws = tuple(Draw((0, 0, i + 1, 5), flip) for i, flip in zip(ids, flips or [False] * len(ids), strict=True))
    labels = torch.tensor(ids) % 3
    images = torch.zeros(len(ids), 3, 2, 2, dtype=torch.uint8)
    return Batch(images, labels, torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), (), draws, epoch, number)


def test_a_digest_is_a_sum_over_samples():
    whole = batch_digest(batch([4, 1, 7, 2]))
    assert 0 < whole < 2**40
    assert (batch_digest(batch([7, 2])) + batch_digest(batch([1, 4]))) % 2**40 == whole


def test_everything_that_training_sees_changes_it():
    plain = batch([4, 1])
    others = [
        batch([4, 2]),
        batch([4, 1], epoch=1),
        batch([4, 1], number=1),
        batch([4, 1], flips=[False, True]),
        replace(plain, labels=plain.labels + 1),
        replace(plain, draws=()),
        batch([4, 4]),
    ]
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
    # Nobody asks for the labels of a batch that is on the device.
    assert batch_digest(made.to("meta")) == made.digest
