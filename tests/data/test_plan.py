import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karat_scale.data.order import epoch_order
from karat_scale.data.plan import PADDING, EvalPlan, TrainPlan, choose_micro_batch
from karat_scale.foundation.errors import DataError, RecipeError


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


def test_an_epoch_repeats_no_sample():
    plan = TrainPlan(0, 1000, 64, 64, 0, 1)
    ids = np.concatenate([part.sample_ids for part in plan.slices(0, plan.steps_per_epoch)])
    assert len(set(ids.tolist())) == len(ids) == 960


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 12))
def test_evaluation_counts_each_sample_once(samples, batch, world):
    plans = [EvalPlan(samples, batch, rank, world) for rank in range(world)]
    slices = [list(plan.slices()) for plan in plans]
    assert {len(rank) for rank in slices} == {plans[0].num_batches}
    assert {len(part.sample_ids) for rank in slices for part in rank} == {batch}
    ids = np.concatenate([part.sample_ids for rank in slices for part in rank])
    assert sorted(ids[ids != PADDING].tolist()) == list(range(samples))


@given(st.integers(1, 512), st.integers(1, 16), st.one_of(st.none(), st.integers(1, 600)), st.booleans())
def test_a_chosen_micro_batch_divides_evenly_or_is_refused_on_one_line(batch, world, wanted, even):
    part, rest = divmod(batch, world)
    micro = min(wanted or part, part)
    if rest or part == 0 or part % micro or (even and (part % 2 or micro % 2)):
        with pytest.raises(RecipeError, match=r"^train\.[^\n]*; use [^\n]*\d$"):
            choose_micro_batch(batch, world, wanted, even)
        return
    micro = choose_micro_batch(batch, world, wanted, even)
    assert batch % (world * micro) == 0
    assert micro <= (wanted or batch)
    assert not (even and micro % 2)


def test_micro_batches():
    assert choose_micro_batch(128, 2, None, True) == 64
    assert choose_micro_batch(128, 2, 100, True) == 64
    assert choose_micro_batch(128, 2, 16, True) == 16
    with pytest.raises(RecipeError, match=r"train.global_batch = 128 .* 3 ranks; use .* such as 129"):
        choose_micro_batch(128, 3, None, False)
    with pytest.raises(RecipeError, match=r"train.micro_batch = 40 .* use 32"):
        choose_micro_batch(128, 2, 40, True)


def test_too_few_samples_are_refused():
    with pytest.raises(DataError, match=r"63 samples.*at most 63"):
        TrainPlan(0, 63, 64, 64, 0, 1)
