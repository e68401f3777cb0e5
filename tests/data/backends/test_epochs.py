"""Epochs are the plan's on every backend.

The libraries' own readers pad with duplicates (FFCV), vary an epoch's length (DALI), give each rank the same shards in
each epoch, epochs of other lengths to other ranks and none to workers without a shard (webdataset), and refuse another
order under several ranks (FFCV, webdataset).
"""

import pytest
import torch

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import EvalPlan, TrainPlan
from tests.data.backends.helpers import CROP_AND_FLIP, SIZE
from tests.data.betons import make_betons

SAMPLES, SHARDS = 43, 6  # whose last holds three
WORLD, EPOCHS, WORKERS = 3, 2, 7  # more workers than shards


@pytest.fixture(params=["webdataset", "ffcv", "dali"])
def opened(request, make_shards, make_sample, data_config):
    """Opens the backend over uneven shards, or their beton, and closes it at the end."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    directory = make_shards(train=[make_sample(i) for i in range(SAMPLES)])
    if request.param == "ffcv":
        directory = make_betons(directory)
    backends = []

    def make(**fields):
        config = data_config(directory, backend=request.param, **fields)
        backends.append(open_backend(ImageSpec(config, CROP_AND_FLIP, SIZE, 3, 5)))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


@pytest.mark.parametrize("order", ["full", "block"])
def test_each_epoch_is_every_sample_once_in_equal_parts(opened, order):
    policy = {"order": order, "block_samples": 4, "window_blocks": 2}

    def epochs(backend, rank: int, world: int):
        plan = TrainPlan(5, SAMPLES, 12, 12 // world, rank, world, **policy)
        batches = list(backend.train_batches(plan.slices(0, EPOCHS * plan.steps_per_epoch)))
        return plan, [[batch for batch in batches if batch.epoch == epoch] for epoch in range(EPOCHS)]

    plan, whole = epochs(opened(workers=WORKERS, **policy), 0, 1)
    backend = opened(**policy)
    ranks = [epochs(backend, rank, WORLD)[1] for rank in range(WORLD)]
    for epoch in range(EPOCHS):
        assert [len(rank[epoch]) for rank in ranks] == [len(whole[epoch])] * WORLD == [3] * WORLD
        seen = torch.cat([batch.sample_ids for batch in whole[epoch]]).tolist()
        assert len(set(seen)) == 36
        assert seen == plan.epoch_order(epoch)[:36].tolist()
        for step, together in enumerate(whole[epoch]):
            parts = [rank[epoch][step] for rank in ranks]
            assert torch.equal(torch.cat([part.sample_ids for part in parts]), together.sample_ids)
            assert torch.equal(torch.cat([part.images for part in parts]), together.images)
    for rank in ranks:
        first, second = ({int(i) for batch in epoch for i in batch.sample_ids} for epoch in rank)
        assert first != second
        # More shards than a rank's share of them.
        assert len({i // 8 for i in first | second}) > SHARDS // WORLD


def test_evaluation_has_equal_parts_and_counts_each_image_once(opened):
    backend = opened(workers=1)
    ranks = [list(backend.eval_batches(EvalPlan(11, 2, rank, WORLD).slices())) for rank in range(WORLD)]
    assert [len(batches) for batches in ranks] == [2] * WORLD
    assert sorted(int(i) for batches in ranks for b in batches for i in b.sample_ids[b.valid]) == list(range(11))
