import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karat_scale.data.order import batch_seed, epoch_order, sample_seed

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(0, 1000), st.integers(0, 500))
def test_an_order_is_a_permutation_and_a_pure_function(seed, epoch, samples):
    order = epoch_order(seed, epoch, samples)
    np.random.seed(seed % 7)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(samples))
    assert np.array_equal(order, epoch_order(seed, epoch, samples))


@given(seeds, st.integers(0, 1000), st.integers(0, 500), st.integers(1, 60), st.integers(1, 9))
def test_a_block_order_is_a_permutation_that_keeps_to_few_blocks_at_a_time(seed, epoch, samples, block, window):
    order = epoch_order(seed, epoch, samples, "block", block, window)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(samples))
    assert np.array_equal(order, epoch_order(seed, epoch, samples, "block", block, window))
    for start in range(0, samples, block * window):
        touched = np.unique(order[start : start + block * window] // block)
        # The short last block may push a window's edge into the next block.
        assert len(touched) <= window + 1


def test_a_block_order_moves_blocks_and_mixes_within_windows():
    first, second = (epoch_order(0, epoch, 2560, "block", 16, 10) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    windows = first.reshape(16, 160)
    assert len({tuple(np.unique(window // 16)) for window in windows}) == 16
    # Neighbours on the disk are spread over their window: a run of two is a chance of 1 in 159.
    assert np.mean(np.diff(first) == 1) < 0.03
    assert abs(np.corrcoef(first, np.arange(2560))[0, 1]) < 0.3


def test_orders_are_pinned():
    assert epoch_order(0, 0, 10).tolist() == [1, 4, 5, 9, 2, 3, 7, 0, 8, 6]
    assert epoch_order(0, 0, 10, "block", 3, 2).tolist() == [4, 1, 9, 3, 2, 0, 7, 6, 8, 5]
    assert sample_seed(1, 2, 3) == 8829882195302039915
    assert batch_seed(1, 2, 3) == 5931935650869668317


def test_epochs_and_seeds_differ():
    orders = [epoch_order(seed, epoch, 100).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6


def test_positions_are_uniform():
    # Each sample's mean position over many epochs stays near the middle: 200 draws, standard error 2.
    positions = np.stack([np.argsort(epoch_order(5, epoch, 100)) for epoch in range(200)])
    assert np.abs(positions.mean(axis=0) - 49.5).max() < 4.5 * 2.05


def test_seeds_are_well_mixed():
    values = {f(0, epoch, i) for f in (sample_seed, batch_seed) for epoch in range(10) for i in range(500)}
    assert len(values) == 10000
    bits = np.unpackbits(np.array(sorted(values), dtype=np.uint64).view(np.uint8).reshape(-1, 8), axis=1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.03


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="use 'full'"):
        epoch_order(0, 0, 4, "sorted")
