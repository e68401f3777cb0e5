"""When a rank saves and stops: by steps, by the clock, and on a signal."""

import itertools
import signal

import pytest

from karat_scale.engine.distributed import ALONE
from karat_scale.training.agreement import Agreement, SavePoints, StopSignals
from tests.clock import Clock


def test_a_rank_alone_hears_a_signal_after_each_step() -> None:
    clock, signals = Clock(), StopSignals()
    points = SavePoints(ALONE, signals, None, None, clock)
    for step in range(1, 100):
        clock.go(0.01)
        assert not points.decide(step).stop
    signals.received = signal.SIGTERM
    assert points.decide(100).stop


def test_saves_by_steps_and_by_minutes() -> None:
    clock = Clock()
    points = SavePoints(ALONE, StopSignals(), 25, 2.0, clock)
    saved = []
    for step in range(1, 101):
        clock.go(4.0)
        if points.decide(step).save:
            points.note_save()
            saved.append(step)
    # Each 30 steps after the last save, and at multiples of 25.
    assert saved == [25, 50, 75, 100]
    points = SavePoints(ALONE, StopSignals(), None, 2.0, clock)
    saved = []
    for step in range(1, 101):
        clock.go(4.0)
        if points.decide(step).save:
            points.note_save()
            saved.append(step)
    assert saved == [30, 60, 90]


def test_a_save_in_progress_continues_when_no_rank_is_busy() -> None:
    points = SavePoints(ALONE, StopSignals(), None, None, Clock())
    assert not points.decide(1, is_busy=True).is_idle
    assert points.decide(2, is_busy=False).is_idle


@pytest.mark.parametrize(("pace", "fewest", "most"), [(0.001, 10, 22), (0.01, 10, 19), (0.4, 10, 15), (3.0, 3, 4)])
def test_agreements_come_about_once_a_second(pace, fewest, most) -> None:
    clock = Clock()
    agreement, asked, step = Agreement(ALONE, clock), 0, 0
    while clock.now < 110:
        step += 1
        clock.go(pace)
        asked += agreement.is_due(step)
        agreement.maxima(step, 0)
    assert fewest <= asked <= most  # in 10 seconds, the first of them after 1, 2, 4, ... steps


def test_a_pause_makes_the_next_stretch_short_and_no_later_one() -> None:
    clock = Clock()
    agreement, asked = Agreement(ALONE, clock), []
    for step in range(1, 2000):
        clock.go(60.0 if step == 1000 else 0.01)  # such as an evaluation
        if agreement.is_due(step):
            asked.append(step)
        agreement.maxima(step, 0)
    distances = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert max(distances) in (99, 100)
    assert distances.count(1) <= 3
    assert distances[-1] in (99, 100)
