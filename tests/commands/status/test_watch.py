"""Which rank a hang is laid to."""

from dataclasses import replace

from karat_scale.commands.status.watch import Watch
from karat_scale.engine.heartbeat import Sign, StallLimits

STALL = StallLimits(60.0)


def signs(*beats: int, written: float = 0.0) -> list[Sign]:
    """Signs of ranks 0, 1, ..., each on a node of its own."""
    return [Sign(rank, f"node{rank}", 100 + rank, "", n, "backward", 7, written) for rank, n in enumerate(beats)]


def test_ranks_that_get_on_are_left_alone() -> None:
    watch = Watch(2, STALL, 0.0)
    assert all(watch.look(signs(t, t + 1, written=t), float(t)) is None for t in range(1000))


def test_the_rank_with_the_fewest_beats_is_named_with_its_host() -> None:
    watch = Watch(3, STALL, 0.0)
    for t in range(61):
        assert watch.look(signs(9, 8, 9, written=t), float(t)) is None
    verdict = watch.look(signs(9, 8, 9, written=61), 61.0)
    assert verdict is not None
    assert verdict.startswith("rank 1 on node1 (process 101) has made no progress for 61 s at 'backward' of step 7")
    assert "2 of 3 ranks wait for it" in verdict


def test_ranks_that_wait_for_one_that_gets_on_are_no_hang() -> None:
    watch = Watch(2, STALL, 0.0)  # rank 0 writes its share of a checkpoint to a slow disk, and the other has none
    assert all(watch.look(signs(10 + t, 5, written=t), float(t)) is None for t in range(1000))
    verdict = next(v for t in range(1000, 2000) if (v := watch.look(signs(1010, 1011, written=t), float(t))))
    assert verdict.startswith("rank 0 on node0")


def test_a_process_that_writes_no_more_is_named_before_one_that_waits() -> None:
    watch = Watch(2, STALL, 0.0)
    for t in range(80):
        living, stopped = signs(5, 5, written=t)
        verdict = watch.look([living, replace(stopped, written=0.0)], float(t))
    assert verdict is not None
    assert verdict.startswith("rank 1 on node1")
    assert "stopped or gone" in verdict


def test_a_rank_that_never_came_is_named() -> None:
    watch = Watch(2, STALL, 0.0)
    assert watch.look(signs(1), 59.0) is None
    assert watch.look(signs(1), 61.0) == "rank 1 gave no sign of life in 60 s"
