import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karat_scale.data.plan import PADDING, EvalPlan, TrainPlan, batch_seed, choose_micro_batch, epoch_order, sample_seed
from karat_scale.foundation.errors import DataError, RecipeError

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(0, 1000), st.integers(0, 500), st.integers(1, 60), st.integers(1, 9))
def test_an_order_is_a_permutation_and_a_pure_function_of_few_blocks_at_a_time(seed, epoch, samples, block, window):
    for policy in ("full", "block"):
        order = epoch_order(seed, epoch, samples, policy, block, window)
        np.random.seed(seed % 7)
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(samples))
        assert np.array_equal(order, epoch_order(seed, epoch, samples, policy, block, window))
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


def test_epochs_and_seeds_differ_and_are_well_mixed():
    orders = [epoch_order(seed, epoch, 100).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    # Each sample's mean position over many epochs stays near the middle: 200 draws, standard error 2.
    positions = np.stack([np.argsort(epoch_order(5, epoch, 100)) for epoch in range(200)])
    assert np.abs(positions.mean(axis=0) - 49.5).max() < 4.5 * 2.05
    values = {f(0, epoch, i) for f in (sample_seed, batch_seed) for epoch in range(10) for i in range(500)}
    assert len(values) == 10000
    bits = np.unpackbits(np.array(sorted(values), dtype=np.uint64).view(np.uint8).reshape(-1, 8), axis=1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.03


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 4), (2, 12), (2, 3), (3, 8), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_make_up_the_global_batches(world, micro):
    plans = [TrainPlan(7, 101, 24, micro, rank, world) for rank in range(world)]
    assert {plan.steps_per_epoch for plan in plans} == {4}
    slices = [list(plan.slices(0, 9)) for plan in plans]
    per_step = plans[0].accumulation
    for step in range(9):
        parts = [part for rank in slices for part in rank[step * per_step : (step + 1) * per_step]]
        epoch, batch = divmod(step, 4)
        assert {(part.epoch, part.batch) for part in parts} == {(epoch, batch)}
        expected = epoch_order(7, epoch, 101)[batch * 24 : (batch + 1) * 24]
        assert np.concatenate([part.sample_ids for part in parts]).tolist() == expected.tolist()


def test_resuming_anywhere_gives_the_tail():
    plan = TrainPlan(3, 50, 8, 2, 1, 2)
    whole = [(part.epoch, part.batch, part.sample_ids.tolist()) for part in plan.slices(0, 15)]
    for start in range(15):
        tail = [(part.epoch, part.batch, part.sample_ids.tolist()) for part in plan.slices(start, 15)]
        assert tail == whole[start * plan.accumulation :]


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 12))
def test_evaluation_counts_each_sample_once(samples, batch, world):
    plans = [EvalPlan(samples, batch, rank, world) for rank in range(world)]
    slices = [list(plan.slices()) for plan in plans]
    assert {len(rank) for rank in slices} == {plans[0].num_batches}
    assert {len(part.sample_ids) for rank in slices for part in rank} == {min(batch, -(-samples // world))}
    ids = np.concatenate([part.sample_ids for rank in slices for part in rank])
    assert sorted(ids[ids != PADDING].tolist()) == list(range(samples))


@given(st.integers(1, 512), st.integers(1, 16), st.one_of(st.none(), st.integers(1, 600)), st.booleans())
def test_a_chosen_micro_batch_divides_evenly_or_is_refused_on_one_line(batch, world, wanted, even):
    part, rest = divmod(batch, world)
    micro = min(wanted or part, part)
    if rest or part == 0 or part % micro or (even and (part % 2 or micro % 2)):
        with pytest.raises(RecipeError, match=r"^train\.[^\n]*; (use|set) [^\n]*\d$"):
            choose_micro_batch(batch, world, wanted, even)
        return
    micro = choose_micro_batch(batch, world, wanted, even)
    assert batch % (world * micro) == 0
    assert micro <= (wanted or batch)
    assert not (even and micro % 2)


def test_micro_batches_and_too_few_samples():
    assert choose_micro_batch(128, 2, None, True) == 64
    assert choose_micro_batch(128, 2, 100, True) == 64
    assert choose_micro_batch(128, 2, 16, True) == 16
    with pytest.raises(RecipeError, match=r"train.global_batch = 128 .* 3 ranks; use .* train.global_batch=129"):
        choose_micro_batch(128, 3, None, False)
    for none in (0, -4):
        with pytest.raises(RecipeError, match=rf"train.global_batch = {none} .* 2 ranks; use .* train.global_batch=2$"):
            choose_micro_batch(none, 2, None, False)
        with pytest.raises(RecipeError, match=rf"train.micro_batch = {none} .* set train.micro_batch=2$"):
            choose_micro_batch(128, 2, none, True)
    with pytest.raises(RecipeError, match=r"train.micro_batch = 40 .* set train.micro_batch=32"):
        choose_micro_batch(128, 2, 40, True)
    with pytest.raises(DataError, match=r"63 samples.*at most 63"):
        TrainPlan(0, 63, 64, 64, 0, 1)
