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


def test_orders_are_pinned():
    assert epoch_order(0, 0, 10).tolist() == [1, 4, 5, 9, 2, 3, 7, 0, 8, 6]
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
