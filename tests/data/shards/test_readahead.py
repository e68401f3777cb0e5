"""What the system is asked to read ahead, over real epochs of `data.order: block`."""

import os
from pathlib import Path

import pytest

from karat_scale.data.order import epoch_order
from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.shard_files import Blocks
from karat_scale.data.shards.shards import ShardSplit
from tests.data.betons import make_betons

BLOCKS = Blocks(samples=4, window=3)


@pytest.fixture
def asked(monkeypatch):
    """The requests of this process, which are passed on."""
    requests, real = [], os.posix_fadvise

    def ask(file, begin, length, advice):
        requests.append((Path(f"/proc/self/fd/{file}").readlink(), begin, length))
        real(file, begin, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", ask)
    return requests


@pytest.mark.parametrize("kind", ["shards", "betons"])
def test_each_epoch_asks_for_each_block_once(make_shards, asked, kind):
    directory = make_shards()  # 40 samples, 8 in each shard: 10 blocks
    if kind == "shards":
        split = ShardSplit(directory, "train", 3, readahead=BLOCKS)
    else:
        split = BetonSplit(make_betons(directory), "train", 3, readahead=BLOCKS)
    asked.clear()
    for epoch in range(3):
        order = epoch_order(0, epoch, 40, "block", BLOCKS.samples, BLOCKS.window)
        for sample_id in order.tolist():
            split.read(sample_id)
        # Blocks that end one epoch and begin the next are still there.
        assert len(asked) == len(set(asked)) >= 10 - 2 * BLOCKS.window
        if epoch == 0:
            assert len(asked) == 10
        asked.clear()
    split.close()


def test_a_block_that_files_cut_is_asked_for_once(make_shards, asked):
    blocks = Blocks(samples=3, window=6)  # 13 blocks and a part, of which shards cut three
    split = ShardSplit(make_shards(), "train", 3, readahead=blocks)
    asked.clear()
    for sample_id in epoch_order(0, 0, 40, "block", *blocks).tolist():
        split.read(sample_id)
    assert len(asked) == len(set(asked)) == 14 + 3
    split.close()


def test_another_order_asks_for_nothing(make_shards, asked):
    split = ShardSplit(make_shards(), "train", 3)
    for sample_id in range(40):
        split.read(sample_id)
    assert asked == []
    split.close()
