from dataclasses import replace

import torch

from karat_scale.data.augmentation.draw import Draw
from karat_scale.data.batch import Batch
from karat_scale.data.digest import batch_digest


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
