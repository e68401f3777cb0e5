"""Tests of the lanes' places in a checkpoint: a resume with the same lanes is exact, others begin at a stated place."""

import pytest

from karat_scale.data.plan import LanePlace, TrainPlan
from karat_scale.data.streams import StreamProgress, StreamState


def places(progress: StreamProgress) -> dict[int, tuple[int, int]]:
    return {lane: tuple(place) for lane, place in progress.places.items()}


def test_a_run_begins_at_the_first_shards_and_the_same_lanes_go_on_where_they_stood():
    saved = StreamState(5, [(9, 1), (4, 2), (7, 3), (2, 4)])
    progress = StreamProgress(1, 2, 2, 5)
    assert progress.resume(saved) == ""
    assert places(progress) == {2: (7, 3), 3: (2, 4)}
    assert progress.mine() == [LanePlace(7, 3), LanePlace(2, 4)]
    assert places(StreamProgress(1, 2, 3, 9)) == {3: (3, 0), 4: (4, 0), 5: (5, 0)}


@pytest.mark.parametrize(("lanes", "shards"), [(1, 5), (4, 5), (2, 6)])
def test_other_lanes_or_tars_begin_at_the_next_cycle(lanes: int, shards: int) -> None:
    progress = StreamProgress(1, 2, lanes, shards)
    said = progress.resume(StreamState(5, [(9, 1), (4, 2), (11, 3), (2, 4)]))
    assert said.endswith("4 lanes (ranks x data workers) in the checkpoint: a new pass over all tars begins")
    assert list(progress.places.values()) == [LanePlace(3 * shards + lane) for lane in range(lanes, 2 * lanes)]


def test_micro_batches_come_from_the_lanes_in_turn_whatever_step_is_the_first() -> None:
    plan = TrainPlan(0, 32, 8, 2, 1, 2, "stream", lanes=3)
    whole = list(plan.slices(0, 9))
    assert [part.lane for part in whole] == [3, 4, 5] * 6
    assert [(part.epoch, part.batch) for part in whole[::2]] == [divmod(step, 4) for step in range(9)]
    assert {(part.lanes, len(part.sample_ids)) for part in whole} == {(6, 2)}
    assert [(part.lane, part.batch) for part in plan.slices(4, 9)] == [(part.lane, part.batch) for part in whole[8:]]


def test_the_first_slice_of_each_lane_says_where_it_stands() -> None:
    progress = StreamProgress(0, 1, 2, 4)
    progress.resume(StreamState(4, [(6, 2), (5, 1)]))
    found = [part.place for part in progress.from_here(TrainPlan(0, 32, 2, 2, 0, 1, "stream", lanes=2).slices(3, 7))]
    assert found == [LanePlace(5, 1), LanePlace(6, 2), None, None]
